"""One thread that works on distillation runs, one after the other, and says how far it is.

A run is led under a lease: a second, small thread extends it every few seconds and hears whether the end was asked
for, so that a step of a minute costs nobody the lease. What ends a run early says how it goes on: cancelled by a
person (it stays so), by the server's stop (it waits for the next start), or because another worker took it over (then
nothing more is written). A run's stages, and what they do after a crash, are the pipeline's business.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from memory.distillation.errors import DistillationError
from memory.distillation.runs import LEASE_SECONDS, LeaseLost, Run, RunState, RunStore

logger = logging.getLogger(__name__)

_BEAT_SECONDS = LEASE_SECONDS / 10
_IDLE_SECONDS = 5.0
_PUBLISH_SECONDS = 0.5

Report = Callable[[Mapping[str, Any]], None]
Publish = Callable[[str, dict[str, Any]], None]


class Interrupted(Exception):
    """The end was asked for; what was done so far lies in the run's folder."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended by itself."""

    state: RunState
    progress: Mapping[str, Any] = field(default_factory=dict)


class Pipeline(Protocol):
    """What a run does. Called again after a crash with the same run, it goes on where its folder stands."""

    def __call__(self, run: Run, report: Report, stop: threading.Event) -> Outcome:
        """Raises ``Interrupted`` soon after ``stop`` is set, and ``DistillationError`` for what a person can mend."""


class DistillationWorker:
    """``start()`` it once; ``wake()`` it when a run was made; ``stop()`` it once."""

    def __init__(
        self,
        store: RunStore,
        pipeline: Pipeline,
        publish: Publish,
        *,
        ready: Callable[[], bool] = lambda: True,
        prepare_thread: Callable[[], None] = lambda: None,
    ):
        """``ready``: no run is begun before; ``prepare_thread`` is called first in the thread that works."""
        self.owner = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._store, self._pipeline, self._publish = store, pipeline, publish
        self._ready, self._prepare_thread = ready, prepare_thread
        self._stopping = threading.Event()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._pulse: _Pulse | None = None

    def start(self) -> None:
        """Begin to work, on a daemon thread."""
        self._thread = threading.Thread(target=self._loop, name="distillation", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """There is something to do, or to stop doing."""
        self._wake.set()
        if (pulse := self._pulse) is not None:
            pulse.wake.set()

    def stop(self, timeout: float) -> bool:
        """Interrupt what runs, which then waits for the next start; False when it did not end in time."""
        self._stopping.set()
        self._wake.set()
        if (pulse := self._pulse) is not None:
            pulse.interrupt("stopping")
        if self._thread is not None:
            self._thread.join(timeout)
        return self._thread is None or not self._thread.is_alive()

    def _loop(self) -> None:
        self._prepare_thread()
        while not self._stopping.is_set():
            self._wake.clear()
            try:
                run = self._store.claim(self.owner) if self._ready() else None
                if run is not None:
                    self._work(run)
                    continue
            except Exception:  # the thread must outlive a database that is away for a moment
                logger.exception("distillation could not look for runs; it tries again")
            self._wake.wait(_IDLE_SECONDS)

    def _work(self, run: Run) -> None:
        pulse = self._pulse = _Pulse(self._store, run, self.owner, self._publish)
        if self._stopping.is_set():
            pulse.interrupt("stopping")
        pulse.start()
        begun = time.monotonic()
        try:
            outcome, error = self._pipeline(run, pulse.report, pulse.stop), None
        except Interrupted:
            outcome, error = None, None
        except Exception as problem:  # whatever a run provokes ends that run only
            outcome, error = self._failed(run, pulse, problem)
        finally:
            pulse.end()
            self._pulse = None
        try:
            self._end(run, pulse, outcome, error)
        except LeaseLost as lost:
            logger.warning("distillation: %s", lost)
        logger.info("distillation run %s: %.1f s", run.id, time.monotonic() - begun)

    @staticmethod
    def _failed(run: Run, pulse: _Pulse, problem: Exception) -> tuple[Outcome | None, str | None]:
        """What an exception means: after the end was asked for, only that something it needs went away first."""
        known = isinstance(problem, DistillationError)
        if pulse.stop.is_set():
            logger.warning("distillation run %s was interrupted: %s", run.id, problem, exc_info=not known)
            return None, None
        if known:
            return Outcome("failed"), str(problem)
        logger.error("distillation run %s failed", run.id, exc_info=problem)
        return Outcome("failed"), f"{type(problem).__name__}: {problem}; the server's log says where"

    def _end(self, run: Run, pulse: _Pulse, outcome: Outcome | None, error: str | None) -> None:
        if pulse.reason == "lost":
            return
        if outcome is not None:
            ended = self._store.finish(
                run.id, self.owner, outcome.state, error=error, progress={**pulse.latest, **outcome.progress}
            )
        elif pulse.reason == "stopping":
            self._store.beat(run.id, self.owner, pulse.latest)
            self._store.hand_back(run.id, self.owner)
            ended = self._store.get(run.id)
        else:
            ended = self._store.finish(run.id, self.owner, "cancelled", progress=pulse.latest)
        self._publish("distillation", ended.to_json())


class _Pulse:
    """The lease of one run: extended in time, with the newest progress; hears when the end was asked for."""

    def __init__(self, store: RunStore, run: Run, owner: str, publish: Publish):
        self._store, self._run, self._owner, self._publish = store, run, owner, publish
        self.stop = threading.Event()
        self.wake = threading.Event()
        self.reason: str | None = None
        self.latest: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._ended = False
        self._published = 0.0
        self._thread = threading.Thread(target=self._beat, name="distillation-lease", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        self._ended = True
        self.wake.set()
        self._thread.join(10)

    def interrupt(self, reason: str) -> None:
        with self._lock:
            self.reason = self.reason or reason
        self.stop.set()

    def report(self, progress: Mapping[str, Any]) -> None:
        """New numbers, merged into those before; watchers hear of them at once, the database with the next beat."""
        with self._lock:
            new_stage = progress.get("stage", self.latest.get("stage")) != self.latest.get("stage")
            self.latest = {**self.latest, **progress}
            now = time.monotonic()
            due = new_stage or now - self._published >= _PUBLISH_SECONDS
            if due:
                self._published = now
            told = {**self._run.to_json(), "progress": {**self._run.progress, **self.latest}}
        if new_stage:
            self.wake.set()
        if due:
            self._publish("distillation", told)

    def _beat(self) -> None:
        while not self._ended:
            self.wake.clear()
            try:
                with self._lock:
                    latest = dict(self.latest)
                if self._store.beat(self._run.id, self._owner, latest):
                    self.interrupt("cancelled")
            except LeaseLost as lost:
                logger.warning("distillation: %s", lost)
                self.interrupt("lost")
                return
            except Exception:  # a database that is away for a moment: the lease has time left
                logger.exception("the lease of run %s could not be extended; it tries again", self._run.id)
            self.wake.wait(_BEAT_SECONDS)
