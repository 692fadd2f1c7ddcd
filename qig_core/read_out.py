"""The fixed read-out of a state: eight directions in which Phi is measured, and along which a core is written."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from qig_core.errors import InvalidInput


@lru_cache(maxsize=16)
def projection(width: int, units: int) -> Tensor:
    """The fixed random orthogonal read-out [width, units], float64; the identity where the units are the state."""
    if width == units:
        return torch.eye(units, dtype=torch.float64)
    if width < units:
        raise InvalidInput(f"a state of width {width} has no {units} orthogonal read-outs")
    generator = torch.Generator().manual_seed(8 * 64 + width)  # a constant of the statistic, never trained
    basis: Tensor = torch.linalg.qr(torch.randn(width, units, dtype=torch.float64, generator=generator))[0]
    return basis
