"""The engine as a client: exact ids and distributions, with and without a cartridge; and the local client around it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from lm.engine_client import EngineClient
from lm.errors import InvalidCall, Unavailable, UnknownCartridge
from lm.flex_hf_client import LocalFlexHFClient
from lm.types import CartridgeRef, LanguageModel, MeasuringModel
from tests.support.tiny_model import save_tiny_model
from workspace.engine import Engine
from workspace.models import LoadedModel, load_model
from workspace.prefix import KVPrefix, prefix_of_tokens

MESSAGES = [{"role": "user", "content": "Which tag is for the quick brown fox?"}]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = save_tiny_model(tmp_path_factory.mktemp("model"), context_length=256)
    return load_model(str(folder), cache_dir=folder, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def prefixes(loaded: LoadedModel) -> dict[str, KVPrefix]:
    texts = {"a_v0001": "Paris is the capital of France.", "b_v0001": "The dog does not mind."}
    return {name: prefix_of_tokens(loaded, loaded.tokenizer.encode(text)) for name, text in texts.items()}


@pytest.fixture(scope="module")
def engine(loaded: LoadedModel) -> Iterator[Engine]:
    engine = Engine(loaded, max_active=2, max_waiting=1, threads=1)
    engine.start()
    yield engine
    assert engine.stop()
    engine.check_invariants()


@pytest.fixture
def client(engine: Engine, prefixes: dict[str, KVPrefix]) -> EngineClient:
    return EngineClient(engine, resolve=prefixes.__getitem__, timeout=30)


def _logprobs(loaded: LoadedModel, ids: list[int]) -> torch.Tensor:
    """Log-probabilities [T, V] of one plain pass."""
    with torch.inference_mode():
        return torch.log_softmax(loaded.model(torch.tensor([ids])).logits[0].float(), -1)


def test_trace_is_the_models_own_distribution(client: EngineClient, loaded: LoadedModel) -> None:
    assert isinstance(client, LanguageModel)
    assert isinstance(client, MeasuringModel)
    reply, trace = client.call_with_trace(MESSAGES, top_logprobs=5, max_tokens=6)
    assert client.call(MESSAGES, max_tokens=6).text == reply.text == loaded.tokenizer.decode(trace.token_ids)
    assert (reply.completion_tokens, reply.finish_reason, trace.topk_token_ids.shape) == (6, "length", (6, 5))
    prompt = client._engine.render(MESSAGES)
    assert reply.prompt_tokens == len(prompt) == client.count_tokens(MESSAGES)
    assert client.context_length() == 256
    expected = _logprobs(loaded, [*prompt, *trace.token_ids])[len(prompt) - 1 : -1].topk(5)
    assert np.array_equal(trace.topk_token_ids, expected.indices.numpy())
    assert np.allclose(trace.topk_logprobs, expected.values.numpy(), atol=1e-4)
    assert trace.topk_token_ids[:, 0].tolist() == list(trace.token_ids), "greedy"
    assert reply.ttft_seconds is not None
    assert 0 < reply.ttft_seconds <= reply.seconds


def test_the_token_that_ends_an_answer_is_in_its_trace(tmp_path: Path) -> None:
    """A student has to learn where to stop, so the end must have its distribution as every other token."""
    folder = save_tiny_model(tmp_path, context_length=128)
    loaded = load_model(str(folder), cache_dir=folder, dtype="float32", device="cpu")
    with torch.no_grad():
        loaded.model.lm_head.weight[1] = 0.5 * loaded.model.lm_head.weight.sum(0)
    ends = frozenset(range(2, len(loaded.tokenizer), 2)) | loaded.eos_ids  # soon, whatever it says
    object.__setattr__(loaded, "eos_ids", ends)
    engine = Engine(loaded, max_active=1, max_waiting=0, threads=1)
    engine.start()
    try:
        reply, trace = EngineClient(engine).call_with_trace(MESSAGES, max_tokens=64)
    finally:
        engine.stop()
    assert reply.finish_reason == "stop"
    assert trace.token_ids[-1] in ends
    assert trace.topk_token_ids[-1, 0] == trace.token_ids[-1]
    assert reply.completion_tokens == len(trace.token_ids)


def test_a_cartridge_answers_as_its_text_would_and_is_counted(client: EngineClient, loaded: LoadedModel) -> None:
    plain, _ = client.call_with_trace(MESSAGES, max_tokens=8)
    reply, trace = client.call_with_trace(MESSAGES, max_tokens=8, cartridges=[CartridgeRef("a_v0001")])
    text = loaded.tokenizer.encode("Paris is the capital of France.")
    assert reply.cartridge_slots == len(text)
    assert reply.prompt_tokens == len(client._engine.render(MESSAGES, after_prefix=True))
    assert plain.cartridge_slots == 0
    ids = [*text, *client._engine.render(MESSAGES, after_prefix=True), *trace.token_ids]
    expected = _logprobs(loaded, ids)[-9:-1].topk(20)
    assert np.array_equal(trace.topk_token_ids[:, 0], expected.indices[:, 0].numpy())
    assert np.allclose(trace.topk_logprobs, expected.values.numpy(), atol=1e-4)


def test_several_cartridges_are_joined_by_id_whatever_the_order(client: EngineClient) -> None:
    both = [CartridgeRef("a_v0001"), CartridgeRef("b_v0001")]
    first, one = client.call_with_trace(MESSAGES, max_tokens=4, cartridges=both)
    second, other = client.call_with_trace(MESSAGES, max_tokens=4, cartridges=both[::-1])
    assert first.text == second.text
    assert np.array_equal(one.topk_logprobs, other.topk_logprobs)
    assert first.cartridge_slots == second.cartridge_slots > 0


@pytest.mark.parametrize(
    ("wanted", "words"),
    [(CartridgeRef("nothing"), "no such cartridge"), (CartridgeRef("a_v0001", "huggingface"), "import it first")],
)
def test_a_cartridge_that_is_not_there(client: EngineClient, wanted: CartridgeRef, words: str) -> None:
    with pytest.raises(UnknownCartridge, match=words):
        client.call(MESSAGES, cartridges=[wanted])


def test_a_cartridge_of_another_model_is_refused(engine: Engine, prefixes: dict[str, KVPrefix]) -> None:
    whole = prefixes["a_v0001"]
    foreign = KVPrefix(whole.keys[:1], whole.values[:1], "a_v0001")
    with pytest.raises(UnknownCartridge, match="layer"):
        EngineClient(engine, resolve=lambda _: foreign).call(MESSAGES, cartridges=[CartridgeRef("a_v0001")])


def test_many_threads_wait_for_a_place(client: EngineClient) -> None:
    texts: list[str] = []
    threads = [
        threading.Thread(target=lambda: texts.append(client.call(MESSAGES, max_tokens=6).text)) for _ in range(9)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(texts) == 9, "three places, nine callers"
    assert len(set(texts)) == 1


def test_a_call_that_takes_too_long_is_cancelled(engine: Engine) -> None:
    with pytest.raises(Unavailable, match="no end within"):
        EngineClient(engine, timeout=0.001).call(MESSAGES, max_tokens=200)
    assert EngineClient(engine).call(MESSAGES, max_tokens=1).completion_tokens == 1


def test_what_cannot_be_asked(client: EngineClient) -> None:
    with pytest.raises(InvalidCall, match="context"):
        client.call([{"role": "user", "content": "word " * 400}])
    with pytest.raises(InvalidCall, match="top_logprobs"):
        client.call_with_trace(MESSAGES, top_logprobs=21)


def test_an_engine_that_does_not_run(loaded: LoadedModel) -> None:
    with pytest.raises(Unavailable, match="not running"):
        EngineClient(Engine(loaded, max_active=1, max_waiting=1, threads=1)).call(MESSAGES)


# The local client.


def test_local_client_loads_answers_and_closes(tmp_path: Path, client: EngineClient) -> None:
    folder = save_tiny_model(tmp_path / "m", context_length=256)
    local = LocalFlexHFClient(str(folder), cache_dir=tmp_path, dtype="float32", device="cpu", threads=1)
    with local:
        assert local.call(MESSAGES, max_tokens=6).text == client.call(MESSAGES, max_tokens=6).text
        assert local.count_tokens(MESSAGES) == client.count_tokens(MESSAGES)
        assert local.context_length() == 256
        prefix = prefix_of_tokens(local.loaded, local.loaded.tokenizer.encode("Paris"))
        local._client._resolve = {"p": prefix}.__getitem__
        reply, _ = local.call_with_trace(MESSAGES, max_tokens=2, cartridges=[CartridgeRef("p")])
        assert reply.cartridge_slots == prefix.slots
    with pytest.raises(Unavailable, match="closed"):
        local.call(MESSAGES)


def test_local_client_of_a_model_that_is_not_there(tmp_path: Path) -> None:
    with LocalFlexHFClient("no-such-model", cache_dir=tmp_path) as local, pytest.raises(Unavailable, match="unknown"):
        local.call(MESSAGES)
