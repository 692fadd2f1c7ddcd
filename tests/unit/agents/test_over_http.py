"""Agents over HTTP: a strict stand-in for an Olympus server, real sockets, and a promotion in the middle of a life."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from agents.base import AgentConfig, Feedback
from agents.environments.intent_tagging import intent_tagging
from agents.episodes import EpisodeRunner, EpisodesConfig
from agents.errors import NoCartridge
from agents.experience_log import FileLog
from agents.hybrid_agent import HybridKVHistoryAgent
from agents.kv_memory_agent import KVMemoryAgent
from agents.over_http import OlympusServer, ServerLog
from lm.errors import InvalidResponse
from lm.tokasaurus_client import TokasaurusClient
from lm.types import CartridgeRef
from memory.history import NewExperience
from memory.kv_cache_memory import KVCacheMemory
from tests.support.fake_tokasaurus import FakeTokasaurus
from tests.support.json_server import Answer, Asked, json_server

FIELDS = {"observation", "action", "domain", "feedback", "score", "session_id", "episode_id", "meta", "request_id"}


class FakeOlympus:
    """The routes that agents use: history, serving cartridges, and Tokasaurus' for the rest."""

    def __init__(self) -> None:
        self.toka = FakeTokasaurus(cartridges=["bank_v0001", "bank_v0002"])
        self.log = FileLog("bank")
        self.serving: list[dict[str, Any]] = []

    def promote(self, cartridge: str) -> None:
        self.serving = [{"id": cartridge, "domain": "bank", "state": "serving", "slots": 64}]

    def __call__(self, asked: Asked) -> Answer:
        path, query = urlsplit(asked.path).path, parse_qs(urlsplit(asked.path).query)
        if path == "/olympus/cartridges":
            assert query == {"domain": ["bank"], "state": ["serving"]}
            old = {"id": "bank_v0000", "domain": "bank", "state": "retired"}
            return Answer({"cartridges": [*self.serving, old]} if isinstance(self.serving, list) else {})
        if path == "/olympus/history" and asked.method == "POST":
            if extra := set(asked.body) - FIELDS:
                return Answer({"detail": f"unknown {extra}"}, 422)
            return Answer(self._shown(self.log.append(NewExperience(source="agent", **asked.body))), 201)
        if path == "/olympus/history":
            limit, before = int(query["limit"][0]), int(query.get("before", ["1000000"])[0])
            older = [record for record in self.log.records() if record.id < before][::-1][: min(limit, 3)]
            following = older[-1].id if len(older) == min(limit, 3) else None
            return Answer({"experiences": [self._shown(record) for record in older], "next_before": following})
        return self.toka(asked)

    @staticmethod
    def _shown(record: Any) -> dict[str, Any]:
        return {name: value for name, value in asdict(record).items() if name not in ("messages", "deleted")}


@pytest.fixture
def fake() -> FakeOlympus:
    return FakeOlympus()


@pytest.fixture
def url(fake: FakeOlympus) -> Iterator[str]:
    with json_server(fake) as address:
        yield address


def test_a_promotion_is_followed_without_a_restart(fake: FakeOlympus, url: str) -> None:
    with TokasaurusClient(url, "tiny") as lm, OlympusServer(url) as server:
        agent = KVMemoryAgent(lm, KVCacheMemory(domain="bank", source=server), AgentConfig(system_prompt=""))
        with pytest.raises(NoCartridge):
            agent.act("Which tag?")
        for cartridge in ("bank_v0001", "bank_v0002"):
            fake.promote(cartridge)
            assert agent.act("Which tag?").cartridges == (CartridgeRef(cartridge),)
    asked = [item.body for item in fake.toka.asked]
    assert [body["cartridges"][0]["id"] for body in asked] == ["bank_v0001", "bank_v0002"]
    assert asked[0]["messages"] == [{"role": "user", "content": "Which tag?"}]


def test_a_hybrid_life_on_a_server(fake: FakeOlympus, url: str, tmp_path: Path) -> None:
    with TokasaurusClient(url, "tiny") as lm, OlympusServer(url) as server:
        memory = KVCacheMemory(domain="bank", source=server)
        agent = HybridKVHistoryAgent(lm, memory, ServerLog(server, "bank"), AgentConfig(recent=2))
        runner = EpisodeRunner(agent, intent_tagging(), tmp_path, EpisodesConfig(episodes=8, eval_tasks=2))
        runner._progress = lambda score: fake.promote("bank_v0001") if score.episode == 4 else None
        assert runner.run().finished
    records = fake.log.records()
    assert len(records) == 8, "examinations are not in the history"
    assert records[0].feedback == "Incorrect! The correct answer is card_arrival."
    assert [record.meta["cartridges"] for record in records] == [[]] * 5 + [["bank_v0001"]] * 3
    turns = [len(item.body["messages"]) for item in fake.toka.asked]
    assert turns[:8] == [2, 5, 8, 11, 14, 8, 8, 8], "the whole history, then two recent experiences"


def test_the_log_reads_all_pages_and_repeats_nothing(fake: FakeOlympus, url: str) -> None:
    with OlympusServer(url) as server:
        log = ServerLog(server, "bank")
        items = [
            NewExperience(f"o{number}", "a", "bank", "agent", "Correct!", 1.0, request_id=f"r/{number}")
            for number in range(8)
        ]
        stored = [log.append(item) for item in items]
        assert log.append(items[3]).id == stored[3].id
        assert list(log.records()) == stored
        assert [record.observation for record in log.records(4)] == ["o4", "o5", "o6", "o7"]
        assert stored[0].score == 1.0


def test_answers_of_something_else_are_refused(fake: FakeOlympus, url: str) -> None:
    with OlympusServer(url) as server:
        for rows in ([{"id": 3, "state": "serving"}], [{"id": "a", "state": "serving"}] * 2, "none", [1]):
            fake.serving = rows  # type: ignore[assignment]
            with pytest.raises(InvalidResponse):
                server.serving("bank")
        fake.serving = [{"id": "bank_v0003", "state": "candidate"}]
        assert server.serving("bank") is None, "a candidate is not served"


def test_feedback_is_not_lost_when_the_agent_moves_on(fake: FakeOlympus, url: str) -> None:
    with TokasaurusClient(url, "tiny") as lm, OlympusServer(url) as server:
        agent = HybridKVHistoryAgent(lm, KVCacheMemory(), ServerLog(server, "bank"))
        agent.act("one")
        agent.act("two")
        agent.observe(Feedback("Correct!", 1.0))
    assert [(record.observation, record.feedback) for record in fake.log.records()] == [
        ("one", None),
        ("two", "Correct!"),
    ]
