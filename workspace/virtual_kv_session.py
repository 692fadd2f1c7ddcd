"""One session's virtual tokens: what was written, in order, and one tensor of each kind per layer.

There is exactly one copy. The tensors of a layer *are* what a view shows, and they are never changed in place: a
write or an eviction makes new ones for the layers concerned and leaves the old ones to whoever holds them. So a view
costs nothing, is always current, and stays what it was for a generation that holds it.

Not thread-safe, knows neither other sessions nor persistence (``virtual_kv.py``), nor files (``virtual_kv_blob.py``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from workspace.context import Segment
from workspace.errors import UnknownSegment
from workspace.virtual_kv_limits import SegmentId, SegmentInfo, StoreLimits, StoreShape, choose_evictions

LayerTensors = tuple[Tensor, Tensor, Tensor]  #: keys and values [1, H, M, D], bias [1, H, M]

_NEVER_STEP, _NEVER = 1 << 62, float("inf")


@dataclass(frozen=True, slots=True)
class SessionState:
    """A session at one moment: what snapshots and statistics are made of, safely outside any lock."""

    infos: tuple[SegmentInfo, ...]
    layers: Mapping[int, Segment]
    step: int
    version: int


class SessionKV:
    """The segments of one session. ``version`` grows with every change that a snapshot would show."""

    def __init__(
        self,
        shape: StoreShape,
        limits: StoreLimits,
        events: Counter[str],
        *,
        infos: Sequence[SegmentInfo] = (),
        layers: Mapping[int, LayerTensors] | None = None,
        step: int = 0,
    ):
        self._shape, self._limits = shape, limits
        self._events = events  #: counts "evicted" and "expired" segments, for all sessions of a store
        self.step = step
        self.version = 0
        self.saved_version: int | None = None  #: the version that persistence holds
        self.parked = False  #: True while its tensors are in CPU memory rather than on the store's device
        self.infos: tuple[SegmentInfo, ...] = ()  #: what is held, oldest first
        self.view: Mapping[int, Segment] = MappingProxyType({})  #: by layer; layers without tokens are absent
        self._set(tuple(infos), {layer: _segment(layer, own, infos) for layer, own in (layers or {}).items()})

    @property
    def dirty(self) -> bool:
        """True when persistence holds something else."""
        return self.version != self.saved_version

    @property
    def has_pins(self) -> bool:
        """True when at least one segment is pinned."""
        return any(info.pinned for info in self.infos)

    def state(self) -> SessionState:
        """Everything as it is now; costs nothing, because nothing of it ever changes."""
        return SessionState(self.infos, self.view, self.step, self.version)

    # Changes. Each leaves everything as it was when it raises.

    def append(self, info: SegmentInfo, layers: Mapping[int, LayerTensors]) -> None:
        """Add a segment, evicting what has to make room. Raises ``StoreFull``. The tensors are copied."""
        victims = choose_evictions(self.infos, info, self._limits, self._shape)
        self._rebuild(victims, info, layers)
        self._events["evicted"] += len(victims)

    def tick(self, steps: int, now: float) -> None:
        """Let ``steps`` pass and remove what is due then."""
        self.step += steps
        if self._counts_steps:
            self.version += 1
        self.expire(now)

    def expire(self, now: float) -> None:
        """Remove what is due and not pinned; two comparisons when nothing is."""
        if self.step >= self._next_step or now >= self._next_at:
            due = {info.id for info in self.infos if not info.pinned and info.due(self.step, now)}
            self._rebuild(due)
            self._events["expired"] += len(due)

    def set_pinned(self, segment: SegmentId, pinned: bool, now: float) -> None:
        """Pin or unpin. What is overdue, or beyond the limits, goes as soon as no pin holds it."""
        found = [info for info in self.infos if info.id == segment]
        if not found:
            raise UnknownSegment(f"there is no segment {segment}; it may have expired, been evicted or been dropped")
        if found[0].pinned != pinned:
            changed = (replace(info, pinned=pinned) if info.id == segment else info for info in self.infos)
            self._set(tuple(changed), self.view)
            self.expire(now)
            self.enforce_limits()

    def enforce_limits(self) -> None:
        """Evict what exceeds the limits and is not pinned."""
        victims = choose_evictions(self.infos, None, self._limits, self._shape)
        if victims:
            self._rebuild(victims)
            self._events["evicted"] += len(victims)

    def drop(self, segment: SegmentId) -> bool:
        """Remove a segment, pinned or not; False when there is none."""
        if all(info.id != segment for info in self.infos):
            return False
        self._rebuild({segment})
        return True

    def settle(self, position: int) -> None:
        """Let nothing be born later than ``position``."""
        if all(info.born <= position for info in self.infos):
            return
        infos = tuple(replace(info, born=min(info.born, position)) for info in self.infos)
        self._set(infos, {layer: _segment(layer, _tensors(old), infos) for layer, old in self.view.items()})

    def move_to(self, device: torch.device, *, parked: bool) -> None:
        """Copy all tensors to ``device``, bit for bit. Not a change: views that are held keep their own."""
        with _plain_tensors():
            moved = {
                layer: _segment(layer, _copies(_tensors(old), device), self.infos) for layer, old in self.view.items()
            }
        self.view, self.parked = MappingProxyType(moved), parked

    def _rebuild(
        self,
        victims: Collection[SegmentId],
        info: SegmentInfo | None = None,
        layers: Mapping[int, LayerTensors] = MappingProxyType({}),
    ) -> None:
        """Take ``victims`` out and put ``info`` in; layers that neither concerns keep their very tensors."""
        kept = tuple(old for old in self.infos if old.id not in victims)
        infos = kept if info is None else (*kept, info)
        affected = {layer for old in self.infos if old.id in victims for layer in old.tokens} | set(layers)
        view = {layer: segment for layer, segment in self.view.items() if layer not in affected}
        with _plain_tensors():
            for layer in affected:
                parts = [
                    _tokens(_tensors(self.view[layer]), begin, end)
                    for begin, end in _kept_runs(self.infos, victims, layer)
                ]
                if layer in layers:
                    parts.append(layers[layer])
                if parts:
                    keys, values, bias = (torch.cat(kind, dim=2) for kind in zip(*parts, strict=True))
                    view[layer] = _segment(layer, (keys, values, bias), infos)
        self._set(infos, view)

    def _set(self, infos: tuple[SegmentInfo, ...], view: Mapping[int, Segment]) -> None:
        self.infos = infos
        self.view = MappingProxyType({layer: view[layer] for layer in sorted(view)})
        self.version += 1
        self.bytes = sum(info.total_tokens for info in infos) * self._shape.token_bytes  # of all its tensors
        self._counts_steps = any(info.expires_step is not None for info in infos)
        self._next_step, self._next_at = _next_due(infos)  # nothing is due before these

    def check_invariants(self) -> None:
        """Counts, order, shapes, births, limits, and that nobody wrote into a shown tensor."""
        ids = [info.id for info in self.infos]
        assert ids == sorted(set(ids)), f"ids out of order or repeated: {ids}"
        assert all(count > 0 for info in self.infos for count in info.tokens.values()), "a segment without tokens"
        assert all(info.tokens for info in self.infos), "a segment without layers"
        assert (self._next_step, self._next_at) == _next_due(self.infos), "the next expiry is not the nearest one"
        assert not choose_evictions(self.infos, None, self._limits, self._shape), "limits are exceeded"
        layers = sorted({layer for info in self.infos for layer in info.tokens})
        assert list(self.view) == layers, f"the view shows {list(self.view)}, the segments have {layers}"
        assert set(layers) <= set(self._shape.layers), f"layers {layers} are not all hooked"
        for layer, segment in self.view.items():
            self._check_layer(layer, segment)
        held = sum(_nbytes(segment) for segment in self.view.values())
        counted = sum(info.total_tokens for info in self.infos) * self._shape.token_bytes
        assert held == counted == self.bytes, f"{held} bytes are held, {self.bytes} are counted"

    def _check_layer(self, layer: int, segment: Segment) -> None:
        count = sum(info.tokens.get(layer, 0) for info in self.infos)
        shape = (1, self._shape.kv_heads, count, self._shape.head_dim)
        assert segment.keys.shape == segment.values.shape == shape, f"layer {layer}: {segment.keys.shape} != {shape}"
        assert segment.bias.shape == shape[:3], f"layer {layer}: bias {tuple(segment.bias.shape)}"
        assert segment.keys.dtype == segment.values.dtype == self._shape.dtype, f"layer {layer}: dtype"
        expected = _segment(layer, _tensors(segment), self.infos)
        assert torch.equal(segment.birth, expected.birth), f"layer {layer}: births differ from the segments'"
        distances = torch.as_tensor(segment.distance), torch.as_tensor(expected.distance)
        assert torch.equal(*distances), f"layer {layer}: distances differ from the segments'"
        for tensor in (segment.keys, segment.values, segment.bias, segment.birth):
            assert tensor._version == 0, f"layer {layer}: somebody wrote into a tensor of the view"
            assert self.parked or tensor.device == self._shape.device, f"layer {layer}: on {tensor.device}"
            assert bool(torch.isfinite(tensor).all()), f"layer {layer}: not finite"


@contextmanager
def _plain_tensors() -> Iterator[None]:
    """No gradients, and ordinary tensors even inside an ``inference_mode``: training may read what serving wrote."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _segment(layer: int, tensors: LayerTensors, infos: Sequence[SegmentInfo]) -> Segment:
    """A layer of the view; births and distances follow from the descriptions."""
    keys, values, bias = tensors
    own = [(info, info.tokens[layer]) for info in infos if layer in info.tokens]
    births = [info.born for info, count in own for _ in range(count)]
    distances = [info.distance for info, count in own for _ in range(count)]
    uniform = len(set(distances)) == 1
    with _plain_tensors():
        return Segment(
            keys,
            values,
            bias,
            birth=torch.tensor([births], dtype=torch.int64, device=keys.device),  # [1, M]
            distance=distances[0] if uniform else torch.tensor(distances, dtype=torch.int64, device=keys.device),
        )


def _tensors(segment: Segment) -> LayerTensors:
    return segment.keys, segment.values, segment.bias


def _tokens(tensors: LayerTensors, begin: int, end: int) -> LayerTensors:
    keys, values, bias = tensors
    return keys[:, :, begin:end], values[:, :, begin:end], bias[:, :, begin:end]


def _copies(tensors: LayerTensors, device: torch.device) -> LayerTensors:
    keys, values, bias = tensors
    return keys.to(device, copy=True), values.to(device, copy=True), bias.to(device, copy=True)


def _kept_runs(infos: Sequence[SegmentInfo], victims: Collection[SegmentId], layer: int) -> Iterator[tuple[int, int]]:
    """Token ranges of ``layer`` that stay, adjacent ones joined."""
    begin: int | None = None
    position = 0
    for info in infos:
        count = info.tokens.get(layer, 0)
        if info.id in victims and count:
            if begin is not None:
                yield begin, position
            begin = None
        elif count and begin is None:
            begin = position
        position += count
    if begin is not None:
        yield begin, position


def _next_due(infos: Sequence[SegmentInfo]) -> tuple[int, float]:
    free = [info for info in infos if not info.pinned]
    steps = [info.expires_step for info in free if info.expires_step is not None]
    times = [info.expires_at for info in free if info.expires_at is not None]
    return min(steps, default=_NEVER_STEP), min(times, default=_NEVER)


def _nbytes(segment: Segment) -> int:
    return segment.keys.nbytes + segment.values.nbytes + segment.bias.nbytes + segment.birth.nbytes
