"""Virtual tokens act as keys and values at a constant distance before every query, whatever computes them and how."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache

from tests.support.architectures import (
    HEADS,
    VARIANTS,
    hooked_model,
    padded_batch,
    segment,
    segments,
    stock_model,
)
from workspace.attention import NAMES
from workspace.context import BACKENDS, Context, Recorder, Segment
from workspace.errors import InvalidWorkspace
from workspace.hooking import HookedModel

Run = Callable[..., torch.Tensor]


def run(hooked: HookedModel, ids: torch.Tensor, context: Context | None = None, **kwargs: Any) -> torch.Tensor:
    """Logits [R, T, V]."""
    with torch.inference_mode():
        return hooked.loaded.model(ids, workspace=context, **kwargs).logits


def decode(
    hooked: HookedModel, ids: torch.Tensor, contexts: list[Context | None], cuts: list[int], cache: Any = None
) -> torch.Tensor:
    """Logits of ``ids`` [1, T], fed in pieces that end at ``cuts``, each with its own context."""
    cache = cache or DynamicCache(config=hooked.loaded.model.config)
    found = []
    for start, end, context in zip([0, *cuts], [*cuts, ids.shape[1]], contexts, strict=True):
        positions = torch.arange(start, end)[None]
        found.append(run(hooked, ids[:, start:end], context, position_ids=positions, past_key_values=cache))
    return torch.cat(found, dim=1)


# The meaning of a virtual token.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "base"), VARIANTS)
def test_the_keys_of_a_real_prefix_made_virtual_act_as_that_prefix(name: str, base: str, backend: Any) -> None:
    """Every layer hooked, and each token of the prefix at the distance at which it really stands before the query."""
    config = {"layer_types": ["full_attention"] * 4} if name in ("gemma3", "gpt_oss") else {}
    hooked = hooked_model(name, base, **config)
    model = hooked.loaded.model
    ids = torch.randint(0, 100, (1, 17), generator=torch.Generator().manual_seed(5))
    prefix, cache = 11, DynamicCache(config=model.config)
    run(hooked, ids[:, :prefix], past_key_values=cache)
    real = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    alone = DynamicCache(config=model.config)
    for position in range(prefix, 17):
        at, token = torch.tensor([[position]]), ids[:, position : position + 1]
        expected = run(hooked, token, position_ids=at, past_key_values=cache)
        virtual = {
            layer: Segment(
                keys=hooked.rope.derotate(keys, torch.arange(prefix)[None], layer),
                values=values,
                bias=torch.zeros(1, 1, prefix),
                birth=torch.zeros(1, prefix, dtype=torch.long),
                distance=position - torch.arange(prefix),
            )
            for layer, (keys, values) in enumerate(real)
        }
        found = run(hooked, token, Context(virtual, backend=backend), position_ids=at, past_key_values=alone)
        torch.testing.assert_close(found, expected, atol=5e-4, rtol=1e-4)
    without = run(hooked, ids[:, prefix:], position_ids=torch.arange(prefix, 17)[None])
    assert (without[:, -1] - expected[:, -1]).abs().max() > 0.1  # the prefix matters


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "base"), VARIANTS)
def test_where_the_text_stands_does_not_matter(name: str, base: str, backend: Any) -> None:
    hooked = hooked_model(name, base)
    ids = torch.arange(12)[None]
    context = Context(segments(hooked), backend=backend)
    at_0, at_7, at_1000 = (run(hooked, ids, context, position_ids=torch.arange(12)[None] + p) for p in (0, 7, 1000))
    assert (at_0 - at_7).abs().max() < 1e-3
    assert (at_0 - at_1000).abs().max() < 1e-3
    nearer = Context({layer: segment(seed=layer, distance=4) for layer in hooked.layers}, backend=backend)
    assert (at_0 - run(hooked, ids, nearer)).abs().max() > 1e-2  # while the distance does


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_a_bias_weighs_a_token_as_often_as_it_says(name: str) -> None:
    """A bias of log 3 on one token equals three copies of it; a bias of -1e9 removes it."""
    hooked = hooked_model(name)
    one, two = segment(1, seed=1), segment(2, seed=1)
    three = segment(
        3, seed=1, **{f: getattr(one, f).expand(-1, -1, 3, -1) for f in ("keys", "values")}, bias=torch.zeros(1, 1, 3)
    )
    heavy = segment(1, seed=1, keys=one.keys, values=one.values, bias=torch.full((1, 1, 1), 3.0).log())
    first_only = segment(2, seed=1, keys=two.keys, values=two.values, bias=torch.tensor([[[0.0, -1e9]]]))
    first = segment(1, seed=1, keys=two.keys[:, :, :1], values=two.values[:, :, :1], bias=torch.zeros(1, 1, 1))
    ids = torch.arange(9)[None]
    for left, right in ((three, heavy), (first_only, first)):
        results = [run(hooked, ids, Context(dict.fromkeys(hooked.layers, which))) for which in (left, right)]
        torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


# Back ends.


@pytest.mark.parametrize(("name", "base"), VARIANTS)
def test_the_back_ends_agree(name: str, base: str) -> None:
    hooked = hooked_model(name, base)
    ids, mask, positions = padded_batch()
    distances = torch.tensor([1, 2, 4, 8, 300])
    seen = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 0, 1, 0, 0]]).bool()
    births = torch.tensor([[0, 0, 3, 6, 100]])
    carried = segments(hooked, rows=3, distance=distances, mask=seen, birth=births)
    arguments = {"attention_mask": mask, "position_ids": positions}
    results = {backend: run(hooked, ids, Context(carried, backend=backend), **arguments) for backend in BACKENDS}
    results["default"] = run(hooked, ids, Context(carried), **arguments)
    stock = run(hooked, ids, **arguments)
    for backend, logits in results.items():
        difference = (logits - results["eager"])[mask.bool()].abs().max()
        assert difference < 1e-4, backend
    assert (results["eager"] - stock)[mask.bool()].abs().max() > 0.1
    assert torch.equal(results["default"], results["merge"])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_back_ends_agree_on_any_shape(data: st.DataObject) -> None:
    """Rows, tokens, births, masks, distances and chunkings drawn at random, with sinks; against one eager pass."""
    hooked = PROPERTY.setdefault("gpt_oss", hooked_model("gpt_oss"))
    draw = data.draw
    rows, length, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 12)), draw(st.integers(1, 6))
    cut = draw(st.integers(1, length))
    seed = draw(st.integers(0, 1000))
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 100, (rows, length), generator=random)
    own_rows = draw(st.sampled_from([1, rows]))
    carried = {
        layer: segment(
            tokens,
            seed=seed + layer,
            rows=own_rows,
            birth=torch.randint(0, length + 2, (own_rows, tokens), generator=random),
            mask=torch.rand(rows, tokens, generator=random) < 0.7,
            distance=torch.randint(-2, 50, (tokens,), generator=random),
        )
        for layer in hooked.layers
    }
    whole = run(hooked, ids, Context(carried, backend="eager"))
    for backend in BACKENDS:
        cache = DynamicCache(config=hooked.loaded.model.config)
        parts = [
            run(
                hooked,
                ids[:, part],
                Context(carried, backend=backend),
                position_ids=torch.arange(length)[None, part],
                past_key_values=cache,
            )
            for part in (slice(0, cut), slice(cut, length))
            if ids[:, part].shape[1]
        ]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-3, rtol=1e-3)


PROPERTY: dict[str, HookedModel] = {}


# Replays.


@pytest.mark.parametrize(("name", "base"), VARIANTS)
def test_a_segment_born_while_decoding_equals_one_pass_with_its_birth(name: str, base: str) -> None:
    hooked = hooked_model(name, base)
    ids = torch.randint(0, 100, (1, 16), generator=torch.Generator().manual_seed(2))
    born = {layer: segment(seed=layer, birth=12) for layer in hooked.layers}
    taught = run(hooked, ids, Context(born))
    # The decode loop carries nothing until the twelfth token, and then the segment without a birth.
    lived = decode(hooked, ids, [None, None, None] + [Context(segments(hooked))] * 4, [10, 11, 12, 13, 14, 15])
    torch.testing.assert_close(lived, taught, atol=2e-4, rtol=1e-4)
    assert (taught - run(hooked, ids))[:, 12:].abs().max() > 0.1


def test_rows_of_different_length_in_one_batch_equal_rows_on_their_own() -> None:
    for name in ("llama", "gpt_oss"):
        hooked = hooked_model(name)
        ids, mask, positions = padded_batch()
        lengths = [5, 2, 0]
        seen = torch.arange(5)[None] < torch.tensor(lengths)[:, None]
        own = {layer: segment(seed=layer, rows=3, mask=seen) for layer in hooked.layers}
        batch = run(hooked, ids, Context(own), attention_mask=mask, position_ids=positions)
        for row, length in enumerate(lengths):
            alone = {
                layer: segment(
                    length,
                    keys=whole.keys[row : row + 1, :, :length],
                    values=whole.values[row : row + 1, :, :length],
                    bias=whole.bias[row : row + 1, :, :length],
                )
                for layer, whole in own.items()
                if length
            }
            real = mask[row].bool()
            single = run(hooked, ids[row : row + 1, real], Context(alone))
            torch.testing.assert_close(batch[row : row + 1, real], single, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("cache_of", ["dynamic", "static"])
@pytest.mark.parametrize(("name", "base"), VARIANTS)
def test_a_prompt_in_chunks_equals_one_pass(name: str, base: str, cache_of: str) -> None:
    hooked = hooked_model(name, base)
    config = hooked.loaded.model.config
    ids = torch.randint(0, 100, (1, 40), generator=torch.Generator().manual_seed(4))
    context = Context(segments(hooked))
    whole = run(hooked, ids, context)
    cache = DynamicCache(config=config) if cache_of == "dynamic" else StaticCache(config=config, max_cache_len=64)
    cuts = [13, 30, 38, 39]
    torch.testing.assert_close(decode(hooked, ids, [context] * 5, cuts, cache), whole, atol=3e-4, rtol=1e-4)


def test_a_segment_made_in_inference_mode_serves_training_and_the_other_way_round() -> None:
    hooked = hooked_model("llama")
    ids = torch.arange(6)[None]
    with torch.inference_mode():
        context = Context(segments(hooked))
        first = hooked.loaded.model(ids, workspace=context).logits
    later = hooked.loaded.model(ids, workspace=context).logits
    torch.testing.assert_close(first, later)
    assert all(len(carried.placed) == 1 for carried in context.segments.values())


def test_what_is_kept_with_a_segment_is_used_again_and_holds_no_gradient() -> None:
    hooked = hooked_model("llama")
    ids = torch.arange(6)[None]
    context = Context(segments(hooked))
    for carried in context.segments.values():
        carried.keys.requires_grad_()
    logits = hooked.loaded.model(ids, workspace=context).logits
    assert logits.requires_grad
    assert not any(carried.placed for carried in context.segments.values())
    run(hooked, ids, context)
    kept = [next(iter(carried.placed.values())) for carried in context.segments.values()]
    run(hooked, ids, context)
    again = [next(iter(carried.placed.values())) for carried in context.segments.values()]
    assert all(a is b for a, b in zip(kept, again, strict=True))
    assert not any(tensor.requires_grad for ready in kept for tensor in ready)


# What is shown.


@pytest.mark.parametrize(("name", "base"), VARIANTS)
def test_recorded_queries_are_content_and_do_not_know_their_position(name: str, base: str) -> None:
    hooked = hooked_model(name, base)
    ids = torch.arange(7)[None]
    near, far = (Recorder(hooked.layers, queries=True) for _ in range(2))
    run(hooked, ids, Context(recorder=near))
    run(hooked, ids, Context(recorder=far), position_ids=torch.arange(7)[None] + 500)
    assert set(near.queries) == set(hooked.layers)
    for layer in hooked.layers:
        assert near.queries[layer].shape == (1, 4, 7, 8)
        torch.testing.assert_close(near.queries[layer], far.queries[layer], atol=1e-3, rtol=1e-3)
    assert not near.attention_mass
    # As the layer had them before RoPE.
    layer = hooked.layers[0]
    seen: list[torch.Tensor] = []
    attention = hooked.loaded.model.model.layers[layer].self_attn
    module = attention.q_norm if hasattr(attention, "q_norm") else attention.q_proj
    handle = module.register_forward_hook(lambda m, a, out: seen.append(out))
    run(hooked, ids)
    handle.remove()
    raw = seen[0] if seen[0].shape == (1, 4, 7, 8) else seen[0].view(1, 7, 4, 8).transpose(1, 2)
    torch.testing.assert_close(near.queries[layer], raw, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "base"), VARIANTS)
def test_recorded_attention_mass_is_what_the_weights_say(name: str, base: str) -> None:
    hooked, stock = hooked_model(name, base), stock_model(name)
    ids = torch.arange(9)[None]
    recorder = Recorder(hooked.layers, mass=True)
    run(hooked, ids, Context(recorder=recorder))
    with torch.inference_mode():
        weights = stock(ids, output_attentions=True).attentions
    for layer in hooked.layers:
        expected = weights[layer].view(1, HEADS, 2, 9, 9).sum(dim=(2, 3))
        torch.testing.assert_close(recorder.attention_mass[layer], expected, atol=1e-4, rtol=1e-4)
    with_virtual = Recorder(hooked.layers, mass=True)
    run(hooked, ids, Context(segments(hooked), recorder=with_virtual))
    layer = hooked.layers[0]
    assert (with_virtual.attention_mass[layer].sum() < 0.95 * recorder.attention_mass[layer].sum()).all()


@pytest.mark.parametrize("backend", ["merge", "eager"])
def test_attention_weights_are_those_of_the_real_keys(backend: Any) -> None:
    hooked = hooked_model("gpt_oss")
    context = Context(segments(hooked), backend=backend)
    recorder = Recorder(hooked.layers, mass=True)
    with torch.inference_mode():
        context = Context(context.segments, backend=backend, recorder=recorder)
        found = hooked.loaded.model(torch.arange(9)[None], workspace=context, output_attentions=True).attentions
    for layer in hooked.layers:
        assert found[layer].shape == (1, 4, 9, 9)
        mass = found[layer].view(1, HEADS, 2, 9, 9).sum(dim=(2, 3))
        torch.testing.assert_close(mass, recorder.attention_mass[layer], atol=1e-4, rtol=1e-4)


# Errors.


@pytest.mark.parametrize("base", ["eager", "sdpa"])
def test_virtual_tokens_of_an_unhooked_layer_are_an_error_even_without_hooks(base: str) -> None:
    hooked = hooked_model("llama", base, layers=[1])
    assert hooked.loaded.model.config._attn_implementation == NAMES[base]  # type: ignore[index]
    with pytest.raises(InvalidWorkspace, match="layer 2 is not hooked; hooked are 1"):
        run(hooked, torch.arange(4)[None], Context({2: segment()}))
    hooked.remove()
    with pytest.raises(InvalidWorkspace, match="layer 1, which is not hooked"):
        run(hooked, torch.arange(4)[None], Context({1: segment()}))
