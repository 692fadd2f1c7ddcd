"""Prompts that begin like earlier ones: read once, answered the same, and never more bytes than allowed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from workspace.engine import Engine
from workspace.forward import Forward, PassiveContext
from workspace.generation import Finished
from workspace.models import LoadedModel
from workspace.prefix import KVPrefix, prefix_of_tokens
from workspace.prefix_cache import PrefixCache, prefix_digest
from workspace.sampling import SamplingParams

MakeEngine = Callable[..., Engine]
ARCHITECTURES = ("llama", "gemma3", "gpt_oss")
ROOMY = 64 << 20


def greedy(tokens: int, **more: Any) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, **more)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return torch.randint(2, 300, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def ask(engine: Engine, prompt: list[int], tokens: int = 8, **more: Any) -> Finished:
    finished = engine.submit(prompt, greedy(tokens), **more).result(60)
    assert finished.reason == "length", finished.error
    engine.check_invariants()
    return finished


# In the engine.


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_conversation_is_read_once_and_answered_the_same(
    architecture: str, tiny_models: dict[str, LoadedModel], make_engine: MakeEngine
) -> None:
    """Three turns; the second begins with the first prompt and its answer. Windows of 8 have long gone by."""
    model = tiny_models[architecture]
    engine = make_engine(model, prefill_chunk=16, prefix_cache_bytes=ROOMY)  # blocks of 16
    plain = make_engine(model, prefill_chunk=16)
    said = prompt_of(100)
    reused = []
    for turn in range(3):
        finished = ask(engine, said, 40)
        assert finished.token_ids == ask(plain, said, 40).token_ids
        reused.append(finished.usage.cached_tokens)
        said = [*said, *finished.token_ids, *prompt_of(11, seed=turn + 1)]
    # 139 tokens of the first turn and 190 of the second are in the cache, the last token of an answer never is.
    assert reused == [0, 128, 176]
    stats = engine.stats().prefix_cache
    assert stats is not None
    assert (stats.lookups, stats.hits, stats.hit_tokens) == (3, 2, sum(reused))
    assert engine.stop()  # generations are counted when they leave, a moment after their end is told
    assert engine.stats().cached_tokens == sum(reused)
    assert plain.stats().prefix_cache is None


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_system_prompt_for_many_requests(
    architecture: str, tiny_models: dict[str, LoadedModel], make_engine: MakeEngine
) -> None:
    """Layers with windows can go on only where somebody's window was copied: at the last block of a prompt."""
    model = tiny_models[architecture]
    engine = make_engine(model, prefill_chunk=256, prefix_cache_bytes=ROOMY)  # blocks of 64, four in a chunk
    plain = make_engine(model)
    system = prompt_of(150)
    counts = []
    for number in range(3):
        prompt = [*system, *prompt_of(3 + number, seed=number + 1)]
        finished = ask(engine, prompt)
        assert finished.token_ids == ask(plain, prompt).token_ids
        counts.append(finished.usage.cached_tokens)
    assert counts == [0, 128, 128]
    shorter = ask(engine, system[:100])
    assert shorter.token_ids == ask(plain, system[:100]).token_ids
    assert shorter.usage.cached_tokens == (64 if architecture == "llama" else 0)  # nobody's window was copied there
    assert ask(engine, system[:100]).usage.cached_tokens == 64  # but now it was


def test_the_last_token_of_a_prompt_is_always_read(tiny: LoadedModel, make_engine: MakeEngine) -> None:
    engine = make_engine(tiny, prefill_chunk=16, prefix_cache_bytes=ROOMY)
    for length in (16, 17, 32, 33):
        prompt = prompt_of(length)
        first, again = ask(engine, prompt), ask(engine, prompt)
        assert first.token_ids == again.token_ids
        assert again.usage.cached_tokens == (length - 1) // 16 * 16


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cartridges_have_beginnings_of_their_own(
    architecture: str, tiny_models: dict[str, LoadedModel], make_engine: MakeEngine
) -> None:
    model = tiny_models[architecture]
    engine = make_engine(model, prefill_chunk=16, prefix_cache_bytes=ROOMY)
    plain = make_engine(model)
    first, second = (prefix_of_tokens(model, prompt_of(13, seed=seed)) for seed in (90, 91))
    prompt = prompt_of(40)
    for prefix, cached in [(first, 0), (second, 0), (None, 0), (first, 32), (second, 32), (None, 32)]:
        finished = ask(engine, prompt, prefix=prefix)
        assert finished.usage.cached_tokens == cached
        assert finished.token_ids == ask(plain, prompt, prefix=prefix).token_ids


def test_equal_cartridges_are_the_same_whoever_loaded_them(tiny: LoadedModel) -> None:
    one = prefix_of_tokens(tiny, prompt_of(5))
    copy = KVPrefix(tuple(t.clone() for t in one.keys), tuple(t.clone() for t in one.values), id="another name")
    other = KVPrefix(one.keys, tuple(t + 1 for t in one.values))
    assert prefix_digest(one) == prefix_digest(copy) == prefix_digest(one)
    assert prefix_digest(other) != prefix_digest(one)  # although it begins with the very same tensor
    assert prefix_digest(None) == ""


def test_a_request_with_a_context_takes_no_part(tiny: LoadedModel, make_engine: MakeEngine) -> None:
    """Its workspace changes what the model makes of the text, or wants to see it."""
    engine = make_engine(tiny, prefill_chunk=16, prefix_cache_bytes=ROOMY)
    ask(engine, prompt_of(40), request_context=PassiveContext())
    assert ask(engine, prompt_of(40)).usage.cached_tokens == 0
    assert ask(engine, prompt_of(40), request_context=PassiveContext()).usage.cached_tokens == 0


def test_a_client_that_left_leaves_what_was_read(tiny: LoadedModel, make_engine: MakeEngine) -> None:
    engine = make_engine(tiny, prefill_chunk=16, prefix_cache_bytes=ROOMY)
    generation = engine.submit(prompt_of(60), greedy(400))
    next(generation.stream(20))
    generation.cancel()
    generation.result(20)
    assert ask(engine, prompt_of(60)).usage.cached_tokens == 48


def test_exact_reuse_gives_the_bits_of_a_prompt_read_whole(tiny: LoadedModel, make_engine: MakeEngine) -> None:
    """Only whole chunks of prompts: every pass is one that the prompt would have taken anyway."""
    engine = make_engine(tiny, prefill_chunk=16, batching="exact", prefix_cache_bytes=ROOMY)
    plain = make_engine(tiny, prefill_chunk=16, batching="exact")
    params = greedy(12, logprobs=True)

    def told(into: Engine, prompt: list[int]) -> list[Any]:
        return list(into.submit(prompt, params).stream(20))[:-1]

    first = ask(engine, prompt_of(60), 30)
    said = [*prompt_of(60), *first.token_ids, 5, 6]
    assert told(engine, said) == told(plain, said)
    assert ask(engine, said).usage.cached_tokens == 80  # 48 of the first prompt, then those of the one before
    stats = engine.stats().prefix_cache
    assert stats is not None
    assert stats.hit_tokens == 48 + 80


# The store.


def bytes_of_a_block(model: LoadedModel, block: int) -> int:
    prefix = prefix_of_tokens(model, prompt_of(block))
    return prefix.nbytes


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_it_never_holds_more_than_it_may(
    architecture: str, tiny_models: dict[str, LoadedModel], make_engine: MakeEngine
) -> None:
    """Room for nine blocks, conversations that need more: the longest unused go, and answers stay right."""
    model = tiny_models[architecture]
    room = 9 * bytes_of_a_block(model, 16)
    engine = make_engine(model, prefill_chunk=16, prefix_cache_bytes=room)
    plain = make_engine(model)
    random = torch.Generator().manual_seed(11)
    conversations = [prompt_of(20, seed=seed) for seed in range(4)]
    hits = 0
    for _ in range(40):
        place = int(torch.randint(4, (), generator=random))
        prompt = conversations[place]
        finished = ask(engine, prompt, 12)  # checks the invariants, the bytes among them
        assert finished.token_ids == ask(plain, prompt, 12).token_ids
        hits += finished.usage.cached_tokens > 0
        grown = [*prompt, *finished.token_ids, 7, 8]
        conversations[place] = grown if len(grown) < 140 else prompt_of(20, seed=int(random.initial_seed()) + place)
    stats = engine.stats().prefix_cache
    assert stats is not None
    assert stats.evicted > 0
    assert hits > 5
    assert 0 < stats.bytes <= room


def test_the_longest_unused_leaf_goes_first(tiny: LoadedModel) -> None:
    store = PrefixCache(3 * bytes_of_a_block(tiny, 8), block=8)
    forward = Forward(tiny)

    def visit(prompt: list[int]) -> int:
        with torch.inference_mode():
            cache = forward.new_cache()
            chain = store.open("", prompt, cache, 0)
            assert chain is not None
            forward(prompt[chain.reused :], cache, chain.reused, {})
            chain.extend(prompt, cache, answering=False)
        store.check_invariants()
        return chain.reused

    stem, left, right = prompt_of(8), [*prompt_of(8), *prompt_of(9, seed=1)], [*prompt_of(8), *prompt_of(9, seed=2)]
    assert [visit(left), visit(right), visit(left)] == [0, 8, 16]
    assert visit([*prompt_of(9, seed=3)]) == 0  # a fourth block: the leaf of "right" is older than that of "left"
    assert store.stats().evicted == 1
    assert visit([*stem, 1]) == 8
    assert visit(right) == 8
    assert visit(left) in (8, 16)


def test_a_store_too_small_for_a_block_keeps_nothing(tiny: LoadedModel, make_engine: MakeEngine) -> None:
    engine = make_engine(tiny, prefill_chunk=16, prefix_cache_bytes=100)
    assert [ask(engine, prompt_of(40)).usage.cached_tokens for _ in range(2)] == [0, 0]
    stats = engine.stats().prefix_cache
    assert stats is not None
    assert (stats.bytes, stats.blocks) == (0, 0)


def test_compiled_steps_reuse_prompts_too(tiny: LoadedModel, make_engine: MakeEngine) -> None:
    """Dynamo's "eager" back end compiles nothing."""
    engine = make_engine(tiny, prefill_chunk=16, prefix_cache_bytes=ROOMY, compiled={"backend": "eager"})
    plain = make_engine(tiny)
    prompt = prompt_of(40)
    assert [ask(engine, prompt).usage.cached_tokens for _ in range(2)] == [0, 32]
    assert ask(engine, prompt).token_ids == ask(plain, prompt).token_ids


@pytest.mark.parametrize(("max_bytes", "block"), [(0, 1), (1, 0)])
def test_an_impossible_store_cannot_be_made(max_bytes: int, block: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        PrefixCache(max_bytes, block)
