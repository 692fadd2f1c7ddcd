"""What each kind of agent sends, writes, and keeps to itself."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from agents.base import AgentConfig, Feedback, MemoryAgent
from agents.errors import AgentConfigError, NoCartridge, OutOfTurn, UnknownAgent
from agents.experience_log import FileLog, HistoryLog
from agents.history_agent import HistoryAgent
from agents.hybrid_agent import HybridKVHistoryAgent
from agents.knn_agent import KNNAgent, WordNearest, episodic_nearest
from agents.kv_memory_agent import SYSTEM_PROMPT, KVMemoryAgent
from agents.registry import AGENTS, make_agent
from lm.engine_client import EngineClient
from lm.types import CartridgeRef
from memory.distillation.prompt_builder import student_messages, teacher_messages
from memory.episodic import EpisodicMemory, EpisodicOptions
from memory.history import History, NewExperience
from memory.kv_cache_memory import KVCacheMemory
from storage import migrate
from storage.database import Database
from tests.unit.agents.conftest import Bookkeeper

ONE, TWO = CartridgeRef("bank_v0001"), CartridgeRef("bank_v0002")
RIGHT = Feedback("Correct!", 1.0)
PLAIN = AgentConfig(system_prompt="Tag it.")


def _log(count: int = 3) -> FileLog:
    log = FileLog("bank")
    for number in range(count):
        log.append(NewExperience(f"message {number}", f"TAG-{number}", "bank", "test", "Correct!", 1.0))
    return log


def _agents(lm: Bookkeeper) -> list[MemoryAgent]:
    return [make_agent(name, lm, log=_log(), memory=KVCacheMemory([ONE]), config=PLAIN) for name in AGENTS]


# Prompts.


@pytest.mark.parametrize("style", ["turns", "list"])
def test_the_history_agent_asks_as_a_teacher_is_asked(style: Any) -> None:
    lm, log = Bookkeeper(" TAG-1\n"), _log()
    agent = HistoryAgent(lm, log, AgentConfig(system_prompt="Tag it.", style=style, stop=("\n",), max_tokens=8))
    act = agent.act("message 9")
    assert act.text == "TAG-1"
    assert lm.asked == [teacher_messages(style, "Tag it.", "message 9", log.records())]
    assert (act.experiences, act.cartridges) == (3, ())
    assert lm.options == [{"max_tokens": 8, "stop": ("\n",)}]


class Counting(Bookkeeper):
    """Knows its tokenizer: ten tokens to a message, and room for eleven messages and the answer."""

    def count_tokens(self, messages: Any) -> int:
        return 10 * len(messages)

    def context_length(self) -> int:
        return 110 + 32


@pytest.mark.parametrize(("most", "shown"), [(100, 3), (40, 1), (9999, 3)])
def test_the_oldest_experiences_go_when_the_prompt_is_full(most: int, shown: int) -> None:
    lm, log = Counting(), _log(40)
    agent = HistoryAgent(lm, log, AgentConfig(max_prompt_tokens=most, max_tokens=32))
    assert agent.act("message 99").experiences == shown
    assert lm.asked[0] == teacher_messages("turns", "", "message 99", log.records()[-shown:])


def test_a_prompt_of_a_real_model_never_exceeds_its_context(client: EngineClient) -> None:
    agent = HistoryAgent(client, _log(200), AgentConfig(max_tokens=8))
    act = agent.act("message 999")
    assert 10 < act.experiences < 200
    room = client.context_length() - 8
    assert room - 80 < act.reply.prompt_tokens <= room
    assert client.count_tokens(act.messages) == act.reply.prompt_tokens


def test_the_memoryless_agent_shows_nothing() -> None:
    lm = Bookkeeper()
    make_agent("memoryless", lm, log=_log(), config=PLAIN).act("message 9")
    assert lm.asked == [[{"role": "system", "content": "Tag it."}, {"role": "user", "content": "message 9"}]]


def test_the_kv_agent_sends_the_students_prompt_and_its_cartridges() -> None:
    lm, memory = Bookkeeper(), KVCacheMemory([ONE, TWO])
    act = KVMemoryAgent(lm, memory, PLAIN).act("message 9")
    assert lm.asked == [student_messages("turns", "Tag it.", "message 9")]
    assert lm.cartridges == [(ONE, TWO)] == [act.cartridges]
    KVMemoryAgent(lm, memory).act("message 9")
    assert lm.asked[-1][0] == {"role": "system", "content": SYSTEM_PROMPT}


def test_the_kv_agent_without_a_cartridge() -> None:
    lm = Bookkeeper()
    with pytest.raises(NoCartridge, match="promote"):
        KVMemoryAgent(lm, KVCacheMemory()).act("message 9")
    assert not lm.asked
    assert KVMemoryAgent(lm, KVCacheMemory(), by_server=True).act("message 9").cartridges == ()


def test_the_hybrid_agent_has_the_long_prompt_until_there_is_a_cartridge() -> None:
    lm, log, memory = Bookkeeper("TAG-7"), _log(6), KVCacheMemory()
    agent = HybridKVHistoryAgent(lm, memory, log, AgentConfig(system_prompt="Tag it.", recent=2))
    agent.act("message 7")
    assert lm.asked[0] == teacher_messages("turns", "Tag it.", "message 7", log.records())
    agent.observe(RIGHT)
    agent.swap(ONE)
    act = agent.act("message 8")
    assert lm.asked[1] == student_messages("turns", "Tag it.", "message 8", log.records()[-2:])
    assert lm.asked[1][-4:-1] == [
        {"role": "user", "content": "message 7"},
        {"role": "assistant", "content": "TAG-7"},
        {"role": "user", "content": "Correct!"},
    ]
    assert (act.experiences, act.cartridges) == (2, (ONE,))


def test_the_hybrid_agent_can_look_up_what_stands_beside_the_cartridge() -> None:
    lm, log, memory = Bookkeeper("TAG-7"), FileLog("bank"), KVCacheMemory()
    for text in ("my card is lost", "the exchange rate of euros", "my card was stolen and lost", "top up failed"):
        log.append(NewExperience(text, text.upper(), "bank", "test", feedback="Incorrect! The correct answer is X."))
    config = AgentConfig(system_prompt="Tag it.", recent=2, recent_choice="nearest", apply_corrections=True)
    agent = HybridKVHistoryAgent(lm, memory, log, config)
    wanted = [
        {"role": "system", "content": "Tag it."},
        {"role": "user", "content": "my card is lost"},
        {"role": "assistant", "content": "X"},
        {"role": "user", "content": "my card was stolen and lost"},
        {"role": "assistant", "content": "X"},
        {"role": "user", "content": "stolen card and lost"},
    ]
    act = agent.act("stolen card and lost")
    assert (lm.asked[0], act.cartridges, act.experiences) == (wanted, (), 2)
    agent.observe(RIGHT)
    agent.swap(ONE)
    act = agent.act("a rate of euros")
    assert [turn["content"] for turn in lm.asked[1][1:]] == ["the exchange rate of euros", "X", "a rate of euros"]
    assert (act.cartridges, act.experiences) == ((ONE,), 1)
    assert agent.act("nothing alike").experiences == 0
    frozen = agent.clone_for_episode(training=False)
    log.append(NewExperience("an umbrella", "wet", "bank", "test"))
    assert frozen.act("my umbrella").messages[-2]["content"] == "X", "what came later is not known to it"
    assert agent.act("my umbrella").messages[-2]["content"] == "wet"


def test_feedback_that_comes_later_is_seen_by_who_looks_up(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'lived.db'}")
    migrate.upgrade(database)
    history = History(database)
    log, nearest = HistoryLog(history, "bank"), WordNearest(HistoryLog(history, "bank"))
    record = log.append(NewExperience("my card is lost", "WRONG", "bank", "test"))
    assert nearest("a lost card", 1)[0].feedback is None
    history.give_feedback(record.id, "Incorrect! The correct answer is RIGHT.", 0.0)
    assert nearest("a lost card", 1)[0].feedback == "Incorrect! The correct answer is RIGHT."
    database.close()


def test_the_knn_agent_shows_the_nearest_last() -> None:
    lm, log = Bookkeeper(), FileLog("bank")
    for text in ("my card is lost", "the exchange rate of euros", "my card was stolen and lost", "top up failed"):
        log.append(NewExperience(text, text.upper(), "bank", "test"))
    agent = KNNAgent(lm, log, AgentConfig(neighbours=2))
    assert agent.act("stolen card and lost").experiences == 2
    assert [turn["content"] for turn in lm.asked[0] if turn["role"] == "user"] == [
        "my card is lost",
        "my card was stolen and lost",
        "stolen card and lost",
    ]
    agent.observe(RIGHT)
    assert agent.act("stolen card and lost").experiences == 2, "the new one is found at once"
    assert lm.asked[1][-2]["content"] == "Correct!"
    assert KNNAgent(lm, FileLog("bank")).act("anything").experiences == 0


def test_the_knn_agent_on_the_episodic_memory(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/test.db")
    migrate.upgrade(database)
    history = History(database)
    episodic = EpisodicMemory(database, history, EpisodicOptions(embedding="none"), default_domain="bank")
    episodic.start()
    try:
        log, lm = HistoryLog(history, "bank"), Bookkeeper("STOLEN")
        for text in ("my card was stolen", "the exchange rate of euros"):
            log.append(NewExperience(text, text.upper(), "bank", "test"))
        history.append([NewExperience("my card was stolen, too", "ELSEWHERE", "other", "test")])
        assert episodic.wait_until_settled()
        agent = KNNAgent(lm, log, AgentConfig(neighbours=2), make_nearest=episodic_nearest(episodic, history))
        agent.act("stolen card")
        assert lm.asked[0] == teacher_messages("turns", "", "stolen card", log.records()[:1])
        frozen = agent.clone_for_episode(training=False)
        agent.observe(RIGHT)
        assert episodic.wait_until_settled()
        assert frozen.act("stolen card").experiences == 1
        assert agent.act("stolen card").experiences == 2
    finally:
        episodic.stop()
        database.close()


# Writing.


def test_an_experience_is_written_when_its_feedback_comes() -> None:
    log = _log(0)
    agent = HistoryAgent(Bookkeeper("TAG-1"), log, episode_id="life-000001")
    agent.act("message 1")
    assert not log.records()
    agent.observe(RIGHT)
    record = log.records()[0]
    assert (record.observation, record.action, record.feedback, record.score) == ("message 1", "TAG-1", "Correct!", 1.0)
    assert (record.episode_id, record.meta) == ("life-000001", {"agent": "history", "cartridges": []})
    with pytest.raises(OutOfTurn):
        agent.observe(RIGHT)


@pytest.mark.parametrize("kind", ["history", "hybrid"])
def test_corrections_can_be_shown_in_place_of_mistakes(kind: str) -> None:
    log, lm = FileLog("bank"), Bookkeeper("OPS-RED")
    config = AgentConfig(system_prompt="", apply_corrections=True)
    agent = make_agent(kind, lm, log=log, memory=KVCacheMemory([CartridgeRef("bank_v0001")]), config=config)
    agent.act("Where is my card?")
    agent.observe(Feedback("Incorrect! The correct answer is FIN-SKY.", 0.0))
    agent.act("And my money?")
    assert [item["content"] for item in lm.asked[-1]] == ["Where is my card?", "FIN-SKY", "And my money?"]
    assert log.records()[0].action == "OPS-RED", "the history keeps what was said"


def test_an_answer_that_no_database_keeps_is_written_with_a_mark() -> None:
    log = FileLog("bank")
    agent = HistoryAgent(Bookkeeper("OPS\x00RED"), log)
    agent.act("Where is my card?")
    agent.observe(Feedback("Correct!", 1.0))
    assert [record.action for record in log.records()] == ["OPS\ufffdRED"]


def test_an_action_without_feedback_is_written_too() -> None:
    log = _log(0)
    agent = HistoryAgent(Bookkeeper(), log)
    agent.act("message 1")
    agent.act("message 2")
    assert [(record.observation, record.feedback) for record in log.records()] == [("message 1", None)]
    agent.end_episode()
    agent.end_episode()
    assert len(log.records()) == 2


def test_an_empty_answer_to_something_is_an_experience() -> None:
    log = _log(0)
    agent = HistoryAgent(Bookkeeper("  "), log)
    agent.act("message 1")
    agent.observe(Feedback("Incorrect! The correct answer is A.", 0.0))
    assert (log.records()[0].action, log.records()[0].score) == ("", 0.0)


def test_an_episode_that_is_lived_again_does_not_read_its_own_answer() -> None:
    lm, log = Bookkeeper("TAG-1"), _log(1)
    first = HistoryAgent(lm, log, episode_id="life-000001")
    first.act("message 1")
    first.observe(RIGHT)
    again = HistoryAgent(lm, log, episode_id="life-000001")
    again.act("message 1")
    assert lm.asked[1] == lm.asked[0]
    again.observe(RIGHT)
    assert len(log.records()) == 2, "and it is not remembered twice"
    again.act("message 2")
    assert {"role": "user", "content": "message 1"} in lm.asked[2], "within an episode everything is seen"


def test_the_kv_agent_writes_nothing_anywhere() -> None:
    memory = KVCacheMemory([ONE])
    agent = KVMemoryAgent(Bookkeeper(), memory)
    with pytest.raises(OutOfTurn):
        agent.observe(RIGHT)
    agent.act("message 1")
    agent.observe(RIGHT)
    assert (memory.references(), memory.swaps) == ((ONE,), 0)


# Clones.


def _live(agent: MemoryAgent, observation: str) -> None:
    agent.act(observation)
    agent.observe(RIGHT)
    agent.end_episode()


def test_an_evaluation_clone_changes_nothing_and_sees_nothing_new() -> None:
    for agent in _agents(lm := Bookkeeper(lambda messages, _: messages[-1]["content"].upper())):
        lm.asked.clear()
        frozen = agent.clone_for_episode(training=False)
        _live(agent, "message of the living agent")
        frozen.act("message 0")
        before = lm.asked[-1]
        frozen.observe(RIGHT)
        frozen.act("message 0")
        assert lm.asked[-1] == before, agent.name
        assert not any("living" in turn["content"] for turn in before), agent.name
        assert frozen.name == agent.name


def test_a_training_clone_shares_the_memory() -> None:
    lm, log, memory = Bookkeeper("TAG-1"), _log(0), KVCacheMemory()
    agent = HybridKVHistoryAgent(lm, memory, log, PLAIN)
    clone = agent.clone_for_episode(training=True, episode_id="life-000007")
    _live(clone, "message 1")
    assert log.records()[0].episode_id == "life-000007"
    agent.swap(ONE)
    clone.act("message 2")
    assert lm.cartridges[-1] == (ONE,)


def test_clones_have_nothing_pending() -> None:
    for agent in _agents(Bookkeeper()):
        agent.act("message 1")
        for training in (True, False):
            with pytest.raises(OutOfTurn):
                agent.clone_for_episode(training=training).observe(RIGHT)


# Distillation.


def test_the_hybrid_agent_tells_its_trigger_and_swaps_when_it_is_done() -> None:
    """A trigger that distills at the third experience: the fourth act is made with the new cartridge."""
    lm, log, memory, told = Bookkeeper("TAG"), _log(0), KVCacheMemory(), []

    def trigger(domain: str) -> None:
        told.append(domain)
        if len(told) == 3:
            memory.swap(ONE)

    agent = HybridKVHistoryAgent(lm, memory, log, PLAIN, trigger=trigger)
    for number in range(5):
        _live(agent, f"message {number}")
    _live(agent.clone_for_episode(training=False), "message 9")
    assert told == ["bank"] * 5, "an evaluation triggers nothing"
    assert lm.cartridges == [(), (), (), (ONE,), (ONE,), (ONE,)]
    assert log.records()[3].meta == {"agent": "hybrid", "cartridges": ["bank_v0001"], "recent": 3}


def test_a_trigger_that_fails_does_not_end_the_agents_life(caplog: pytest.LogCaptureFixture) -> None:
    def trigger(_: str) -> None:
        raise RuntimeError("no room on the disk")

    log = _log(0)
    agent = HybridKVHistoryAgent(Bookkeeper(), KVCacheMemory(), log, trigger=trigger)
    with caplog.at_level(logging.ERROR):
        _live(agent, "message 1")
    assert len(log.records()) == 1
    assert "no room on the disk" in caplog.text


def test_a_real_engine_answers_with_the_cartridge_of_the_moment(client: EngineClient) -> None:
    """A promotion is followed by the same agent object: the domain's registry says another id, nothing else happens."""

    class Registry:
        current: CartridgeRef | None = None

        def serving(self, domain: str) -> CartridgeRef | None:
            return self.current if domain == "bank" else None

    registry = Registry()
    agent = KVMemoryAgent(client, KVCacheMemory(domain="bank", source=registry), AgentConfig(max_tokens=12))
    with pytest.raises(NoCartridge, match="bank"):
        agent.act("Which tag?")
    answers = []
    for reference in (ONE, TWO, ONE):
        registry.current = reference
        act = agent.act("Which tag?")
        assert act.cartridges == (reference,)
        assert act.reply.cartridge_slots > 0
        answers.append(act.text)
    assert answers[0] == answers[2] != answers[1]
    frozen = agent.clone_for_episode(training=False)
    registry.current = TWO
    assert frozen.act("Which tag?").text == answers[0]
    assert agent.act("Which tag?").text == answers[1]


# Snapshots and names.


def test_snapshots_of_every_kind(tmp_path: Path) -> None:
    wanted = {"kv": ["kv_memory_a.json"], "hybrid": ["memory_a.jsonl", "kv_memory_a.json"]}
    for agent in _agents(Bookkeeper()):
        paths = agent.save_snapshot(tmp_path / agent.name, "a")
        assert [path.name for path in paths] == wanted.get(agent.name, ["memory_a.jsonl"])
    again = KVCacheMemory.load_snapshot(tmp_path / "hybrid" / "kv_memory_a.json")
    assert again.references() == (ONE,)


def test_registry() -> None:
    assert [agent.name for agent in _agents(Bookkeeper())] == list(AGENTS)
    assert all(isinstance(agent, MemoryAgent) for agent in _agents(Bookkeeper()))
    with pytest.raises(UnknownAgent, match="did you mean hybrid"):
        make_agent("hibrid", Bookkeeper())
    for name, given, words in (
        ("kv", {}, "KVCacheMemory"),
        ("hybrid", {"log": _log()}, "KVCacheMemory"),
        ("hybrid", {"memory": KVCacheMemory()}, "log"),
        ("history", {}, "log"),
    ):
        with pytest.raises(AgentConfigError, match=words):
            make_agent(name, Bookkeeper(), **given)


def test_what_an_agent_cannot_be() -> None:
    for wrong in ({"style": "prose"}, {"recent": -1}, {"max_tokens": 0}, {"unknown": 1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            AgentConfig(**wrong)
