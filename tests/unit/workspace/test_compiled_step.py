"""The compiled step of one token: the same numbers as the plain one, for every row, from one graph.

With dynamo's "eager" back end, which compiles nothing: what is tested is the graph and the operators that it calls.
"""

from __future__ import annotations

import logging
import shutil
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from tests.support.architectures import HIDDEN, VARIANTS, hooked_model, loaded, segment, segments, stock_model
from workspace.attention import adopt_attention
from workspace.compiled_step import CompiledStep
from workspace.context import Context, Delta, Recorder
from workspace.errors import InvalidWorkspace
from workspace.forward import Forward, Row
from workspace.hooking import HookedModel
from workspace.models import LoadedModel

EAGER: Any = {"backend": "eager"}
#: The experts of gpt-oss that are written as a loop cannot be traced.
TRACEABLE: dict[str, dict[str, Any]] = {"gpt_oss": {"experts_implementation": "grouped_mm"}}


pytestmark = pytest.mark.usefixtures("fresh_compiler")


def adopted(name: str, base: str = "sdpa") -> LoadedModel:
    model = stock_model(name, base, **TRACEABLE.get(name, {}))
    assert adopt_attention(model)
    return loaded(model)


def pair(model: LoadedModel) -> tuple[Forward, Forward]:
    """Passes as they are, and compiled ones that were tried."""
    plain, compiled = Forward(model), Forward(model, EAGER)
    assert compiled.rows_agree()
    assert compiled._compiled is not None
    return plain, compiled


def contexts(hooked: HookedModel, tokens: int) -> Context:
    delta = torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(tokens))
    deltas = {layer: Delta(delta, torch.tensor([0])) for layer in hooked.layers}
    shown = {layer: segment(tokens, seed=layer) for layer in hooked.layers} if tokens else {}
    return Context(shown, deltas, recorder=Recorder(hooked.layers, queries=True, mass=True))


def steps(forward: Forward, prompt: int, carried: list[Context | None]) -> torch.Tensor:
    """Logits [T, V] of a token for each of ``carried``, after a prompt of that length."""
    cache = forward.new_cache()
    forward([2 + number % 90 for number in range(prompt)], cache, 0, {})
    rows = [Row(5 + number, prompt + number, cache, context) for number, context in enumerate(carried)]
    return torch.stack([forward.together([row])[0].clone() for row in rows])


@pytest.mark.parametrize(("name", "base"), VARIANTS)
@torch.inference_mode()
def test_a_row_with_and_without_a_context_says_what_it_says_uncompiled(name: str, base: str) -> None:
    hooked = hooked_model(name, base, **TRACEABLE.get(name, {}))
    plain, compiled = pair(hooked.loaded)
    for prompt in (3, 12, 40):  # below, at and beyond a sliding window of 8
        ours, theirs = ([None, contexts(hooked, 0), contexts(hooked, 5), None, contexts(hooked, 7)] for _ in range(2))
        found, wanted = steps(compiled, prompt, ours), steps(plain, prompt, theirs)
        torch.testing.assert_close(found, wanted, atol=2e-4, rtol=2e-4)
        for one, other in zip(ours, theirs, strict=True):
            if one is None or other is None:
                continue
            left, right = one.recorder, other.recorder
            assert left is not None
            assert right is not None
            for part in ("residuals", "queries", "attention_mass"):
                assert set(getattr(left, part)) == set(hooked.layers)
                for layer in hooked.layers:
                    torch.testing.assert_close(
                        getattr(left, part)[layer], getattr(right, part)[layer], atol=2e-4, rtol=2e-4
                    )
    assert not counters["graph_break"], dict(counters["graph_break"])
    assert counters["stats"]["unique_graphs"] == 1, "for all lengths and contexts"


@torch.inference_mode()
def test_what_is_carried_changes_what_is_said() -> None:
    hooked = hooked_model("llama")
    _, compiled = pair(hooked.loaded)
    nothing = steps(compiled, 9, [None])
    shown = steps(compiled, 9, [Context(segments(hooked, 5))])
    pushed = steps(compiled, 9, [Context(deltas={hooked.layers[0]: Delta(torch.ones(1, HIDDEN), torch.tensor([0]))})])
    assert (shown - nothing).abs().max() > 0.1
    assert (pushed - nothing).abs().max() > 0.1
    assert torch.equal(steps(compiled, 9, [Context()]), nothing), "off is off"


@torch.inference_mode()
def test_hooks_that_come_and_go_are_noticed() -> None:
    model = adopted("llama")
    plain, compiled = pair(model)
    assert counters["stats"]["unique_graphs"] == 1
    hooked = HookedModel(model)
    ours, theirs = contexts(hooked, 5), contexts(hooked, 5)
    torch.testing.assert_close(steps(compiled, 9, [ours]), steps(plain, 9, [theirs]), atol=2e-4, rtol=2e-4)
    assert counters["stats"]["unique_graphs"] == 2
    hooked.remove()
    with pytest.raises(InvalidWorkspace, match="layer 0 is not hooked"):
        steps(compiled, 9, [contexts(hooked, 5)])
    torch.testing.assert_close(steps(compiled, 9, [None]), steps(plain, 9, [None]), atol=2e-4, rtol=2e-4)


@torch.inference_mode()
def test_models_of_one_process_keep_their_own_graphs() -> None:
    models = [adopted("llama"), adopted("qwen3"), adopted("llama")]
    models[2].model.lm_head.weight.data.mul_(-1)
    pairs = [pair(model) for model in models]
    for plain, compiled in pairs:
        torch.testing.assert_close(steps(compiled, 9, [None]), steps(plain, 9, [None]), atol=2e-4, rtol=2e-4)


@torch.inference_mode()
def test_layers_without_hooks_refuse_what_they_would_lose() -> None:
    hooked = hooked_model("llama", layers=[1])
    _, compiled = pair(hooked.loaded)
    for context in (Context({2: segment()}), Context(deltas={2: Delta(torch.ones(1, HIDDEN), torch.tensor([0]))})):
        with pytest.raises(InvalidWorkspace, match="layer 2 is not hooked"):
            steps(compiled, 9, [context])


@torch.inference_mode()
def test_several_rows_share_an_uncompiled_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adopted("llama")
    plain, compiled = pair(model)
    calls: list[int] = []
    step = compiled._compiled
    assert step is not None
    monkeypatch.setattr(compiled, "_compiled", lambda *args: calls.append(1) or step(*args))
    found = []
    for forward in (compiled, plain):
        caches = [forward.new_cache() for _ in range(2)]
        for cache, length in zip(caches, (5, 20), strict=True):
            forward(list(range(2, 2 + length)), cache, 0, {})
        both = forward.together([Row(3, 5, caches[0]), Row(4, 20, caches[1])])
        found.append((both, forward.together([Row(7, 6, caches[0])])))
    assert calls == [1]
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], atol=2e-4, rtol=2e-4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("default")  # of the compiler's own parts
@pytest.mark.parametrize("name", ["llama", "gemma3"])
@torch.inference_mode()
def test_really_compiled_it_says_the_same(name: str) -> None:
    hooked = hooked_model(name)
    plain, compiled = Forward(hooked.loaded), Forward(hooked.loaded, {"mode": "default"})
    assert compiled.rows_agree()
    assert compiled._compiled is not None
    for prompt in (12, 700):
        ours, theirs = ([None, contexts(hooked, 5), None] for _ in range(2))
        torch.testing.assert_close(
            steps(compiled, prompt, ours), steps(plain, prompt, theirs), atol=5e-4, rtol=5e-4, msg=str(prompt)
        )


def test_a_machine_that_cannot_compile_goes_without(caplog: pytest.LogCaptureFixture) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler here")

    forward = Forward(adopted("llama"), {"backend": broken})  # type: ignore[typeddict-item]
    with caplog.at_level(logging.WARNING):
        assert forward.rows_agree()
    assert "cannot be compiled" in caplog.text
    assert forward._compiled is None
    with torch.inference_mode():
        assert torch.equal(steps(forward, 9, [None]), steps(Forward(adopted("llama")), 9, [None]))


def test_a_step_that_was_compiled_wrongly_is_not_used(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = CompiledStep.__call__
    monkeypatch.setattr(CompiledStep, "__call__", lambda *args: right(*args).flip(-1))
    forward = Forward(adopted("llama"), EAGER)
    with caplog.at_level(logging.WARNING):
        assert forward.rows_agree()
    assert "does not give what the plain one gives" in caplog.text
    assert forward._compiled is None
