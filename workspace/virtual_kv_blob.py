"""A session's virtual tokens as bytes: safetensors with one JSON header, and back, believing nothing.

Header (under ``olympus.virtual_kv`` in the safetensors metadata): schema version, model fingerprint, dtype, geometry,
the description of every segment, and the SHA-256 of all tensors in the order of their names. Tensors are
``<layer>.keys``, ``<layer>.values`` [1, H, M, D] and ``<layer>.bias`` [1, H, M], the tokens of the segments in order.
Equal states give equal bytes. Births and distances are not tensors: they follow from the descriptions.

Every error names the source it was given. Where the bytes are kept is the caller's business.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from workspace.errors import InvalidSnapshot, SnapshotMismatch, SnapshotVersion
from workspace.virtual_kv_limits import SegmentId, SegmentInfo, StoreShape
from workspace.virtual_kv_session import LayerTensors, SessionState

SCHEMA_VERSION = 1
_KEY = "olympus.virtual_kv"
_PARTS = ("keys", "values", "bias")

_FAR = 1 << 53

_Strict = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)
_Layer = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,5})$")]  # JSON has only string keys
_Count = Annotated[int, Field(ge=0, lt=1 << 62)]


class _SegmentHeader(BaseModel):
    model_config = _Strict

    id: Annotated[int, Field(ge=1, lt=1 << 62)]
    kind: Annotated[str, Field(min_length=1, max_length=64)]
    tokens: Annotated[dict[_Layer, Annotated[int, Field(ge=1, lt=1 << 31)]], Field(min_length=1)]
    born: _Count
    distance: _Count
    written_step: _Count
    written_at: float
    expires_step: _Count | None
    expires_at: float | None
    pinned: bool
    meta: dict[str, Any]


class _Header(BaseModel):
    model_config = _Strict

    version: Literal[1]
    model: str
    dtype: str
    kv_heads: int
    head_dim: int
    step: _Count
    segments: list[_SegmentHeader]
    sha256: str


def encode(state: SessionState, shape: StoreShape) -> bytes:
    """The bytes of ``state``."""
    tensors = {
        f"{layer}.{part}": getattr(segment, part).cpu().contiguous()
        for layer, segment in state.layers.items()
        for part in _PARTS
    }
    header = _Header(
        version=SCHEMA_VERSION,
        model=shape.fingerprint,
        dtype=_name(shape.dtype),
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        step=state.step,
        segments=[_describe(info) for info in state.infos],
        sha256=_digest(tensors),
    )
    return save(tensors, metadata={_KEY: header.model_dump_json()})


def decode(blob: bytes, shape: StoreShape, source: str) -> tuple[tuple[SegmentInfo, ...], dict[int, LayerTensors], int]:
    """Segments, tensors by layer on the device of ``shape``, and the step.

    Raises ``InvalidSnapshot``, ``SnapshotVersion`` or ``SnapshotMismatch``, each naming ``source``.
    """
    try:
        tensors = load(blob)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:  # as safetensors and torch.frombuffer do
        raise InvalidSnapshot(source, f"not a whole safetensors file: {error}") from None
    header = _read_header(blob, source)
    _must_match(header, shape, source)
    infos = tuple(_info(item) for item in header.segments)
    ids = [info.id for info in infos]
    if ids != sorted(set(ids)):
        raise InvalidSnapshot(source, f"the segment ids are not increasing: {ids}")
    if max([header.step, *ids]) >= _FAR:
        raise InvalidSnapshot(source, f"ids and steps must be below {_FAR}, so that counting on stays possible")
    counts: Counter[int] = Counter()
    for info in infos:
        counts.update(info.tokens)
    if unknown := sorted(set(counts) - set(shape.layers)):
        raise SnapshotMismatch(source, f"it has tokens for layers {unknown}, but hooked are {list(shape.layers)}")
    _check_tensors(tensors, counts, shape, source)
    if _digest(tensors) != header.sha256:
        raise InvalidSnapshot(source, "the tensors do not have the SHA-256 of the header: the bytes were altered")
    placed = {name: tensor.to(shape.device) for name, tensor in tensors.items()}
    layers = {layer: (placed[f"{layer}.keys"], placed[f"{layer}.values"], placed[f"{layer}.bias"]) for layer in counts}
    return infos, layers, header.step


def _read_header(blob: bytes, source: str) -> _Header:
    # safetensors has checked this frame but does not hand out the metadata of bytes.
    length = int.from_bytes(blob[:8], "little")
    metadata = json.loads(blob[8 : 8 + length]).get("__metadata__") or {}
    if _KEY not in metadata:
        raise InvalidSnapshot(source, "a safetensors file, but not a snapshot of virtual tokens: it has no header")
    try:
        version = json.loads(metadata[_KEY]).get("version")
    except (json.JSONDecodeError, AttributeError, RecursionError):
        raise InvalidSnapshot(source, "its header is not a JSON object") from None
    if version != SCHEMA_VERSION:
        raise SnapshotVersion(source, f"it has schema version {version!r}, this program reads {SCHEMA_VERSION}")
    try:
        return _Header.model_validate_json(metadata[_KEY])
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidSnapshot(source, f"its header is wrong at {where or 'the top'}: {first['msg']}") from None


def _must_match(header: _Header, shape: StoreShape, source: str) -> None:
    """Same weights, same dtype, same geometry: other virtual tokens would be noise to this model."""
    found = (header.model, header.dtype, header.kv_heads, header.head_dim)
    wanted = (shape.fingerprint, _name(shape.dtype), shape.kv_heads, shape.head_dim)
    names = ("model fingerprint", "dtype", "number of key-value heads", "head size")
    for name, is_, should in zip(names, found, wanted, strict=True):
        if is_ != should:
            raise SnapshotMismatch(source, f"it is of another model: {name} {is_}, here {should}")


def _check_tensors(tensors: Mapping[str, Tensor], counts: Mapping[int, int], shape: StoreShape, source: str) -> None:
    expected = {f"{layer}.{part}" for layer in counts for part in _PARTS}
    if expected != set(tensors):
        lacking, extra = sorted(expected - set(tensors)), sorted(set(tensors) - expected)
        raise InvalidSnapshot(source, f"tensors are missing ({lacking}) or superfluous ({extra})")
    for name, tensor in sorted(tensors.items()):
        layer, part = name.split(".")
        columns = (1, shape.kv_heads, counts[int(layer)])
        size, dtype = (columns, torch.float32) if part == "bias" else ((*columns, shape.head_dim), shape.dtype)
        if tuple(tensor.shape) != size or tensor.dtype != dtype:
            found = f"{_name(tensor.dtype)} {list(tensor.shape)}"
            raise InvalidSnapshot(source, f"{name} is {found}, its segments say {_name(dtype)} {list(size)}")
        if not bool(torch.isfinite(tensor).all()):
            raise InvalidSnapshot(source, f"{name} holds NaN or infinity")


def _describe(info: SegmentInfo) -> _SegmentHeader:
    return _SegmentHeader(
        id=info.id,
        kind=info.kind,
        tokens={str(layer): count for layer, count in sorted(info.tokens.items())},
        born=info.born,
        distance=info.distance,
        written_step=info.written_step,
        written_at=info.written_at,
        expires_step=info.expires_step,
        expires_at=info.expires_at,
        pinned=info.pinned,
        meta=dict(info.meta),
    )


def _info(item: _SegmentHeader) -> SegmentInfo:
    fields = {name: getattr(item, name) for name in type(item).model_fields}
    tokens = {int(layer): count for layer, count in item.tokens.items()}
    return SegmentInfo(**{**fields, "id": SegmentId(item.id), "tokens": tokens})


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + b"\0")
        digest.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
