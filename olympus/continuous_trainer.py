"""Who trains when: a queue, a limit, and a supervisor that lets no thread die unnoticed.

Kernels wait in line, first come first served; at most ``limit`` threads train at once. The supervisor starts them,
collects how they ended, watches their heartbeats, wakes resting kernels when new experience arrives, and writes the
measurements of all of them in one batch.

- A thread that ended with an exception is started again from its last good checkpoint after 1, 2, 4, ... seconds, at
  most ``max_restarts`` times; after divergence with half the learning rate. A run of 500 good steps clears the count.
- A thread without a heartbeat for a minute is ``stalled``: that is shown, its place goes to the next in line, and if
  it comes back it goes on, or back into the line. (A thread cannot be killed; a process can.)
- The database says ``training`` only while a thread trains: rows left so by a crash are queued again at the start.

Not here: a thread's own life (``kernel_thread``), what users may ask for (``zeus``).
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import structlog

from memory.history import Record
from olympus.errors import InvalidAction
from olympus.kernel_rows import ACTIVE_STATES, RESTING_STATES, KernelRecord, State
from olympus.kernel_thread import Ending, KernelServices, KernelTrainingThread, Purpose, describe_error

log = structlog.get_logger(__name__)

TICK_SECONDS = 0.25
STALL_SECONDS = 60.0
STEPS_THAT_CLEAR_RESTARTS = 500
MAX_BACKOFF_SECONDS = 60.0
#: A resting kernel looks at new experience at most this often; one that waits for its first, every second.
EXAMINE_SECONDS = 10.0
EXAMINE_WAITING_SECONDS = 1.0


@dataclass(slots=True)
class _Failures:
    """What went wrong lately with one kernel."""

    count: int = 0
    not_before: float = 0.0
    lr_scale: float = 1.0


class ContinuousKernelTrainer:
    """See the module docstring. Safe to use from all threads."""

    def __init__(self, services: KernelServices, limit: int):
        self.limit = limit
        self._services = services
        self._lock = threading.RLock()
        self._wake = threading.Event()
        self._queue: OrderedDict[str, Purpose] = OrderedDict()
        self._threads: dict[str, KernelTrainingThread] = {}
        self._stalled: set[str] = set()
        self._failures: dict[str, _Failures] = {}
        self._resting: dict[str, str] = {}  # kernel id -> domain, of kernels that new experience can wake
        self._to_examine: set[str] = set()
        self._examined_at: dict[str, float] = {}
        self._supervisor: threading.Thread | None = None
        self._closing = False

    # -- life -------------------------------------------------------------------------------------------------

    def start(self, kernels: list[KernelRecord]) -> None:
        """Take up every kernel where it was left, and begin to supervise."""
        for kernel in kernels:
            self._take_up(kernel)
        self._supervisor = threading.Thread(target=self._supervise, name="kernel-supervisor", daemon=True)
        self._supervisor.start()

    def _take_up(self, kernel: KernelRecord) -> None:
        rows, autostart = self._services.rows, self._services.settings.autostart
        interrupted = kernel.state in ACTIVE_STATES or kernel.state == "queued"
        if interrupted or (kernel.state == "paused" and kernel.wanted == "train"):
            if kernel.wanted == "train" and autostart:
                rows.set_state(kernel.id, "queued", "resumes after a restart of the server")
                self.enqueue(kernel.id)
            elif kernel.wanted == "train":
                rows.set_state(kernel.id, "paused", "kernels.autostart is off; resume it to go on", wanted="pause")
            else:
                rows.set_state(kernel.id, "stopped" if kernel.wanted == "stop" else "paused", "stopped with the server")
        elif kernel.state in RESTING_STATES and kernel.wanted == "train" and autostart:
            with self._lock:
                self._resting[kernel.id] = kernel.domain
                if kernel.summary.get("buffer", {}).get("cursor") is None or self._has_news(kernel):
                    self._to_examine.add(kernel.id)

    def _has_news(self, kernel: KernelRecord) -> bool:
        cursor = int(kernel.summary["buffer"]["cursor"])
        return self._services.open_source(kernel.domain).has_after(cursor)

    def shutdown(self, deadline: float) -> list[str]:
        """Stop every thread within ``deadline`` seconds, the least saved first; returns those that did not end."""
        give_up = time.monotonic() + deadline
        with self._lock:
            self._closing = True
            self._queue.clear()
            self._to_examine.clear()
            threads = sorted(self._threads.values(), key=lambda thread: thread.unsaved_steps, reverse=True)
        for thread in threads:
            thread.request_stop("queued", "the server is stopping")
        for thread in threads:
            thread.join(max(0.0, give_up - time.monotonic()))
        self._wake.set()
        if self._supervisor is not None:
            self._supervisor.join(max(0.5, give_up - time.monotonic()))
        self._tick_threads()
        self._services.flush_metrics()
        late = [thread.kernel_id for thread in threads if thread.is_alive()]
        if late:
            log.error("kernels did not stop in time; their last checkpoint counts", kernels=late)
        return late

    # -- what others ask for ----------------------------------------------------------------------------------

    def enqueue(self, kernel_id: str, purpose: Purpose = "train") -> None:
        """Put a kernel at the end of the line; one that stands in line or trains keeps its place."""
        with self._lock:
            self._resting.pop(kernel_id, None)
            self._to_examine.discard(kernel_id)
            if kernel_id not in self._threads:
                self._queue.setdefault(kernel_id, purpose)
        self._wake.set()

    def forget_failures(self, kernel_id: str) -> None:
        """A user asked to go on: the restarts count from zero."""
        with self._lock:
            self._failures.pop(kernel_id, None)

    def halt(self, kernel_id: str, state: State, reason: str, timeout: float = 15.0) -> bool:
        """Take a kernel out of line or stop its thread; False when the thread is still busy after ``timeout``.

        The row is written here or, with the last step and checkpoint, when the thread has ended.
        """
        with self._lock:
            self._queue.pop(kernel_id, None)
            self._resting.pop(kernel_id, None)
            self._to_examine.discard(kernel_id)
            thread = self._threads.get(kernel_id)
            if thread is not None:
                thread.request_stop(state, reason)
        if thread is None:
            self._services.rows.set_state(kernel_id, state, reason)
            return True
        thread.join(timeout)
        self._tick_threads()
        return not thread.is_alive()

    def save_now(self, kernel_id: str, timeout: float = 15.0) -> dict[str, Any] | None:
        """Ask the training thread for a checkpoint. Raises ``InvalidAction`` when nothing trains."""
        with self._lock:
            thread = self._threads.get(kernel_id)
        if thread is None or not thread.is_alive():
            raise InvalidAction(f"kernel {kernel_id} is not training; everything it knows is in its checkpoints")
        return thread.request_checkpoint().wait(timeout)

    def thread_of(self, kernel_id: str) -> KernelTrainingThread | None:
        """The thread at work for a kernel, if any."""
        with self._lock:
            return self._threads.get(kernel_id)

    def at_work(self) -> int:
        """How many kernels have a thread now."""
        with self._lock:
            return len(self._threads)

    def is_busy(self, kernel_id: str) -> bool:
        """True while a thread works on the kernel."""
        return self.thread_of(kernel_id) is not None

    def queue_position(self, kernel_id: str) -> int | None:
        """1 for the next to start; None when it is not in line."""
        with self._lock:
            return list(self._queue).index(kernel_id) + 1 if kernel_id in self._queue else None

    def notice(self, records: list[Record]) -> None:
        """Called after each commit to the history, in the writer's thread: take note and return at once."""
        domains = {record.domain for record in records}
        with self._lock:
            for thread in self._threads.values():
                thread.notice_experience()
            for kernel_id, domain in self._resting.items():
                if domain == "*" or domain in domains:
                    self._to_examine.add(kernel_id)
        self._wake.set()

    def check_invariants(self) -> None:
        """Nobody is in two places, and the limit holds."""
        with self._lock:
            working = [
                thread
                for kernel_id, thread in self._threads.items()
                if kernel_id not in self._stalled and thread.stop_as is None and thread.heartbeat_age() < STALL_SECONDS
            ]
            assert len(working) <= self.limit
            assert not set(self._queue) & set(self._threads)
            assert not set(self._resting) & (set(self._queue) | set(self._threads))
            assert self._to_examine <= set(self._resting)

    # -- the supervisor ---------------------------------------------------------------------------------------

    def _supervise(self) -> None:
        while not self._closing:
            self._wake.wait(TICK_SECONDS)
            self._wake.clear()
            try:
                self._tick_threads()
                self._examine_due()
                self._start_due()
                self._services.flush_metrics()
            except Exception:  # the supervisor must outlive a database that is briefly gone
                log.exception("kernel supervision failed; trying again")
                self._services.stopping.wait(1.0)

    def _tick_threads(self) -> None:
        with self._lock:
            threads = list(self._threads.values())
        for thread in threads:
            if thread.is_alive():
                self._watch(thread)
            else:
                self._collect(thread)

    def _watch(self, thread: KernelTrainingThread) -> None:
        stalled, age = thread.kernel_id in self._stalled, thread.heartbeat_age()
        if not stalled and age > STALL_SECONDS:
            with self._lock:
                self._stalled.add(thread.kernel_id)
            log.error("kernel stalled", kernel=thread.kernel_id, seconds=round(age))
            self._services.rows.set_state(thread.kernel_id, "stalled", f"no sign of life for {age:.0f} s")
        elif stalled and age < STALL_SECONDS:
            with self._lock:
                self._stalled.discard(thread.kernel_id)
                crowded = len(self._threads) - len(self._stalled) > self.limit
                if crowded and thread.stop_as is None:
                    thread.request_stop("queued", "came back after a stall; its place was taken")
            self._services.rows.set_state(thread.kernel_id, thread.state, "came back after a stall")

    def _collect(self, thread: KernelTrainingThread) -> None:
        kernel_id = thread.kernel_id
        with self._lock:
            if self._threads.get(kernel_id) is not thread:
                return
            ending = thread.ending
            if thread.steps_done >= STEPS_THAT_CLEAR_RESTARTS:
                self._failures.pop(kernel_id, None)
            if ending is None:
                ending = Ending("failed", error="the thread vanished")
            state, reason = ending.state, ending.reason
            if ending.error is not None and thread.stop_as is not None:
                state, reason = thread.stop_as.state, f"ended with an error: {ending.error}"
            elif ending.error is not None:
                state, reason = self._after_failure(kernel_id, ending)
            self._services.rows.set_state(kernel_id, state, reason)
            del self._threads[kernel_id]
            self._stalled.discard(kernel_id)
            if state in RESTING_STATES:
                self._rest(thread)
            elif state == "queued" and not self._closing:
                self._queue.setdefault(kernel_id, "train")

    def _rest(self, thread: KernelTrainingThread) -> None:
        """Remember to look at new experience, also at what came in while the thread was ending."""
        self._resting[thread.kernel_id] = thread.domain
        self._examined_at[thread.kernel_id] = time.monotonic()
        if thread.has_unseen_experience:
            self._to_examine.add(thread.kernel_id)

    def _after_failure(self, kernel_id: str, ending: Ending) -> tuple[State, str]:
        failures = self._failures.setdefault(kernel_id, _Failures())
        allowed = self._services.settings.max_restarts
        if failures.count >= allowed:
            return "failed", f"{ending.error} (after {failures.count} restarts; see the server's log, then resume it)"
        pause = min(2.0**failures.count, MAX_BACKOFF_SECONDS)
        failures.count += 1
        failures.not_before = time.monotonic() + pause
        if ending.diverged:
            failures.lr_scale *= 0.5
        return "queued", f"restart {failures.count} of {allowed} in {pause:.0f} s after {ending.error}"

    def _examine_due(self) -> None:
        now = time.monotonic()
        with self._lock:
            due = []
            for kernel_id in self._to_examine:
                waited = now - self._examined_at.get(kernel_id, float("-inf"))
                never_trained = self._services.rows.get(kernel_id).state == "waiting"
                if waited >= (EXAMINE_WAITING_SECONDS if never_trained else EXAMINE_SECONDS):
                    due.append(kernel_id)
            for kernel_id in due:
                self._examined_at[kernel_id] = now
                self.enqueue(kernel_id, "examine")

    def _start_due(self) -> None:
        now = time.monotonic()
        with self._lock:
            for kernel_id, purpose in list(self._queue.items()):
                full = len(self._threads) - len(self._stalled) >= self.limit
                if full or self._closing or self._services.stopping.is_set():
                    return
                failures = self._failures.get(kernel_id, _Failures())
                if failures.not_before <= now:
                    del self._queue[kernel_id]
                    self._start(kernel_id, purpose, failures.lr_scale)

    def _start(self, kernel_id: str, purpose: Purpose, lr_scale: float) -> None:
        try:
            kernel = self._services.rows.get(kernel_id)
            thread = KernelTrainingThread(
                kernel, self._services, purpose=purpose, lr_scale=lr_scale, on_end=self._wake.set
            )
            self._threads[kernel_id] = thread
            thread.start()
        except Exception as error:  # one kernel that cannot start must not hold up the others
            log.exception("kernel thread could not start", kernel=kernel_id)
            self._threads.pop(kernel_id, None)
            self._services.rows.set_state(kernel_id, "failed", describe_error(error))
