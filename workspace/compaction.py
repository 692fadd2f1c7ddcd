"""Many evicted key-value pairs become a few virtual ones that attention can hardly tell from them.

Fast KV compaction by attention matching (Zweiger et al. 2026, arXiv 2602.16284; keys are chosen as in its matching
pursuit variant), in closed form, for every layer and key-value head by itself, without training. Given E
evicted tokens (k, v, bias b) and Q reference queries q, usually those of the last tokens, let

    a[q, e] = exp(scaling q.k_e + b_e) / Z[q]      the share of its attention that q gives to e; Z counts everything
                                                   that q sees: evicted, kept, attention sinks
    m[q]    = sum_e a[q, e]                        mass of the evicted tokens
    y[q]    = sum_e a[q, e] v_e                    what they add to the output of q

Three steps give M tokens (k_j, v'_j, b'_j), where the keys k_j are M of the evicted keys:

    1. choose   greedily the columns of a that best explain (y, w m): orthogonal least squares
    2. mass     weights u >= 0 that minimise  sum_q (sum_j a[q, j] u_j - m[q])^2;   b'_j = b_j + log u_j
    3. values   ridge regression  sum_q |sum_j a[q, j] u_j v'_j - y[q]|^2 + r sum_j |v'_j - v_j|^2

Because the shares are of everything that q sees, queries which hardly look at the evicted tokens hardly count. The
result can be compacted again together with later tokens: that is what biases on the input are for. Where M >= E the
input comes back unchanged. Steps 2 and 3 are differentiable in keys, values, biases and queries; the choice is not.

What this does not do: decide what is evicted, or keep positions (``window.py``). Scores are taken as
``scaling q.k``: models that cap them (Gemma 2) are matched approximately.

Shapes: any leading dimensions ``...`` (layers, rows, key-value heads), E tokens, Q queries (those of all query heads
of a group, one after the other), M budget, D head size. Everything is computed in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from workspace.errors import InvalidWorkspace

_TINY = 1e-12


@dataclass(frozen=True, slots=True)
class CompactionSettings:
    """Defaults were chosen on training text (SmolLM2-135M, tinyshakespeare); measured in docs/workspace.md."""

    choice: Literal["matching", "mass"] = "matching"  #: "mass" takes the M most attended tokens (SnapKV), for less time
    mass_weight: float = 0.3  #: w of step 1, in units of the values
    match_mass: bool = True  #: step 2; without it u = 1
    match_values: bool = True  #: step 3; without it v' = v
    ridge: float = 0.1  #: r, relative to the mean squared norm of the columns of the regression
    iterations: int = 100  #: of the non-negative least squares of step 2
    weights: tuple[float, float] = (1e-3, 1e3)  #: range of u, so that biases stay finite

    def __post_init__(self) -> None:
        low, high = self.weights
        if self.choice not in ("matching", "mass"):
            raise InvalidWorkspace(f"unknown choice {self.choice!r}; known are matching and mass")
        if self.iterations < 1 or self.ridge <= 0 or self.mass_weight < 0 or not 0 < low <= 1 <= high:
            raise InvalidWorkspace(
                f"compaction needs iterations >= 1, ridge > 0, mass_weight >= 0 and weights around 1, got {self}"
            )


class Compacted(NamedTuple):
    """``budget`` virtual tokens in place of E evicted ones."""

    keys: Tensor  #: [..., M, D]
    values: Tensor  #: [..., M, D]
    bias: Tensor  #: [..., M]
    chosen: Tensor  #: [..., M] int64, ascending: which of the E tokens the keys come from


def log_mass(queries: Tensor, keys: Tensor, scaling: float, bias: Tensor | None = None) -> Tensor:
    """Logarithm of the attention mass before normalisation: [..., Q] of ``queries`` on ``keys`` [..., N, D]."""
    return _scores(queries, keys, scaling, bias).logsumexp(dim=-1)


def attention_shares(queries: Tensor, keys: Tensor, bias: Tensor, others: Tensor | None, scaling: float) -> Tensor:
    """``a`` [..., Q, E]. ``others`` [..., Q] is the ``log_mass`` of everything else that the queries see."""
    scores = _scores(queries, keys, scaling, bias)
    total = scores.logsumexp(dim=-1)
    if others is not None:
        total = torch.logaddexp(total, others.float())
    return (scores - total.unsqueeze(-1)).exp()


def compact(
    keys: Tensor,
    values: Tensor,
    bias: Tensor,
    queries: Tensor,
    budget: int,
    *,
    scaling: float,
    others: Tensor | None = None,
    settings: CompactionSettings | None = None,
) -> Compacted:
    """At most ``budget`` virtual tokens for ``keys``, ``values`` [..., E, D] with ``bias`` [..., E] (0: none).

    ``queries`` [..., Q, D] are the reference queries, in the same rotated space as the keys, and ``others`` [..., Q]
    the ``log_mass`` of what they see besides. Raises ``InvalidWorkspace``.
    """
    settings = settings or CompactionSettings()
    if budget < 1 or queries.shape[-2] < 1:
        raise InvalidWorkspace(f"compaction needs a budget and reference queries, got {budget}, {queries.shape[-2]}")
    tokens = keys.shape[-2]
    if tokens <= budget:
        chosen = torch.arange(tokens, device=keys.device).expand(*keys.shape[:-2], tokens)
        return Compacted(keys.float(), values.float(), bias.float(), chosen)
    values = values.float()
    shares = attention_shares(queries, keys, bias, others, scaling)  # [..., Q, E]
    mass = shares.sum(dim=-1)  # [..., Q]
    output = shares @ values  # [..., Q, D]
    with torch.no_grad():
        if settings.choice == "mass":
            chosen = choose_by_mass(shares, budget)
        else:
            target = torch.cat((output, settings.mass_weight * mass.unsqueeze(-1)), dim=-1)  # [..., Q, D + 1]
            chosen = choose_by_matching(shares, target, budget)
    shares = _columns(shares, chosen)  # [..., Q, M]
    kept, bias = _rows(values, chosen), bias.float().gather(-1, chosen)
    if settings.match_mass:
        weights = fit_mass(shares, mass, iterations=settings.iterations, bounds=settings.weights)
        shares, bias = shares * weights.unsqueeze(-2), bias + weights.log()
    if settings.match_values:
        kept = fit_values(shares, output, kept, ridge=settings.ridge)
    return Compacted(_rows(keys.float(), chosen), kept, bias, chosen)


def choose_by_mass(shares: Tensor, budget: int) -> Tensor:
    """The ``budget`` columns of ``shares`` [..., Q, E] with the greatest mean, ascending: [..., M]."""
    return shares.mean(dim=-2).topk(budget, dim=-1).indices.sort(dim=-1).values


def choose_by_matching(shares: Tensor, target: Tensor, budget: int) -> Tensor:
    """Orthogonal least squares: columns of ``shares`` [..., Q, E] whose span comes near to ``target`` [..., Q, F].

    Each step takes the column that lowers the squared error most when all chosen ones are refitted. Works on the Gram
    matrix (a pivoted Cholesky factorisation, slightly regularised), so that a step costs E (M + F) whatever Q is.
    Returns ascending indices [..., M].
    """
    gram = shares.transpose(-1, -2) @ shares  # [..., E, E]
    residual = shares.transpose(-1, -2) @ target  # [..., E, F], columns times what of the target is not explained yet
    left = gram.diagonal(dim1=-2, dim2=-1).clone()  # [..., E], what of each column the chosen ones do not explain
    ridge = 1e-3 * left.mean(dim=-1, keepdim=True) + _TINY
    free = torch.ones_like(left, dtype=torch.bool)
    basis = torch.zeros(*left.shape, budget, device=left.device)  # [..., E, M]
    chosen = []
    for step in range(budget):
        gain = torch.linalg.vector_norm(residual, dim=-1).square_().div_(left + ridge).masked_fill_(~free, -1.0)
        new = gain.argmax(dim=-1, keepdim=True)  # [..., 1]
        free = free.scatter(-1, new, False)
        length = (left.gather(-1, new) + ridge).sqrt()  # [..., 1]
        done = basis[..., :step]
        column = (_columns(gram, new) - done @ _rows(done, new).transpose(-1, -2)).squeeze(-1) / length  # [..., E]
        basis[..., step] = column
        explained = _rows(residual, new) / length.unsqueeze(-1)  # [..., 1, F]
        residual.view(-1, *residual.shape[-2:]).baddbmm_(  # in place: allocating it anew costs more than the sum
            column.reshape(-1, column.shape[-1], 1), explained.reshape(-1, 1, residual.shape[-1]), alpha=-1
        )
        left.addcmul_(column, column, value=-1).clamp_(min=0)
        chosen.append(new)
    return torch.cat(chosen, dim=-1).sort(dim=-1).values


def fit_mass(shares: Tensor, mass: Tensor, *, iterations: int, bounds: tuple[float, float]) -> Tensor:
    """Weights u [..., M] >= 0 that minimise |shares u - mass|^2, clamped to ``bounds``; FISTA from u = 1.

    ``shares`` [..., Q, M], ``mass`` [..., Q]. The greatest row sum bounds the spectral norm of the Gram matrix.
    """
    gram = shares.transpose(-1, -2) @ shares  # [..., M, M]
    aim = shares.transpose(-1, -2) @ mass.unsqueeze(-1)  # [..., M, 1]
    step = 1 / gram.sum(dim=-1, keepdim=True).amax(dim=-2, keepdim=True).clamp_min(_TINY)  # [..., 1, 1]
    current = ahead = torch.ones_like(aim)
    momentum = 1.0
    for _ in range(iterations):
        following = (ahead - step * (gram @ ahead - aim)).clamp_min(0)
        grown = (1 + (1 + 4 * momentum * momentum) ** 0.5) / 2
        ahead = following + (momentum - 1) / grown * (following - current)
        current, momentum = following, grown
    return current.squeeze(-1).clamp(*bounds)


def fit_values(shares: Tensor, output: Tensor, prior: Tensor, *, ridge: float) -> Tensor:
    """Values [..., M, D] that minimise |shares v - output|^2 + r |v - prior|^2, r = ``ridge`` times the mean of the
    diagonal of the Gram matrix. ``shares`` [..., Q, M], ``output`` [..., Q, D], ``prior`` [..., M, D]."""
    gram = shares.transpose(-1, -2) @ shares
    strength = ridge * gram.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[..., None, None].clamp_min(_TINY)
    aim = shares.transpose(-1, -2) @ output + strength * prior
    found: Tensor = torch.linalg.solve(_ridged(gram, ridge), aim)
    return found


def _ridged(gram: Tensor, ridge: float) -> Tensor:
    """``gram`` [..., M, M] plus ``ridge`` times the mean of its diagonal on the diagonal."""
    strength = ridge * gram.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[..., None, None].clamp_min(_TINY)
    return gram + strength * torch.eye(gram.shape[-1], device=gram.device, dtype=gram.dtype)


def _scores(queries: Tensor, keys: Tensor, scaling: float, bias: Tensor | None) -> Tensor:
    """[..., Q, N] in float32."""
    scores: Tensor = queries.float() @ keys.float().transpose(-1, -2) * scaling
    return scores if bias is None else scores + bias.float().unsqueeze(-2)


def _columns(matrix: Tensor, index: Tensor) -> Tensor:
    """Columns ``index`` [..., M] of ``matrix`` [..., Q, E]: [..., Q, M]."""
    return matrix.gather(-1, index.unsqueeze(-2).expand(*matrix.shape[:-1], index.shape[-1]))


def _rows(matrix: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` [..., M] of ``matrix`` [..., E, D]: [..., M, D]."""
    return matrix.gather(-2, index.unsqueeze(-1).expand(*index.shape, matrix.shape[-1]))
