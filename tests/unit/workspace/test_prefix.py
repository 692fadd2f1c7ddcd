"""A prefix of keys and values is the tokens it was made of: in logits, in text, beside others, in every cache."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch._dynamo
from transformers import DynamicCache, StaticCache

from tests.support.architectures import HEADS, WIDTH, loaded, stock_model
from workspace.engine import Engine
from workspace.errors import InvalidWorkspace, PrefixMismatch, PromptTooLong
from workspace.forward import Forward, PassiveContext
from workspace.generation import Finished
from workspace.models import LoadedModel
from workspace.prefix import KVPrefix, check_prefix, fit_prefix, join_prefixes, prefix_of_tokens
from workspace.prompting import Prompting
from workspace.sampling import SamplingParams
from workspace.steering import Steering
from workspace.window import ActiveWindow, WindowSettings
from workspace.workspace_config import WorkspaceConfig

MakeEngine = Callable[..., Engine]
GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
#: More than the sliding windows of 8.
SLOTS = 19


def ids_of(count: int, seed: int = 0, below: int = 100) -> list[int]:
    return torch.randint(2, below, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def checksum(prefix: KVPrefix) -> str:
    digest = hashlib.sha256()
    for tensor in (*prefix.keys, *prefix.values):
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def continued(model: Any, cache: Any, text: list[int], first: int) -> torch.Tensor:
    """Logits [T, V] of ``text`` at positions from ``first`` on."""
    positions = torch.arange(first, first + len(text))[None]
    with torch.no_grad():
        return model(torch.tensor([text]), past_key_values=cache, position_ids=positions).logits[0]


def caches(model: Any) -> dict[str, Any]:
    return {
        "bare": DynamicCache(),
        "configured": DynamicCache(config=model.config),
        "static": StaticCache(config=model.config, max_cache_len=64),
    }


@pytest.mark.parametrize("kind", ["bare", "configured", "static"])
@pytest.mark.parametrize("slots", [3, SLOTS])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss", "qwen3"])
def test_logits_after_a_prefix_are_those_of_the_prefill(name: str, slots: int, kind: str) -> None:
    model = stock_model(name)
    tokens, text = ids_of(slots), ids_of(15, 1)
    with torch.no_grad():
        expected = model(torch.tensor([tokens + text])).logits[0, slots:]
    prefix = prefix_of_tokens(loaded(model), tokens)
    assert prefix.slots == slots, "all layers keep all slots, sliding ones too"
    cache = caches(model)[kind]
    prefix.fill(cache)
    assert int(cache.get_seq_length()) == slots
    torch.testing.assert_close(continued(model, cache, text, slots), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
def test_the_text_is_out_of_place_anywhere_but_behind_the_slots(name: str) -> None:
    model = stock_model(name)
    tokens, text = ids_of(SLOTS), ids_of(6, 1)
    prefix = prefix_of_tokens(loaded(model), tokens)
    found = []
    for first in (SLOTS, 0):
        cache = DynamicCache(config=model.config)
        prefix.fill(cache)
        found.append(continued(model, cache, text, first))
    assert (found[0] - found[1]).abs().max() > 0.1


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
def test_rows_of_a_batch_share_a_prefix_under_masks_of_slots_and_text(name: str) -> None:
    """What the trainer does: rows of different lengths, padded behind, on the expanded prefix."""
    model = stock_model(name)
    tokens, rows = ids_of(SLOTS), [ids_of(9, 1), ids_of(5, 2)]
    prefix = prefix_of_tokens(loaded(model), tokens)
    cache = DynamicCache(config=model.config)
    for layer, (keys, values) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
        cache.update(keys.expand(2, -1, -1, -1), values.expand(2, -1, -1, -1), layer)
    ids = torch.tensor([rows[0], rows[1] + [0] * 4])
    mask = torch.ones(2, SLOTS + 9, dtype=torch.long)
    mask[1, SLOTS + 5 :] = 0
    positions = torch.arange(SLOTS, SLOTS + 9).expand(2, -1)
    with torch.no_grad():
        found = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
        for row, text in enumerate(rows):
            expected = model(torch.tensor([tokens + text])).logits[0, SLOTS:]
            torch.testing.assert_close(found[row, : len(text)], expected, atol=2e-5, rtol=1e-5)


def test_two_caches_filled_from_one_prefix_do_not_meet() -> None:
    model = stock_model("gpt_oss")
    prefix = prefix_of_tokens(loaded(model), ids_of(SLOTS))
    before = checksum(prefix)
    for kind in ("bare", "configured", "static"):
        first, second = caches(model)[kind], caches(model)[kind]
        prefix.fill(first)
        prefix.fill(second)
        continued(model, first, ids_of(9, 3), SLOTS)
        alone = continued(model, second, ids_of(9, 4), SLOTS)
        for layer in first.layers:
            layer.keys.fill_(0)
        fresh = caches(model)[kind]
        prefix.fill(fresh)
        torch.testing.assert_close(continued(model, fresh, ids_of(9, 4), SLOTS), alone, atol=0, rtol=0)
    assert checksum(prefix) == before


def test_only_an_empty_cache_is_filled() -> None:
    model = stock_model("llama")
    prefix = prefix_of_tokens(loaded(model), ids_of(4))
    cache = DynamicCache()
    prefix.fill(cache)
    with pytest.raises(PrefixMismatch, match="holds 4"):
        prefix.fill(cache)


def test_gradients_reach_the_keys_that_filled_a_cache() -> None:
    model = stock_model("gpt_oss")
    made = prefix_of_tokens(loaded(model), ids_of(SLOTS))
    keys = tuple(tensor.clone().requires_grad_() for tensor in made.keys)
    cache = DynamicCache(config=model.config)
    KVPrefix(keys, made.values).fill(cache)
    model(torch.tensor([ids_of(3, 1)]), past_key_values=cache).logits.sum().backward()
    assert all(tensor.grad is not None for tensor in keys)
    sliding, full = keys[0].grad, keys[1].grad
    assert sliding is not None
    assert full is not None
    assert float(full[:, :, 0].abs().sum()) > 0
    assert float(sliding[:, :, : SLOTS - 7].abs().sum()) == 0, "beyond the window of 8 nothing is seen"
    assert float(sliding[:, :, SLOTS - 7 :].abs().sum()) > 0


# Joined ones.


def test_a_joined_prefix_has_all_slots_unchanged_and_in_order() -> None:
    model = stock_model("gemma3")
    one, other = (prefix_of_tokens(loaded(model), ids_of(count, count)) for count in (5, 7))
    one, other = KVPrefix(one.keys, one.values, "one"), KVPrefix(other.keys, other.values, "other")
    joined = join_prefixes([one, other])
    assert (joined.slots, joined.id) == (12, "one+other")
    for layer in range(len(joined.keys)):
        assert torch.equal(joined.keys[layer][:, :, :5], one.keys[layer])
        assert torch.equal(joined.values[layer][:, :, 5:], other.values[layer])
    assert join_prefixes([one]) is one
    check_prefix(loaded(model), joined)


def test_nothing_and_prefixes_of_two_models_are_not_joined() -> None:
    one = prefix_of_tokens(loaded(stock_model("llama")), ids_of(4))
    other = prefix_of_tokens(loaded(stock_model("llama", num_hidden_layers=2)), ids_of(4))
    with pytest.raises(PrefixMismatch, match="no prefixes"):
        join_prefixes([])
    with pytest.raises(PrefixMismatch, match=r"4 layers .* 2 layers"):
        join_prefixes([one, other])


# What does not fit.


@pytest.mark.parametrize(
    "changes", [{"num_hidden_layers": 3}, {"num_key_value_heads": 4}, {"head_dim": 4}, {"num_key_value_heads": 1}]
)
def test_a_prefix_of_another_shape_is_refused_with_both_shapes(changes: dict[str, int]) -> None:
    other = prefix_of_tokens(loaded(stock_model("llama", **changes)), ids_of(4))
    named = KVPrefix(other.keys, other.values, "memory_v0001")
    with pytest.raises(PrefixMismatch, match=r"memory_v0001 does not fit .* has 4 layers of 2 key-value heads of 8"):
        check_prefix(loaded(stock_model("llama")), named)


def test_tensors_that_are_no_prefix_are_refused() -> None:
    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape)

    good = zeros(1, HEADS, 4, WIDTH)
    for keys, values in [
        ((), ()),
        ((good,), ()),
        ((zeros(2, HEADS, 4, WIDTH),), (zeros(2, HEADS, 4, WIDTH),)),
        ((zeros(1, HEADS, 0, WIDTH),), (zeros(1, HEADS, 0, WIDTH),)),
        ((good, zeros(1, HEADS, 5, WIDTH)), (good, zeros(1, HEADS, 5, WIDTH))),
        ((good,), (zeros(1, HEADS, 5, WIDTH),)),
        ((zeros(HEADS, 4, WIDTH),), (zeros(HEADS, 4, WIDTH),)),
    ]:
        with pytest.raises(PrefixMismatch):
            KVPrefix(keys, values)


def test_no_tokens_or_more_than_the_context_make_no_prefix() -> None:
    model = loaded(stock_model("llama"))
    for count in (0, model.context_length):
        with pytest.raises(PrefixMismatch, match="1 to 4095 tokens"):
            prefix_of_tokens(model, ids_of(count))


def test_fitting_casts_once_and_leaves_what_fits() -> None:
    model = loaded(stock_model("llama"))
    prefix = prefix_of_tokens(model, ids_of(4))
    assert fit_prefix(model, prefix) is prefix
    half = KVPrefix(tuple(item.bfloat16() for item in prefix.keys), tuple(item.bfloat16() for item in prefix.values))
    assert half.nbytes * 2 == prefix.nbytes
    assert {tensor.dtype for tensor in fit_prefix(model, half).keys} == {torch.float32}


# In the engine.


def say(engine: Engine, prompt: list[int], prefix: KVPrefix | None = None, **more: Any) -> Finished:
    finished = engine.submit(prompt, GREEDY, prefix=prefix, **more).result(60)
    assert finished.error is None, finished.error
    return finished


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt_oss"])
def test_text_with_a_prefix_is_that_of_the_same_tokens(
    architecture: str, tiny_models: dict[str, LoadedModel], make_engine: MakeEngine
) -> None:
    model = tiny_models[architecture]
    engine = make_engine(model, prefill_chunk=8)
    sampled = SamplingParams(max_tokens=24, temperature=1, seed=3, ignore_eos=True)
    for slots, length in ((SLOTS, 1), (SLOTS, 21), (2, 5)):
        tokens, text = ids_of(slots, 5, 300), ids_of(length, 6, 300)
        prefix = prefix_of_tokens(model, tokens)
        for params in (GREEDY, sampled):
            expected = engine.submit(tokens + text, params).result(60)
            found = engine.submit(text, params, prefix=prefix).result(60)
            assert found.token_ids == expected.token_ids
            assert (found.usage.cartridge_slots, expected.usage.cartridge_slots) == (slots, 0)
            assert found.usage.prompt_tokens == length
        if architecture != "gemma3":  # whose random weights say one token for ever, whatever was before
            assert engine.submit(text, sampled).result(60).token_ids != found.token_ids, "the slots do count"


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_compiled_step_says_the_same(
    architecture: str, tiny_models: dict[str, LoadedModel], make_engine: MakeEngine
) -> None:
    """It attends to the same slots; sliding layers keep their window of them."""
    model = tiny_models[architecture]
    plain, compiled = make_engine(model), make_engine(model, prefill_chunk=8, compiled={"backend": "eager"})
    prefix, text = prefix_of_tokens(model, ids_of(SLOTS, 5, 300)), ids_of(21, 6, 300)
    assert say(compiled, text, prefix).token_ids == say(plain, text, prefix).token_ids


@pytest.mark.parametrize("architecture", ["llama", "gpt_oss"])
def test_concurrent_requests_on_one_prefix_say_what_they_say_alone(
    architecture: str, tiny_models: dict[str, LoadedModel], make_engine: MakeEngine
) -> None:
    model = tiny_models[architecture]
    engine = make_engine(model, max_active=8, max_waiting=8, prefill_chunk=8)
    prefix = prefix_of_tokens(model, ids_of(SLOTS, 5, 300))
    before = checksum(prefix)
    prompts = [ids_of(3 + number, number, 300) for number in range(8)]
    alone = [say(engine, prompt, prefix).token_ids for prompt in prompts]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda prompt: say(engine, prompt, prefix).token_ids, prompts))
    assert together == alone
    assert checksum(prefix) == before


def test_slots_count_against_the_context(tiny: LoadedModel, make_engine: MakeEngine) -> None:
    engine = make_engine(tiny)  # a context of 512
    prefix = prefix_of_tokens(tiny, ids_of(500, 5, 300))
    finished = engine.submit(ids_of(9, 1, 300), GREEDY, prefix=prefix).result(60)
    assert (finished.reason, finished.usage.completion_tokens) == ("length", 3)
    with pytest.raises(PromptTooLong, match="12 tokens after 500 slots of cartridges"):
        engine.submit(ids_of(12, 1, 300), GREEDY, prefix=prefix)


def test_the_engine_refuses_a_prefix_of_another_model(
    tiny_models: dict[str, LoadedModel], make_engine: MakeEngine
) -> None:
    engine = make_engine(tiny_models["llama"])
    other = prefix_of_tokens(loaded(stock_model("llama")), ids_of(4))
    with pytest.raises(PrefixMismatch, match=r"4 layers .* 2 layers"):
        engine.submit([5, 6], GREEDY, prefix=other)
    assert engine.stats().submitted == 0


def test_a_prefix_in_another_dtype_is_cast(tiny: LoadedModel, make_engine: MakeEngine) -> None:
    prefix = prefix_of_tokens(tiny, ids_of(8, 5, 300))
    double = KVPrefix(tuple(item.double() for item in prefix.keys), tuple(item.double() for item in prefix.values))
    engine = make_engine(tiny)
    assert say(engine, [5, 6], double).token_ids == say(engine, [5, 6], prefix).token_ids


class Told(PassiveContext):
    def __init__(self) -> None:
        self.began: list[int] = []
        self.starts: list[tuple[int, int]] = []

    def begin(self, cache: Any, prompt_ids: Any) -> None:
        self.began.append(int(cache.get_seq_length()))

    def forward_kwargs(self, start: int, count: int) -> dict[str, Any]:
        self.starts.append((start, count))
        return {}


def test_a_context_is_told_true_positions(tiny: LoadedModel, make_engine: MakeEngine) -> None:
    told, engine = Told(), make_engine(tiny, prefill_chunk=4)
    params = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
    prefix = prefix_of_tokens(tiny, ids_of(10, 5, 300))
    engine.submit(ids_of(6, 1, 300), params, prefix=prefix, request_context=told).result(60)
    assert told.began == [10]
    assert told.starts == [(10, 4), (14, 2), (16, 1), (17, 1)]


# With the workspace.


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt_oss"])
def test_the_workspace_acts_after_a_prefix_as_after_the_same_tokens(
    architecture: str, tiny_models: dict[str, LoadedModel], make_engine: MakeEngine
) -> None:
    """Silent virtual tokens leave the answer alone; births, deltas and the report count positions behind the slots."""
    model = tiny_models[architecture]
    engine = make_engine(model)
    prefix, text = prefix_of_tokens(model, ids_of(SLOTS, 5, 300)), ids_of(16, 6, 300)
    quiet = Steering(model, WorkspaceConfig(kv_plan_bias=-64.0))
    try:
        run = quiet.run()
        stock = say(engine, text, prefix)
        assert say(engine, text, prefix, request_context=run).token_ids == stock.token_ids
        assert run.report.virtual_tokens > 0
        assert run.report.cache_tokens == SLOTS + len(text) + GREEDY.max_tokens - 1
        births = {int(segment.birth.min()) for segment in run._broadcast.values()}
        assert min(births) >= SLOTS + len(text)
    finally:
        quiet.close()
    loud = Steering(model, WorkspaceConfig(kv_plan_bias=4.0))
    try:
        say(engine, text, prefix, request_context=loud.run())
    finally:
        loud.close()


def test_a_capped_cache_never_evicts_the_prefix(tiny: LoadedModel, make_engine: MakeEngine) -> None:
    """What is evicted and forgotten is the same text as without a prefix; the slots stay, to the bit."""
    slots = 40
    prefix, text = prefix_of_tokens(tiny, ids_of(slots, 5, 300)), ids_of(70, 6, 300)
    steering = Steering(tiny, WorkspaceConfig(chunk_size=24, sinks=2))
    window_settings = steering.window_settings
    try:
        cache = DynamicCache(config=tiny.model.config)
        prefix.fill(cache)
        window = ActiveWindow(steering.hooked, cache, window_settings, prefix=slots)
        run = steering.run()
        kept: list[torch.Tensor] = []

        class Watched(PassiveContext):
            """``run``, and a look at the cache after each pass."""

            def begin(self, cache: Any, prompt_ids: Any) -> None:
                run.begin(cache, prompt_ids)
                self.cache, self.most_tokens = cache, run.most_tokens

            def forward_kwargs(self, start: int, count: int) -> Any:
                return run.forward_kwargs(start, count)

            def fed(self, start: int, count: int) -> None:
                run.fed(start, count)
                kept.append(self.cache.layers[1].keys[:, :, :slots].clone())  # what it gives lives as long as it

            def chosen(self, logits: torch.Tensor, token: int) -> bool:
                return run.chosen(logits, token)

            def ended(self) -> None:
                run.ended()

        finished = make_engine(tiny).submit(text * 3, GREEDY, prefix=prefix, request_context=Watched()).result(60)
        assert finished.error is None, finished.error
        assert run.report.evicted_tokens > 0
        held = slots + 24 + window_settings.block
        assert run.report.cache_tokens is not None
        assert slots + 24 <= run.report.cache_tokens < held
        assert all(torch.equal(seen, prefix.keys[1]) for seen in kept)
        window.check_invariants()
    finally:
        steering.close()


@pytest.mark.parametrize("architecture", ["llama", "gpt_oss"])
def test_a_window_that_only_forgets_attends_slots_sinks_and_recent_tokens(
    architecture: str, tiny_models: dict[str, LoadedModel]
) -> None:
    """Against a cache cut by hand: keys keep their positions, so cutting is all that an eviction does."""
    model = tiny_models[architecture]
    slots, text = 12, ids_of(60, 6, 300)
    prefix = prefix_of_tokens(model, ids_of(slots, 5, 300))
    steering = Steering(model, WorkspaceConfig(chunk_size=24))
    try:
        settings = WindowSettings(chunk_size=16, sinks=2, virtual_tokens=0, block=8)
        cache, twin = (DynamicCache(config=model.model.config) for _ in range(2))
        prefix.fill(cache)
        prefix.fill(twin)
        window = ActiveWindow(steering.hooked, cache, settings, prefix=slots)
        forward = Forward(model)
        with torch.inference_mode():
            for start in range(0, 60, 4):
                piece = text[start : start + 4]
                found = forward(piece, cache, slots + start, {})
                expected = forward(piece, twin, slots + start, {})
                window.advance(len(piece))
                window.check_invariants()
                for layer in twin.layers:
                    if not layer.is_sliding and layer.keys.shape[2] >= slots + 24:
                        keep = [*range(slots + 2), *range(layer.keys.shape[2] - 14, layer.keys.shape[2])]
                        layer.keys, layer.values = layer.keys[:, :, keep], layer.values[:, :, keep]
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert window.seen == slots + 60
        assert window.held < slots + 24
    finally:
        steering.close()


def test_a_window_is_told_how_long_the_prefix_is(tiny: LoadedModel) -> None:
    cache = DynamicCache(config=tiny.model.config)
    prefix_of_tokens(tiny, ids_of(5, 1, 300)).fill(cache)
    steering = Steering(tiny, WorkspaceConfig(chunk_size=24))
    try:
        with pytest.raises(InvalidWorkspace, match="holds 5, the prefix has 4"):
            ActiveWindow(steering.hooked, cache, prefix=4)
    finally:
        steering.close()


# Text without a beginning.


class Template:
    """``Prompting`` over a tokenizer whose template is ``template``."""

    def __init__(self, make_tokenizer: Any, template: str, bos: str):
        tokenizer = make_tokenizer()
        tokenizer.chat_template, tokenizer.bos_token = template, bos
        self.tokenizer = tokenizer
        self.prompting = Prompting(
            LoadedModel(
                "t",
                stock_model("llama", vocab_size=400),
                tokenizer,
                frozenset({1}),
                512,
                torch.float32,
                torch.device("cpu"),
                "0" * 32,
            )
        )


MESSAGES = [{"role": "user", "content": "the fox"}]


def test_a_beginning_of_sequence_is_left_out_after_a_prefix(make_tokenizer: Any) -> None:
    made = Template(
        make_tokenizer, "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}", "Z"
    )
    whole = made.prompting.render(MESSAGES)
    assert whole[0] == made.tokenizer.bos_token_id
    assert made.prompting.render(MESSAGES, after_prefix=True) == whole[1:]
    with_it, _ = made.prompting.prepare(MESSAGES, GREEDY)
    without, _ = made.prompting.prepare(MESSAGES, GREEDY, after_prefix=True)
    assert (list(with_it), list(without)) == (whole, whole[1:])


def test_a_mark_of_every_turn_stays_though_it_is_called_beginning(tiny: LoadedModel) -> None:
    """As SmolLM2 has it: the tokenizer's beginning of sequence is ``<|im_start|>``."""
    prompting = Prompting(tiny)
    assert tiny.tokenizer.bos_token_id == tiny.tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert prompting.render(MESSAGES, after_prefix=True) == prompting.render(MESSAGES)


def test_plain_text_after_a_prefix_has_no_special_tokens(tiny: LoadedModel) -> None:
    prompting = Prompting(tiny)
    assert prompting.encode("a dog", after_prefix=True) == tiny.tokenizer.encode("a dog", add_special_tokens=False)


def test_messages_after_a_prefix_are_rendered_for_it(make_engine: MakeEngine, tiny: LoadedModel) -> None:
    engine = make_engine(tiny)
    prefix = prefix_of_tokens(tiny, ids_of(9, 5, 300))
    finished = engine.submit(MESSAGES, GREEDY, prefix=prefix).result(60)
    assert finished.usage.prompt_tokens == len(engine.render(MESSAGES, after_prefix=True))
