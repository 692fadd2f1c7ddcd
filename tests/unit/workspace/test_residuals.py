"""Deltas enter the residual stream between attention and feed-forward; probes see exactly that stream."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from tests.support.architectures import ARCHITECTURES, HIDDEN, hooked_model, padded_batch, segments, stock_model
from workspace.context import Context, Delta, Recorder
from workspace.errors import UnsupportedModel
from workspace.hooking import HookedModel
from workspace.residuals import LayerHooks, Turning

IDS = torch.arange(9)[None]


def delta(seed: int = 0, first: int = 0) -> Delta:
    return Delta(torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(seed)), torch.tensor([first]))


def logits(hooked: HookedModel, ids: torch.Tensor, context: Context | None = None, **kwargs: Any) -> torch.Tensor:
    with torch.inference_mode():
        return hooked.loaded.model(ids, workspace=context, **kwargs).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_probes_see_the_stream_that_the_feed_forward_half_reads(name: str, dtype: torch.dtype) -> None:
    stock, hooked = stock_model(name, dtype=dtype), hooked_model(name, dtype=dtype)
    norm = "pre_feedforward_layernorm" if name == "gemma3" else "post_attention_layernorm"
    seen: dict[int, torch.Tensor] = {}
    for layer in hooked.layers:
        module = getattr(stock.model.layers[layer], norm)
        module.register_forward_pre_hook(lambda _, args, layer=layer: seen.update({layer: args[0]}))
    ids, mask, positions = padded_batch()
    arguments = {"attention_mask": mask, "position_ids": positions}
    last, whole = Recorder(hooked.layers), Recorder(hooked.layers[:1], whole=True)
    with torch.inference_mode():
        expected = stock(ids, **arguments).logits
    assert torch.equal(logits(hooked, ids, Context(recorder=last), **arguments), expected)
    logits(hooked, ids, Context(recorder=whole), **arguments)
    assert set(last.residuals) == set(hooked.layers)
    assert set(whole.residuals) == set(hooked.layers[:1])
    for layer in hooked.layers:
        assert torch.equal(last.residuals[layer], seen[layer][:, -1])
    assert torch.equal(whole.residuals[hooked.layers[0]], seen[hooked.layers[0]])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_delta_is_added_to_the_stream_at_its_positions_and_no_others(name: str) -> None:
    hooked = hooked_model(name)
    layer = hooked.layers[0]
    ids, mask, positions = padded_batch()
    arguments = {"attention_mask": mask, "position_ids": positions}
    first = torch.tensor([4, 8, 100])
    vector = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(1))
    with_it, without = (Recorder([layer], whole=True) for _ in range(2))
    changed = logits(hooked, ids, Context(deltas={layer: Delta(vector, first)}, recorder=with_it), **arguments)
    stock = logits(hooked, ids, Context(recorder=without), **arguments)
    reached = positions >= first[:, None]
    added = torch.where(reached[..., None], vector[:, None], 0.0)
    torch.testing.assert_close(with_it.residuals[layer] - without.residuals[layer], added, atol=1e-5, rtol=1e-5)
    before = ~reached & mask.bool()
    assert torch.equal(changed[before], stock[before])  # causal, so what came before keeps its bits
    assert not torch.allclose(changed[reached], stock[reached], atol=0.01)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_deltas_on_each_step_equal_one_pass_with_their_schedule(name: str) -> None:
    """Added at the last prompt token and at each token after it, beside virtual tokens."""
    hooked = hooked_model(name)
    ids = torch.randint(0, 100, (1, 15), generator=torch.Generator().manual_seed(8))
    scheduled = Context(segments(hooked), {layer: delta(layer, first=9) for layer in hooked.layers})
    every = Context(segments(hooked), {layer: delta(layer) for layer in hooked.layers})
    taught = logits(hooked, ids, scheduled)
    cache = DynamicCache(config=hooked.loaded.model.config)
    lived = [logits(hooked, ids[:, :9], Context(segments(hooked)), past_key_values=cache)]
    for position in range(9, 15):
        at, token = torch.tensor([[position]]), ids[:, position : position + 1]
        lived.append(logits(hooked, token, every, position_ids=at, past_key_values=cache))
    torch.testing.assert_close(torch.cat(lived, dim=1), taught, atol=3e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_delta_for_each_position_equals_one_vector_where_they_are_alike(name: str) -> None:
    hooked = hooked_model(name)
    layer = hooked.layers[-1]
    one = delta(3, first=4)
    alike = Delta(one.vector[:, None].expand(1, 9, HIDDEN), one.first)
    expected = logits(hooked, IDS, Context(deltas={layer: one}))
    assert torch.equal(logits(hooked, IDS, Context(deltas={layer: alike})), expected)
    vectors = torch.randn(1, 9, HIDDEN, generator=torch.Generator().manual_seed(4))
    with_them, without = (Recorder([layer], whole=True) for _ in range(2))
    logits(hooked, IDS, Context(deltas={layer: Delta(vectors, one.first)}, recorder=with_them))
    logits(hooked, IDS, Context(recorder=without))
    added = (with_them.residuals[layer] - without.residuals[layer])[0]
    torch.testing.assert_close(added[4:], vectors[0, 4:], atol=1e-5, rtol=1e-5)
    assert not added[:4].any()


def test_a_delta_of_zero_changes_no_bit() -> None:
    hooked = hooked_model("gpt_oss")
    zero = Delta(torch.zeros(1, HIDDEN), torch.tensor([0]))
    assert torch.equal(logits(hooked, IDS, Context(deltas=dict.fromkeys(hooked.layers, zero))), logits(hooked, IDS))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_gradients_reach_the_loss_through_a_probe(name: str) -> None:
    hooked = hooked_model(name)
    layer = hooked.layers[-1]
    vector = torch.zeros(1, HIDDEN, requires_grad=True)
    recorder = Recorder([layer])
    hooked.loaded.model(IDS, workspace=Context(deltas={layer: Delta(vector, torch.tensor([0]))}, recorder=recorder))
    recorder.residuals[layer].sum().backward()
    torch.testing.assert_close(vector.grad, torch.ones(1, HIDDEN))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_two_threads_on_one_model_do_not_mix_what_they_carry(name: str) -> None:
    hooked = hooked_model(name)

    def context(number: int) -> Context:
        return Context(
            segments(hooked, number + 2),
            {layer: delta(number) for layer in hooked.layers},
            recorder=Recorder(hooked.layers),
        )

    def shown(context: Context) -> dict[int, torch.Tensor]:
        assert context.recorder is not None
        return context.recorder.residuals

    alone = [context(number) for number in range(2)]
    expected = [logits(hooked, IDS, each) for each in alone]
    start, wrong = threading.Barrier(2), []

    def work(number: int) -> None:
        torch.set_num_threads(1)
        start.wait()
        for _ in range(40):
            mine = context(number)
            if not torch.equal(logits(hooked, IDS, mine), expected[number]):
                wrong.append(number)
            for layer, residual in shown(mine).items():
                if not torch.equal(residual, shown(alone[number])[layer]):
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert wrong == []
    assert not torch.allclose(expected[0], expected[1], atol=0.1)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_pass_that_broke_off_leaves_nothing_behind(name: str) -> None:
    """Attention ran and left its note, then the layer failed: the next pass must not pick the note up."""
    hooked = hooked_model(name)
    layer = hooked.layers[0]
    expected = logits(hooked, IDS)

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    # Before the hooks of the norm, which come later in the list.
    norm = hooked.loaded.model.model.layers[layer].post_attention_layernorm
    handle = norm.register_forward_pre_hook(fail, prepend=True)
    recorder = Recorder([layer])
    with pytest.raises(RuntimeError, match="out of memory"):
        logits(hooked, IDS, Context(deltas={layer: delta()}, recorder=recorder))
    handle.remove()
    assert torch.equal(logits(hooked, IDS), expected)
    assert torch.equal(logits(hooked, IDS, Context(recorder=Recorder(hooked.layers[1:]))), expected)
    assert not recorder.residuals


def test_layers_of_another_build_are_refused() -> None:
    hooked = hooked_model("llama")
    turning = Turning(hooked.rope.of(0))

    class Parallel(nn.Module):
        """Attention and feed-forward side by side on one norm (Phi, Cohere)."""

        def __init__(self) -> None:
            super().__init__()
            self.input_layernorm, self.self_attn, self.mlp = nn.Identity(), nn.Identity(), nn.Identity()

    class NormsAfterOnly(Parallel):
        """Norms on the outputs only (OLMo 2): the norm after attention does not see the stream."""

        def __init__(self) -> None:
            super().__init__()
            del self.input_layernorm
            self.post_attention_layernorm, self.post_feedforward_layernorm = nn.Identity(), nn.Identity()

    for layer in (Parallel(), NormsAfterOnly()):
        with pytest.raises(UnsupportedModel, match="not known where its residual stream passes"):
            LayerHooks(layer, 0, turning)
        assert not layer.self_attn._forward_hooks
