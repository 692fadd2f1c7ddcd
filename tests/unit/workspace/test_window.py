"""The capped cache: equal to a sliding window when nothing is remembered, to the full context when everything is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from workspace.compaction import attention_shares
from workspace.context import Context
from workspace.errors import InvalidWorkspace
from workspace.hooking import HookedModel, hookable_layers
from workspace.models import LoadedModel
from workspace.window import ActiveWindow, WindowSettings

SMALL = WindowSettings(chunk_size=16, sinks=2, virtual_tokens=4, block=8, reference_queries=8)
EXACT = WindowSettings(chunk_size=16, sinks=2, virtual_tokens=64, block=8, reference_queries=8, stride=1)


@pytest.fixture(params=["llama", "gpt_oss", "gemma3"])
def hooked(request: pytest.FixtureRequest, tiny_models: dict[str, LoadedModel]) -> Iterator[HookedModel]:
    """A tiny model of each architecture, hooked on all layers that can be."""
    loaded = tiny_models[request.param]
    model = HookedModel(loaded, hookable_layers(loaded.model.config))
    yield model
    model.remove()


@pytest.fixture
def llama(tiny_models: dict[str, LoadedModel]) -> Iterator[HookedModel]:
    """The tiny Llama, both layers hooked."""
    model = HookedModel(tiny_models["llama"], (0, 1))
    yield model
    model.remove()


def make_ids(count: int, seed: int = 0) -> Tensor:
    """Random token ids, [1, count]."""
    return torch.randint(2, 250, (1, count), generator=torch.Generator().manual_seed(seed))


def make_window(hooked: HookedModel, settings: WindowSettings) -> ActiveWindow:
    """A window over a new cache."""
    return ActiveWindow(hooked, DynamicCache(config=hooked.loaded.model.config), settings)


@torch.no_grad()
def feed(hooked: HookedModel, window: ActiveWindow, ids: Tensor, step: int | None = None) -> Tensor:
    """Take ``window`` through ``ids`` [1, T], ``step`` tokens a pass (None: its own blocks); logits [T - seen, V]."""
    logits = []
    while window.seen < ids.shape[1]:
        first, count = next(window.pieces(ids.shape[1]))
        count = min(count, step or count)
        recorder = window.recorder(count)
        context = Context(segments=window.segments(count), recorder=recorder)
        logits.append(run(hooked, ids[:, first : first + count], first, window.cache, workspace=context))
        window.advance(count, recorder)
        window.check_invariants()
    return torch.cat(logits)


def run(hooked: HookedModel, ids: Tensor, first: int, cache: DynamicCache | None, **kwargs: Any) -> Tensor:
    """Logits [T, V] of one pass at positions from ``first``."""
    positions = torch.arange(first, first + ids.shape[1])[None]
    output = hooked.loaded.model(
        input_ids=ids, past_key_values=cache, position_ids=positions, use_cache=cache is not None, **kwargs
    )
    return output.logits[0].float()  # type: ignore[no-any-return]


@torch.no_grad()
def sliding_oracle(hooked: HookedModel, ids: Tensor, settings: WindowSettings) -> Tensor:
    """One pass without a cache over all of ``ids``; a mask hides what the cache of ``settings`` had evicted by then."""
    config = hooked.loaded.model.config
    length = ids.shape[1]
    query, key = torch.arange(length)[:, None], torch.arange(length)[None]
    block, recent = settings.block, settings.chunk_size - settings.sinks
    evictions = ((query // block * block - settings.chunk_size) // block).clamp_min(0)  # before the pass of this query
    oldest = settings.sinks + evictions * block
    capped = (key <= query) & ((key >= oldest) | (key < settings.sinks))
    assert int(oldest.max()) + recent <= length + block
    masks = {"full_attention": capped}
    if getattr(config, "sliding_window", None):
        masks["sliding_attention"] = (key <= query) & (query - key < config.sliding_window)
    additive = {
        kind: torch.zeros(1, 1, length, length).masked_fill(~mask, torch.finfo(torch.float32).min)
        for kind, mask in masks.items()
    }
    return run(hooked, ids, 0, None, attention_mask=additive if len(additive) > 1 else additive["full_attention"])


def test_without_virtual_tokens_it_is_a_sliding_window(hooked: HookedModel) -> None:
    ids = make_ids(61)
    settings = WindowSettings(chunk_size=16, sinks=2, virtual_tokens=0, block=8)
    window = make_window(hooked, settings)
    assert torch.allclose(feed(hooked, window, ids), sliding_oracle(hooked, ids, settings), atol=2e-4)
    assert window.summary is None
    assert window.segments() == {}
    assert window.seen - window.held == 40


def test_the_cache_is_capped_and_sliding_layers_are_left_alone(hooked: HookedModel) -> None:
    window, plain = make_window(hooked, SMALL), DynamicCache(config=hooked.loaded.model.config)
    ids = make_ids(100)
    feed(hooked, window, ids)
    run(hooked, ids, 0, plain)
    lengths = {layer.keys.shape[2] for layer in window.cache.layers if not layer.is_sliding}
    assert lengths == {window.held}
    assert SMALL.chunk_size <= window.held < SMALL.chunk_size + SMALL.block
    for capped, stock in zip(window.cache.layers, plain.layers, strict=True):
        assert not capped.is_sliding or capped.keys.shape == stock.keys.shape


def test_a_budget_for_everything_gives_the_full_context(hooked: HookedModel) -> None:
    ids = make_ids(44)
    window = make_window(hooked, EXACT)
    logits = feed(hooked, window, ids, step=1)
    assert window.seen - window.held == 24
    truth = run(hooked, ids, 0, None)
    assert torch.allclose(logits, truth, atol=5e-4), (logits - truth).abs().max()


def test_forgetting_is_not_the_full_context(hooked: HookedModel) -> None:
    """What the test above compares is far apart where nothing is remembered."""
    ids = make_ids(44)
    window = make_window(hooked, WindowSettings(chunk_size=16, sinks=2, virtual_tokens=0, block=8))
    assert (feed(hooked, window, ids, step=1) - run(hooked, ids, 0, None)).abs().max() > 0.1


def test_virtual_tokens_bring_the_logits_nearer_to_the_full_context(hooked: HookedModel) -> None:
    distances = []
    for tokens in (0, 12):
        total = 0.0
        for seed in range(6):
            ids = make_ids(60, seed)
            window = make_window(hooked, WindowSettings(16, 2, virtual_tokens=tokens, block=8, reference_queries=8))
            truth = run(hooked, ids, 0, None).log_softmax(-1)
            found = feed(hooked, window, ids).log_softmax(-1)
            total += float((truth.exp() * (truth - found)).sum(-1)[24:].mean())  # KL from the first eviction on
        distances.append(total)
    assert distances[1] < 0.9 * distances[0], distances


def test_tokens_one_by_one_and_in_blocks_evict_the_same(llama: HookedModel) -> None:
    ids = make_ids(70)
    windows = [make_window(llama, SMALL), make_window(llama, SMALL)]
    for window, step in zip(windows, (None, 1), strict=True):
        feed(llama, window, ids, step=step)
    assert windows[0].held == windows[1].held
    assert windows[0].summary is not None
    assert windows[1].summary is not None
    assert windows[0].summary.tokens == windows[1].summary.tokens == 70 - windows[0].held


def test_a_block_is_merged_with_the_summary_of_before(llama: HookedModel) -> None:
    window = make_window(llama, SMALL)
    counts = []
    for total in (24, 32, 40):
        feed(llama, window, make_ids(total))
        assert window.summary is not None
        counts.append((window.summary.tokens, window.summary.keys.shape[2], window.summary.frame))
    assert counts == [(8, 4, 24), (16, 4, 32), (24, 4, 40)]


def test_eviction_can_be_asked_for(llama: HookedModel) -> None:
    window = make_window(llama, SMALL)
    feed(llama, window, make_ids(21))
    assert window.held == 21
    assert window.summary is None
    assert window.evict() == 5
    assert window.held == 16
    assert window.evict() == 0
    assert window.summary is not None
    assert window.summary.keys.shape[2] == 4
    window.check_invariants()


def test_segments_keep_their_place_while_decoding(llama: HookedModel) -> None:
    window = make_window(llama, SMALL)
    feed(llama, window, make_ids(24))
    first = window.segments()
    assert window.segments() is first
    assert first[0].distance == 8
    feed(llama, window, make_ids(25), step=1)
    assert window.segments() is first
    assert window.segments(6)[0].distance == 1 + 3


def test_virtual_tokens_stand_where_their_tokens_were(llama: HookedModel) -> None:
    """The summary of an eviction without compaction, seen from a later position, has the cached keys' scores."""
    window = make_window(llama, EXACT)
    ids = make_ids(24)
    cache = DynamicCache(config=llama.loaded.model.config)
    run(llama, ids, 0, cache)
    feed(llama, window, ids)
    assert window.summary is not None
    segment = window.segments()[1]
    position = torch.tensor([[window.seen]])
    rope = llama.rope.of(1)
    turned = rope.rotate(rope.shift(segment.keys, -segment.distance), position)
    assert torch.allclose(turned, cache.layers[1].keys[:, :, 2:10], atol=1e-4)
    assert torch.allclose(segment.values, cache.layers[1].values[:, :, 2:10], atol=1e-5)  # read in other pieces
    assert segment.birth.tolist() == [[24] * 8]


def test_probes_are_answered_better_when_they_are_known(llama: HookedModel) -> None:
    random = torch.Generator().manual_seed(5)
    probes = {layer: 3 * torch.randn(1, 4, 40, 8, generator=random) for layer in (0, 1)}
    errors = []
    for given in (None, probes):
        window = make_window(llama, WindowSettings(16, 2, virtual_tokens=3, block=12, reference_queries=8))
        feed(llama, window, make_ids(27))
        cached = [(layer.keys.clone(), layer.values.clone()) for layer in window.cache.layers]
        window.evict(given)
        segments = window.segments(2)  # placed one token after the eviction
        position = torch.tensor([[28]])
        total = 0.0
        for layer, (keys, values) in enumerate(cached):
            query = llama.rope.rotate(probes[layer], position.expand(1, 40), layer).reshape(1, 2, 80, 8)
            truth = attention_shares(query, keys, torch.zeros(1, 2, 27), None, 8**-0.5) @ values
            segment, kept = segments[layer], window.cache.layers[layer]
            rope = llama.rope.of(layer)
            virtual = rope.rotate(rope.shift(segment.keys, -segment.distance), position)
            bias = torch.cat((segment.bias, torch.zeros(1, 2, 16)), dim=2)
            shares = attention_shares(query, torch.cat((virtual, kept.keys), dim=2), bias, None, 8**-0.5)
            found = shares @ torch.cat((segment.values, kept.values), dim=2)
            total += float((found - truth).square().mean())
        errors.append(total)
    assert errors[1] < 0.8 * errors[0], errors


def test_it_works_in_bfloat16(tiny_models: dict[str, LoadedModel], make_tokenizer: Any) -> None:
    from tests.unit.workspace.conftest import build_model
    from workspace.models import adopt_model

    tokenizer = make_tokenizer()
    loaded = adopt_model("tiny", build_model("llama", len(tokenizer)).to(torch.bfloat16), tokenizer)
    hooked = HookedModel(loaded, (0, 1))
    window = make_window(hooked, SMALL)
    assert feed(hooked, window, make_ids(60)).isfinite().all()
    assert window.cache.layers[0].keys.dtype == torch.bfloat16


def test_only_hooked_layers_remember_but_all_are_capped(tiny_models: dict[str, LoadedModel]) -> None:
    hooked = HookedModel(tiny_models["llama"], (1,))
    window = make_window(hooked, SMALL)
    feed(hooked, window, make_ids(50))
    assert list(window.segments()) == [1]
    assert {layer.keys.shape[2] for layer in window.cache.layers} == {window.held}
    hooked.remove()


def test_gradients_reach_the_virtual_tokens(llama: HookedModel) -> None:
    window = make_window(llama, SMALL)
    feed(llama, window, make_ids(24))
    segments = window.segments(4)
    for segment in segments.values():
        for part in (segment.keys, segment.values, segment.bias):
            part.requires_grad_()
    logits = run(llama, make_ids(4, 1), 24, window.cache, workspace=Context(segments=segments))
    logits.log_softmax(-1)[:, 5].sum().backward()
    for segment in segments.values():
        assert all(part.grad.abs().max() > 0 for part in (segment.keys, segment.values, segment.bias))


def test_a_pass_that_the_window_did_not_see_is_noticed(llama: HookedModel) -> None:
    window = make_window(llama, SMALL)
    run(llama, make_ids(5), 0, window.cache)
    with pytest.raises(InvalidWorkspace, match="5"):
        window.advance(4)


def test_a_used_cache_is_refused(llama: HookedModel) -> None:
    cache = DynamicCache(config=llama.loaded.model.config)
    run(llama, make_ids(5), 0, cache)
    with pytest.raises(InvalidWorkspace, match="not empty"):
        ActiveWindow(llama, cache, SMALL)


def test_eviction_without_recorded_queries_is_refused(llama: HookedModel) -> None:
    window = make_window(llama, SMALL)
    run(llama, make_ids(24), 0, window.cache)
    with pytest.raises(InvalidWorkspace, match="recorder"):
        window.advance(24)


@pytest.mark.parametrize(
    "bad",
    [{"chunk_size": 4}, {"block": 0}, {"sinks": -1}, {"virtual_tokens": -1}, {"reference_queries": 0}, {"stride": 0}],
)
def test_settings_out_of_range_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(InvalidWorkspace):
        WindowSettings(**bad)


def test_a_fork_goes_its_own_way(llama: HookedModel) -> None:
    window = make_window(llama, SMALL)
    feed(llama, window, make_ids(31))
    before = [layer.keys.clone() for layer in window.cache.layers]
    twin = window.fork(WindowSettings(chunk_size=12, sinks=2, virtual_tokens=3, block=30, reference_queries=4))
    twin.evict()
    twin.check_invariants()
    assert (twin.held, window.held) == (12, 23)
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(window.cache.layers, before, strict=True))
    same = window.fork(SMALL)
    ids = make_ids(40)
    assert torch.equal(feed(llama, window, ids), feed(llama, same, ids))


def test_sliding_layers_cannot_be_forked(tiny_models: dict[str, LoadedModel]) -> None:
    hooked = HookedModel(tiny_models["gemma3"], (1,))
    with pytest.raises(InvalidWorkspace, match="sliding"):
        make_window(hooked, SMALL).fork(SMALL)
    hooked.remove()
