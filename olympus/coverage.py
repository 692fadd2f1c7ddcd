"""Zeus looks by himself whether new experience is badly served, and then asks for a kernel.

A watch on a daemon thread of its own: new experience wakes it, at most every ``kernels.coverage_seconds``, never on
a request's time. A domain is **badly served** when it holds at least ``LEAST_EXPERIENCES`` and

    domain_gap       no kernel learns from it, or
    specialization   every kernel of it has come to rest and none is below the context-free baseline.

One that still learns, or that a user has paused, is left its chance. What is found goes through the same vote as any
proposal (``governance``), so a domain that another kernel serves already is refused with numbers.

Never twice for the same gap: each look that led to a vote leaves its audit row, and until ``coverage_cooldown_hours``
later *and* half as much experience again the domain is left alone, also after a restart and after the kernel was
deleted. One round makes at most one kernel. Clusters inside a domain get none: a kernel learns from a domain of the
history, so a part of one has nothing to learn from.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
import structlog

from memory.history import History, Record
from olympus.errors import KernelLimitReached, NotReady, OlympusError, StorageFull, VoteLost
from olympus.kernel_rows import KernelRecord, KernelRows
from olympus.requests import ALL_DOMAINS, Reason, SpawnRequest
from settings import KernelSettings
from storage.database import Database
from storage.models import AuditEvent

log = structlog.get_logger(__name__)

ACTOR = "zeus"
#: The audit row of an automatic proposal; its target is the domain.
AUTOMATIC = "kernel.proposal.automatic"
LEAST_EXPERIENCES = 60
#: What "half as much again" means.
GROWTH = 1.5
_AT_REST = ("converged", "settled")
#: What says nothing about the gap: the next look tries again.
_PASSING = (NotReady, StorageFull, KernelLimitReached)


@dataclass(frozen=True, slots=True)
class Gap:
    """A domain that is badly served, and why."""

    domain: str
    reason: Reason
    experiences: int
    detail: str


def find_gaps(
    domains: Mapping[str, int], kernels: Sequence[KernelRecord], report: Callable[[KernelRecord], Mapping[str, Any]]
) -> list[Gap]:
    """Badly served domains, those with the most experience first."""
    found = []
    for domain, experiences in sorted(domains.items(), key=lambda item: (-item[1], item[0])):
        if experiences < LEAST_EXPERIENCES:
            continue
        incumbents = [kernel for kernel in kernels if kernel.domain in (domain, ALL_DOMAINS)]
        if not incumbents:
            found.append(Gap(domain, "domain_gap", experiences, "no kernel learns from it"))
        elif all(kernel.state in _AT_REST and not _has_learned(report(kernel)) for kernel in incumbents):
            detail = f"its {len(incumbents)} kernels came to rest without beating the baseline"
            found.append(Gap(domain, "specialization", experiences, detail))
    return found


def _has_learned(report: Mapping[str, Any]) -> bool:
    return bool(report.get("progress", {}).get("loss_ok"))


class CoverageWatch:
    """See the module docstring. ``spawn(request, actor=...)`` holds the vote and makes the kernel."""

    def __init__(
        self,
        settings: KernelSettings,
        database: Database,
        history: History,
        rows: KernelRows,
        report: Callable[[KernelRecord], Mapping[str, Any]],
        spawn: Callable[..., dict[str, Any]],
        stopping: threading.Event,
    ):
        self._settings = settings
        self._database = database
        self._history = history
        self._rows = rows
        self._report = report
        self._spawn = spawn
        self._stopping = stopping
        self._closing = threading.Event()
        self._news = threading.Event()
        self._thread: threading.Thread | None = None
        #: A round of the watch; the runtime puts in its place what also notes the outcome (``timetable.py``).
        self.perform: Callable[[], object] = self.look
        self.next_at: float | None = None  #: the earliest next round, in seconds since the epoch

    def start(self) -> None:
        """Begin to watch, if the settings want it; what the history holds already is looked at first."""
        if self._settings.auto_spawn:
            self._news.set()
            self._thread = threading.Thread(target=self._watch, name="coverage-watch", daemon=True)
            self._thread.start()

    def stop(self, deadline_s: float) -> None:
        """End the watch; a vote that is being held ends within a few seconds by itself."""
        self._closing.set()
        self._news.set()
        if self._thread is not None:
            self._thread.join(deadline_s)

    def notice(self, _: list[Record]) -> None:
        """Called after each commit to the history, in the writer's thread."""
        self._news.set()

    def look(self) -> list[dict[str, Any]]:
        """One round, here and now: what was proposed and how it went. At most one kernel is made."""
        domains = {domain: count for domain, (count, _) in self._history.domains().items()}
        told: list[dict[str, Any]] = []
        for gap in find_gaps(domains, self._rows.all(), self._report):
            if self._closing.is_set() or len(self._rows.all()) >= self._settings.max_kernels:
                break
            if self._is_cooling(gap):
                continue
            told.append(self._propose(gap))
            if told[-1]["spawned"] is not None:
                break
        return told

    # -- inside -----------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        pause = self._settings.coverage_seconds
        self.next_at = time.time() + pause
        while not self._closing.wait(pause) and not self._stopping.is_set():
            if not self._news.wait(pause) or self._closing.is_set():
                self.next_at = time.time() + pause
                continue
            self._news.clear()
            try:
                self.perform()
            except Exception:  # the watch must outlive a database that is briefly gone
                log.exception("the look for badly served domains failed; trying again with the next experience")
            self.next_at = time.time() + pause
        self.next_at = None

    def look_in_words(self) -> str:
        """``look``, for the timetable."""
        return "; ".join(f"{told['domain']}: {told['outcome']}" for told in self.look())

    def _propose(self, gap: Gap) -> dict[str, Any]:
        log.info("badly served", domain=gap.domain, reason=gap.reason, detail=gap.detail, experiences=gap.experiences)
        request = SpawnRequest(domain=gap.domain, reason=gap.reason, vote=True)
        told: dict[str, Any] = {"domain": gap.domain, "reason": gap.reason, "detail": gap.detail, "spawned": None}
        try:
            told["spawned"] = self._spawn(request, actor=ACTOR)["kernel"]["kernel_id"]
            outcome = f"spawned {told['spawned']}"
        except VoteLost as lost:
            outcome = str(lost)
        except _PASSING as error:
            return {**told, "outcome": f"not now: {error}"}
        except OlympusError as error:
            outcome = f"could not be carried out: {error}"
        told["outcome"] = outcome
        self._remember(gap, outcome)
        return told

    def _remember(self, gap: Gap, outcome: str) -> None:
        detail = {"reason": gap.reason, "detail": gap.detail, "experiences": gap.experiences, "outcome": outcome[:500]}
        with self._database.write() as session:
            session.add(AuditEvent(actor=ACTOR, action=AUTOMATIC, target=gap.domain, detail=detail))

    def _is_cooling(self, gap: Gap) -> bool:
        """True when the last automatic proposal for the domain was too recent, or has seen most of what there is."""
        for at, experiences in self._looks(gap.domain):
            recent = time.time() - at < self._settings.coverage_cooldown_hours * 3600
            return recent or gap.experiences < GROWTH * experiences
        return False

    def _looks(self, domain: str) -> Iterator[tuple[float, int]]:
        query = sa.select(AuditEvent).where(AuditEvent.action == AUTOMATIC, AuditEvent.target == domain)
        with self._database.read() as session:
            row = session.scalar(query.order_by(AuditEvent.id.desc()).limit(1))
            if row is not None:
                yield row.at, int(row.detail["experiences"])
