"""Generations that share passes: each gets what it would get alone, whoever comes, goes or fails beside it."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from tests.support.architectures import VARIANTS, hooked_model, loaded, segments, stock_model
from workspace.attention import adopt_attention
from workspace.context import Context, Delta, Recorder
from workspace.engine import Engine
from workspace.forward import Forward, PassiveContext, Row
from workspace.generation import Generation, TokenChunk
from workspace.models import LoadedModel
from workspace.prefix import prefix_of_tokens
from workspace.row_cache import RowCache, RowLayer
from workspace.row_slab import Group, Slabs
from workspace.sampling import SamplingParams
from workspace.steering import Steering
from workspace.steering_types import Toggles
from workspace.workspace_config import ControllerConfig, WorkspaceConfig

MakeEngine = Callable[..., Engine]
ARCHITECTURES = ("llama", "gemma3", "gpt_oss")
LENGTHS = (3, 30, 11, 50, 5, 21)


def greedy(tokens: int, **more: Any) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, **more)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return torch.randint(2, 300, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


CAPPED: dict[str, Any] = {
    "chunk_size": 48,
    "virtual_tokens": 8,
    "slots": 8,
    "kv_plan_bias": 1.0,
    "thresholds": ControllerConfig(halt_on_repetition=False),
}


class Held(PassiveContext):
    """The first generation of an engine: while it is held, others can be submitted that then start together."""

    def __init__(self) -> None:
        self.entered, self.go = threading.Event(), threading.Event()

    def forward_kwargs(self, start: int, count: int) -> Mapping[str, Any]:
        self.entered.set()
        assert self.go.wait(20)
        return {}


def at_once(engine: Engine, submit: Callable[[], list[Generation]]) -> list[Generation]:
    """The generations that ``submit`` makes, none of which begins before all are there."""
    held = Held()
    first = engine.submit([2, 3], greedy(1), request_context=held)
    assert held.entered.wait(20)
    generations = submit()
    held.go.set()
    first.result(20)
    return generations


def logprobs(generation: Generation) -> list[float]:
    return [e.logprob for e in generation.stream() if isinstance(e, TokenChunk) and e.logprob is not None]


# The pass.


@pytest.mark.parametrize(("name", "base"), VARIANTS)
def test_rows_of_any_lengths_get_the_logits_of_single_passes(name: str, base: str) -> None:
    """Windows of 8 are shorter than, as long as, and longer than the rows; eight steps go past their ends."""
    model = stock_model(name, base)
    assert adopt_attention(model)
    forward = Forward(loaded(model), rows=10)
    assert forward.rows_agree()
    lengths = (1, 7, 8, 9, 40)
    prompts = [torch.randint(0, 100, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in lengths]
    with torch.inference_mode():
        alone, together = ([forward.new_cache() for _ in prompts] for _ in range(2))
        for caches in (alone, together):
            for prompt, cache in zip(prompts, caches, strict=True):
                forward(prompt, cache, 0, {})
        for step in range(8):
            tokens = [(7 * step + row) % 100 for row in range(len(prompts))]
            places = [length + step for length in lengths]
            wanted = [forward([t], c, p, {}) for t, c, p in zip(tokens, alone, places, strict=True)]
            rows = [Row(t, p, c) for t, p, c in zip(tokens, places, together, strict=True)]
            torch.testing.assert_close(forward.together(rows), torch.stack(wanted), atol=2e-4, rtol=1e-4)
            for cache in together:
                cache.check_invariants()
        for one, other in zip(alone, together, strict=True):
            for left, right in zip(one.layers, other.layers, strict=True):
                torch.testing.assert_close(left.keys, right.keys, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("others", [1, 4])
def test_contexts_act_on_their_own_rows_only(others: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Virtual tokens, deltas and probes of three rows, beside some without: each as if it were alone."""
    hooked = hooked_model(name)
    monkeypatch.setattr("workspace.forward.Slabs", functools.partial(Slabs, forced=True))
    groups: list[int] = []
    attend = Group.attend
    monkeypatch.setattr(Group, "attend", lambda self, *args: groups.append(len(self.rows)) or attend(self, *args))
    forward = Forward(hooked.loaded, rows=16)
    vectors = torch.randn(3, hooked.hidden_size, generator=torch.Generator().manual_seed(1))

    def contexts() -> list[Context | None]:
        deltas = {layer: Delta(vectors[:1], torch.tensor([2])) for layer in hooked.layers}
        return [
            Context(segments(hooked), recorder=Recorder(hooked.layers, queries=True, mass=True)),
            None,
            Context(deltas=deltas, recorder=Recorder(hooked.layers[:1])),
            Context(segments(hooked, tokens=3), deltas, recorder=Recorder(hooked.layers)),
            *[None] * (others - 1),
        ]

    prompts = [[5, 6, 7], [8] * 12, [9, 10], [11] * 7, [12] * 5, [13] * 9, [14, 15]][: 3 + others]
    with torch.inference_mode():
        alone, together = ([forward.new_cache() for _ in prompts] for _ in range(2))
        for caches in (alone, together):
            for prompt, cache in zip(prompts, caches, strict=True):
                forward(prompt, cache, 0, {})
        apart, shared = contexts(), contexts()
        wanted = [
            forward([20], cache, len(prompt), {} if context is None else {"workspace": context})
            for prompt, cache, context in zip(prompts, alone, apart, strict=True)
        ]
        rows = [Row(20, len(p), c, x) for p, c, x in zip(prompts, together, shared, strict=True)]
        torch.testing.assert_close(forward.together(rows), torch.stack(wanted), atol=2e-4, rtol=1e-4)
    acting = [layer for layer in hooked.layers if layer in segments(hooked)]
    assert groups.count(3 + others) >= (len(acting) if others > 1 else 0), "one group, and some of its rows beside it"
    for left, right in zip(apart, shared, strict=True):
        if left is None or right is None:
            continue
        assert left.recorder is not None
        assert right.recorder is not None
        for kind in ("residuals", "queries", "attention_mass"):
            seen, expected = getattr(right.recorder, kind), getattr(left.recorder, kind)
            assert set(seen) == set(expected)
            for layer, tensor in seen.items():
                torch.testing.assert_close(tensor, expected[layer], atol=1e-4, rtol=1e-4)


def test_a_pass_that_fails_half_way_changes_no_cache() -> None:
    hooked = hooked_model("llama")
    forward = Forward(hooked.loaded)
    last = hooked.layers[-1]
    narrow = torch.zeros(1, 2, 5, 4)
    wrong = {last: replace(segments(hooked)[last], keys=narrow, values=narrow)}
    with torch.inference_mode():
        caches = [forward.new_cache(), forward.new_cache()]
        for cache in caches:
            forward([1, 2, 3], cache, 0, {})
        before = [layer.keys.clone() for cache in caches for layer in cache.layers]
        with pytest.raises(RuntimeError):
            forward.together([Row(4, 3, caches[0]), Row(4, 3, caches[1], Context(wrong))])
        after = [layer.keys for cache in caches for layer in cache.layers]
    assert all(torch.equal(left, right) for left, right in zip(before, after, strict=True))


def test_models_whose_rows_would_differ_are_computed_alone(
    tiny: LoadedModel, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Forward.together
    monkeypatch.setattr(Forward, "together", lambda self, rows: real(self, rows).flip(0))
    engine = make_engine(tiny)
    prompts = [prompt_of(length, seed=length) for length in LENGTHS[:3]]
    alone = [engine.submit(prompt, greedy(12)).result(20).token_ids for prompt in prompts]
    together = at_once(engine, lambda: [engine.submit(prompt, greedy(12)) for prompt in prompts])
    assert [item.result(20).token_ids for item in together] == alone
    stats = engine.stats()
    assert stats.decode_rows == stats.decode_passes


# In the engine.


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_streams_share_passes_and_give_what_each_gives_alone(
    architecture: str, tiny_models: dict[str, LoadedModel], make_engine: MakeEngine
) -> None:
    """Greedy and sampled, with different cartridges and without, penalties, logprobs; rows join as places get free."""
    model = tiny_models[architecture]
    cartridges = [None, prefix_of_tokens(model, prompt_of(13, seed=90)), prefix_of_tokens(model, prompt_of(4, seed=91))]
    wishes = [
        greedy(9),
        SamplingParams(max_tokens=24, seed=5, top_p=0.9, ignore_eos=True),
        greedy(17, logprobs=True, top_logprobs=3),
        SamplingParams(max_tokens=12, seed=6, temperature=1.5, repetition_penalty=1.2, logprobs=True),
        greedy(1),
        SamplingParams(max_tokens=30, seed=7, min_p=0.05, logit_bias=((9, 2.0),), stop_ids=frozenset({40, 41})),
    ]
    alone_engine = make_engine(model, batching="exact", prefill_chunk=16)
    engine = make_engine(model, max_active=4, max_waiting=8, prefill_chunk=16)

    def all_of(into: Engine) -> Iterator[Generation]:
        for place, (length, params) in enumerate(zip(LENGTHS, wishes, strict=True)):
            yield into.submit(prompt_of(length, seed=length), params, prefix=cartridges[place % 3])

    alone = [(item.result(60), logprobs(item)) for item in all_of(alone_engine)]
    together = [(item.result(60), logprobs(item)) for item in at_once(engine, lambda: list(all_of(engine)))]
    for (left, left_probs), (right, right_probs) in zip(alone, together, strict=True):
        assert right.reason == left.reason
        assert right.token_ids == left.token_ids
        assert right.text == left.text
        assert right_probs == pytest.approx(left_probs, abs=1e-4)
    stats = engine.stats()
    assert stats.decode_rows > 1.5 * stats.decode_passes
    assert alone_engine.stats().decode_rows == alone_engine.stats().decode_passes


def test_cancel_ends_one_row_within_a_token_and_no_other(tiny: LoadedModel, make_engine: MakeEngine) -> None:
    engine = make_engine(tiny)
    prompts = [prompt_of(length, seed=length) for length in LENGTHS[:3]]
    wanted = [engine.submit(prompt, greedy(300)).result(60).token_ids for prompt in prompts]
    running = at_once(engine, lambda: [engine.submit(prompt, greedy(300)) for prompt in prompts])
    stream = running[1].stream()
    for _ in range(6):
        next(stream)
    running[1].cancel()
    ended = running[1].result(20)
    assert ended.reason == "cancelled"
    assert ended.token_ids == wanted[1][: len(ended.token_ids)]
    assert len(ended.token_ids) < 300
    assert [running[row].result(60).token_ids for row in (0, 2)] == [wanted[0], wanted[2]]


def test_a_row_whose_sampler_fails_ends_alone(tiny: LoadedModel, make_engine: MakeEngine) -> None:
    class Broken(PassiveContext):
        def chosen(self, logits: torch.Tensor, token: int) -> bool:
            raise FloatingPointError("no number")

    engine = make_engine(tiny)
    wanted = engine.submit(prompt_of(5), greedy(40)).result(20).token_ids
    good, bad = at_once(
        engine,
        lambda: [
            engine.submit(prompt_of(5), greedy(40)),
            engine.submit(prompt_of(9), greedy(40), request_context=Broken()),
        ],
    )
    assert bad.result(20).error == "FloatingPointError: no number"
    assert good.result(20).token_ids == wanted


def test_a_prompt_whose_first_pass_fails_ends_alone(tiny: LoadedModel, make_engine: MakeEngine) -> None:
    class Broken(PassiveContext):
        def fed(self, start: int, count: int) -> None:
            raise ValueError("not that prompt")

    engine = make_engine(tiny)
    good, bad = at_once(
        engine,
        lambda: [
            engine.submit(prompt_of(5), greedy(4)),
            engine.submit(prompt_of(400), greedy(4), request_context=Broken()),
        ],
    )
    assert bad.result(20).error == "ValueError: not that prompt"
    assert good.result(20).reason == "length"


def test_a_row_whose_context_does_not_fit_fails_alone(make_engine: MakeEngine, tiny: LoadedModel) -> None:
    """The shared pass fails, its rows are computed alone, and passes are shared again."""

    class Late(PassiveContext):
        """Carries, from its fifth token on, virtual tokens for a layer that nobody hooked."""

        def forward_kwargs(self, start: int, count: int) -> Mapping[str, Any]:
            return {"workspace": Context(segments(hooked) if start > 9 else {})}

    hooked = hooked_model("llama", num_hidden_layers=2)
    engine = make_engine(tiny)
    wanted = [engine.submit(prompt_of(n), greedy(40)).result(20).token_ids for n in (4, 7)]

    good = at_once(
        engine,
        lambda: [
            engine.submit(prompt_of(4), greedy(40)),
            engine.submit(prompt_of(5), greedy(40), request_context=Late()),
            engine.submit(prompt_of(7), greedy(40)),
        ],
    )
    bad = good.pop(1).result(20)
    assert bad.reason == "error"
    assert "is not hooked" in (bad.error or "")
    assert len(bad.token_ids) == 6
    assert [item.result(20).token_ids for item in good] == wanted
    before = engine.stats()
    more = at_once(engine, lambda: [engine.submit(prompt_of(n), greedy(40)) for n in (4, 7)])
    assert [item.result(20).token_ids for item in more] == wanted
    after = engine.stats()
    assert after.decode_passes - before.decode_passes < 0.8 * (after.decode_rows - before.decode_rows)


def test_a_long_prompt_costs_streams_one_chunk_a_round(
    tiny: LoadedModel, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in passes: while ten chunks are read, three streams get ten tokens each."""
    passes: list[str] = []
    alone, together = Forward.__call__, Forward.together

    def noted(self: Forward, token_ids: list[int], *args: Any) -> torch.Tensor:
        passes.append(f"{len(token_ids)} of a prompt")
        return alone(self, token_ids, *args)

    def noted_rows(self: Forward, rows: list[Row]) -> torch.Tensor:
        passes.append(f"{len(rows)} streams")
        return together(self, rows)

    engine = make_engine(tiny, prefill_chunk=16)
    engine.warm_up()
    monkeypatch.setattr(Forward, "__call__", noted)
    monkeypatch.setattr(Forward, "together", noted_rows)
    lengths = (3, 4, 5, 160)
    generations = at_once(engine, lambda: [engine.submit(prompt_of(n), greedy(30)) for n in lengths])
    for generation in generations:
        generation.result(20)
    first = passes.index("16 of a prompt")
    assert passes[1:first] == ["3 of a prompt", "4 of a prompt", "5 of a prompt", "3 streams"]  # 12 fit into a chunk
    assert passes[first : first + 20] == ["16 of a prompt", "3 streams"] * 9 + ["16 of a prompt", "4 streams"]


def test_a_short_prompt_does_not_wait_for_the_end_of_long_ones(tiny: LoadedModel, make_engine: MakeEngine) -> None:
    """Prompts take turns: two of ten chunks, then one of two, which is read after its second turn."""
    order: list[int] = []

    class Noted(PassiveContext):
        def begin(self, cache: Any, prompt_ids: Any) -> None:
            self.length = len(prompt_ids)

        def forward_kwargs(self, start: int, count: int) -> Mapping[str, Any]:
            if count > 1:
                order.append(self.length)
            return {}

    engine = make_engine(tiny, prefill_chunk=16)
    generations = at_once(
        engine, lambda: [engine.submit(prompt_of(n), greedy(2), request_context=Noted()) for n in (160, 159, 32)]
    )
    assert all(generation.result(20).reason == "length" for generation in generations)
    assert order == [160, 159, 32] * 2 + [160, 159] * 8


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_workspace_runs_share_passes_with_plain_requests(
    architecture: str, tiny_models: dict[str, LoadedModel], make_engine: MakeEngine
) -> None:
    """Slots, broadcasts and a capped cache that evicts: as alone, and in passes with requests that have none of it."""
    model = tiny_models[architecture]
    steering = Steering(model, WorkspaceConfig(**CAPPED))
    engine = make_engine(model)
    lengths = (200, 20, 90)

    def all_of() -> list[tuple[Generation, Any]]:
        runs = [steering.run(toggles=Toggles(memory=False)), None, steering.run(toggles=Toggles(memory=False))]
        return [
            (engine.submit(prompt_of(length), greedy(120), request_context=run), run)
            for length, run in zip(lengths, runs, strict=True)
        ]

    try:
        alone = []
        for place in range(3):
            pairs = all_of()
            for other in {0, 1, 2} - {place}:
                pairs[other][0].cancel()
            alone.append((pairs[place][0].result(60), pairs[place][1]))
        before = engine.stats()
        together: list[tuple[Generation, Any]] = []
        at_once(engine, lambda: together.extend(all_of()) or [])  # type: ignore[func-returns-value]
        for (wanted, run), (generation, other) in zip(alone, together, strict=True):
            finished = generation.result(60)
            assert finished.reason == "length"
            assert finished.token_ids == wanted.token_ids
            if run is not None:
                assert other.report.evicted_tokens == run.report.evicted_tokens > 0
                assert other.report.broadcasts == run.report.broadcasts
        after = engine.stats()
        assert after.decode_passes - before.decode_passes < 0.7 * (after.decode_rows - before.decode_rows)
    finally:
        steering.close()


def test_a_request_that_carries_other_things_goes_alone(tiny: LoadedModel, make_engine: MakeEngine) -> None:
    class Carrying(PassiveContext):
        def forward_kwargs(self, start: int, count: int) -> Mapping[str, Any]:
            return {"output_attentions": False}

    engine = make_engine(tiny)
    wanted = [engine.submit(prompt_of(n), greedy(12)).result(20).token_ids for n in (4, 7, 9)]
    before = engine.stats()
    contexts = [None, Carrying(), None]
    together = at_once(
        engine,
        lambda: [
            engine.submit(prompt_of(n), greedy(12), request_context=context)
            for n, context in zip((4, 7, 9), contexts, strict=True)
        ],
    )
    assert [item.result(20).token_ids for item in together] == wanted
    after = engine.stats()
    assert after.decode_rows - before.decode_rows == 33  # eleven each: the first comes with the prompt
    assert after.decode_passes - before.decode_passes >= 22


# The cache of a row.


@pytest.mark.parametrize("window", [None, 8])
def test_a_row_layer_is_the_stock_layer(window: int | None) -> None:
    """The same tokens in pieces of all sizes; contents are replaced in between, as a capped cache does it."""
    config = stock_model("gemma3").config
    stock = DynamicCache(config=config).layers[0 if window else 1]
    ours = RowLayer(window)
    random = torch.Generator().manual_seed(3)
    for size in (1, 5, 1, 1, 300, 1, 1, 7, 1, 40, 1):
        keys, values = (torch.randn(1, 2, size, 4, generator=random) for _ in range(2))
        assert ours.get_mask_sizes(size) == stock.get_mask_sizes(size)
        seen, wanted = ours.update(keys, values), stock.update(keys, values)
        assert all(torch.equal(left, right) for left, right in zip(seen, wanted, strict=True))
        assert ours.get_seq_length() == stock.get_seq_length()
        if size == 7 and window is None:
            for layer in (ours, stock):
                layer.keys = torch.cat((layer.keys[:, :, :2], layer.keys[:, :, 9:]), dim=2)
                layer.values = torch.cat((layer.values[:, :, :2], layer.values[:, :, 9:]), dim=2)
            kept = ours.keys
        ours.check_invariants()
        assert torch.equal(ours.keys, stock.keys)
        assert torch.equal(ours.values, stock.values)
    if window is None:
        assert torch.equal(kept[:, :, :2], ours.keys[:, :, :2])
    ours.reset()
    assert ours.keys is None
    assert ours.get_seq_length() == 0


def test_a_written_token_counts_only_when_it_is_committed() -> None:
    layer = RowLayer()
    first = torch.ones(1, 1, 3, 2)
    layer.update(first, first)
    layer.write(torch.full((1, 1, 1, 2), 7.0), torch.full((1, 1, 1, 2), 7.0))
    assert torch.equal(layer.keys, first)
    seen, _ = layer.update(torch.full((1, 1, 1, 2), 9.0), torch.full((1, 1, 1, 2), 9.0))
    assert seen[0, 0, :, 0].tolist() == [1, 1, 1, 9]


def test_caches_of_other_kinds_are_no_rows() -> None:
    config = stock_model("llama").config
    assert RowCache(config).batchable
    config.layer_types = ["full_attention", "chunked_attention"] * 2
    config.attention_chunk_size = 8
    assert not RowCache(config).batchable
