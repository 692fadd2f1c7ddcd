"""The fixed read-out of a state: eight directions in which Phi is measured, and along which a core is written."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from qig_core.errors import InvalidInput


@lru_cache(maxsize=16)
def projection(width: int, units: int) -> Tensor:
    """The fixed random orthogonal read-out [width, units], float64; the identity where the units are the state.

    On the CPU whatever torch's default device is: all kernels share what the first call made, and that one may come
    from a kernel without weights (``torch.device("meta")``), whose read-out would make every later kernel's garbage.
    """
    if width == units:
        return torch.eye(units, dtype=torch.float64, device="cpu")
    if width < units:
        raise InvalidInput(f"a state of width {width} has no {units} orthogonal read-outs")
    generator = torch.Generator().manual_seed(8 * 64 + width)  # a constant of the statistic, never trained
    drawn = torch.randn(width, units, dtype=torch.float64, generator=generator, device="cpu")
    basis: Tensor = torch.linalg.qr(drawn)[0]
    return basis
