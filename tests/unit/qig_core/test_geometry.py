"""Fisher-Rao geometry against closed forms and metric axioms."""

from __future__ import annotations

import math

import pytest
import torch

from qig_core.errors import InvalidInput
from qig_core.geometry import exponentiated_gradient_step, fisher_rao_distance, frechet_mean, geodesic


def _points(count: int, k: int = 8, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(2 * torch.randn(count, k, dtype=torch.float64, generator=generator), dim=-1)


def test_distance_is_twice_the_angle_of_the_roots():
    p, q = _points(50, seed=1), _points(50, seed=2)
    expected = 2 * torch.arccos((p * q).sqrt().sum(-1))
    assert torch.allclose(fisher_rao_distance(p, q), expected, atol=1e-7)


def test_distance_reaches_pi_for_disjoint_support_and_zero_for_equals():
    assert fisher_rao_distance(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])).item() == pytest.approx(math.pi)
    assert fisher_rao_distance(_points(3), _points(3)).max() == 0


def test_distance_is_precise_where_arccos_is_not():
    p = torch.tensor([0.5, 0.5], dtype=torch.float64)
    q = torch.tensor([0.5 + 1e-10, 0.5 - 1e-10], dtype=torch.float64)
    assert fisher_rao_distance(p, q).item() == pytest.approx(2e-10, rel=1e-4)  # ds^2 = sum dp^2 / p


def test_distance_is_a_metric():
    a, b, c = _points(40, seed=3), _points(40, seed=4), _points(40, seed=5)
    assert torch.allclose(fisher_rao_distance(a, b), fisher_rao_distance(b, a))
    assert (fisher_rao_distance(a, c) <= fisher_rao_distance(a, b) + fisher_rao_distance(b, c) + 1e-12).all()


def test_distance_broadcasts_and_has_finite_gradients_at_equality():
    assert fisher_rao_distance(_points(4).unsqueeze(1), _points(5, seed=9)).shape == (4, 5)
    logits = torch.randn(8, requires_grad=True)
    p = torch.softmax(logits, -1)
    fisher_rao_distance(p, p.detach()).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_distance_rejects_different_sizes():
    with pytest.raises(InvalidInput):
        fisher_rao_distance(_points(2, 4), _points(2, 5))


def test_geodesic_divides_the_distance_and_stays_on_the_simplex():
    p, q = _points(20, seed=6), _points(20, seed=7)
    whole = fisher_rao_distance(p, q)
    for t in (0.0, 0.25, 0.5, 1.0):
        at = geodesic(p, q, t)
        assert torch.allclose(at.sum(-1), torch.ones(20, dtype=torch.float64))
        assert torch.allclose(fisher_rao_distance(p, at), t * whole, atol=1e-9)
    assert torch.allclose(geodesic(p, p, 0.3), p)


def test_frechet_mean_is_the_midpoint_of_two_and_minimises_the_squared_distance():
    pair = _points(2, seed=8)
    assert torch.allclose(frechet_mean(pair), geodesic(pair[0], pair[1], 0.5), atol=1e-8)
    points = _points(30, seed=9)
    mean = frechet_mean(points)
    best = fisher_rao_distance(points, mean).square().sum()
    for other in _points(200, seed=10):
        moved = geodesic(mean, other, 0.02)
        assert fisher_rao_distance(points, moved).square().sum() > best


def test_frechet_mean_with_weights_repeats_points():
    points = _points(3, seed=11)
    repeated = torch.cat((points, points[:1], points[:1]))
    assert torch.allclose(frechet_mean(points, torch.tensor([3.0, 1.0, 1.0])), frechet_mean(repeated), atol=1e-9)


def test_frechet_mean_of_nothing_is_an_error():
    with pytest.raises(InvalidInput):
        frechet_mean(torch.empty(0, 8))


def test_exponentiated_gradient_descends_and_stays_on_the_simplex():
    cost = torch.tensor([3.0, 1.0, 2.0])
    p = torch.full((3,), 1 / 3)
    for _ in range(200):
        p = exponentiated_gradient_step(p, cost, 0.1)
    assert p.sum().item() == pytest.approx(1.0)
    assert p.argmax() == 1
    assert p[1] > 0.999
