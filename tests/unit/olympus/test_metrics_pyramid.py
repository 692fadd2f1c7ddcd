"""The pyramid's arithmetic against the plain lists that it summarises."""

from __future__ import annotations

import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from olympus.metrics_pyramid import FANOUT, Ladder, Point, Summary, merge, thin


def point(step: int, value: float, regime: str | None = None) -> Point:
    return Point(step, step, float(step), regime, {"loss": value} if step % 3 else {})


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60), st.integers(1, 7))
def test_summaries_of_summaries_are_summaries_of_the_values(values: list[float], size: int) -> None:
    parts = [Summary.of(value) for value in values]
    groups = [Summary.merge(parts[start : start + size]) for start in range(0, len(parts), size)]
    whole = Summary.merge(groups)
    assert (whole.count, whole.least, whole.most, whole.last) == (len(values), min(values), max(values), values[-1])
    assert whole.mean == pytest.approx(statistics.fmean(values), rel=1e-9, abs=1e-6)
    packed = Summary.unpack(whole.pack())
    assert packed.count == whole.count
    assert packed.most == pytest.approx(whole.most, rel=1e-6)


def test_a_merged_point_covers_its_steps_and_skips_what_was_not_measured() -> None:
    merged = merge([point(1, 4.0, "linear"), point(2, 2.0), point(3, 9.0), point(4, 3.0)])
    assert (merged.first, merged.step, merged.regime) == (1, 4, "linear")
    assert merged.values == {"loss": [3, 3.0, 2.0, 4.0, 3.0]}
    assert merge([point(3, 1.0), point(6, 1.0)]).values == {}


def test_the_ladder_makes_each_summary_once_and_in_order() -> None:
    ladder, rows = Ladder(), dict[int, list[Point]]()
    for step in range(1, 1001):
        for level, made in ladder.add(point(step, float(step))):
            rows.setdefault(level, []).append(made)
        ladder.check_invariants()
        assert ladder.end == step
    assert ladder.counts == [len(rows[level]) for level in sorted(rows)]
    for level in range(1, len(ladder.counts)):
        below = rows[level - 1]
        for index, made in enumerate(rows[level]):
            assert made == merge(below[index * FANOUT : (index + 1) * FANOUT])
        assert 0 <= len(below) - FANOUT * len(rows[level]) < FANOUT


def test_a_ladder_that_is_loaded_late_builds_what_is_missing() -> None:
    points = [point(step, float(step)) for step in range(1, 500)]
    late, steady = Ladder(), Ladder()
    late.load(0, points, len(points))
    made = late.summarise()
    for item in points:
        steady.add(item)
    assert (late.open, late.counts) == (steady.open, steady.counts)
    assert {level for level, _ in made} == {1, 2, 3, 4}
    late.check_invariants()


def test_thinning_keeps_the_spikes() -> None:
    drawer = random.Random(0)
    points = [Point(step, step, 0.0, None, {"loss": drawer.random()}) for step in range(1, 5001)]
    points[1234].values["loss"] = 50.0
    few = thin(points, 100)
    assert len(few) == 100
    assert max(Summary.unpack(item.values["loss"]).most for item in few) == 50.0
    assert thin([], 10) == []
