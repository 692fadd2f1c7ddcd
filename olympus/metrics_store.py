"""Measurements of the kernels: collected by the trainers, written in batches, read at any resolution.

A trainer calls ``add`` after every step and never touches the database. A row covers a window of at least 250 ms. One
``flush`` writes the finished windows of all kernels, and the summaries that they complete (``metrics_pyramid``), in
one transaction: what is stored grows with the logarithm of a kernel's life.

Not here: which rows answer (``metrics_reader``), and events for the dashboard (``kernel_thread`` publishes the rows
that ``flush`` returns).
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from olympus.metrics_pyramid import KEEP, Ladder, Packed, Point, Summary, thin
from olympus.metrics_reader import Reader
from storage.database import Database
from storage.models import MetricPoint

WINDOW_SECONDS = 0.25
#: A level is pruned when it has grown this far beyond ``KEEP``: one deletion now and then instead of one per row.
_SLACK = 256


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


#: Every quantity that is measured; each is a column of an answer.
COLUMNS: tuple[str, ...] = tuple(field.name for field in fields(StepMetrics) if field.name not in ("step", "regime"))


class _Window:
    """The measurements of one kernel since its last row."""

    def __init__(self, opened: float):
        self.opened = opened
        self.step = 0
        self.regime: str | None = None
        self._parts: dict[str, list[Summary]] = {}

    def add(self, metrics: StepMetrics) -> None:
        self.step, self.regime = metrics.step, metrics.regime or self.regime
        for name, value in asdict(metrics).items():
            if name in COLUMNS and value is not None and math.isfinite(value):  # JSON has no NaN
                parts = self._parts.setdefault(name, [])
                parts[:] = [Summary.merge([*parts, Summary.of(float(value))])]

    def close(self, first: int) -> Point:
        values = {name: parts[0].pack() for name, parts in self._parts.items()}
        return Point(min(first, self.step), self.step, time.time(), self.regime, values)


class MetricsStore:
    """Collects, writes and reads measured steps. Safe to use from all threads."""

    def __init__(self, database: Database, clock: Callable[[], float] = time.monotonic):
        self._database = database
        self._clock = clock
        self._lock = threading.Lock()
        self._flushing = threading.RLock()  # held from taking windows until their rows are committed
        self._windows: dict[str, _Window] = {}
        self._ladders: dict[str, Ladder] = {}

    def begin(self, kernel_id: str, step: int) -> None:
        """Training goes on after ``step``: rows that reach beyond it describe a future that a crash undid, so they go.

        A summary goes with them when it reaches beyond; the rows below it that stay will be summarised again.
        """
        with self._flushing:
            self.discard(kernel_id)
            with self._database.write() as session:
                session.execute(_deletion(kernel_id).where(MetricPoint.step > step))

    def add(self, kernel_id: str, metrics: StepMetrics) -> None:
        """Remember one step; steps of a kernel must increase."""
        with self._lock:
            window = self._windows.get(kernel_id)
            if window is None:
                window = self._windows[kernel_id] = _Window(self._clock())
            window.add(metrics)

    def flush(self, kernel_id: str | None = None) -> list[dict[str, Any]]:
        """Write finished windows (all of them, or at once that of ``kernel_id``); returns what they measured."""
        with self._flushing:
            now = self._clock()
            with self._lock:
                ready = {
                    owner: self._windows.pop(owner)
                    for owner, window in list(self._windows.items())
                    if owner == kernel_id or (kernel_id is None and now - window.opened >= WINDOW_SECONDS)
                }
            if not ready:
                return []
            try:
                with self._database.write() as session:
                    return [self._write(session, owner, window) for owner, window in ready.items()]
            except BaseException:
                for owner in ready:
                    self._ladders.pop(owner, None)  # it is ahead of the database now; load it again
                raise

    def discard(self, kernel_id: str) -> None:
        """Drop what is not written yet, after any write in progress; call it before the kernel's row goes."""
        with self._flushing, self._lock:
            self._windows.pop(kernel_id, None)
            self._ladders.pop(kernel_id, None)

    def read(
        self,
        kernel_id: str,
        since: int | None = None,
        max_points: int = 2000,
        *,
        columns: Sequence[str] = COLUMNS,
        spread: bool = False,
    ) -> dict[str, Any]:
        """``columns`` of equal length after step ``since``: means over the steps of each row, null where not measured.

        With ``spread``, also ``first_step`` of each row, and ``min``, ``max`` and ``last`` of each column. ``level``
        says how far it is summarised (0: as measured). ``next_since`` is what to pass next time; it equals ``since``
        when nothing is new.
        """
        if kernel_id not in self._ladders:  # asked without the lock: a reader need not wait until a flush is on disk
            with self._flushing, self._database.write() as session:
                self._ladder(session, kernel_id)
        with self._database.read() as session:
            level, points = Reader(session, kernel_id, columns).cover(-1 if since is None else since, max_points)
        if len(points) > max_points:
            points = thin(points, max_points)
        newest = points[-1].step if points else since
        return {"kernel_id": kernel_id, **_columns(points, columns, spread), "level": level, "next_since": newest}

    def check_invariants(self) -> None:
        """Every open window holds at least one step, and the ladders are sound."""
        with self._lock:
            assert all(window.step > 0 for window in self._windows.values())
        with self._flushing:
            for ladder in self._ladders.values():
                ladder.check_invariants()

    # -- inside -----------------------------------------------------------------------------------------------

    def _write(self, session: Session, kernel_id: str, window: _Window) -> dict[str, Any]:
        ladder = self._ladder(session, kernel_id)
        point = window.close(ladder.end + 1)
        _insert(session, kernel_id, ladder.add(point))
        _prune(session, kernel_id, ladder)
        means = {name: _mean(point.values.get(name)) for name in COLUMNS}
        return {"kernel_id": kernel_id, "at": point.at, "step": point.step, "regime": point.regime, **means}

    def _ladder(self, session: Session, kernel_id: str) -> Ladder:
        """The kernel's ladder; loaded when it is not known, and its missing summaries written then.

        They are missing after a migration from a version without them, and after ``begin`` has cut a summary.
        """
        ladder = self._ladders.get(kernel_id)
        if ladder is not None:
            return ladder
        ladder = Ladder()
        mine = MetricPoint.kernel_id == kernel_id
        levels = sa.select(MetricPoint.level, sa.func.count(), sa.func.max(MetricPoint.step)).where(mine)
        found = {level: (count, newest) for level, count, newest in session.execute(levels.group_by(MetricPoint.level))}
        for level, (count, _) in sorted(found.items()):
            summarised = found.get(level + 1, (0, 0))[1]
            ladder.load(level, _points(session, kernel_id, level, after=summarised), count)
        _insert(session, kernel_id, ladder.summarise())
        _prune(session, kernel_id, ladder)
        self._ladders[kernel_id] = ladder
        return ladder


def _points(session: Session, kernel_id: str, level: int, after: int) -> list[Point]:
    row = MetricPoint
    query = sa.select(row.first_step, row.step, row.at, row.regime, row.values).order_by(row.step)
    query = query.where(row.kernel_id == kernel_id, row.level == level, row.step > after)
    return [Point(*found) for found in session.execute(query)]


def _insert(session: Session, kernel_id: str, rows: Sequence[tuple[int, Point]]) -> None:
    values = [
        {
            "kernel_id": kernel_id,
            "level": level,
            "step": point.step,
            "first_step": point.first,
            "at": point.at,
            "regime": point.regime,
            "values": point.values,
        }
        for level, point in rows
    ]
    if values:
        session.execute(sa.insert(MetricPoint), values)


def _prune(session: Session, kernel_id: str, ladder: Ladder) -> None:
    """Remove the oldest rows of levels that grew too long, as far as the level above summarises them."""
    for level, count in enumerate(ladder.counts[:-1]):
        if count <= KEEP + _SLACK:
            continue
        mine = (MetricPoint.kernel_id == kernel_id, MetricPoint.level == level)
        stays = sa.select(MetricPoint.step).where(*mine).order_by(MetricPoint.step.desc()).limit(1).offset(KEEP)
        above = (MetricPoint.kernel_id == kernel_id, MetricPoint.level == level + 1)
        edge = session.scalar(
            sa.select(sa.func.max(MetricPoint.step)).where(*above, MetricPoint.step <= stays.scalar_subquery())
        )
        gone = sa.delete(MetricPoint).where(*mine, MetricPoint.step <= (edge or 0))
        ladder.counts[level] -= session.execute(gone).rowcount  # type: ignore[attr-defined]


def _deletion(kernel_id: str) -> sa.Delete:
    return sa.delete(MetricPoint).where(MetricPoint.kernel_id == kernel_id)


def _columns(points: Sequence[Point], names: Sequence[str], spread: bool) -> dict[str, Any]:
    columns: dict[str, Any] = {"step": [point.step for point in points]}
    rows = [point.values for point in points]
    for name in names:
        columns[name] = [_mean(values.get(name)) for values in rows]
    if spread:
        columns["first_step"] = [point.first for point in points]
        for label, place in (("min", 2), ("max", 3), ("last", 4)):
            columns[label] = {name: [_part(values.get(name), place) for values in rows] for name in names}
    return columns


def _mean(packed: Packed | None) -> float | None:
    return _part(packed, 1)


def _part(packed: Packed | None, place: int) -> float | None:
    return packed[place] if isinstance(packed, list) else packed
