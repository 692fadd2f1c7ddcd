"""What the server does by itself, by the clock: when next, how it went, and the same at once where somebody asks.

APScheduler only calls. It says in its log alone that a job failed, was late or was left out; here the newest outcomes
of each job are kept for people, in memory: what a job made stands in rows of its own. Equal outcomes in a row are one
entry with a count, so that two thousand looks that found nothing do not push out the one that did.

A job is never at work twice. The jobs are added anew at every start: APScheduler's SQL store unpickles what the
database holds, and forgets jobs whose function was renamed.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import structlog
from apscheduler.events import EVENT_JOB_MAX_INSTANCES, EVENT_JOB_MISSED, JobEvent
from apscheduler.schedulers.background import BackgroundScheduler

from olympus.coverage import CoverageWatch
from olympus.errors import InvalidAction, OlympusError
from settings import KernelSettings

log = structlog.get_logger(__name__)

Result = Literal["done", "nothing", "failed", "missed"]
SCHEDULE = "schedule"
COVERAGE = "coverage"
_KEPT = 20


class UnknownJob(OlympusError):
    """No job has that id; ``GET /olympus/scheduler`` lists them."""

    status = 404
    code = "job_not_found"


class JobBusy(InvalidAction):
    """The job is at work at this moment; its outcome follows."""

    code = "job_busy"


@dataclass(frozen=True, slots=True)
class Job:
    """Something to do again and again. ``run`` says in words what it did; an empty text: nothing had to be done."""

    id: str
    title: str
    about: str
    seconds: float  #: between two calls
    scope: str  #: who may run it at once
    run: Callable[[], str]
    off: str = ""  #: why it is never run by itself, if it is not
    next_at: Callable[[], float | None] | None = None  #: of a job with a clock of its own


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one call went; ``times`` equal ones in a row, the newest at ``began_at``."""

    by: str  #: ``schedule``, or the principal who wanted it at once
    began_at: float
    seconds: float
    result: Result
    told: str
    times: int = 1


class Timetable:
    """See the module docstring. Jobs are added before they begin; all methods may be called from any thread."""

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}
        self._outcomes: dict[str, deque[Outcome]] = {}
        self._at_work: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()
        self._scheduler: BackgroundScheduler | None = None

    def add(self, job: Job) -> None:
        """Make a job known; ``begin`` starts its clock."""
        with self._lock:
            assert job.id not in self._jobs, f"two jobs are called {job.id}"
            self._jobs[job.id] = job
            self._outcomes[job.id] = deque(maxlen=_KEPT)
            self._at_work[job.id] = threading.Lock()

    def begin(self, job_id: str) -> None:
        """Call a job every ``seconds`` from now on."""
        job = self._job(job_id)
        with self._lock:
            if self._scheduler is None:
                self._scheduler = BackgroundScheduler(timezone="UTC")
                self._scheduler.add_listener(self._left_out, EVENT_JOB_MAX_INSTANCES | EVENT_JOB_MISSED)
                self._scheduler.start()
            self._scheduler.add_job(
                self.perform, "interval", args=[job.id], seconds=job.seconds, id=job.id, misfire_grace_time=None
            )

    def shutdown(self) -> None:
        """Call nothing any more; what is at work ends by itself."""
        with self._lock:
            scheduler, self._scheduler = self._scheduler, None
        if scheduler is not None:
            scheduler.shutdown(wait=False)

    def perform(self, job_id: str, by: str = SCHEDULE) -> Outcome | None:
        """Do a job now and keep its outcome. None: the schedule came while it was at work.

        Raises ``UnknownJob``, and ``JobBusy`` for anybody but the schedule. Errors of the job become its outcome.
        """
        job = self._job(job_id)
        if not self._at_work[job_id].acquire(blocking=False):
            if by == SCHEDULE:
                return None
            raise JobBusy(f"{job_id} is at work at this moment; look again shortly")
        try:
            return self._keep(job_id, self._run(job, by))
        finally:
            self._at_work[job_id].release()

    def scope_of(self, job_id: str) -> str:
        """What a principal needs to run a job at once. Raises ``UnknownJob``."""
        return self._job(job_id).scope

    def next_at(self, job_id: str) -> float | None:
        """When a job is called next, in seconds since the epoch; None: not by itself."""
        job, scheduler = self._job(job_id), self._scheduler
        if job.next_at is not None:
            return job.next_at()
        known = None if scheduler is None else scheduler.get_job(job_id)
        return None if known is None or known.next_run_time is None else float(known.next_run_time.timestamp())

    def describe(self) -> list[dict[str, Any]]:
        """Every job with its clock and its newest outcomes, newest first."""
        with self._lock:
            known = [(job, list(self._outcomes[job.id])) for job in self._jobs.values()]
        return [
            {
                "id": job.id,
                "title": job.title,
                "about": job.about,
                "every_seconds": job.seconds,
                "scope": job.scope,
                "next_at": self.next_at(job.id),
                "off": job.off or None,
                "at_work": self._at_work[job.id].locked(),
                "outcomes": [asdict(outcome) for outcome in reversed(outcomes)],
            }
            for job, outcomes in known
        ]

    # -- inside -----------------------------------------------------------------------------------------------

    def _job(self, job_id: str) -> Job:
        job = self._jobs.get(job_id)
        if job is None:
            raise UnknownJob(f"there is no job {job_id!r}; known are {', '.join(sorted(self._jobs))}")
        return job

    @staticmethod
    def _run(job: Job, by: str) -> Outcome:
        began, clock = time.time(), time.perf_counter()
        try:
            told = job.run()
            result: Result = "done" if told else "nothing"
        except OlympusError as error:
            result, told = "failed", str(error)
        except Exception:  # the last line of defence: a job that fails is called again all the same
            log.exception("a job failed", job=job.id)
            result, told = "failed", "an unexpected error; see the server's log"
        return Outcome(by, began, round(time.perf_counter() - clock, 4), result, told)

    def _keep(self, job_id: str, outcome: Outcome) -> Outcome:
        with self._lock:
            kept = self._outcomes[job_id]
            last = kept[-1] if kept else None
            if last is not None and (last.by, last.result, last.told) == (outcome.by, outcome.result, outcome.told):
                kept.pop()
                outcome = replace(outcome, times=last.times + 1)
            kept.append(outcome)
        return outcome

    def _left_out(self, event: JobEvent) -> None:
        why = (
            "the call before was still at work" if event.code == EVENT_JOB_MAX_INSTANCES else "the server was too busy"
        )
        self._keep(event.job_id, Outcome(SCHEDULE, time.time(), 0.0, "missed", why))

    def check_invariants(self) -> None:
        """Raise ``AssertionError`` if the outcomes contradict themselves."""
        with self._lock:
            for kept in self._outcomes.values():
                assert len(kept) <= _KEPT
                assert all(outcome.times >= 1 for outcome in kept)


def coverage_job(watch: CoverageWatch, settings: KernelSettings) -> Job:
    """Zeus's look for badly served domains, which has a clock of its own: it waits for new experiences, too."""
    return Job(
        COVERAGE,
        "Look for badly served domains",
        "Zeus proposes a kernel where none learns; at most one in a round, and only when there are new experiences.",
        settings.coverage_seconds,
        "kernels:write",
        watch.look_in_words,
        off="" if settings.auto_spawn else "kernels.auto_spawn is false",
        next_at=lambda: watch.next_at,
    )
