"""The probability simplex with the Fisher-Rao metric: distance, geodesic, mean, and the natural descent step.

A distribution p on k outcomes is the point sqrt(p) of the unit sphere; Fisher-Rao geometry is the sphere's, with all
lengths doubled (Rao 1945; Amari, Information Geometry, 2016, section 2.2). One convention everywhere:
d(p, q) = 2 arccos sum_i sqrt(p_i q_i), in [0, pi].

What it does not do: project arbitrary vectors onto the simplex. Sparse projections have dead gradients; use softmax.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qig_core.errors import InvalidInput

_TINY = 1e-12


def _angle(u: Tensor, v: Tensor) -> Tensor:
    """Angle between unit vectors [..., k]. atan2 of chords is precise near 0, where arccos is not."""
    return 2.0 * torch.atan2(torch.linalg.vector_norm(u - v, dim=-1), torch.linalg.vector_norm(u + v, dim=-1))


def fisher_rao_distance(p: Tensor, q: Tensor) -> Tensor:
    """Fisher-Rao distance 2 arccos sum sqrt(p q) of distributions [..., k], in [0, pi]. Batched, differentiable."""
    if p.shape[-1] != q.shape[-1]:
        raise InvalidInput(f"distributions over {p.shape[-1]} and {q.shape[-1]} outcomes cannot be compared")
    return 2.0 * _angle(p.clamp_min(0).sqrt(), q.clamp_min(0).sqrt())


def geodesic(p: Tensor, q: Tensor, t: float | Tensor) -> Tensor:
    """Point at fraction ``t`` in [0, 1] of the Fisher-Rao geodesic from p to q, both [..., k]: slerp of the roots."""
    u, v = p.clamp_min(0).sqrt(), q.clamp_min(0).sqrt()
    angle = _angle(u, v).unsqueeze(-1)
    fraction = torch.as_tensor(t, dtype=p.dtype, device=p.device)
    sine = torch.sin(angle)
    near = sine < 1e-7  # slerp is 0/0 there, and the chord is the arc to rounding
    safe = torch.where(near, torch.ones_like(sine), sine)
    left = torch.where(near, 1 - fraction, torch.sin((1 - fraction) * angle) / safe)
    right = torch.where(near, fraction * torch.ones_like(angle), torch.sin(fraction * angle) / safe)
    squared: Tensor = (left * u + right * v) ** 2
    return squared / squared.sum(-1, keepdim=True)


def frechet_mean(
    points: Tensor, weights: Tensor | None = None, iterations: int = 50, tolerance: float = 1e-10
) -> Tensor:
    """The distribution [k] that minimises the (weighted) sum of squared Fisher-Rao distances to ``points`` [N, k].

    Karcher iteration on the sphere, started at the renormalised mean root. The roots lie in one orthant, so the mean
    is unique (Karcher 1977). Raises InvalidInput for an empty set.
    """
    if points.dim() != 2 or points.shape[0] == 0:
        raise InvalidInput(f"frechet_mean needs points of shape [N >= 1, k], got {list(points.shape)}")
    roots = points.double().clamp_min(0).sqrt()  # [N, k]
    share = torch.ones(len(points), dtype=torch.float64, device=points.device) if weights is None else weights.double()
    share = (share / share.sum()).unsqueeze(-1)  # [N, 1]
    mean = (share * roots).sum(0)
    mean = mean / torch.linalg.vector_norm(mean)
    for _ in range(iterations):
        cosine = (roots @ mean).clamp(-1, 1).unsqueeze(-1)  # [N, 1]
        tangent = roots - cosine * mean
        length = torch.linalg.vector_norm(tangent, dim=-1, keepdim=True)
        arc = torch.atan2(length, cosine)
        step = (share * tangent * (arc / length.clamp_min(_TINY))).sum(0)  # mean of the log maps
        size = torch.linalg.vector_norm(step)
        if size < tolerance:
            break
        mean = torch.cos(size) * mean + torch.sin(size) * step / size
        mean = mean / torch.linalg.vector_norm(mean)
    squared: Tensor = mean**2
    return (squared / squared.sum()).to(points.dtype)


def exponentiated_gradient_step(p: Tensor, gradient: Tensor, lr: float) -> Tensor:
    """p_i exp(-lr g_i) / Z for rows p [..., k] (Kivinen and Warmuth 1997): mirror descent that stays on the simplex."""
    logits = p.clamp_min(_TINY).log() - lr * gradient
    return torch.softmax(logits, dim=-1)
