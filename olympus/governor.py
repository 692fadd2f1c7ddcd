"""Zeus as a governor: votes, routing, polls, lineage and the watch over badly served domains, put together.

Zeus owns one and hands it what it needs; nothing here trains or stores by itself. The parts have pages of their own:
``governance`` and ``ballots`` (votes), ``routing`` and ``route_reference`` (geometry), ``polling``, ``lineage``,
``coverage``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memory.history import History, Record
from olympus import lineage, polling
from olympus.checkpoint_mirror import CheckpointMirror
from olympus.checkpoints import CheckpointStore
from olympus.coverage import CoverageWatch
from olympus.governance import Council
from olympus.kernel_rows import KernelRecord, KernelRows
from olympus.lineage import Inheritance
from olympus.requests import PollRequest, ProposeRequest, QueryRequest, SpawnRequest
from olympus.routing import Router
from olympus.snapshot import SnapshotShelf
from settings import KernelSettings
from storage.database import Database
from telemetry.hub import EventHub


@dataclass(frozen=True)
class Realm:
    """What Zeus lends his governor: the stores, and four of his own requests."""

    settings: KernelSettings
    database: Database
    history: History
    hub: EventHub
    rows: KernelRows
    snapshots: SnapshotShelf
    checkpoints: CheckpointStore
    mirror: CheckpointMirror | None
    lines: Callable[[], list[dict[str, Any]]]
    report: Callable[[KernelRecord], Mapping[str, Any]]
    query: Callable[[str, QueryRequest], dict[str, Any]]
    spawn: Callable[..., dict[str, Any]]
    stopping: threading.Event


class Governor:
    """See the module docstring. Safe to use from all threads."""

    def __init__(self, realm: Realm):
        self._realm = realm
        self.router = Router(realm.history, realm.lines)
        self.council = Council(
            realm.settings,
            realm.database,
            realm.history,
            realm.hub,
            realm.rows,
            realm.snapshots,
            realm.checkpoints,
            self.router,
            realm.report,
        )
        self.watch = CoverageWatch(
            realm.settings,
            realm.database,
            realm.history,
            realm.rows,
            realm.report,
            realm.spawn,
            realm.stopping,
        )
        self._inheritance = Inheritance(realm.settings, realm.rows, realm.checkpoints, realm.snapshots, realm.mirror)

    def notice(self, records: list[Record]) -> None:
        """Called after each commit to the history."""
        self.watch.notice(records)

    # -- a new kernel -----------------------------------------------------------------------------------------

    def vote_on(self, request: SpawnRequest, actor: str) -> dict[str, Any] | None:
        """The proposal and its vote where the request asks for one, else None. Raises ``VoteLost``."""
        if not request.vote and request.reason == "user_request":
            return None
        asked = {name: getattr(request, name) for name in ProposeRequest.model_fields}
        return self.council.propose(ProposeRequest(**asked), actor, force=request.force)

    def bless(self, child: KernelRecord, actor: str) -> None:
        """Give a new kernel what it inherits, before it trains. Raises ``InvalidRequest``, and then there is none."""
        if child.config.get("inherited_from") is not None:
            self._inheritance.pass_on(child, actor)

    def propose(self, request: ProposeRequest, actor: str) -> dict[str, Any]:
        """Hold a vote and make nothing. Raises ``VoteLost`` or ``InvalidRequest``."""
        answer = self.council.propose(request, actor)
        return {**answer, "hint": "POST /olympus/kernels/spawn makes the kernel; with vote it is voted on again"}

    # -- questions to all -------------------------------------------------------------------------------------

    def route(self, texts: Sequence[str]) -> list[dict[str, Any]]:
        """One answer per text; see ``Router.route``."""
        return self.router.route(texts)

    def poll(self, request: PollRequest) -> dict[str, Any]:
        """Ask all kernels, or the named ones. Raises ``KernelNotFound`` for one that does not exist."""
        routed = self.router.route([request.input])[0]
        return polling.poll(request, routed, self._realm.rows.all(), self._realm.query)

    def lineage(self) -> dict[str, Any]:
        """Nodes and edges of the family."""
        kernels = self._realm.rows.all()
        reports = {kernel.id: self._realm.report(kernel) for kernel in kernels}
        return lineage.family(kernels, reports, self.router.atlas().between())
