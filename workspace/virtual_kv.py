"""The virtual tokens of all sessions of one hooked model: the store that produces what a forward pass carries.

A generation asks for ``view(session)`` before each pass (nothing is computed when nothing changed), says ``tick``
after each token, and writes segments in between. What it holds stays as it was, whatever happens here meanwhile.

**Pressure.** When the sessions together exceed ``spill_bytes`` on the store's device, the least recently used ones
are spilled: from a GPU to CPU memory, and beyond ``parked_bytes``, or on a CPU, to persistence, after which nothing
of them is left in memory. They come back on demand, bit for bit. A store without persistence has nowhere to put
them and forgets whole sessions instead, never one with pins, and says so in the log. Not counted: views that
generations hold, and what the attention function derives from them.

**Durability** is write-behind: ``write`` and ``tick`` touch memory only, so that decoding never waits for a disk.
The unit that is acknowledged is the finished request: after ``flush(session)`` returns, everything written before
survives ``kill -9``; call it before a client is told that its answer is finished. ``clear`` and ``drop`` too are
durable once flushed. Sessions that were flushed are spilled without any input or output.

Stored tensors are detached: gradients go through a ``Context`` made from fresh ones, never through the store.
Expired segments leave at the next touch of their session. Not here: what a write must look like
(``virtual_kv_input.py``), limits (``virtual_kv_limits.py``), one session (``virtual_kv_session.py``), locks and
spilling (``virtual_kv_residency.py``), bytes (``virtual_kv_blob.py``), the database (``memory/latent.py``).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from workspace.context import Segment
from workspace.errors import StoreFull
from workspace.virtual_kv_blob import encode
from workspace.virtual_kv_input import Description, accept_layers, check_name
from workspace.virtual_kv_limits import SegmentId, SegmentInfo, StoreLimits, StoreShape
from workspace.virtual_kv_residency import Load, Residency, Save
from workspace.virtual_kv_session import LayerTensors, SessionState
from workspace.virtual_kv_stats import SessionStats, StoreTotals, measure

logger = logging.getLogger(__name__)

_NOTHING: Mapping[int, Segment] = MappingProxyType({})


class VirtualKVStore:
    """Segments by session. Every method may be called from any thread.

    ``load`` and ``save`` are persistence, both or neither. ``clock`` gives seconds since the epoch: times to live in
    seconds go on while the process is down. ``parking`` is where spilled tensors wait: CPU memory, unless the store
    itself is there.
    """

    def __init__(
        self,
        shape: StoreShape,
        limits: StoreLimits | None = None,
        *,
        load: Load | None = None,
        save: Save | None = None,
        clock: Callable[[], float] = time.time,
        parking: torch.device | None = None,
    ):
        self.shape = shape
        self.limits = limits or StoreLimits()
        self._clock = clock
        self._sessions = Residency(shape, self.limits, load=load, save=save, clock=clock, parking=parking)

    # What a generation does.

    def write(
        self,
        session: str,
        layers: Mapping[int, tuple[Tensor, Tensor, Tensor]],
        *,
        born: int,
        kind: str,
        ttl_steps: int | None = None,
        ttl_seconds: float | None = None,
        pinned: bool = False,
        meta: Mapping[str, Any] | None = None,
        distance: int = 0,
    ) -> SegmentId:
        """Add one segment over several layers: (keys [1, H, M, D], values [1, H, M, D], bias [1, H|1, M]) for each.

        ``born`` is the first position whose query sees it; a time to live that is not given is the limits' own. The
        tensors are copied. Raises ``InvalidSegment`` or ``StoreFull``, and then nothing has changed.
        """
        description = Description(kind, born, distance, ttl_steps, ttl_seconds, pinned, meta)
        tensors = accept_layers(layers, self.shape)
        try:
            with self._sessions.opened(session, create=True) as record:
                assert record is not None
                self._sessions.unpark(record)
                info = self._info(SegmentId(self._sessions.next_id), description, tensors, record.step)
                record.append(info, tensors)
                self._sessions.next_id += 1
                self._sessions.events["writes"] += 1
        except StoreFull:
            self._sessions.note("refused")
            raise
        finally:
            self._sessions.relieve(session)  # a refused write too may have brought the session back
        return info.id

    def _info(
        self, number: SegmentId, description: Description, tensors: Mapping[int, LayerTensors], step: int
    ) -> SegmentInfo:
        steps = self.limits.ttl_steps if description.ttl_steps is None else description.ttl_steps
        seconds = self.limits.ttl_seconds if description.ttl_seconds is None else description.ttl_seconds
        now = self._clock()
        return SegmentInfo(
            id=number,
            kind=description.kind,
            tokens={layer: own[0].shape[2] for layer, own in tensors.items()},
            born=description.born,
            distance=description.distance,
            written_step=step,
            written_at=now,
            expires_step=None if steps is None else step + steps,
            expires_at=None if seconds is None else now + seconds,
            pinned=description.pinned,
            meta=description.meta or {},
        )

    def view(self, session: str) -> Mapping[int, Segment]:
        """What the session holds, by layer, in the order it was written; layers without tokens are absent.

        Read it, never write into it: the tensors are the store's own. It never changes; a change makes another view.
        """
        with self._sessions.opened(session) as record:
            if record is None:
                return _NOTHING
            back = self._sessions.unpark(record)
            view = record.view
        if back:
            self._sessions.relieve(session)
        return view

    def tick(self, session: str, steps: int = 1) -> None:
        """The session advanced by ``steps`` tokens: what was written to live for so many is removed."""
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        with self._sessions.opened(session) as record:
            if record is not None:
                record.tick(steps, self._clock())

    def settle(self, session: str, position: int = 0) -> None:
        """Let no segment be born later than ``position``: what one request wrote is the past of the next.

        Positions begin anew with every request, so a segment born at token 900 would stay unseen in a shorter one.
        """
        with self._sessions.opened(session) as record:
            if record is not None:
                record.settle(position)

    # What keeps and removes.

    def pin(self, session: str, segment: SegmentId) -> None:
        """Hold a segment against limits and time. Raises ``UnknownSegment``."""
        self._set_pinned(session, segment, True)

    def unpin(self, session: str, segment: SegmentId) -> None:
        """Release it; if it is overdue, or the limits are exceeded, it goes at once. Raises ``UnknownSegment``."""
        self._set_pinned(session, segment, False)

    def _set_pinned(self, session: str, segment: SegmentId, pinned: bool) -> None:
        with self._sessions.opened(session, create=True) as record:
            assert record is not None
            record.set_pinned(segment, pinned, self._clock())

    def drop(self, session: str, segment: SegmentId) -> bool:
        """Remove one segment, pinned or not; False when it is not there (any more)."""
        with self._sessions.opened(session) as record:
            return record is not None and record.drop(segment)

    def clear(self, session: str) -> None:
        """Remove everything of a session, pins too, without reading what persistence holds of it."""
        check_name(session)
        with self._sessions.lock:
            self._sessions.put(session, self._sessions.empty())

    # What is there.

    def sessions(self) -> list[str]:
        """Names of the sessions in memory that hold something, least recently used first."""
        with self._sessions.lock:
            return [name for name, record in self._sessions.records.items() if record.infos]

    def segments(self, session: str) -> tuple[SegmentInfo, ...]:
        """Descriptions of what the session holds, oldest first."""
        return self._state(session).infos

    def stats(self, session: str) -> SessionStats:
        """Tokens, bytes and mean norms, per layer."""
        return measure(self._state(session), self.shape)

    def totals(self) -> StoreTotals:
        """All sessions in memory together, and counts since the start, for telemetry."""
        with self._sessions.lock:
            records = [record for record in self._sessions.records.values() if record.infos]
            infos = [info for record in records for info in record.infos]
            count = self._sessions.events
            return StoreTotals(
                sessions=len(records),
                parked_sessions=sum(record.parked for record in records),
                segments=len(infos),
                tokens=sum(info.total_tokens for info in infos),
                resident_bytes=self._sessions.held_bytes(parked=False),
                parked_bytes=self._sessions.held_bytes(parked=True),
                writes=count["writes"],
                refused=count["refused"],
                evicted=count["evicted"],
                expired=count["expired"],
                spilled=count["spilled"],
                brought_back=count["brought_back"],
                forgotten=count["forgotten"],
                failed_saves=count["failed_saves"],
            )

    # Bytes and persistence.

    def snapshot(self, session: str) -> bytes:
        """One session as safetensors bytes with a JSON header; equal sessions give equal bytes."""
        return encode(self._state(session), self.shape)

    def restore(self, session: str, blob: bytes, *, source: str) -> None:
        """Replace a session by a snapshot, then expire and evict as always. ``source`` says in errors what it was.

        Raises ``SnapshotError``, and then nothing has changed.
        """
        check_name(session)
        record = self._sessions.decoded(blob, source)
        with self._sessions.lock:
            self._sessions.put(session, record)
        self._sessions.relieve(session)

    def flush(self, session: str) -> None:
        """Persist what is new in a session. When this returns, it survives ``kill -9``; persistence's errors pass."""
        self._sessions.flush(session)

    def flush_all(self) -> None:
        """Flush every session, also when some fail; then raise the first failure."""
        with self._sessions.lock:
            names = list(self._sessions.records)
        failures: list[Exception] = []
        for name in names:
            try:
                self.flush(name)
            except Exception as error:  # persistence may raise anything; the other sessions still count
                logger.exception("the virtual tokens of session %s could not be saved", name)
                failures.append(error)
        if failures:
            raise failures[0]

    def spill(self, session: str) -> bool:
        """Move a session off the store's device now; False when there is nothing to move, or nowhere to move it."""
        return self._sessions.spill(session)

    def check_invariants(self) -> None:
        """Every count, order, byte and view; raises ``AssertionError``."""
        self._sessions.check_invariants()

    def _state(self, session: str) -> SessionState:
        with self._sessions.opened(session) as record:
            return SessionState((), _NOTHING, 0, 0) if record is None else record.state()
