"""Projector: shapes, norm matching, the neutral bias, deltas that are zero until trained."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from workspace.projector import ModuleShape, Projector
from workspace.workspace_config import WorkspaceConfig

SHAPE = ModuleShape(hidden_size=24, kv_heads=2, head_dim=8, layers=(1, 5))
R, S, W, M = 3, 4, 16, 8


def make(seed: int = 0, **values: object) -> Projector:
    torch.manual_seed(seed)
    sizes = {"slots": S, "slot_width": W, "virtual_tokens": M, "write_slots": 2, "delta_rank": 3, **values}
    return Projector(SHAPE, WorkspaceConfig(**sizes))  # type: ignore[arg-type]


def slots(seed: int = 1) -> Tensor:
    return torch.randn(R, S, W, generator=torch.Generator().manual_seed(seed))


def residuals(seed: int = 2, scale: float = 1.0) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {layer: scale * torch.randn(R, 24, generator=generator) for layer in SHAPE.layers}


def train_delta(projector: Projector, gate: float = 1.0) -> Projector:
    with torch.no_grad():
        projector.gate.fill_(gate)
    return projector


# Virtual KV.


def test_each_layer_gets_keys_values_and_bias() -> None:
    made = make().kv(slots())
    assert tuple(made) == SHAPE.layers
    for keys, values, bias in made.values():
        assert keys.shape == values.shape == (R, 2, M, 8)
        assert bias.shape == (1, 2, M)
        assert torch.equal(bias, torch.full_like(bias, -16.0))


def test_tokens_come_from_their_slot_only() -> None:
    projector, content = make(), slots()
    changed = content.clone()
    changed[:, 2] += 1
    before, after = projector.kv(content)[5][0], projector.kv(changed)[5][0]
    same = (before == after).all(dim=-1)  # [R, H, M]
    assert torch.equal(same, torch.tensor([True, True, True, True, False, False, True, True]).expand_as(same))


def test_vectors_have_the_length_of_real_ones_times_their_gain() -> None:
    projector = make(kv_plan_scale=0.5, kv_projection_scale=2.0)
    scales = torch.tensor([3.0, 11.0])  # two heads of very different size
    real = torch.nn.functional.normalize(torch.randn(R, 2, 40, 8), dim=-1) * scales[None, :, None, None]
    assert not projector.calibrated
    for layer in SHAPE.layers:
        projector.observe(layer, real, 2 * real)
    assert projector.calibrated
    for keys, values, _ in projector.kv(slots()).values():
        torch.testing.assert_close(keys.norm(dim=-1), 0.5 * scales[None, :, None].expand(R, -1, M))
        torch.testing.assert_close(values.norm(dim=-1), 2.0 * 2 * scales[None, :, None].expand(R, -1, M))


def test_running_norms_follow_slowly_and_undo_the_attention_scaling() -> None:
    projector = make()
    ones = torch.nn.functional.normalize(torch.randn(1, 2, 5, 8), dim=-1)
    projector.observe(1, 1.5 * 4 * ones, ones, attention_scaling=1.5)
    torch.testing.assert_close(projector.key_norms[0], torch.tensor([4.0, 4.0]))
    projector.observe(1, 8 * ones.bfloat16(), ones)
    torch.testing.assert_close(projector.key_norms[0], torch.tensor([4.2, 4.2]), atol=2e-3, rtol=0)
    assert torch.equal(projector.observations, torch.tensor([2, 0]))
    assert torch.equal(projector.key_norms[1], torch.ones(2))
    projector.check_invariants()


def attend(query: Tensor, keys: Tensor, values: Tensor, virtual: tuple[Tensor, Tensor, Tensor] | None) -> Tensor:
    """A tiny grouped attention over real [R, H, T, D] and virtual columns."""
    scores, stacked = query @ keys.transpose(-1, -2) / 8**0.5, values
    if virtual is not None:
        extra = query @ virtual[0].transpose(-1, -2) / 8**0.5 + virtual[2][:, :, None]
        scores, stacked = torch.cat([extra, scores], dim=-1), torch.cat([virtual[1], values], dim=2)
    return scores.softmax(dim=-1) @ stacked


@pytest.mark.parametrize(("bias", "neutral"), [(-16.0, True), (0.0, False)])
def test_bias_is_the_dial_from_off_to_on(bias: float, neutral: bool) -> None:
    projector = make(kv_plan_bias=bias)
    query, keys, values = (torch.randn(R, 2, 6, 8) for _ in range(3))
    for layer in SHAPE.layers:
        projector.observe(layer, keys, values)
    with torch.no_grad():
        hooked = attend(query, keys, values, projector.kv(slots())[1])
    difference = float((hooked - attend(query, keys, values, None)).abs().max())
    assert difference < 1e-3 if neutral else difference > 0.1, difference


# Static tokens.


def test_static_tokens_are_optional_and_begin_without_content() -> None:
    assert make().static() == {}
    for keys, values, bias in make(static_tokens=3, kv_plan_bias=-2.0).static().values():
        assert keys.shape == (1, 2, 3, 8)
        torch.testing.assert_close(keys.norm(dim=-1), torch.ones(1, 2, 3))
        assert not values.any()
        assert torch.equal(bias, torch.full((1, 2, 3), -2.0))


def test_static_tokens_can_begin_as_real_ones() -> None:
    projector = make(static_tokens=3, kv_plan_scale=2.0)
    real = {layer: (torch.randn(2, 3, 8), torch.randn(2, 3, 8)) for layer in SHAPE.layers}
    projector.begin_static(real)
    keys, values, _ = projector.static()[5]
    assert torch.equal(keys[0], 2 * real[5][0])
    assert torch.equal(values[0], real[5][1])
    with pytest.raises(ValueError, match=r"layer 1: static tokens have shape \(2, 3, 8\), got keys \(2, 4, 8\)"):
        projector.begin_static({layer: (torch.randn(2, 4, 8), torch.randn(2, 4, 8)) for layer in SHAPE.layers})


# Deltas.


def test_an_untrained_delta_is_exactly_zero() -> None:
    for vector in make().delta(slots(), residuals(scale=1e3)).values():
        assert vector.shape == (R, 24)
        assert torch.equal(vector, torch.zeros(R, 24))


def test_a_delta_is_loreft() -> None:
    """R^T (W h + b(slots) - R h) with h in units of its root mean square, written out for one layer and row."""
    projector, content, seen = train_delta(make(delta_cap=2.0), 0.01), slots(), residuals()
    basis = projector.orthonormal_basis()[1]
    size = seen[5][2].square().mean().sqrt()
    unit = seen[5][2] / size
    offset = projector.norm(content)[2].mean(dim=0) @ projector.read_slots[1] + projector.read_offset[1, 0]
    expected = 0.01 * size * (basis.T @ (projector.read[1] @ unit + offset - basis @ unit))
    torch.testing.assert_close(projector.delta(content, seen)[5][2], expected)


def test_the_basis_is_orthonormal_and_close_to_what_it_is_made_of() -> None:
    projector = make()
    torch.testing.assert_close(projector.orthonormal_basis(), projector.basis, atol=1e-5, rtol=0)
    with torch.no_grad():
        projector.basis.add_(0.3 * torch.randn_like(projector.basis))
    basis = projector.orthonormal_basis()
    torch.testing.assert_close(basis @ basis.transpose(1, 2), torch.eye(3).expand(2, 3, 3), atol=1e-5, rtol=0)
    projector.check_invariants()


@pytest.mark.parametrize("gate", [0.1, 1e4])
def test_a_delta_scales_with_the_residual_and_is_capped(gate: float) -> None:
    projector = train_delta(make(delta_cap=0.2), gate)
    small, large = projector.delta(slots(), residuals()), projector.delta(slots(), residuals(scale=100))
    for layer, residual in residuals().items():
        torch.testing.assert_close(large[layer], 100 * small[layer], rtol=1e-4, atol=1e-4)
        share = small[layer].norm(dim=-1) / residual.norm(dim=-1)
        assert (share <= 0.2 + 1e-5).all()
        assert bool((share > 0.19).all()) is (gate > 1)


def test_a_residual_of_zero_gives_no_delta() -> None:
    projector = train_delta(make())
    found = projector.delta(slots(), {layer: torch.zeros(R, 24) for layer in SHAPE.layers})
    assert not any(vector.any() for vector in found.values())


# Gradients.


def loss_of(projector: Projector) -> Tensor:
    parts = [*projector.kv(slots()).values(), *projector.static().values()]
    torch.manual_seed(9)
    loss = sum((tensor * torch.randn_like(tensor)).sum() for part in parts for tensor in part)
    for vector in projector.delta(slots(), residuals()).values():
        loss = loss + (vector * torch.randn_like(vector)).sum()
    return loss


def test_every_parameter_is_trained_once_the_gate_has_moved() -> None:
    """At gate 0 only the gate itself learns of the delta: its other matrices are multiplied by it."""
    projector = make(static_tokens=2)
    behind_the_gate = {"basis", "read", "read_slots", "read_offset"}
    optimizer = torch.optim.SGD(projector.parameters(), lr=1e-3)
    loss_of(projector).backward()
    silent = {name for name, value in projector.named_parameters() if value.grad is None or not value.grad.any()}
    assert silent == behind_the_gate
    optimizer.step()
    optimizer.zero_grad()
    loss_of(projector).backward()
    for name, parameter in projector.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
        assert parameter.grad.isfinite().all(), name


# Shapes of a model.


def test_the_shape_comes_from_a_hooked_model_and_is_checked() -> None:
    hooked = SimpleNamespace(hidden_size=24, kv_heads=2, head_dim=8, layers=(1, 5), loaded=None)
    assert ModuleShape.of(hooked) == SHAPE
    for layers in ((), (5, 1), (1, 1), (-1, 2)):
        with pytest.raises(ValueError, match="layers must be distinct, rising"):
            ModuleShape(24, 2, 8, layers)
    with pytest.raises(ValueError, match="sizes of a model are positive"):
        ModuleShape(24, 0, 8, (1,))
    with pytest.raises(ValueError, match=r"delta_rank \(25\) exceeds the model's hidden size \(24\); lower it"):
        make(delta_rank=25)


def test_a_basis_that_lost_its_rank_is_noticed() -> None:
    projector = make()
    with torch.no_grad():
        projector.basis[0, 1] = projector.basis[0, 0]
    with pytest.raises(AssertionError, match="lost its rank"):
        projector.check_invariants()
