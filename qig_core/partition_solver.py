"""The disconnected model of geometric integrated information, solved for many partitions at once.

For each partition, minimise over A' with no entry between parts (Oizumi, Tsuchiya, Amari 2016, PNAS 113:14817, eq. 21)

    f(A') = (ld S_E' - ld S_E) / 2,   S_E' = S_E + D S_X D',   D = A - A'.

Two steps share one linear system per partition, over the free entries of A':

- *majorise*: log det is concave, so its tangent at S_E' bounds f from above, and the minimiser of the bound solves
  ``W (x) S_X`` restricted to the free entries, W = S_E'^-1. Monotone from anywhere, but only linear convergence.
- *Newton*: the Hessian of f is ``W_ij (S_X - M)_ab - G_ib G_ja`` with G = W D S_X, M = S_X D' W D S_X. Quadratic
  convergence near the solution; used where it is positive definite and does not increase f.

Every partition falls back to the majorising step by itself, so f never increases. The problem is not convex: local
minima exist, and differ little (up to 0.03 nats of 2.5 on a coupled rotation). Cost: O(P n^3) per iteration for n free
entries, n about d^2 / 2; meant for d <= 12. All tensors float64 and outside autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qig_core.gaussian import Regression, symmetric

TOLERANCE = 1e-11  # nats that one more Newton step would gain
_ROUNDING = 1e-12  # increase of f that is arithmetic, not failure
_NUDGE = 0.05
MAX_ITERATIONS = 200


@dataclass(frozen=True)
class Disconnected:
    """The best disconnected model for each of P partitions."""

    value: Tensor  # [P] nats, f at the minimum: Phi_G of that partition
    a: Tensor  # [P, d, d] A'
    cov_e: Tensor  # [P, d, d] S_E'
    iterations: int
    converged: Tensor  # [P] bool


class _Problem:
    """Partitions with equally many free entries, and what is constant about them.

    Row r of a system is the free entry (i_r, a_r) of A': only these are ever built and factorised.
    """

    def __init__(self, law: Regression, free: Tensor):
        self.law = law
        self.count, self.d = free.shape[0], free.shape[-1]
        entries = torch.nonzero(free.reshape(self.count, -1))[:, 1].reshape(self.count, -1)  # [P, n]
        self.i, self.a = entries // self.d, entries % self.d
        self.floor: Tensor = torch.linalg.slogdet(law.cov_e)[1]

    def take(self, index: Tensor) -> _Problem:
        part = object.__new__(_Problem)
        part.law, part.d, part.count, part.floor = self.law, self.d, len(index), self.floor
        part.i, part.a = self.i[index], self.a[index]
        return part

    def residual(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """D and S_E' for A' [P, d, d]."""
        gap = self.law.a - a
        return gap, symmetric(self.law.cov_e + gap @ self.law.cov_x @ gap.mT)

    def value(self, a: Tensor) -> Tensor:
        excess: Tensor = torch.linalg.slogdet(self.residual(a)[1])[1] - self.floor
        return 0.5 * excess

    def _pairs(self, matrix: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """[P, n, n] of matrix[p, rows_r, columns_s]."""
        batch = torch.arange(self.count, device=matrix.device)[:, None, None]
        picked: Tensor = matrix[batch, rows.unsqueeze(-1), columns.unsqueeze(-2)]
        return picked

    def _spread(self, values: Tensor) -> Tensor:
        """Values [P, n] of the free entries as matrices [P, d, d]."""
        full = values.new_zeros(self.count, self.d * self.d)
        return full.scatter_(1, self.i * self.d + self.a, values).reshape(self.count, self.d, self.d)

    def steps(self, a: Tensor, damping: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Majorising step, damped Newton step (each [P, d, d], to add to A'), where Newton is allowed, and its gain.

        ``damping`` [P]: mu of the Hessian H + mu B, B the Hessian of the bound. The gain [P] is what the quadratic
        model promises, in nats.
        """
        gap, cov_e = self.residual(a)
        w = torch.linalg.inv(cov_e)
        g = w @ gap @ self.law.cov_x  # [P, d, d]; minus the gradient with respect to A'
        m = symmetric(self.law.cov_x @ gap.mT @ g)
        ww = self._pairs(w, self.i, self.i)  # [P, n, n]
        bound = ww * self._pairs(self.law.cov_x.expand_as(w), self.a, self.a)
        crossed = self._pairs(g, self.i, self.a)  # G_ib
        curved = (1.0 + damping)[:, None, None] * bound - ww * self._pairs(m, self.a, self.a) - crossed * crossed.mT
        rhs = g.reshape(self.count, -1).gather(1, self.i * self.d + self.a).unsqueeze(-1)  # [P, n, 1]
        safe = torch.cholesky_solve(rhs, torch.linalg.cholesky(bound)).squeeze(-1)
        factor, info = torch.linalg.cholesky_ex(curved)
        allowed = info == 0
        identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
        newton = torch.cholesky_solve(rhs, torch.where(allowed[:, None, None], factor, identity)).squeeze(-1)
        gain = 0.5 * (rhs.squeeze(-1) * torch.where(allowed[:, None], newton, safe)).sum(1)
        return self._spread(safe), self._spread(newton), allowed, gain


@torch.no_grad()
def solve(
    law: Regression,
    free: Tensor,
    start: Tensor | None = None,
    tolerance: float = TOLERANCE,
    max_iterations: int = MAX_ITERATIONS,
    between: Callable[[], None] | None = None,
) -> Disconnected:
    """Minimise f for each mask ``free`` [P, d, d] (True: within a part). ``start`` [P, d, d]: an earlier solution.

    ``tolerance``: a partition is done when one more step promises less than this many nats. Values that were stopped
    by ``max_iterations`` are upper bounds. ``between`` is called before each iteration: a caller that shares the
    processor may wait there.
    """
    free = free.to(law.a.device)
    sizes = free.sum((1, 2))
    value = law.a.new_zeros(len(free))
    a, cov_e = law.a.new_zeros(free.shape), law.a.new_zeros(free.shape)
    converged = torch.zeros(len(free), dtype=torch.bool, device=free.device)
    iterations = 0
    for size in sorted(set(sizes.tolist())):
        index = torch.nonzero(sizes == size).squeeze(-1)
        found = _solve_equal(
            law, free[index], None if start is None else start[index], tolerance, max_iterations, between
        )
        value[index], a[index], cov_e[index], converged[index] = found.value, found.a, found.cov_e, found.converged
        iterations = max(iterations, found.iterations)
    return Disconnected(value, a, cov_e, iterations, converged)


def _solve_equal(
    law: Regression,
    free: Tensor,
    start: Tensor | None,
    tolerance: float,
    max_iterations: int,
    between: Callable[[], None] | None,
) -> Disconnected:
    """``solve`` for partitions with equally many free entries."""
    problem = _Problem(law, free)
    a = _start(problem, free, start)
    value = problem.value(a)
    damping = torch.zeros_like(value)
    active = torch.arange(problem.count, device=a.device)
    iteration = 0
    while len(active) and iteration < max_iterations:
        iteration += 1
        if between is not None:
            between()
        part = problem if len(active) == problem.count else problem.take(active)
        here, now, mu = a[active], value[active], damping[active]
        safe, newton, allowed, gain = part.steps(here, mu)
        reached = part.value(here + newton)
        good = allowed & (reached <= now + _ROUNDING)
        chosen = torch.where(good[:, None, None], here + newton, here + safe)
        a[active] = chosen
        value[active] = torch.where(good, reached, part.value(chosen))
        damping[active] = torch.where(good, torch.where(mu > 0.005, mu / 2, 0.0), (2 * mu).clamp(0.05, 10.0))
        # A heavily damped step promises less than there is to gain; it may not declare the end.
        active = active[~((good | (now - value[active] < _ROUNDING)) & (mu <= 0.1) & (gain < tolerance))]
    converged = torch.ones(problem.count, dtype=torch.bool, device=a.device)
    converged[active] = False
    return Disconnected(value.clamp_min(0.0), a, problem.residual(a)[1], iteration, converged)


def _start(problem: _Problem, free: Tensor, start: Tensor | None) -> Tensor:
    """A cut to the free entries and nudged; the earlier solution where that is better.

    The cut A is a saddle of f for rotations (residual covariance block-diagonal), hence the fixed nudge.
    """
    law = problem.law
    generator = torch.Generator().manual_seed(problem.d)
    noise = torch.randn(problem.d, problem.d, dtype=torch.float64, generator=generator).to(law.a.device)
    fresh = (law.a + _NUDGE * law.a.abs().max() * noise) * free
    if start is None:
        return fresh
    start = start * free
    return torch.where((problem.value(start) <= problem.value(fresh))[:, None, None], start, fresh)
