"""Gradients of virtual keys, values, biases and deltas: against finite differences, and under checkpointing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.support.architectures import HIDDEN, VARIANTS, hooked_model, segment
from workspace.context import BACKENDS, Context, Delta, Segment
from workspace.hooking import HookedModel

IDS = torch.randint(0, 100, (2, 7), generator=torch.Generator().manual_seed(6))
FIELDS = ("keys", "values", "bias", "vector")
Leaves = dict[tuple[str, int], torch.Tensor]


def leaves(hooked: HookedModel, dtype: torch.dtype) -> Leaves:
    """What can be trained, for each layer, in ``dtype``."""
    found = {}
    for layer in hooked.layers:
        made = segment(3, seed=layer)
        vector = torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(layer))
        for field, tensor in zip(FIELDS, (made.keys, made.values, made.bias, vector), strict=True):
            found[field, layer] = tensor.to(dtype).requires_grad_()
    return found


def loss(hooked: HookedModel, trained: Leaves, backend: Any) -> torch.Tensor:
    """A smooth number that depends on all of them; the keys stand at distance 2, one is born at position 3."""
    birth = torch.tensor([[0, 0, 3]])
    context = Context(
        segments={
            layer: Segment(*(trained[field, layer] for field in FIELDS[:3]), birth=birth, distance=2)
            for layer in hooked.layers
        },
        deltas={layer: Delta(trained["vector", layer], torch.tensor([4])) for layer in hooked.layers},
        backend=backend,
    )
    logits = hooked.loaded.model(IDS, workspace=context, use_cache=False).logits
    return logits.log_softmax(-1)[..., ::7].mean()


class ExactNorm(nn.Module):
    """Root mean square norm in the dtype of its input; those of transformers compute in float32."""

    def __init__(self, norm: Any, offset: float):
        super().__init__()
        self.weight = nn.Parameter(norm.weight + offset, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


def exact_model(name: str, base: str) -> HookedModel:
    """In float64 throughout, which needs an attention without ``softmax(dtype=float32)``: sdpa, or that of gpt-oss."""
    hooked = hooked_model(name, base, torch.float64)
    hooked.remove()
    for module in list(hooked.loaded.model.modules()):
        for label, child in module.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                setattr(module, label, ExactNorm(child, 1.0 if name == "gemma3" else 0.0))
    return HookedModel(hooked.loaded, hooked.layers)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "base"), [("llama", "sdpa"), ("gemma3", "sdpa"), ("gpt_oss", "eager")])
def test_gradients_equal_finite_differences(name: str, base: str, backend: Any) -> None:
    hooked = exact_model(name, base)
    trained = leaves(hooked, torch.float64)
    loss(hooked, trained, backend).backward()
    assert all(parameter.grad is None for parameter in hooked.loaded.model.parameters())
    step = 1e-5
    for (field, layer), tensor in trained.items():
        gradient = tensor.grad
        assert gradient is not None, (field, layer)
        assert gradient.abs().max() > 1e-6, (field, layer)
        direction = torch.randn(tensor.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
        with torch.no_grad():
            ends = [
                loss(hooked, {**trained, (field, layer): tensor + sign * step * direction}, backend) for sign in (1, -1)
            ]
        numeric = (ends[0] - ends[1]) / (2 * step)
        torch.testing.assert_close((gradient * direction).sum(), numeric, atol=1e-8, rtol=1e-5)


@pytest.mark.parametrize(("name", "base"), VARIANTS)
def test_the_back_ends_have_the_same_gradients(name: str, base: str) -> None:
    hooked = hooked_model(name, base)
    found = {}
    for backend in BACKENDS:
        trained = leaves(hooked, torch.float32)
        loss(hooked, trained, backend).backward()
        found[backend] = torch.cat([tensor.grad.flatten() for tensor in trained.values()])  # type: ignore[union-attr]
    scale = found["eager"].abs().max()
    for backend, gradients in found.items():
        assert (gradients - found["eager"]).abs().max() < 2e-4 * scale, backend


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "base"), [("llama", "sdpa"), ("gemma3", "eager"), ("gpt_oss", "eager")])
def test_checkpointing_replays_to_the_same_gradients(name: str, base: str, backend: Any) -> None:
    hooked = hooked_model(name, base)
    model = hooked.loaded.model
    calls: list[None] = []
    model.model.layers[hooked.layers[0]].self_attn.register_forward_pre_hook(lambda *_: calls.append(None))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
            model.train()  # transformers checkpoints in training mode only; there is no dropout here
        trained = leaves(hooked, torch.float32)
        loss(hooked, trained, backend).backward()
        gradients.append([tensor.grad for tensor in trained.values()])
        assert len(calls) == (3 if checkpointing else 1)  # the third is the replay
    for plain, replayed in zip(*gradients, strict=True):
        torch.testing.assert_close(replayed, plain, atol=1e-7, rtol=1e-5)


def test_dropout_of_the_attention_falls_on_real_and_virtual_tokens() -> None:
    """With all weights dropped nothing is left; without a dropout that the model asks for, nothing is dropped."""
    hooked = hooked_model("llama", attention_dropout=1.0)
    context = Context({layer: segment(3, seed=layer) for layer in hooked.layers})
    model = hooked.loaded.model
    kept = model(IDS, workspace=context).logits
    model.train()
    dropped, bare = model(IDS, workspace=context).logits, model(IDS).logits
    assert torch.equal(dropped, bare)
    assert not torch.allclose(kept, dropped, atol=0.1)
