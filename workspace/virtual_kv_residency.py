"""Which sessions are in memory: locks, least recent use, spilling under pressure, and persistence.

Two locks. ``lock`` guards all state and is never held during input or output. ``_saving`` is taken before it, never
inside it, and admits one save or load at a time: so persistence never goes back to an older state of a session. What
is saved is a ``SessionState``, which does not change, so a session can be written to while it is being saved; it is
then dirty again afterwards.

A session without a record here is either in persistence or nowhere; ``_absent`` remembers the latter, so that a
session with nothing stored is not asked for again at every token. What a session holds is ``virtual_kv_session.py``.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from workspace.virtual_kv_blob import decode, encode
from workspace.virtual_kv_input import check_name
from workspace.virtual_kv_limits import StoreLimits, StoreShape
from workspace.virtual_kv_session import SessionKV, SessionState

logger = logging.getLogger(__name__)

Load = Callable[[str], bytes | None]  #: what persistence holds for a session
Save = Callable[[str, bytes | None], None]  #: keep it durably, committed on return; None: keep nothing

_MAX_ABSENT = 65536


class Residency:
    """The sessions of a store. Methods that say so need ``lock`` held; the others take it themselves."""

    def __init__(
        self,
        shape: StoreShape,
        limits: StoreLimits,
        *,
        load: Load | None,
        save: Save | None,
        clock: Callable[[], float],
        parking: torch.device | None,
    ):
        if (load is None) != (save is None):
            raise ValueError("give both load and save, or neither")
        self._shape, self._limits = shape, limits
        self._load, self._save = load, save
        self._clock = clock
        self._parking = torch.device("cpu") if parking is None and shape.device.type != "cpu" else parking
        self._saving = threading.Lock()
        self.lock = threading.Lock()
        self.records: OrderedDict[str, SessionKV] = OrderedDict()  #: least recently used first; needs ``lock``
        self.events: Counter[str] = Counter()  #: needs ``lock``
        self.next_id = 1  #: of segments, above every id in memory; needs ``lock``
        self._absent: OrderedDict[str, None] = OrderedDict()  # persistence is known to hold nothing of these

    @contextmanager
    def opened(self, session: str, *, create: bool = False) -> Iterator[SessionKV | None]:
        """The session in memory and up to date, ``lock`` held meanwhile; None when there is none.

        Its tensors may be parked. With ``create`` there always is one; if it is still empty at the end, it is gone.
        """
        check_name(session)
        while True:
            with self.lock:
                record = self.records.get(session)
                if record is not None or self._persists_nothing(session):
                    if record is None and create:
                        record = self.records[session] = self.empty()
                    if record is not None:
                        self.records.move_to_end(session)
                        record.expire(self._clock())
                    try:
                        yield record
                    finally:
                        self._remove_if_empty(session)
                    return
            self._fetch(session)

    def empty(self) -> SessionKV:
        """A session that holds nothing, not among the others yet."""
        return SessionKV(self._shape, self._limits, self.events)

    def decoded(self, blob: bytes, source: str) -> SessionKV:
        """A session out of a snapshot, not among the others yet. Raises ``SnapshotError``."""
        infos, layers, step = decode(blob, self._shape, source)
        return SessionKV(self._shape, self._limits, self.events, infos=infos, layers=layers, step=step)

    def put(self, session: str, record: SessionKV) -> None:
        """Make ``record`` the session, whatever it was before; needs ``lock``."""
        record.expire(self._clock())
        record.enforce_limits()
        self.next_id = max([self.next_id, *(info.id + 1 for info in record.infos)])
        self.records[session] = record
        self.records.move_to_end(session)
        self._remove_if_empty(session)

    def unpark(self, record: SessionKV) -> bool:
        """Bring a parked session back to the device; False when it is there. Needs ``lock``; ``relieve`` after it."""
        if not record.parked:
            return False
        record.move_to(self._shape.device, parked=False)
        self.events["brought_back"] += 1
        return True

    def note(self, event: str) -> None:
        """Count an event."""
        with self.lock:
            self.events[event] += 1

    def held_bytes(self, *, parked: bool) -> int:
        """Of all resident or of all parked sessions; needs ``lock``."""
        return sum(record.bytes for record in self.records.values() if record.parked == parked)

    # Persistence.

    def flush(self, session: str) -> None:
        """Persist what is new in a session; errors of persistence pass, and the session stays dirty."""
        check_name(session)
        if self._save is None:
            return
        with self._saving:
            with self.lock:
                record = self.records.get(session)
                state = None if record is None else record.state()
            if record is not None and state is not None:
                self._persist(session, record, state)

    def _persist(self, session: str, record: SessionKV, state: SessionState) -> None:
        """Save ``state`` of ``record`` unless it is saved already; needs ``_saving``."""
        assert self._save is not None
        if state.version == record.saved_version:
            return
        with self.lock:
            self._absent.pop(session, None)  # before the save, not after: from here on it may hold something
        self._save(session, encode(state, self._shape) if state.infos else None)
        with self.lock:
            record.saved_version = state.version
            if not state.infos:
                self._note_absent(session)

    def _fetch(self, session: str) -> None:
        """Read a session from persistence, unless somebody was quicker."""
        assert self._load is not None
        with self._saving:
            with self.lock:
                if session in self.records or self._persists_nothing(session):
                    return
            blob = self._load(session)
            record = None
            if blob is not None:
                record = self.decoded(blob, f"the stored virtual tokens of session {session!r}")
                record.saved_version = record.version
            with self.lock:
                if record is None:
                    self._note_absent(session)
                elif session not in self.records:  # else it was cleared or restored meanwhile: this is the past
                    self.put(session, record)
                    self.events["brought_back"] += 1
        self.relieve(session)

    def _persists_nothing(self, session: str) -> bool:
        """Whether persistence is known to hold nothing of the session; needs ``lock``."""
        return self._load is None or session in self._absent

    def _note_absent(self, session: str) -> None:
        self._absent[session] = None
        self._absent.move_to_end(session)
        if len(self._absent) > _MAX_ABSENT:
            self._absent.popitem(last=False)
        self._remove_if_empty(session)

    def _remove_if_empty(self, session: str) -> None:
        """Keep no empty session that persistence need not hear of; needs ``lock``."""
        record = self.records.get(session)
        if record is not None and not record.infos and self._persists_nothing(session):
            del self.records[session]

    # Pressure.

    def spill(self, session: str) -> bool:
        """Move a session off the device now; False when there is nothing to move, or nowhere to move it."""
        check_name(session)
        with self._saving:
            moved = self._park(session) if self._parking is not None else self._leave(session, forget=False)
        self.relieve(None)
        return moved

    def relieve(self, keep: str | None) -> None:
        """Spill least recently used sessions other than ``keep`` until the budgets hold, if they can."""
        with self.lock:
            if not self._over(parked=False) and not self._over(parked=True):
                return
        with self._saving:
            with self.lock:
                for name in list(self.records):  # what has expired goes first
                    self.records[name].expire(self._clock())
                    self._remove_if_empty(name)
                names = [name for name in self.records if name != keep]
            if self._parking is not None:
                self._spill_while_over(names, self._park, parked=False)
            self._spill_while_over(names, self._leave, parked=self._parking is not None)

    def _spill_while_over(self, names: list[str], spill: Callable[[str], bool], *, parked: bool) -> None:
        for name in names:
            with self.lock:
                if not self._over(parked=parked):
                    return
            spill(name)

    def _over(self, *, parked: bool) -> bool:
        """Whether a budget is exceeded; needs ``lock``."""
        return self.held_bytes(parked=parked) > (self._limits.parked_bytes if parked else self._limits.spill_bytes)

    def _park(self, session: str) -> bool:
        """Move a resident session to where spilled ones wait."""
        assert self._parking is not None
        with self.lock:
            record = self.records.get(session)
            if record is None or record.parked or not record.infos:
                return False
            record.move_to(self._parking, parked=True)
            self.events["spilled"] += 1
            return True

    def _leave(self, session: str, *, forget: bool = True) -> bool:
        """Take a session out of memory, to persistence or, where there is none, for good; needs ``_saving``."""
        with self.lock:
            record = self.records.get(session)
            if record is None or (self._parking is not None and not record.parked):
                return False
            if self._save is None:
                return forget and self._forget(session, record)
            state = record.state()
        try:
            self._persist(session, record, state)
        except Exception:  # whoever needs the room must not fail for another session; this one stays
            logger.exception("the virtual tokens of session %s could not be saved", session)
            self.note("failed_saves")
            return False
        with self.lock:
            if self.records.get(session) is not record or record.version != state.version:
                return False  # it was used meanwhile
            del self.records[session]
            self.events["spilled"] += 1
            return True

    def _forget(self, session: str, record: SessionKV) -> bool:
        if record.has_pins:
            return False
        del self.records[session]
        self.events["forgotten"] += 1
        logger.warning("session %s was forgotten: no room for its %d bytes, no persistence", session, record.bytes)
        return True

    def check_invariants(self) -> None:
        """Every session's own, and what holds between them."""
        with self.lock:
            for name, record in self.records.items():
                record.check_invariants()
                assert record.infos or not self._persists_nothing(name), f"{name}: an empty session was kept"
                assert all(info.id < self.next_id for info in record.infos), f"{name}: an id from the future"
                assert record.saved_version is None or record.saved_version <= record.version, f"{name}: versions"
                assert not record.parked or self._parking is not None, f"{name}: parked nowhere"
            assert len(self._absent) <= _MAX_ABSENT, "too many absent sessions are remembered"
