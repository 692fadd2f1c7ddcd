"""What one forward pass carries into the frozen model: virtual tokens, residual deltas, and a place for what is seen.

All of it is plain data that travels as the keyword argument ``workspace`` of the model. A ``Context`` never changes
during a pass: gradient checkpointing replays the pass and ``torch.compile`` traces it. Where the tensors come from
(``virtual_kv.py``, ``projector.py``) and what is done with them (``attention.py``, ``residuals.py``) is not decided
here. None of these classes has a method ``to``: accelerate would call it on every keyword argument.

Shapes: R rows (batch) or 1 for all rows, H key-value heads, M virtual tokens, D head size, T positions.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from workspace.errors import InvalidWorkspace

Backend = Literal["eager", "fused", "merge"]
BACKENDS: tuple[Backend, ...] = ("eager", "fused", "merge")


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """Virtual tokens of one hooked layer, at least one. Differentiable in ``keys``, ``values`` and ``bias``.

    Keys are in content space: before RoPE and before the model's ``attention_scaling``, but after the key norm of
    models that have one. They stand ``distance`` tokens before every query, wherever in the text the query is.
    """

    keys: Tensor  #: [R|1, H, M, D]
    values: Tensor  #: [R|1, H, M, D]
    bias: Tensor  #: [R|1, H|1, M] floating point, added to the scores of the virtual tokens
    birth: Tensor  #: [R|1, M] int64: a token is visible to queries at positions >= its birth
    mask: Tensor | None = None  #: [R|1, M] bool: False hides a token from a row
    distance: Tensor | int = 0  #: an int, or [M] int64
    #: Derived tensors: the memo of ``attention_backends.placed``, which is a pure function of the rest.
    placed: dict[Any, Any] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        rows, heads, tokens, _ = _shape("keys", self.keys, 4)
        if tokens < 1:
            raise InvalidWorkspace("a segment needs at least one virtual token; leave the layer out instead")
        if self.values.shape != self.keys.shape:
            raise InvalidWorkspace(f"keys {tuple(self.keys.shape)} and values {tuple(self.values.shape)} differ")
        _fits("bias", self.bias, (rows, heads, tokens))
        _fits("birth", self.birth, (rows, tokens))
        if not (self.keys.is_floating_point() and self.values.is_floating_point() and self.bias.is_floating_point()):
            raise InvalidWorkspace("keys, values and bias must be floating point")
        if self.birth.dtype != torch.int64:
            raise InvalidWorkspace(f"birth must be int64, got {self.birth.dtype}")
        if self.mask is not None:
            _fits("mask", self.mask, (rows, tokens))
            if self.mask.dtype != torch.bool:
                raise InvalidWorkspace(f"mask must be bool, got {self.mask.dtype}")
        if isinstance(self.distance, Tensor) and (
            self.distance.shape != (tokens,) or self.distance.dtype != torch.int64
        ):
            raise InvalidWorkspace(
                f"distance must be an int or int64 of shape ({tokens},), got {self.distance.dtype} of shape "
                f"{tuple(self.distance.shape)}"
            )

    @property
    def tokens(self) -> int:
        """Number of virtual tokens, hidden ones included."""
        return int(self.keys.shape[2])


@dataclass(frozen=True, slots=True, eq=False)
class Delta:
    """A vector added to the residual stream right after the attention of one layer. Differentiable in ``vector``."""

    vector: Tensor  #: [R|1, hidden], or one for each position of the pass: [R|1, T, hidden]
    first: Tensor  #: [R|1] int64: added at positions >= first (the last prompt token and all later ones)

    def __post_init__(self) -> None:
        rows = _shape("vector", self.vector, 3 if self.vector.ndim == 3 else 2)[0]
        _fits("first", self.first, (rows,))
        if not self.vector.is_floating_point() or self.first.dtype != torch.int64:
            raise InvalidWorkspace(
                f"vector must be floating point and first int64, got {self.vector.dtype} and {self.first.dtype}"
            )


class Recorder:
    """Where the probes of one forward pass put what they see. Made by the caller, one per pass.

    A pass writes each entry anew, so a replay (gradient checkpointing) leaves the same values. Nothing is detached.

    ``residuals[layer]``  residual stream after attention, deltas included: of the last position [R, hidden], or with
                          ``whole`` of all [R, T, hidden]
    ``queries[layer]``    with ``queries``: the queries in content space [R, Hq, T, D]
    ``attention_mass[layer]``  with ``mass``: attention that each real key got, summed over the queries and the query
                          heads of its key-value head, [R, H, N] in float32; virtual tokens and sinks took their share
    """

    __slots__ = ("attention_mass", "layers", "queries", "residuals", "wants_mass", "wants_queries", "whole")

    def __init__(self, layers: Collection[int], *, whole: bool = False, queries: bool = False, mass: bool = False):
        self.layers = frozenset(layers)
        self.whole = whole
        self.wants_queries = queries
        self.wants_mass = mass
        self.residuals: dict[int, Tensor] = {}
        self.queries: dict[int, Tensor] = {}
        self.attention_mass: dict[int, Tensor] = {}


@dataclass(frozen=True, slots=True, eq=False)
class Context:
    """What one forward pass carries, by layer. An empty one changes nothing, to the bit."""

    segments: Mapping[int, Segment] = field(default_factory=dict)
    deltas: Mapping[int, Delta] = field(default_factory=dict)
    backend: Backend | None = None  #: None lets ``attention.py`` choose for each call
    recorder: Recorder | None = None

    def __post_init__(self) -> None:
        if self.backend is not None and self.backend not in BACKENDS:
            raise InvalidWorkspace(f"unknown attention back end {self.backend!r}; known are {', '.join(BACKENDS)}")

    @property
    def layers(self) -> set[int]:
        """Those on which something is carried or recorded."""
        recorded = () if self.recorder is None else self.recorder.layers
        return {*self.segments, *self.deltas, *recorded}

    @property
    def empty(self) -> bool:
        """True when the pass equals one without a context."""
        return not self.segments and not self.deltas and self.recorder is None


def _shape(name: str, tensor: Tensor, dimensions: int) -> tuple[int, ...]:
    if tensor.ndim != dimensions:
        raise InvalidWorkspace(f"{name} must have {dimensions} dimensions, got shape {tuple(tensor.shape)}")
    return tuple(tensor.shape)


def _fits(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """The last dimension must match; the others may be 1, and the rows anything where ``shape`` has one row."""
    _shape(name, tensor, len(shape))
    for axis, (found, wanted) in enumerate(zip(tensor.shape, shape, strict=True)):
        token_axis = axis == len(shape) - 1 and axis > 0
        if found != wanted and not (not token_axis and found == 1) and not (axis == 0 and wanted == 1):
            raise InvalidWorkspace(f"{name} has shape {tuple(tensor.shape)}, which does not fit {shape}")
