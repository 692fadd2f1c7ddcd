"""The part "stream" of the distillation benchmark: its phases, its tables, its clients, and a life that is killed."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from agents.base import AgentConfig
from agents.environments.drifting_conventions import DriftingConventions
from agents.episodes import EpisodesConfig, Score
from agents.kv_memory_agent import KVMemoryAgent
from benchmarks.distillation_parts import stream, stream_report
from benchmarks.distillation_parts.stream_hybrid import HybridLife, settings
from benchmarks.distillation_parts.stream_lives import ARMS, live, local_arms, own_history
from benchmarks.distillation_parts.stream_swap import CLIENTS, Swapped, swap_under_clients
from benchmarks.kernel_parts.common import MissingData, Options
from cli.distill_cycle import serving
from lm.engine_client import EngineClient
from lm.types import CartridgeRef
from memory.distillation.config import make_distill_config
from tests.support.tiny_model import save_tiny_model
from workspace.engine import Engine
from workspace.models import load_model
from workspace.prefix import KVPrefix, prefix_of_tokens

WORLD = DriftingConventions(per_phase=4, eval_per_intent=1, seed=1)
EPISODES = EpisodesConfig(episodes=12, eval_every=4, eval_tasks=6)
VERSIONS = ("bank_v0001", "bank_v0002")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Engine]:
    loaded = load_model(str(model), cache_dir=model, dtype="float32", device="cpu")
    engine = Engine(loaded, max_active=4, max_waiting=16, threads=1, batching="exact", prefix_cache_bytes=1 << 26)
    engine.start()
    yield engine
    assert engine.stop()


def score(mode: str, episode: int, reward: float, *, index: int = 0, group: str = "", tokens: int = 40) -> Score:
    made: dict[str, Any] = {
        "mode": mode, "episode": episode, "index": index, "environment": "e", "agent": "a", "group": group, "key": "k",
        "answer": "X", "action": "X", "score": reward, "seconds": 0.1, "ttft_seconds": 0.1, "prompt_tokens": tokens,
        "completion_tokens": 3, "cartridge_slots": 64, "cartridges": [], "experiences": 0, "at": 0.0,
    }  # fmt: skip
    return Score(**made)


def life(rewards: str, after_first: str, after_second: str) -> list[Score]:
    """A life of two episodes a phase; examinations of A alone."""
    found = [score("train", number, float(text)) for number, text in enumerate(rewards)]
    for episode, texts in ((2, after_first), (4, after_second)):
        found += [score("eval", episode, float(text), index=place, group="A") for place, text in enumerate(texts)]
    return found


def cells(text: str, row: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {row} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_rewards_are_told_by_phase_and_by_block() -> None:
    lives = {"hybrid": life("110010", "1", "1"), "other": life("000000", "1", "1")[::-1]}
    assert cells(stream_report.by_phase(lives, 2), "hybrid")[1:] == [
        "1.00 [1.00, 1.00]",
        "0.00 [0.00, 0.00]",
        "0.50 [0.00, 1.00]",
        "3 of 6",
        "40",
        "104",
    ]
    told = stream_report.by_block(lives, 4)
    assert cells(told, "arm")[1:] == ["1-4", "5-6"]
    assert cells(told, "hybrid")[1:] == ["2 (2)", "1 (3)"]
    told = stream_report.against(lives, "hybrid", 2)
    assert cells(told, "other")[1:3] == ["+1.00 [+1.00, +1.00]", "+0.00 [+0.00, +0.00]"]
    assert cells(told, "other")[4].startswith("+0.50")


def test_forgetting_compares_the_same_questions_before_and_after() -> None:
    told = stream_report.forgetting({"hybrid": life("000000", "1111", "1001")}, 2)
    row = cells(told, "hybrid")
    assert row[1] == "1.00 [1.00, 1.00]"
    assert row[2].startswith("0.50 [")
    assert row[3:6] == ["", "", ""], "what was not asked is empty"
    assert row[6].startswith("-0.50 [")


def test_every_arm_lives_the_three_phases(engine: Engine, tmp_path: Path) -> None:
    with own_history(tmp_path) as history:
        arms = local_arms([engine] * ARMS, history, WORLD.system_prompt)
        lives = {name: live(agent, WORLD, tmp_path / str(n), EPISODES) for n, (name, agent) in enumerate(arms.items())}
        assert history.domains().keys() == {"full", "window", "nearest-8", "nearest-4"}
    for name, found in lives.items():
        trained = stream_report.lived(found)
        assert [item.group for item in trained] == ["A"] * 4 + ["B"] * 4 + ["A+B changed"] * 4, name
        examined = [(item.episode, item.group) for item in found if item.mode == "eval"]
        assert examined == [(4, "A")] * 3 + [(episode, group) for episode in (8, 12) for group in "AAABBB"], name
    shown = {name: [item.experiences for item in stream_report.lived(found)] for name, found in lives.items()}
    assert shown["memoryless"] == [0] * 12
    assert shown["full history"] == list(range(12))
    assert shown["newest 4"] == [*range(4), *[4] * 8]
    assert max(shown["8 nearest (BM25)"]) <= 8
    assert max(shown["4 nearest (BM25)"]) <= 4
    assert engine.stats().cached_tokens > 0, "the growing prompt is not read anew every time"
    page = stream.told({stream.HYBRID: lives["memoryless"], **lives}, [], None, None, stream.Size(per_phase=4), 1)
    assert "hybrid minus" in page
    assert "No kill was tried." in page


class Domain:
    """A domain's serving cartridge, and the route that promotes another."""

    def __init__(self, wrong: bool = False):
        self._name = VERSIONS[1]
        self.promoted: list[str] = []
        self._wrong = wrong

    def serving(self, domain: str) -> CartridgeRef:
        return CartridgeRef(self._name)

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        self._name = path.split("/")[3]
        self.promoted.append(self._name)
        return {}


def swapped(engine: Engine, resolve: Any, swaps: int = 4) -> tuple[Swapped, Domain]:
    lm = EngineClient(engine, resolve=resolve)
    config = AgentConfig(system_prompt=WORLD.system_prompt, max_tokens=6)
    domain: Any = Domain()
    tasks = WORLD.evaluation(12)
    found = swap_under_clients(
        domain, domain, "bank", VERSIONS, tasks, lambda memory: KVMemoryAgent(lm, memory, config), swaps=swaps
    )
    return found, domain


def test_clients_see_one_version_or_the_other(engine: Engine) -> None:
    loaded = engine.loaded
    texts = ("Paris is the capital of France.", "The dog does not mind at all. 日本")
    shelf = {
        name: prefix_of_tokens(loaded, loaded.tokenizer.encode(text))
        for name, text in zip(VERSIONS, texts, strict=True)
    }
    found, domain = swapped(engine, shelf.__getitem__)
    assert domain.promoted == [*VERSIONS, *VERSIONS]
    assert found.answers == sum(found.of_each.values()) >= 5 * CLIENTS
    assert min(found.of_each.values()) > 0
    assert found.mixed == 0
    assert found.telling > 0, "versions that answer alike would prove nothing"
    # A server that mixed them up would be found out.
    asked, lock = 0, threading.Lock()

    def mixing(name: str) -> KVPrefix:
        nonlocal asked
        with lock:
            asked += 1
        other = VERSIONS[1 - VERSIONS.index(name)]
        return shelf[other if asked > 2 * len(WORLD.evaluation(12)) and asked % 3 == 0 else name]

    assert swapped(engine, mixing, swaps=2)[0].mixed > 0


def test_the_servers_configuration_is_one() -> None:
    config = make_distill_config(stream.preset("Tag it.", stream.Size(), 1))
    assert config.schedule.when.every_episodes == stream.Size().every
    assert config.data.targets == "feedback"
    make_distill_config(stream.preset("Tag it.", stream.QUICK, 1))


def test_without_data_it_says_so() -> None:
    with pytest.raises(MissingData, match="not on this machine"):
        stream.run(Options(data=None))


@pytest.mark.slow  # a server, and the lease of one that was killed
def test_a_life_over_http_survives_a_kill(model: Path, tmp_path: Path) -> None:
    size = stream.Size(per_phase=4, every=4, steps=120, kill_in=2)  # long enough to be seen in the middle
    wanted = stream.preset(WORLD.system_prompt, size, 1)
    wanted["training"] |= {"slots": 16, "max_tokens": 128}
    environ = settings(tmp_path, wanted) | {"OLYMPUS_MODEL__NAME": str(model), "OLYMPUS_MODEL__DTYPE": "float32"}
    (tmp_path / "server").mkdir()
    said: list[str] = []
    with serving(tmp_path / "server", environ, said.append) as server:
        hybrid = HybridLife(server, WORLD, tmp_path / "life", size.kill_in, 12, said.append)
        try:
            found = hybrid.run(EPISODES)
        finally:
            hybrid.close()
    assert len(stream_report.lived(found)) == 12
    assert [run["episodes"] for run in hybrid.runs] == [4, 8, 12], said
    killed = hybrid.killed
    assert killed is not None
    assert killed.run == hybrid.runs[1]["id"]
    assert killed.at_step >= 12
    assert killed.steps_once
    assert killed.state in ("promoted", "rejected")
    assert killed.experiences == (8, 8)
    page = stream.told({stream.HYBRID: found}, hybrid.runs, killed, None, size, 1)
    assert f"Kill: SIGKILL to the server after step {killed.at_step} of {killed.run}" in page
    assert len([line for line in page.splitlines() if "| episodes |" in line]) == 3
