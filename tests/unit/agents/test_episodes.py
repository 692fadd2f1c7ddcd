"""Lives in episodes: scores, examinations with a frozen memory, and going on after an interruption."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from agents.base import AgentConfig
from agents.environments.associative_recall import AssociativeRecall
from agents.environments.intent_tagging import intent_tagging
from agents.episodes import SCORES, EpisodeRunner, EpisodesConfig, Score, mean_by_group, read_scores
from agents.errors import EpisodesMismatch, LogDamaged
from agents.experience_log import FileLog
from agents.history_agent import HistoryAgent
from agents.hybrid_agent import HybridKVHistoryAgent
from lm.engine_client import EngineClient
from lm.types import CartridgeRef
from memory.kv_cache_memory import KVCacheMemory
from tests.unit.agents.conftest import Bookkeeper

PAIRS = AssociativeRecall(pairs=8, repeats=2)


def _reader(messages: Sequence[Mapping[str, Any]], _: Sequence[CartridgeRef]) -> str:
    """Answers from what stands in its prompt, as a perfect model would: the pair's value, once it was corrected."""
    words = messages[-1]["content"].replace("?", " ").replace(":", " ").replace(",", " ").replace(".", " ").split()
    for place, message in enumerate(messages[:-1]):
        asked = message["content"].replace("?", " ").replace(".", " ").split()
        key = next((task.group for task in PAIRS.tasks("eval") if task.group in words), "")
        if message["role"] == "user" and key in asked:
            feedback = messages[place + 2]["content"]
            return feedback.rsplit(" ", 1)[1].rstrip(".") if "Incorrect" in feedback else messages[place + 1]["content"]
    return "nothing"


def _runner(folder: Path, log: FileLog, stop: threading.Event | None = None, **options: Any) -> EpisodeRunner:
    config = EpisodesConfig(**{"episodes": 16, "eval_every": 8, "eval_tasks": 16} | options)
    agent = HistoryAgent(Bookkeeper(_reader), log, AgentConfig(max_prompt_tokens=100_000))
    return EpisodeRunner(agent, PAIRS, folder, config, stop=stop)


def test_an_agent_with_a_memory_learns_what_it_is_told(tmp_path: Path) -> None:
    log = FileLog("pairs")
    runner = _runner(tmp_path, log, eval_at_start=True, snapshots=True)
    summary = runner.run()
    assert (summary.episodes, summary.mean_train, summary.finished) == (16, 0.5, True), "wrong once, then right"
    assert summary.examinations == {0: 0.0, 8: 1.0, 16: 1.0}
    assert len(log.records()) == 16, "examinations are not remembered"
    assert [record.episode_id for record in log.records()][:2] == ["life-000000", "life-000001"]
    scores = read_scores(tmp_path)
    assert scores == runner.scores()
    assert len(scores) == 16 + 3 * 16
    assert all(score.prompt_tokens > 0 and score.seconds > 0 for score in scores)
    assert mean_by_group([score for score in scores if score.mode == "train"]) == dict.fromkeys(
        sorted({task.group for task in PAIRS.tasks("train")}), 0.5
    )
    assert sorted(path.name for path in tmp_path.glob("memory_*")) == [
        f"memory_ep_{number:06d}.jsonl" for number in (0, 8, 16)
    ]


def _plain(scores: Sequence[Score]) -> list[tuple[Any, ...]]:
    """What must not depend on when it was measured."""
    names = ("mode", "episode", "index", "key", "action", "score", "prompt_tokens")
    return [tuple(getattr(item, name) for name in names) for item in scores]


def test_workers_change_nothing(tmp_path: Path) -> None:
    for workers in (1, 4):
        _runner(tmp_path / str(workers), FileLog("pairs"), workers=workers).run()
    assert _plain(read_scores(tmp_path / "1")) == _plain(read_scores(tmp_path / "4"))


@pytest.mark.parametrize("cut", [0, 1, 5, 8, 12, 24, 30])
def test_a_life_goes_on_after_its_last_line(tmp_path: Path, cut: int) -> None:
    """Killed at any line, with the experience of the lost line already written: the life is the same in the end."""
    _runner(tmp_path / "whole", FileLog("pairs", tmp_path / "whole.jsonl")).run()
    lines = (tmp_path / "whole" / SCORES).read_bytes().splitlines(keepends=True)
    _runner(tmp_path / "cut", FileLog("pairs", tmp_path / "cut.jsonl")).run()
    (tmp_path / "cut" / SCORES).write_bytes(b"".join(lines[:cut]) + lines[cut][:20])
    lived = sum(1 for line in lines[:cut] if json.loads(line)["mode"] == "train")
    experiences = (tmp_path / "cut.jsonl").read_bytes().splitlines(keepends=True)
    written = lived + (json.loads(lines[cut])["mode"] == "train")
    (tmp_path / "cut.jsonl").write_bytes(b"".join(experiences[:written]))
    summary = _runner(tmp_path / "cut", FileLog("pairs", tmp_path / "cut.jsonl")).run()
    assert summary.finished
    assert _plain(read_scores(tmp_path / "cut")) == _plain(read_scores(tmp_path / "whole"))
    assert len(FileLog("pairs", tmp_path / "cut.jsonl").records()) == 16


def test_stop_ends_it_between_two_tasks_and_it_goes_on(tmp_path: Path) -> None:
    stop, asked = threading.Event(), []

    def answer(messages: Any, cartridges: Any) -> str:
        asked.append(1)
        if len(asked) == 8 + 4:  # in the middle of the examination
            stop.set()
        return _reader(messages, cartridges)

    log = FileLog("pairs", tmp_path / "log.jsonl")
    agent = HistoryAgent(Bookkeeper(answer), log, AgentConfig(max_prompt_tokens=100_000))
    runner = EpisodeRunner(agent, PAIRS, tmp_path, EpisodesConfig(episodes=16, eval_every=8), stop=stop)
    summary = runner.run()
    assert (summary.episodes, summary.finished) == (8, False)
    assert len(runner.scores()) == 8 + 4
    assert _runner(tmp_path, FileLog("pairs", tmp_path / "log.jsonl")).run().examinations == {8: 1.0, 16: 1.0}


def test_a_folder_keeps_one_life(tmp_path: Path) -> None:
    _runner(tmp_path, FileLog("pairs"), episodes=1).run()
    agent = HistoryAgent(Bookkeeper(), FileLog("bank"))
    for other in (intent_tagging(), AssociativeRecall(pairs=8, repeats=2, seed=5)):
        with pytest.raises(EpisodesMismatch, match="another folder"):
            EpisodeRunner(agent, other, tmp_path).run()
    with pytest.raises(EpisodesMismatch):
        EpisodeRunner(agent, PAIRS, tmp_path, life="second").run()
    assert _runner(tmp_path, FileLog("pairs"), episodes=2).run().episodes == 2, "a life may become longer"


def test_a_damaged_score_is_named(tmp_path: Path) -> None:
    _runner(tmp_path, FileLog("pairs"), episodes=1, eval_tasks=1).run()
    with open(tmp_path / SCORES, "a") as handle:
        handle.write('{"mode": "train"}\n')
    with pytest.raises(LogDamaged, match="line 3"):
        read_scores(tmp_path)


def test_a_hybrid_life_on_a_real_engine(tmp_path: Path, client: EngineClient) -> None:
    """With a real tiny model: half-way the domain gets a cartridge, and the prompts become short at that moment."""
    memory, log = KVCacheMemory(), FileLog("bank")

    def trigger(_: str) -> None:
        if len(log.records()) == 6:
            memory.swap(CartridgeRef("bank_v0001"))

    agent = HybridKVHistoryAgent(client, memory, log, AgentConfig(max_tokens=4, recent=1), trigger=trigger)
    runner = EpisodeRunner(agent, intent_tagging(), tmp_path, EpisodesConfig(episodes=10, eval_tasks=4, workers=2))
    runner.run()
    train = [score for score in runner.scores() if score.mode == "train"]
    assert [score.cartridges for score in train] == [[]] * 6 + [["bank_v0001"]] * 4
    assert all(score.cartridge_slots > 0 for score in train[6:])
    assert max(score.prompt_tokens for score in train[6:]) < train[5].prompt_tokens
    assert train[0].prompt_tokens < train[5].prompt_tokens
    assert all(score.ttft_seconds for score in train)
    examined = [score for score in runner.scores() if score.mode == "eval"]
    assert all(score.cartridges == ["bank_v0001"] for score in examined)
