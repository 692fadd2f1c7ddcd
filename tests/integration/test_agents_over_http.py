"""Agents that live on the real server over HTTP: a promotion in the middle of a life, exact traces, a clean history."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from agents.base import AgentConfig
from agents.environments.intent_tagging import intent_tagging
from agents.episodes import EpisodeRunner, EpisodesConfig
from agents.errors import NoCartridge
from agents.over_http import OlympusServer, ServerLog
from agents.registry import make_agent
from lm.engine_client import EngineClient
from lm.errors import RequestRefused
from lm.factory import lm_factory
from lm.types import CartridgeRef, LanguageModel
from memory.cartridges.archive import pack
from memory.cartridges.cartridge import make_cartridge
from memory.kv_cache_memory import KVCacheMemory
from tests.support.server import Server, running
from tests.support.tiny_model import save_tiny_model
from workspace.engine import Engine
from workspace.models import LoadedModel, load_model
from workspace.prefix import KVPrefix, prefix_of_tokens

QUESTION = [{"role": "user", "content": "Which tag is it?"}]
QUIET = AgentConfig(system_prompt="", max_tokens=6, recent=1)
TEXTS = ("Paris is the capital of France, as every dog knows.", "The quick brown fox jumps over Bern and Italy.")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = save_tiny_model(tmp_path_factory.mktemp("model") / "tiny-llama", context_length=2048)
    return load_model(str(folder), cache_dir=folder, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def server(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    environ = {
        "OLYMPUS_MODEL__NAME": loaded.name,
        "OLYMPUS_MODEL__DTYPE": "float32",
        "OLYMPUS_KERNELS__SPAWN_DEFAULT": "false",
        "OLYMPUS_MEMORY__EPISODIC__EMBEDDING": "none",
    }
    with running(tmp_path_factory.mktemp("data"), environ) as server:
        yield server


@pytest.fixture
def lm(server: Server) -> Iterator[LanguageModel]:
    with contextlib.closing(lm_factory(f"olympus:{server.url}")) as client:
        yield client


def _prefix(loaded: LoadedModel, text: str) -> KVPrefix:
    """16 slots, as cartridges have them."""
    return prefix_of_tokens(loaded, loaded.tokenizer.encode(text)[:16])


def _bring(server: Server, loaded: LoadedModel, text: str, domain: str) -> str:
    """A candidate on the server, brought as a file."""
    file = pack(make_cartridge(loaded, _prefix(loaded, text), domain=domain), "native")
    path = f"/olympus/cartridges/import?domain={domain}"
    told = server.json("POST", path, 201, content=file, headers={"Content-Type": "application/zip"})
    return str(told["id"])


def test_a_kv_agent_follows_a_promotion_and_traces_are_exact(
    server: Server, loaded: LoadedModel, lm: LanguageModel
) -> None:
    """The agent is made once; its answers are those of an engine here with the same prefix, before and after."""
    with OlympusServer(server.url) as olympus:
        agent = make_agent("kv", lm, memory=KVCacheMemory(domain="tags", source=olympus), config=QUIET)
        with pytest.raises(NoCartridge):
            agent.act("Which tag is it?")
        names = [_bring(server, loaded, text, "tags") for text in TEXTS]
        engine = Engine(loaded, max_active=1, max_waiting=1, threads=1)
        engine.start()
        shelf = {name: _prefix(loaded, text) for name, text in zip(names, TEXTS, strict=True)}
        here = EngineClient(engine, resolve=shelf.__getitem__)
        try:
            for name in names:
                server.json("POST", f"/olympus/cartridges/{name}/promote", json={})
                cartridges = [CartridgeRef(name)]
                act = agent.act("Which tag is it?")
                assert (act.cartridges, act.reply.cartridge_slots) == (tuple(cartridges), 16)
                expected, exact = here.call_with_trace(QUESTION, max_tokens=6, cartridges=cartridges)
                assert act.text == expected.text.strip()
                reply, trace = lm.call_with_trace(QUESTION, max_tokens=6, cartridges=cartridges)
                assert reply.prompt_tokens == expected.prompt_tokens
                assert trace.token_ids == exact.token_ids
                assert np.array_equal(trace.topk_token_ids[:, 0], exact.topk_token_ids[:, 0])
                assert np.allclose(trace.topk_logprobs, exact.topk_logprobs, atol=1e-3)
        finally:
            engine.stop()
    assert server.json("GET", "/olympus/history")["experiences"] == [], "nobody wrote what was only asked"


def test_a_hybrid_life_on_the_server(server: Server, loaded: LoadedModel, lm: LanguageModel, tmp_path: Path) -> None:
    name = _bring(server, loaded, TEXTS[0], "bank")
    with OlympusServer(server.url) as olympus:
        memory = KVCacheMemory(domain="bank", source=olympus)
        agent = make_agent("hybrid", lm, log=ServerLog(olympus, "bank"), memory=memory, config=QUIET)

        def promote(score: object) -> None:
            if (score.mode, score.episode) == ("train", 2):  # type: ignore[attr-defined]
                server.json("POST", f"/olympus/cartridges/{name}/promote", json={})

        config = EpisodesConfig(episodes=6, eval_tasks=3)
        runner = EpisodeRunner(agent, intent_tagging(), tmp_path, config, progress=promote)
        assert runner.run().finished
        records = ServerLog(olympus, "bank").records()
    assert [record.meta["cartridges"] for record in records] == [[]] * 3 + [[name]] * 3
    assert [record.feedback for record in records][:1] == ["Incorrect! The correct answer is card_arrival."]
    assert server.json("GET", "/olympus/history?limit=200")["experiences"][0]["domain"] == "bank"
    assert len(server.json("GET", "/olympus/history?limit=200")["experiences"]) == 6, "and nothing twice"


def test_an_unknown_cartridge_is_refused_in_the_servers_words(lm: LanguageModel) -> None:
    with pytest.raises(RequestRefused, match="nothing_v0001") as caught:
        lm.call(QUESTION, cartridges=[CartridgeRef("nothing_v0001")])
    assert caught.value.status == 400
