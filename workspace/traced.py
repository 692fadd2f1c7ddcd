"""What a compiled pass carries in place of a ``RowBatch``: a sign that what a row carries is looked up when it runs.

A compiled step is traced once and then replayed for every row, so nothing of a row may be in its graph: not the length
of its cache, not what its context holds. Attention and the hooks leave the graph through the operators that are called
here (defined in ``compiled_step.py``), which find the row at hand, and do there what they do in a plain pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Traced:
    """The sign; it holds nothing. No method ``to``: it travels as a keyword argument."""

    __slots__ = ()


TRACED = Traced()


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, rotation: tuple[Tensor, Tensor] | None, **kwargs: Any
) -> Tensor:
    """Attention of one token to the row's cache, itself included: ``query`` [1, Hq, 1, D] to [1, 1, Hq, D].

    ``key`` and ``value`` [1, H, 1, D] are the token's own. ``rotation``: cosine and sine, on a hooked layer.
    """
    cos, sin = rotation or (None, None)
    scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
    out: Tensor = torch.ops.olympus.attend(
        query, key, value, cos, sin, kwargs.get("s_aux"), module.layer_idx, scaling, kwargs.get("softcap")
    )
    return out


def steer(output: Tensor, layer: int) -> Tensor:
    """The output of the attention of a hooked ``layer`` [1, 1, hidden], with the row's delta."""
    out: Tensor = torch.ops.olympus.steer(output, layer)
    return out


def show(residual: Tensor, layer: int) -> Tensor:
    """``residual`` [1, 1, hidden] of a hooked ``layer`` as it is, shown to the row's recorder."""
    out: Tensor = torch.ops.olympus.show(residual, layer)
    return out
