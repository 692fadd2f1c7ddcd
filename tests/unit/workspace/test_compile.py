"""``torch.compile`` traces a hooked model whole: no graph breaks, few graphs, the same numbers, probes that fill.

With dynamo's "eager" back end, which compiles nothing: what is tested is the tracing.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import StaticCache

from tests.support.architectures import HIDDEN, hooked_model, segments
from workspace.compiled_step import CompiledStep
from workspace.context import Context, Delta, Recorder
from workspace.hooking import HookedModel
from workspace.sampling import SamplingParams
from workspace.steering import Steering
from workspace.workspace_config import WorkspaceConfig

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def carrying(hooked: HookedModel, tokens: int, backend: Any = None) -> Context:
    deltas = {layer: Delta(torch.full((1, HIDDEN), 0.1), torch.tensor([10])) for layer in hooked.layers}
    return Context(segments(hooked, tokens), deltas, backend, Recorder(hooked.layers))


def same_records(left: Context, right: Context, layers: tuple[int, ...]) -> None:
    assert left.recorder is not None
    assert right.recorder is not None
    assert set(left.recorder.residuals) == set(right.recorder.residuals) == set(layers)
    for layer in layers:
        torch.testing.assert_close(
            left.recorder.residuals[layer], right.recorder.residuals[layer], atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize(("name", "base"), [("llama", "sdpa"), ("gpt_oss", "eager")])
def test_decoding_compiles_into_few_graphs_without_breaks(name: str, base: str) -> None:
    config = {"experts_implementation": "grouped_mm"} if name == "gpt_oss" else {}  # the eager experts do break
    layer_types = {} if name == "llama" else {"layer_types": ["sliding_attention", "full_attention"]}
    hooked = hooked_model(name, base, num_hidden_layers=2, **layer_types, **config)
    model = hooked.loaded.model
    compiled = torch.compile(model, backend="eager")
    graphs = []
    for tokens in (0, 5, 7, 9, 11, 0):
        caches = [StaticCache(config=model.config, max_cache_len=32) for _ in range(2)]
        with torch.inference_mode():
            for cache in caches:
                model(torch.arange(14)[None], past_key_values=cache, use_cache=True)
            for step in range(3):
                contexts = [carrying(hooked, tokens) if tokens else None for _ in range(2)]
                ours, expected = (
                    run(
                        torch.tensor([[step]]),
                        past_key_values=cache,
                        position_ids=torch.tensor([[14 + step]]),
                        workspace=context,
                        use_cache=True,
                    ).logits
                    for run, cache, context in zip((compiled, model), caches, contexts, strict=True)
                )
                torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
                if contexts[0] is not None and contexts[1] is not None:
                    same_records(contexts[0], contexts[1], hooked.layers)
        assert not counters["graph_break"], dict(counters["graph_break"])
        graphs.append(counters["stats"]["unique_graphs"])
    # One without a context, one with, one more for any number of tokens; then nothing is traced again. The static
    # sliding layers of transformers count in Python, which costs one more at the start.
    first = 1 if name == "llama" else 2
    assert graphs == [first, first + 1, first + 2, first + 2, first + 2, first + 2]


@pytest.mark.parametrize(
    ("name", "base", "backend"),
    [("llama", "sdpa", "eager"), ("gemma3", "eager", "fused"), ("gemma3", "eager", "merge")],
)
def test_every_back_end_compiles_a_prompt_into_one_graph(name: str, base: str, backend: Any) -> None:
    layer_types = {} if name == "llama" else {"layer_types": ["sliding_attention", "full_attention"]}
    hooked = hooked_model(name, base, num_hidden_layers=2, **layer_types)
    compiled = torch.compile(hooked.loaded.model, backend="eager", fullgraph=True)
    ids, contexts = torch.arange(9)[None], [carrying(hooked, 5, backend) for _ in range(2)]
    with torch.inference_mode():
        ours = compiled(ids, workspace=contexts[0]).logits
        expected = hooked.loaded.model(ids, workspace=contexts[1]).logits
        without = hooked.loaded.model(ids).logits
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    same_records(contexts[0], contexts[1], hooked.layers)
    assert (ours - without).abs().max() > 0.1
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("chunk_size", [0, 48])
def test_an_engine_with_a_compiled_step_says_the_same(
    architecture: str, chunk_size: int, tiny_models: Any, make_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = tiny_models[architecture]
    calls: list[int] = []
    step = CompiledStep.__call__
    monkeypatch.setattr(CompiledStep, "__call__", lambda *args: calls.append(1) or step(*args))
    params = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
    options = {"prefill_chunk": 8}  # the slots look at the prompt chunk by chunk
    plain, compiled = make_engine(loaded, **options), make_engine(loaded, compiled={"backend": "eager"}, **options)
    steering = Steering(loaded, WorkspaceConfig(kv_plan_bias=-1.0, chunk_size=chunk_size, virtual_tokens=8, slots=8))
    try:
        for prompt in ([5, 6, 7], list(range(2, 40))):
            for steered in (False, True):
                calls.clear()
                one, other = (
                    engine.submit(prompt, params, request_context=steering.run() if steered else None).result(60)
                    for engine in (plain, compiled)
                )
                assert one.error is None
                assert other.error is None
                assert one.token_ids == other.token_ids
                assert len(calls) >= 39, "every token but the first"
    finally:
        steering.close()
    assert not counters["graph_break"], dict(counters["graph_break"])
