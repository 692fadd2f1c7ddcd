"""Information between Gaussian states, from covariances: the plain measures that stand beside Phi for diagnosis.

Notation: X [k] is the state, Y [k] the next state, Y = A X + E. ld = log det. All values in nats, all inputs float64.

    A       = S_YX S_X^-1
    S_E     = S_Y - A S_X A'
    I(X;Y)  = (ld S_Y - ld S_E) / 2                                    mutual information
    TC(Y)   = (sum_i ln S_ii - ld S_Y) / 2                             total correlation (Watanabe 1960)
    O(Y)    = (k - 2) H(Y) + sum_i [H(Y_i) - H(Y_-i)]                  O-information (Rosas et al. 2019)
    SI      = sum_i h(Y_Mi | X_Mi) - h(Y | X)                          stochastic interaction (Ay 2001)

Nothing here is trained or differentiated; estimation from samples is in ``integration.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qig_core.errors import InvalidInput


@dataclass(frozen=True)
class Regression:
    """The linear-Gaussian law of Y given X: Y = A X + E."""

    a: Tensor  # [..., k, k]
    cov_x: Tensor
    cov_e: Tensor  # [..., k, k], residual covariance
    cov_y: Tensor


def symmetric(matrix: Tensor) -> Tensor:
    return 0.5 * (matrix + matrix.mT)


def log_det(matrix: Tensor) -> Tensor:
    """log det of positive definite matrices [..., k, k]; InvalidInput where one is not."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    if bool((info != 0).any()):
        raise InvalidInput("a covariance is not positive definite; add observation noise or use more samples")
    logs: Tensor = factor.diagonal(dim1=-2, dim2=-1).log()
    return 2.0 * logs.sum(-1)


def regress(cov_x: Tensor, cov_yx: Tensor, cov_y: Tensor) -> Regression:
    """The regression of Y on X from their covariances, each [k, k]."""
    a = torch.linalg.solve(cov_x, cov_yx.mT).mT
    return Regression(a, symmetric(cov_x), symmetric(cov_y - a @ cov_yx.mT), symmetric(cov_y))


def mutual_information(law: Regression) -> float:
    return 0.5 * float(log_det(law.cov_y) - log_det(law.cov_e))


def total_correlation(cov: Tensor) -> float:
    return 0.5 * float(cov.diagonal().log().sum() - log_det(cov))


def o_information(cov: Tensor) -> float:
    """Positive: redundancy dominates; negative: synergy dominates. Zero by definition for fewer than 3 units."""
    k = len(cov)
    if k < 3:
        return 0.0
    # The ln(2 pi e) terms cancel: (k - 2) k + k - k (k - 1) = 0.
    singles = cov.diagonal().log().sum()
    rest = torch.stack([torch.cat((torch.arange(i), torch.arange(i + 1, k))) for i in range(k)])  # [k, k - 1]
    without = cov[rest.unsqueeze(-1), rest.unsqueeze(-2)]  # [k, k - 1, k - 1]
    return 0.5 * float((k - 2) * log_det(cov) + singles - log_det(without).sum())


def stochastic_interaction(law: Regression, parts: tuple[tuple[int, ...], ...]) -> float:
    """SI between the given parts (tuples of indices that together are all units)."""
    total = -0.5 * float(log_det(law.cov_e))
    cov_yx = law.a @ law.cov_x
    for part in parts:
        index = torch.tensor(part, device=law.a.device)
        block = (index.unsqueeze(-1), index.unsqueeze(0))
        own = regress(law.cov_x[block], cov_yx[block], law.cov_y[block])
        total += 0.5 * float(log_det(own.cov_e))
    return max(total, 0.0) if math.isfinite(total) else total
