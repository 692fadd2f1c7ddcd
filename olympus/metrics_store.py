"""Measurements of the kernels: collected by the trainers, written in batches, read back thinned out.

A trainer calls ``add`` after every step and never touches the database. A row covers a window of at least 250 ms:
its loss is the mean over the window, every other column the newest measurement in it, null when there was none. One
``flush`` writes the finished windows of all kernels in one transaction. So that a kernel that trains for weeks does
not fill the disk, the window widens with the number of rows (after 4,000 rows it grows in proportion to them), and
the number of rows grows with the square root of time: about 50,000 after a day.

Reading averages over buckets of steps inside the database, so an answer has at most ``max_points`` rows however long
the kernel has lived. Not here: events for the dashboard (``continuous_trainer`` publishes the rows that ``flush``
returns).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

import sqlalchemy as sa

from storage.database import Database
from storage.models import KernelMetric

WINDOW_SECONDS = 0.25
ROWS_AT_FULL_RATE = 4000


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """What one step measured. None: not measured at this step."""

    step: int
    loss: float | None = None
    holdout_loss: float | None = None
    baseline_loss: float | None = None
    phi: float | None = None
    kappa: float | None = None
    regime: str | None = None
    grad_norm: float | None = None
    basin_drift: float | None = None
    step_ms: float | None = None


COLUMNS: tuple[str, ...] = tuple(field.name for field in fields(StepMetrics))
_NUMERIC = tuple(name for name in COLUMNS if name not in ("step", "regime"))
_AVERAGED = ("loss", "grad_norm", "step_ms")


class _Window:
    """The measurements of one kernel since its last row."""

    def __init__(self, opened: float):
        self.opened = opened
        self.steps = 0
        self.values: dict[str, Any] = {}
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, metrics: StepMetrics) -> None:
        self.steps += 1
        for name, value in asdict(metrics).items():
            if value is None:
                continue
            if name in _AVERAGED:
                total, count = self._sums.get(name, (0.0, 0))
                self._sums[name] = (total + value, count + 1)
                value = (total + value) / (count + 1)
            self.values[name] = value


class MetricsStore:
    """Collects, writes and reads measured steps. Safe to use from all threads."""

    def __init__(self, database: Database, clock: Callable[[], float] = time.monotonic):
        self._database = database
        self._clock = clock
        self._lock = threading.Lock()
        self._flushing = threading.RLock()  # held from taking windows until their rows are committed
        self._windows: dict[str, _Window] = {}
        self._rows: dict[str, int] = {}

    def begin(self, kernel_id: str, step: int) -> None:
        """Training goes on after ``step``: rows beyond it describe a future that a crash undid, so they go."""
        mine = KernelMetric.kernel_id == kernel_id
        with self._flushing:
            self.discard(kernel_id)
            with self._database.write() as session:
                session.execute(sa.delete(KernelMetric).where(mine, KernelMetric.step > step))
                count = session.scalar(sa.select(sa.func.count()).select_from(KernelMetric).where(mine))
            with self._lock:
                self._rows[kernel_id] = count or 0

    def add(self, kernel_id: str, metrics: StepMetrics) -> None:
        """Remember one step; steps of a kernel must increase."""
        with self._lock:
            window = self._windows.get(kernel_id)
            if window is None:
                window = self._windows[kernel_id] = _Window(self._clock())
            window.add(metrics)

    def flush(self, kernel_id: str | None = None) -> list[dict[str, Any]]:
        """Write finished windows (all of them, or at once that of ``kernel_id``) and return the rows written."""
        with self._flushing:
            now = self._clock()
            with self._lock:
                ready = [
                    owner
                    for owner, window in self._windows.items()
                    if owner == kernel_id or (kernel_id is None and now - window.opened >= self._width(owner))
                ]
                now_utc, unmeasured = time.time(), dict.fromkeys(COLUMNS)
                rows = [
                    {"kernel_id": owner, "at": now_utc, **unmeasured, **self._windows.pop(owner).values}
                    for owner in ready
                ]
                for owner in ready:
                    self._rows[owner] = self._rows.get(owner, 0) + 1
            if rows:
                with self._database.write() as session:
                    session.execute(sa.insert(KernelMetric), rows)
            return rows

    def discard(self, kernel_id: str) -> None:
        """Drop what is not written yet, after any write in progress; call it before the kernel's row goes."""
        with self._flushing, self._lock:
            self._windows.pop(kernel_id, None)
            self._rows.pop(kernel_id, None)

    def read(self, kernel_id: str, since: int | None, max_points: int) -> dict[str, Any]:
        """Columns of equal length after step ``since``, averaged over buckets of steps when there are too many.

        ``next_since`` is what to pass next time; it equals ``since`` when nothing is new.
        """
        after = -1 if since is None else since
        where = (KernelMetric.kernel_id == kernel_id, KernelMetric.step > after)
        with self._database.read() as session:
            low, high, count = session.execute(
                sa.select(sa.func.min(KernelMetric.step), sa.func.max(KernelMetric.step), sa.func.count()).where(*where)
            ).one()
            width = 1 if count <= max_points else (high - low + max_points) // max_points
            bucket = (KernelMetric.step - (low or 0)) // width
            averages = [sa.func.avg(getattr(KernelMetric, name)).label(name) for name in _NUMERIC]
            query = sa.select(sa.func.max(KernelMetric.step).label("step"), *averages).where(*where)
            rows = session.execute(query.group_by(bucket).order_by(bucket)).all()
        columns: dict[str, Any] = {name: [getattr(row, name) for row in rows] for name in ("step", *_NUMERIC)}
        return {"kernel_id": kernel_id, **columns, "rows": count, "next_since": high if count else since}

    def check_invariants(self) -> None:
        """Every open window holds at least one step."""
        with self._lock:
            assert all(window.steps > 0 and "step" in window.values for window in self._windows.values())

    def _width(self, kernel_id: str) -> float:
        return WINDOW_SECONDS * max(1.0, self._rows.get(kernel_id, 0) / ROWS_AT_FULL_RATE)
