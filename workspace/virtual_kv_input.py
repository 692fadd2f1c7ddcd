"""What a write must look like: tensors of the store's shape, and a description that makes sense.

Raises ``InvalidSegment`` and changes nothing; storing is done elsewhere (``virtual_kv_session.py``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workspace.errors import InvalidSegment
from workspace.virtual_kv_limits import StoreShape
from workspace.virtual_kv_session import LayerTensors

MAX_KIND = 64  #: characters
MAX_META = 4096  #: bytes of JSON
MAX_NAME = 256  #: characters of a session's name
_BEYOND = 1 << 53  # positions, distances and steps are below it: exact in every JSON reader, and sums fit in 64 bits


@dataclass(frozen=True, slots=True)
class Description:
    """What a writer says about a segment; one that exists is valid. ``meta`` is copied and must be JSON."""

    kind: str
    born: int
    distance: int = 0
    ttl_steps: int | None = None
    ttl_seconds: float | None = None
    pinned: bool = False
    meta: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        _require(0 < len(self.kind) <= MAX_KIND, f"kind must have 1 to {MAX_KIND} characters, got {self.kind!r}")
        _require(_encodes(self.kind), f"kind is not valid Unicode: {self.kind!r}")
        for name in ("born", "distance"):
            value = getattr(self, name)
            _require(isinstance(value, int) and 0 <= value < _BEYOND, f"{name} must be an int from 0, got {value!r}")
        steps, seconds = self.ttl_steps, self.ttl_seconds
        _require(steps is None or 0 < steps < _BEYOND, f"ttl_steps must be positive, got {steps!r}")
        proper = seconds is None or (math.isfinite(seconds) and seconds > 0)
        _require(proper, f"ttl_seconds must be positive and finite, got {seconds!r}")
        try:
            text = json.dumps(dict(self.meta or {}), allow_nan=False, ensure_ascii=False)
            size = len(text.encode())
        except (TypeError, ValueError, RecursionError) as error:  # a lone surrogate is a ValueError too
            raise InvalidSegment(f"meta must be JSON: {error}") from None
        _require(size <= MAX_META, f"meta must be at most {MAX_META} bytes of JSON, got {size}")
        object.__setattr__(self, "meta", json.loads(text))


def accept_layers(layers: Mapping[int, tuple[Tensor, Tensor, Tensor]], shape: StoreShape) -> dict[int, LayerTensors]:
    """The tensors of a write in the store's dtypes and on its device, biases spread over all heads."""
    _require(len(layers) > 0, "a segment needs at least one layer")
    return {layer: _accept(layer, *own, shape) for layer, own in sorted(layers.items())}


def check_name(session: str) -> None:
    """Refuse names of sessions that persistence could not keep."""
    proper = 0 < len(session) <= MAX_NAME and "\0" not in session and _encodes(session)
    _require(proper, f"a session's name must have 1 to {MAX_NAME} Unicode characters and no NUL, got {session!r}")


def _accept(layer: int, keys: Tensor, values: Tensor, bias: Tensor, shape: StoreShape) -> LayerTensors:
    _require(layer in shape.layers, f"layer {layer} is not hooked; hooked are {list(shape.layers)}")
    heads, size = shape.kv_heads, shape.head_dim
    tokens = keys.shape[2] if keys.ndim == 4 else 0
    _require(
        tokens > 0 and keys.shape == values.shape == (1, heads, tokens, size),
        f"layer {layer}: keys and values must both be [1, {heads}, tokens, {size}] with at least one token, "
        f"got {list(keys.shape)} and {list(values.shape)}",
    )
    _require(
        bias.shape in ((1, heads, tokens), (1, 1, tokens)),
        f"layer {layer}: bias must be [1, {heads} or 1, {tokens}], got {list(bias.shape)}",
    )
    own_keys = _convert(layer, "keys", keys, shape.dtype, shape.device)
    own_values = _convert(layer, "values", values, shape.dtype, shape.device)
    own_bias = _convert(layer, "bias", bias, torch.float32, shape.device)
    return own_keys, own_values, own_bias.expand(1, heads, tokens)


def _convert(layer: int, name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    converted = tensor.detach().to(device, dtype)
    # After the conversion: what a float32 holds may be infinite in float16.
    _require(bool(torch.isfinite(converted).all()), f"layer {layer}: {name} hold NaN or infinity in {dtype}")
    return converted


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise InvalidSegment(message)
