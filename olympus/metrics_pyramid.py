"""A pyramid of measurements: every level summarises the one below four to one, and none grows beyond a bound.

Level 0 holds the rows as measured. Whenever a level has four rows that the next one does not summarise yet, they are
merged into one row there, and so on upwards. A summary keeps count, mean, least, greatest and last value, so that a
spike of one step is still seen from the top. Rows cover steps without gap or overlap: a row at ``step`` covers
``first .. step``, and the rows of any level together with the unsummarised ones below it cover a whole life.

Each level keeps its newest ``KEEP`` rows (a few more between two prunings); older steps live on in the levels above.
Relatives: RRDtool's round-robin archives, Graphite's whisper. Pure functions here; the rows are in ``metrics_store``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

FANOUT = 4
KEEP = 4096

#: A value measured once is its own summary; otherwise [count, mean, least, greatest, last].
Packed = float | list[float]


@dataclass(frozen=True, slots=True)
class Summary:
    """Some measurements of one quantity."""

    count: int
    mean: float
    least: float
    most: float
    last: float

    @classmethod
    def of(cls, value: float) -> Summary:
        """One measurement."""
        return cls(1, value, value, value, value)

    @classmethod
    def merge(cls, parts: Sequence[Summary]) -> Summary:
        """All of them together, in the order in which they were measured."""
        if len(parts) == 1:
            return parts[0]
        count = sum(part.count for part in parts)
        mean = math.fsum(part.mean * part.count for part in parts) / count
        return cls(count, mean, min(part.least for part in parts), max(part.most for part in parts), parts[-1].last)

    def pack(self) -> Packed:
        """As stored: seven significant digits, which is what float32 measurements hold."""
        if self.count == 1:
            return _short(self.mean)
        return [self.count, *map(_short, (self.mean, self.least, self.most, self.last))]

    @classmethod
    def unpack(cls, packed: Packed) -> Summary:
        """Inverse of ``pack``."""
        if isinstance(packed, list):
            return cls(int(packed[0]), *packed[1:])
        return cls.of(packed)


@dataclass(frozen=True, slots=True)
class Point:
    """One row: what was measured in the steps ``first`` to ``step``. ``regime``: the newest."""

    first: int
    step: int
    at: float
    regime: str | None
    values: dict[str, Packed]


def merge(points: Sequence[Point]) -> Point:
    """Consecutive points as one."""
    parts: dict[str, list[Summary]] = {}
    for point in points:
        for name, packed in point.values.items():
            parts.setdefault(name, []).append(Summary.unpack(packed))
    values = {name: Summary.merge(found).pack() for name, found in parts.items()}
    regime = next((point.regime for point in reversed(points) if point.regime is not None), None)
    return Point(points[0].first, points[-1].step, points[-1].at, regime, values)


def thin(points: Sequence[Point], most: int) -> list[Point]:
    """At most ``most`` points, by merging neighbours."""
    size = math.ceil(len(points) / most) if points else 1
    return [merge(points[start : start + size]) for start in range(0, len(points), size)]


@dataclass(slots=True)
class Ladder:
    """Where the pyramid of one kernel grows. ``open[level]``: rows that the level above does not summarise yet."""

    open: list[list[Point]] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)  # rows per level

    @property
    def end(self) -> int:
        """The newest step; 0 before the first."""
        return max((points[-1].step for points in self.open if points), default=0)

    def add(self, point: Point) -> list[tuple[int, Point]]:
        """Take in a new row of level 0; returns it and the summaries that it completes, as (level, row)."""
        self._append(0, point)
        return [(0, point), *self.summarise()]

    def load(self, level: int, points: Iterable[Point], count: int) -> None:
        """Take over what is stored: the unsummarised rows of a level, and how many rows it has."""
        self._reach(level)
        self.open[level], self.counts[level] = list(points), count

    def summarise(self) -> list[tuple[int, Point]]:
        """Merge whatever is complete; returns the new rows as (level, row)."""
        made: list[tuple[int, Point]] = []
        level = 0
        while level < len(self.open):
            points = self.open[level]
            complete = len(points) - len(points) % FANOUT
            for start in range(0, complete, FANOUT):
                summary = merge(points[start : start + FANOUT])
                self._append(level + 1, summary)
                made.append((level + 1, summary))
            if complete:
                # The last summary reaches as far as `complete`; what remains waits for company.
                self.open[level] = points[complete:]
            level += 1
        return made

    def _append(self, level: int, point: Point) -> None:
        self._reach(level)
        self.open[level].append(point)
        self.counts[level] += 1

    def _reach(self, level: int) -> None:
        while len(self.open) <= level:
            self.open.append([])
            self.counts.append(0)

    def check_invariants(self) -> None:
        """Fewer than a summary's worth of rows wait on each level, and they follow one another."""
        assert all(len(points) < FANOUT for points in self.open)
        newest_first = [point for points in self.open for point in reversed(points)]
        for newer, older in pairwise(newest_first):
            assert older.step < newer.first <= newer.step


def _short(value: float) -> float:
    return float(f"{value:.7g}")
