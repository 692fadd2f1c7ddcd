"""One daemon thread that trains one kernel, and stops at once when asked.

It opens a session from the newest valid checkpoint, trains step by step, saves, and ends in one of the states below.
Between two steps it looks at everything that may interrupt it: a stop request, the server's stop, lack of disk space,
a request for a checkpoint, new experience, a chat or a question that wants the processor. Every wait can be ended.

    ends as   paused, stopped      somebody asked
              queued               the server stops; training goes on at the next start
              waiting              not enough experience yet
              converged, settled   nothing more to gain now; new experience can wake it

A lack of room is not an end: the thread holds in state ``paused`` with the reason, keeps what it has learned in
memory, and goes on by itself. An exception ends the thread as ``failed``; ``continuous_trainer`` decides about a
restart. One intra-op thread: more would fight over the cores (measured: 57 instead of 763 steps/s on two busy ones).

Not here: the mathematics of a step (``training_session``), the queue (``continuous_trainer``).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import structlog
import torch

from olympus.checkpoint_mirror import CheckpointMirror
from olympus.checkpoints import CheckpointStore
from olympus.courtesy import Courtesy, Pace
from olympus.experience_source import ExperienceSource
from olympus.kernel_rows import KernelRecord, KernelRows, State
from olympus.metrics_store import MetricsStore
from olympus.query_gate import QueryGate, be_nice
from olympus.snapshot import SnapshotShelf
from olympus.training_session import TrainingDiverged, TrainingSession
from settings import KernelSettings
from telemetry.hub import EventHub

log = structlog.get_logger(__name__)

Purpose = Literal["train", "examine"]
#: Seconds between two looks at the free space, and between two reports for the status.
ROOM_CHECK_SECONDS = 5.0
REPORT_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class KernelServices:
    """What every training thread shares."""

    settings: KernelSettings
    rows: KernelRows
    checkpoints: CheckpointStore
    mirror: CheckpointMirror | None
    metrics: MetricsStore
    snapshots: SnapshotShelf
    hub: EventHub
    open_source: Callable[[str], ExperienceSource]
    serving_busy: Callable[[], bool]
    gate: QueryGate
    stopping: threading.Event

    def flush_metrics(self, kernel_id: str | None = None) -> None:
        """Write finished windows of measurements (or at once that of one kernel) and tell the dashboard."""
        for row in self.metrics.flush(kernel_id):
            self.hub.publish("kernel.metric", {**row, "state": "training"}, key=f"metric:{row['kernel_id']}")


@dataclass(frozen=True, slots=True)
class Ending:
    """How a thread ended. ``error`` is a short reason; the traceback is in the log."""

    state: State
    reason: str = ""
    error: str | None = None
    diverged: bool = False


class CheckpointTicket:
    """A request for a checkpoint, answered by the training thread between two steps."""

    def __init__(self) -> None:
        self._done = threading.Event()
        self._result: dict[str, Any] | None = None

    def answer(self, result: dict[str, Any] | None) -> None:
        """Called by the thread; None: it could not be written."""
        self._result = result
        self._done.set()

    def wait(self, timeout: float) -> dict[str, Any] | None:
        """The checkpoint's row, or None when it was not written in time."""
        return self._result if self._done.wait(timeout) else None


class KernelTrainingThread(threading.Thread):
    """See the module docstring. ``lr_scale`` below 1 gives a restart after divergence another course."""

    def __init__(
        self,
        kernel: KernelRecord,
        services: KernelServices,
        *,
        purpose: Purpose = "train",
        lr_scale: float = 1.0,
        on_end: Callable[[], None] = lambda: None,
    ):
        super().__init__(name=f"kernel-{kernel.id}", daemon=True)
        self.kernel_id = kernel.id
        self.domain = kernel.domain
        self.ending: Ending | None = None
        self.report: dict[str, Any] | None = None
        self.heartbeat = time.monotonic()
        self.started_at = time.time()
        self.steps_done = 0
        self.unsaved_steps = 0
        self._kernel = kernel
        self._services = services
        self._purpose = purpose
        self._lr_scale = lr_scale
        self._on_end = on_end
        self._stop_requested = threading.Event()
        #: What a stop request asked for; None until there is one.
        self.stop_as: Ending | None = None
        self._fresh = threading.Event()
        self._tickets: list[CheckpointTicket] = []
        self._tickets_lock = threading.Lock()
        self._state: State = kernel.state
        self._room_checked = float("-inf")
        self._reported = float("-inf")

    # -- called by others -------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """What the thread is doing now."""
        return self._state

    def request_stop(self, state: State, reason: str = "") -> None:
        """End after the current step, with a checkpoint."""
        self.stop_as = Ending(state, reason)
        self._stop_requested.set()

    def request_checkpoint(self) -> CheckpointTicket:
        """Save between two steps, and pin the checkpoint: who asked for it wants to find it again."""
        ticket = CheckpointTicket()
        with self._tickets_lock:
            self._tickets.append(ticket)
        return ticket

    def notice_experience(self) -> None:
        """There is something new in the history."""
        self._fresh.set()

    @property
    def has_unseen_experience(self) -> bool:
        """Something came in that the thread did not look at any more."""
        return self._fresh.is_set()

    def heartbeat_age(self) -> float:
        """Seconds since the thread last came by."""
        return time.monotonic() - self.heartbeat

    # -- the thread -------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Live one session; whatever happens, ``ending`` says how it ended."""
        torch.set_num_threads(1)
        be_nice(self._services.settings.niceness)
        try:
            self.ending = self._live()
        except Exception as error:  # the thread's last line of defence: the supervisor acts on the ending
            log.exception("kernel training failed", kernel=self.kernel_id)
            self.ending = Ending("failed", error=describe_error(error), diverged=isinstance(error, TrainingDiverged))
        finally:
            self._answer_tickets(None)
            self._on_end()

    def _live(self) -> Ending:
        services = self._services
        session, damaged = TrainingSession.open(
            self._kernel,
            services.settings,
            services.open_source(self._kernel.domain),
            services.checkpoints,
            lr_scale=self._lr_scale,
        )
        if damaged:
            reason = f"{', '.join(damaged)} could not be used; went back to step {session.step}"
            services.rows.set_state(self.kernel_id, self._state, reason, step=session.step)
        settings = services.settings
        pace = Pace(services.serving_busy, settings.serve_share, settings.serve_pause_ms / 1000, self._stop_requested)
        session.courtesy = Courtesy(services.gate, settings.query_pause_ms / 1000, pace)
        services.metrics.begin(self.kernel_id, session.step)
        self._show(session)
        self._fresh.clear()
        session.sync()
        if self._purpose == "examine":
            resting = session.still_rests()
            if resting is not None:
                return Ending(resting.state, resting.reason)
        ending = self._train(session, session.wake())
        self._show(session)
        return ending

    def _train(self, session: TrainingSession, why: str) -> Ending:
        services = self._services
        while True:
            self.heartbeat = time.monotonic()
            if self.stop_as is not None:
                return self._finish(session, self.stop_as)
            if services.stopping.is_set():
                return self._finish(session, Ending("queued", "the server is stopping"))
            if not self._has_room(session):
                continue
            self._serve_tickets(session)
            if self._fresh.is_set() or session.sync_due:
                self._fresh.clear()
                session.sync()
            if not session.has_enough:
                return self._finish(session, Ending("waiting", session.waiting_reason))
            self._enter("training", why, session)
            services.metrics.add(self.kernel_id, session.advance())
            self.steps_done += 1
            self.unsaved_steps = session.step - session.saved_step
            self._show(session, only_if_due=not session.just_evaluated)
            verdict = session.verdict()
            if verdict is not None:
                return self._finish(session, Ending(verdict.state, verdict.reason))
            if session.step % services.settings.checkpoint_every == 0:
                self._save(session, urgent=False)
            self._yield_processor()

    def _yield_processor(self) -> None:
        settings = self._services.settings
        if settings.step_pause_ms > 0:
            self._stop_requested.wait(settings.step_pause_ms / 1000)
        self._services.gate.give_way(settings.query_pause_ms / 1000)

    def _enter(self, state: State, reason: str, session: TrainingSession) -> None:
        if state != self._state:
            self._state = state
            self._services.rows.set_state(self.kernel_id, state, reason, step=session.step)

    # -- saving -----------------------------------------------------------------------------------------------

    def _finish(self, session: TrainingSession, ending: Ending) -> Ending:
        self._services.flush_metrics(self.kernel_id)
        reason = ending.reason
        needs_saving = session.step > session.saved_step or (ending.state == "converged" and session.step > 0)
        session.remember_rest(ending.state, reason)
        if needs_saving and self._save(session, urgent=True, converged=ending.state == "converged") is None:
            lost = session.step - session.saved_step
            reason = "; ".join(
                filter(None, (reason, f"the last {lost} steps could not be saved, see the server's log"))
            )
        self._serve_tickets(session)
        self._services.rows.progress(self.kernel_id, session.step, session.report())
        return Ending(ending.state, reason)

    def _save(
        self, session: TrainingSession, *, urgent: bool, converged: bool = False, pinned: bool = False
    ) -> dict[str, Any] | None:
        """Publish a checkpoint; None when the disk refused, which the log tells and the next look for room too."""
        services = self._services
        begun = time.perf_counter()
        try:
            saved = services.checkpoints.publish(
                self.kernel_id,
                session.step,
                session.tensors(),
                session.state(),
                session.checkpoint_metrics(converged),
                pinned=pinned,
            )
        except OSError as error:
            log.error("checkpoint could not be written", kernel=self.kernel_id, step=session.step, reason=str(error))
            self._room_checked = float("-inf")
            return None
        session.saved_step = session.step
        self.unsaved_steps = 0
        session.overhead_seconds += time.perf_counter() - begun
        services.rows.progress(self.kernel_id, session.step, session.report())
        services.hub.publish("kernel.checkpoint", {"kernel_id": self.kernel_id, **saved})
        if services.mirror is not None:
            services.mirror.copy(self.kernel_id, saved["name"], urgent=urgent)
        return saved

    def _has_room(self, session: TrainingSession) -> bool:
        """True when training may go on; otherwise hold for a moment in state ``paused``."""
        holding = self._state == "paused"
        if time.monotonic() - self._room_checked < (1.0 if holding else ROOM_CHECK_SECONDS):
            if holding:
                self._stop_requested.wait(0.5)
            return not holding
        self._room_checked = time.monotonic()
        shortage = self._services.checkpoints.shortage()
        if shortage is None:
            return True
        if not holding:
            log.error("training pauses for lack of room", kernel=self.kernel_id, reason=shortage)
        self._enter("paused", f"no room: {shortage}", session)
        self._answer_tickets(None)
        self._stop_requested.wait(0.5)
        return False

    def _serve_tickets(self, session: TrainingSession) -> None:
        with self._tickets_lock:
            waiting = bool(self._tickets)
        if waiting:
            self._answer_tickets(self._save(session, urgent=True, pinned=True))

    def _answer_tickets(self, result: dict[str, Any] | None) -> None:
        with self._tickets_lock:
            tickets, self._tickets = self._tickets, []
        for ticket in tickets:
            ticket.answer(result)

    # -- showing ----------------------------------------------------------------------------------------------

    def _show(self, session: TrainingSession, *, only_if_due: bool = False) -> None:
        """Swap in what queries and the status read; a reference assignment each, so never torn."""
        now = time.monotonic()
        if only_if_due and now - self._reported < REPORT_SECONDS:
            return
        self._reported = now
        self.report = session.report()
        for drift in session.new_drifts():
            data = {"kernel_id": self.kernel_id, **asdict(drift), "reason": drift.reason}
            self._services.hub.publish("kernel.drift", data)
        for snapshot in session.new_snapshots():
            self._services.snapshots.put(self.kernel_id, snapshot)


def describe_error(error: BaseException) -> str:
    """One line for the status: the kind of error and its message, without a traceback."""
    text = " ".join(str(error).split())[:200]
    return f"{error.__class__.__name__}: {text}" if text else error.__class__.__name__
