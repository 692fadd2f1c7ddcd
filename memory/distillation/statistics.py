"""Bootstrap intervals of means and of paired differences (Efron 1979): percentiles over resampled questions.

Deterministic: the same values give the same interval. N values, thousands of resamples; nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 5000
_BLOCK = 1 << 22  # numbers that are held at once


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Of two arms on the same questions: mean(one - other), and what it may be."""

    difference: float
    low: float  #: two-sided 95 %
    high: float
    lower: float  #: one-sided 95 %: with this certainty the difference is not below
    upper: float  #: and with this not above


def paired_difference(
    one: NDArray[np.float64], other: NDArray[np.float64], seed: int = 0, weights: NDArray[np.float64] | None = None
) -> PairedDifference:
    """Bootstrap of the mean difference of ``one`` [N] and ``other`` [N], question by question.

    ``weights`` [N]: how much each question counts, above 0; all alike without them.
    """
    difference = one - other
    means = _resampled_means(difference, seed, weights)
    low, lower, upper, high = np.quantile(means, (0.025, 0.05, 0.95, 0.975))
    return PairedDifference(
        float(np.average(difference, weights=weights)), float(low), float(high), float(lower), float(upper)
    )


def mean_interval(values: NDArray[np.float64], seed: int = 0) -> dict[str, Any]:
    """The mean of ``values`` [N] with its two-sided 95 % interval, rounded for reports."""
    low, high = np.quantile(_resampled_means(values, seed), (0.025, 0.975))
    return {"mean": round(float(values.mean()), 4), "low": round(float(low), 4), "high": round(float(high), 4)}


def _resampled_means(
    values: NDArray[np.float64], seed: int, weights: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """Means of ``RESAMPLES`` draws with replacement."""
    random = np.random.default_rng(seed)
    size = max(1, _BLOCK // len(values))
    parts = []
    for start in range(0, RESAMPLES, size):
        rows = min(size, RESAMPLES - start)
        drawn = random.integers(0, len(values), (rows, len(values)))
        parts.append(np.average(values[drawn], axis=1, weights=None if weights is None else weights[drawn]))
    return np.concatenate(parts)
