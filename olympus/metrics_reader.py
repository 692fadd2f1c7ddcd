"""Which rows of the pyramid answer a question about a kernel's measurements, and how they are fetched.

It is the finest level that answers within ``max_points``, and what that cannot say exactly comes from finer rows: from
``since`` up to where a row of the level begins, and from where the level ends up to now. So every step after ``since``
is in exactly one row of the answer, and reading on from the newest one neither repeats nor misses any. (When the finer
rows at ``since`` are pruned already, the row that ``since`` falls into is given whole.)

Rows come out of the database as one text: a row that is fetched by itself lets go of the interpreter and waits for it
again, two thousand times in an answer, while others compute. And the database picks the columns, because what is not
asked for then need not be parsed under that lock. Measured on two cores: six answers at once, of 1,564 rows and one
column, take 40 ms instead of 110.

Not here: writing (``metrics_store``), and what becomes of the rows.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from olympus.metrics_pyramid import FANOUT, Packed, Point
from storage.models import MetricPoint

#: Up to so many columns the database picks them out of a row's values; more are faster parsed with all of them.
_MOST_PICKED = 4


@dataclass(frozen=True, slots=True)
class _Reach:
    """Rows of one level beyond some step: how many, where the first begins, where the first and the last one end."""

    count: int
    first: int
    eldest: int
    newest: int


class Reader:
    """Chooses the rows of one answer, within one read transaction; of their values they need ``columns``."""

    def __init__(self, session: Session, kernel_id: str, columns: Sequence[str]):
        self._session = session
        self._kernel_id = kernel_id
        self._columns = tuple(columns)
        mine = MetricPoint.kernel_id == kernel_id
        self.top = session.scalar(sa.select(sa.func.max(MetricPoint.level)).where(mine)) or 0

    def cover(self, after: int, max_points: int) -> tuple[int, list[Point]]:
        """Rows that hold each step beyond ``after`` once, mostly of one level, and that level."""
        reached = self._reached(after)
        level = self._level_for(reached, after, max_points)
        rows: list[Point] = []
        position = after
        for lower in range(level):  # up to where a row of the next level begins
            above = (reached if position == after else self._reached(position)).get(lower + 1)
            if above is None:
                break  # everything newer is on the levels below: the descent finds it
            if above.first > position:
                continue
            finer = self._rows((lower, position, above.eldest))
            whole = bool(finer) and finer[0].first <= position + 1
            rows += finer if whole else self._rows((lower + 1, position, above.eldest))
            position = above.eldest
        ranges = []
        for lower in range(level, -1, -1):  # the level itself, then what it does not summarise yet
            newest = reached[lower].newest if lower in reached else position
            if newest > position:
                ranges.append((lower, position, newest))
                position = newest
        return level, rows + self._rows(*ranges)

    def _level_for(self, reached: Mapping[int, _Reach], after: int, max_points: int) -> int:
        """The finest level that reaches back to ``after`` and has few enough rows since then."""
        eldest = reached.get(self.top)
        for level in range(self.top):
            found = reached.get(level)
            if found is None:
                return level
            reaches = eldest is None or found.first <= max(after + 1, eldest.first)
            spare = max_points - 2 * FANOUT * level  # the ascent and the descent
            if reaches and found.count <= spare:
                return level
        return self.top

    def _reached(self, after: int) -> dict[int, _Reach]:
        """By level, what lies beyond ``after``."""
        found = self._session.execute(_REACHED, {"kernel_id": self._kernel_id, "after": after})
        return {level: _Reach(count, first, eldest, newest) for level, count, eldest, newest, first in found}

    def _rows(self, *ranges: tuple[int, int, int]) -> list[Point]:
        """Rows of a level beyond a step and up to another one, for each of ``ranges``, oldest first."""
        if not ranges:
            return []
        places = {
            f"{name}{index}": value
            for index, places in enumerate(ranges)
            for name, value in zip(("level", "after", "until"), places, strict=True)
        }
        text = self._session.scalar(_rows_as_text(self._columns, len(ranges)), {"kernel_id": self._kernel_id, **places})
        flat = iter(json.loads(f"[{text or ''}]"))
        width = 3 if _taken_whole(self._columns) else 2 + len(self._columns)
        rows = zip(*[flat] * width, strict=True)
        points = [Point(first, step, 0.0, None, self._named(values)) for first, step, *values in rows]
        return sorted(points, key=lambda point: point.step)  # a database joins texts in any order

    def _named(self, values: list[Any]) -> dict[str, Packed]:
        if _taken_whole(self._columns):
            whole: dict[str, Packed] = values[0]
            return whole
        return {name: value for name, value in zip(self._columns, values, strict=True) if value is not None}


def _taken_whole(columns: Sequence[str]) -> bool:
    return len(columns) > _MOST_PICKED


def _reached_statement() -> sa.Select[Any]:
    """Level, count, first and last step of the rows beyond a step, and where the first begins: little but the index."""
    row, mine = MetricPoint, MetricPoint.kernel_id == sa.bindparam("kernel_id")
    beyond = (
        sa.select(
            row.level, sa.func.count().label("count"), sa.func.min(row.step).label("eldest"), sa.func.max(row.step)
        )
        .where(mine, row.step > sa.bindparam("after"))
        .group_by(row.level)
        .subquery()
    )
    return sa.select(beyond, row.first_step).join(
        row, sa.and_(mine, row.level == beyond.c.level, row.step == beyond.c.eldest)
    )


_REACHED = _reached_statement()


@functools.lru_cache(maxsize=64)
def _rows_as_text(columns: tuple[str, ...], ranges: int) -> sa.Select[Any]:
    """Rows of so many ranges as a JSON text without its brackets: first step, step, and the columns or all values."""
    row = MetricPoint
    wanted = [
        sa.and_(
            row.level == sa.bindparam(f"level{index}"),
            row.step > sa.bindparam(f"after{index}"),
            row.step <= sa.bindparam(f"until{index}"),
        )
        for index in range(ranges)
    ]
    values = [row.values] if _taken_whole(columns) else [row.values[name] for name in columns]
    text: sa.ColumnElement[str] = sa.cast(row.first_step, sa.Text) + "," + sa.cast(row.step, sa.Text)
    for value in values:
        text = text + "," + sa.func.coalesce(sa.cast(value, sa.Text), "null")
    joined = sa.func.aggregate_strings(text, ",")
    return sa.select(joined).where(row.kernel_id == sa.bindparam("kernel_id"), sa.or_(*wanted))
