"""What is known of each experience besides its words and its meaning, in columns: which ones a question may find.

A row per living experience, at a place. One that is removed is not found from then on; its place is given again when
its owner has cleared what else stands there (``free``). A filter is a few comparisons of whole
columns (0.1 ms for 100,000 rows), so that words and vectors need to know nothing of domains, sessions and times.
Not thread-safe: its owner holds a lock.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

_NO_SESSION = -1
_UNKNOWN = -2  # a name that no row has


@dataclass(frozen=True, slots=True)
class Filters:
    """Which experiences may be found; None: any. Times are UTC seconds since the epoch, ``until`` is not included."""

    domain: str | None = None
    session: str | None = None
    without_session: str | None = None
    since: float | None = None
    until: float | None = None
    min_score: float | None = None  #: of those that were judged; the others are not found then
    wrong: bool = True  #: False: none whose score is negative


@dataclass(frozen=True, slots=True)
class Line:
    """An experience as the catalog takes it, with the text whose words count."""

    id: int
    domain: str
    session_id: str | None
    created_at: float
    score: float | None
    text: str


class Catalog:
    """See the module docstring."""

    def __init__(self) -> None:
        self._names: dict[str, int] = {}  # of domains and sessions
        self._places: dict[int, int] = {}
        self._fading: dict[int, int] = {}  # removed, but not free yet: id -> place
        self._free: list[int] = []
        self._size = 0  # places in use, fading or free
        self._columns: dict[str, np.ndarray[Any, Any]] = {
            "ids": np.zeros(0, np.int64),
            "alive": np.zeros(0, np.bool_),
            "domain": np.zeros(0, np.int32),
            "session": np.zeros(0, np.int32),
            "created": np.zeros(0, np.float64),
            "score": np.zeros(0, np.float32),
        }

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, experience_id: int) -> bool:
        return experience_id in self._places

    @property
    def ids(self) -> np.ndarray:
        """Experience ids by place; what stands at a free place means nothing."""
        return self._columns["ids"][: self._size]

    def add(self, line: Line) -> int:
        """A new row; returns its place."""
        place = self._free.pop() if self._free else self._grow()
        row = {
            "ids": line.id,
            "alive": True,
            "domain": self._code(line.domain),
            "session": _NO_SESSION if line.session_id is None else self._code(line.session_id),
            "created": line.created_at,
            "score": math.nan if line.score is None else line.score,
        }
        for name, value in row.items():
            self._columns[name][place] = value
        self._places[line.id] = place
        return place

    def remove(self, experience_id: int) -> bool:
        """The row is not found any more; False when there was none."""
        place = self._places.pop(experience_id, None)
        if place is None:
            return False
        self._columns["alive"][place] = False
        self._fading[experience_id] = place
        return True

    @property
    def fading(self) -> list[tuple[int, int]]:
        """``(id, place)`` of what was removed and is not free yet."""
        return list(self._fading.items())

    def free(self, experience_id: int) -> None:
        """Nothing of a removed row stands anywhere any more."""
        place = self._fading.pop(experience_id)
        self._columns["ids"][place] = -1
        self._free.append(place)

    def oldest(self, count: int) -> list[int]:
        """The ``count`` lowest ids."""
        return sorted(self._places)[:count]

    def judge(self, experience_id: int, score: float | None) -> None:
        """The row's score changed; unknown ids pass by."""
        place = self._places.get(experience_id)
        if place is not None:
            self._columns["score"][place] = math.nan if score is None else score

    def mask(self, filters: Filters) -> np.ndarray | None:
        """[places] True where a row passes; None: all rows pass, and nothing fades."""
        chosen: list[np.ndarray] = []

        def column(name: str) -> np.ndarray:
            return self._columns[name][: self._size]

        if filters.domain is not None:
            chosen.append(column("domain") == self._names.get(filters.domain, _UNKNOWN))
        if filters.session is not None:
            chosen.append(column("session") == self._names.get(filters.session, _UNKNOWN))
        if filters.without_session is not None:
            chosen.append(column("session") != self._names.get(filters.without_session, _UNKNOWN))
        if filters.since is not None:
            chosen.append(column("created") >= filters.since)
        if filters.until is not None:
            chosen.append(column("created") < filters.until)
        if filters.min_score is not None:
            chosen.append(column("score") >= filters.min_score)  # NaN, not judged, compares as False
        if not filters.wrong:
            chosen.append(~(column("score") < 0))
        if not chosen and not self._fading:
            return None
        mask = column("alive").copy()
        for condition in chosen:
            mask &= condition
        return mask if self._fading or np.count_nonzero(mask) < len(self._places) else None

    def check_invariants(self) -> None:
        """Raise ``AssertionError`` if places and columns contradict each other."""
        assert np.count_nonzero(self._columns["alive"][: self._size]) == len(self._places)
        assert len(self._free) + len(self._places) + len(self._fading) == self._size
        assert all(self._columns["ids"][place] == known for known, place in self._places.items())

    def _code(self, name: str) -> int:
        return self._names.setdefault(name, len(self._names))

    def _grow(self) -> int:
        capacity = len(self._columns["ids"])
        if self._size == capacity:
            more = max(1024, capacity)
            for name, column in self._columns.items():
                self._columns[name] = np.concatenate([column, np.zeros(more, column.dtype)])
        self._size += 1
        return self._size - 1
