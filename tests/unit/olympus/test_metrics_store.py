"""Metrics: windows, batches, levels, exact continuation, and what a crash undid."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from olympus import metrics_store
from olympus.metrics_pyramid import FANOUT
from olympus.metrics_store import COLUMNS, MetricsStore, StepMetrics
from storage.database import Database
from storage.models import Base, Kernel, MetricPoint

ID = "athena-0a1b2c"
OTHER = "hermes-000000"


class Clock:
    """A clock that tests move by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'test.db'}")
    Base.metadata.create_all(database.engine)
    with database.write() as session:
        for kernel_id in (ID, OTHER):
            session.add(Kernel(id=kernel_id, god_name="x", domain="d", state="queued", config={}, seed=1))
    yield database
    database.close()


def insert(database: Database, losses: list[float]) -> None:
    """Rows of level 0 as an earlier version wrote them: no summaries yet."""
    rows = [
        {"kernel_id": ID, "level": 0, "step": step, "first_step": step, "at": 0.0, "values": {"loss": loss}}
        for step, loss in enumerate(losses, start=1)
    ]
    with database.write() as session:
        session.execute(sa.insert(MetricPoint), rows)


def rows_per_level(database: Database) -> dict[int, int]:
    query = sa.select(MetricPoint.level, sa.func.count()).group_by(MetricPoint.level).order_by(MetricPoint.level)
    with database.read() as session:
        return {level: count for level, count in session.execute(query)}


def assert_covers(read: dict[str, Any], after: int, newest: int) -> None:
    """Each step after ``after`` is in exactly one row."""
    assert read["first_step"][0] == after + 1
    assert read["step"][-1] == newest
    assert read["first_step"][1:] == [step + 1 for step in read["step"][:-1]]


def test_a_window_is_one_row_with_the_mean_loss_and_its_extremes(database: Database) -> None:
    clock = Clock()
    store = MetricsStore(database, clock)
    for step, loss, phi in ((1, 4.0, None), (2, 2.0, 0.5), (3, 3.0, None)):
        store.add(ID, StepMetrics(step, loss=loss, phi=phi))
        store.check_invariants()
    assert store.flush() == []
    clock.now = 0.3
    rows = store.flush()
    assert [(row["step"], row["loss"], row["phi"]) for row in rows] == [(3, 3.0, 0.5)]
    read = store.read(ID, None, 100, spread=True)
    assert (read["step"], read["loss"], read["phi"], read["holdout_loss"]) == ([3], [3.0], [0.5], [None])
    assert (read["min"]["loss"], read["max"]["loss"], read["last"]["loss"]) == ([2.0], [4.0], [3.0])
    assert (read["first_step"], read["level"], read["next_since"]) == ([1], 0, 3)
    assert store.read(ID, 3, 100)["next_since"] == 3
    assert store.read(ID, 3, 100)["step"] == []
    assert store.read(OTHER, None, 100)["next_since"] is None


def test_what_is_no_number_is_not_a_measurement(database: Database) -> None:
    store = MetricsStore(database, Clock())
    store.add(ID, StepMetrics(1, loss=1.0, grad_norm=float("nan"), step_ms=float("inf")))
    store.flush(ID)
    read = store.read(ID)
    assert (read["loss"], read["grad_norm"], read["step_ms"]) == ([1.0], [None], [None])


def test_at_most_four_rows_a_second_for_each_kernel(database: Database) -> None:
    clock = Clock()
    store = MetricsStore(database, clock)
    for tick in range(1000):
        clock.now = tick / 100
        store.add(ID, StepMetrics(tick + 1, loss=1.0))
        store.flush()
    assert 36 <= len(store.read(ID, None, 10_000)["step"]) <= 40


def test_one_kernel_can_be_flushed_at_once(database: Database) -> None:
    store = MetricsStore(database, Clock())
    store.add(ID, StepMetrics(1, loss=1.0))
    store.add(OTHER, StepMetrics(1, loss=1.0))
    assert [row["kernel_id"] for row in store.flush(ID)] == [ID]


def test_rows_without_summaries_are_summarised_when_they_are_first_read(database: Database) -> None:
    insert(database, [float(step % 2) for step in range(1, 10_001)])
    store = MetricsStore(database, Clock())
    read = store.read(ID, None, 100, spread=True)
    assert len(read["step"]) <= 100
    assert_covers(read, 0, 10_000)
    assert read["next_since"] == 10_000
    assert all(loss == pytest.approx(0.5, abs=0.05) for loss in read["loss"])
    assert len(store.read(ID, 9_950, 100)["step"]) == 50
    counts = rows_per_level(database)
    assert [counts[level] for level in (1, 2, 3)] == [2500, 625, 156]
    assert counts[0] < 4500


@pytest.mark.parametrize("max_points", [1, 7, 100, 500, 2000, 10_000])
def test_a_spike_survives_at_every_resolution(database: Database, max_points: int) -> None:
    losses = [1.0] * 9_000
    losses[4321] = 77.0
    insert(database, losses)
    read = MetricsStore(database, Clock()).read(ID, None, max_points, spread=True)
    assert 1 <= len(read["step"]) <= max_points
    assert max(read["max"]["loss"]) == 77.0
    assert min(read["min"]["loss"]) == 1.0
    assert_covers(read, 0, 9_000)


def test_reading_on_repeats_nothing_and_misses_nothing(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """A watcher that comes by at random moments sees every step once, whatever was summarised meanwhile."""
    monkeypatch.setattr(metrics_store, "KEEP", 256)
    monkeypatch.setattr(metrics_store, "_SLACK", 16)
    drawer = random.Random(3)
    store, since, seen, step = MetricsStore(database, Clock()), None, 0, 0
    while step < 1500:
        for _ in range(drawer.choice((1, 2, 5, 60, 200))):
            step += drawer.randint(1, 3)
            store.add(ID, StepMetrics(step, loss=float(step)))
            store.flush(ID)
        store.check_invariants()
        read = store.read(ID, since, drawer.choice((40, 500)), spread=True)
        assert_covers(read, since or 0, step)
        assert read["last"]["loss"][-1] == float(step)
        assert read["max"]["loss"] == [float(end) for end in read["step"]]
        since, seen = read["next_since"], seen + 1
    assert seen > 5
    assert_covers(store.read(ID, None, 30, spread=True), 0, step)
    assert all(count <= 256 + 16 + FANOUT for count in rows_per_level(database).values())


def test_a_watcher_that_comes_back_too_late_gets_whole_rows(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_store, "KEEP", 64)
    monkeypatch.setattr(metrics_store, "_SLACK", 4)
    insert(database, [1.0] * 4000)
    read = MetricsStore(database, Clock()).read(ID, 1003, 200, spread=True)
    assert read["first_step"][0] <= 1004, "nothing is missing"
    assert read["step"][0] > 1003
    assert read["first_step"][1:] == [step + 1 for step in read["step"][:-1]]


@pytest.mark.parametrize("columns", [("phi",), ("holdout_loss", "loss"), COLUMNS[:3], tuple(reversed(COLUMNS))])
@pytest.mark.parametrize("max_points", [7, 200, 10_000])
def test_an_answer_with_some_columns_is_part_of_the_whole_one(
    database: Database, columns: tuple[str, ...], max_points: int
) -> None:
    """Few columns are picked by the database, many are not: both say the same, also where nothing was measured."""
    drawer = random.Random(5)
    store = MetricsStore(database, Clock())
    for step in range(1, 700):
        phi = drawer.random() if step % 9 == 0 else None
        store.add(ID, StepMetrics(step, loss=drawer.random(), phi=phi, holdout_loss=1e-9 if step % 50 == 0 else None))
        if step % 3 == 0:
            store.flush(ID)
    store.flush(ID)
    for since in (None, 0, 333, 690, 699):
        whole = store.read(ID, since, max_points, spread=True)
        some = store.read(ID, since, max_points, columns=columns, spread=True)
        assert [name for name in some if name in COLUMNS] == list(columns)
        for label in ("min", "max", "last"):
            assert some.pop(label) == {name: whole[label][name] for name in columns}
        assert some == {name: whole[name] for name in some}


def test_a_reader_does_not_wait_for_a_flush(database: Database) -> None:
    """The dashboard stood still while a flush waited for the disk."""
    store = MetricsStore(database, Clock())
    insert(database, [1.0] * 10)
    store.read(ID)
    with store._flushing, ThreadPoolExecutor(1) as other:
        assert other.submit(store.read, ID).result(timeout=10)["step"][-1] == 10


def test_resuming_removes_the_rows_of_the_lost_future(database: Database) -> None:
    store = MetricsStore(database, Clock())
    for step in (100, 150, 200):
        store.add(ID, StepMetrics(step, loss=1.0))
        store.flush(ID)
    store.add(ID, StepMetrics(201, loss=1.0))
    store.begin(ID, 150)
    assert store.read(ID, None, 10)["step"] == [100, 150]
    store.add(ID, StepMetrics(200, loss=2.0))  # reached again
    store.flush(ID)
    assert store.read(ID, None, 10)["step"] == [100, 150, 200]


@pytest.mark.parametrize("back_to", [0, 63, 64, 219])
def test_after_a_crash_the_summaries_are_those_of_the_new_course(database: Database, back_to: int) -> None:
    store = MetricsStore(database, Clock())
    for first, last, loss in ((1, 220, 1.0), (back_to + 1, 300, 2.0)):
        store.begin(ID, first - 1)
        for step in range(first, last + 1):
            store.add(ID, StepMetrics(step, loss=loss))
            store.flush(ID)
    store.check_invariants()
    for points in (3, 90, 2000):
        read = store.read(ID, None, points, spread=True)
        assert_covers(read, 0, 300)
        total = sum(
            loss * (step - first + 1)
            for first, step, loss in zip(read["first_step"], read["step"], read["loss"], strict=True)
        )
        assert total == pytest.approx(back_to + 2.0 * (300 - back_to), rel=1e-5)


def test_a_write_that_fails_leaves_the_pyramid_as_it_was(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    store = MetricsStore(database, Clock())
    for step in range(1, 8):
        store.add(ID, StepMetrics(step, loss=1.0))
        store.flush(ID)

    def refuse(*_: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(metrics_store, "_prune", refuse)
        store.add(ID, StepMetrics(8, loss=1.0))
        with pytest.raises(OSError, match="disk full"):
            store.flush(ID)
    store.add(ID, StepMetrics(9, loss=1.0))
    store.flush(ID)
    store.check_invariants()
    assert rows_per_level(database) == {0: 8, 1: 2}
    assert_covers(store.read(ID, spread=True), 0, 9)


def test_a_long_life_stays_small_and_is_read_in_bounded_work(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """40,000 rows: at most KEEP and a little on each level, and an answer touches no more rows than it returns."""
    insert(database, [1.0 + step % 5 for step in range(40_000)])
    store = MetricsStore(database, Clock())
    store.read(ID)
    counts = rows_per_level(database)
    assert max(counts.values()) <= metrics_store.KEEP + metrics_store._SLACK
    fetched = 0
    plain: Callable[..., list[Any]] = metrics_store._points

    def counted(*given: Any, **named: Any) -> list[Any]:
        nonlocal fetched
        found = plain(*given, **named)
        fetched += len(found)
        return found

    monkeypatch.setattr(metrics_store, "_points", counted)
    read = store.read(ID, None, 2000)
    assert 500 <= len(read["step"]) <= 2000
    assert fetched <= len(read["step"]) + 64
    assert set(COLUMNS) <= set(read)


def test_discarding_keeps_a_deleted_kernel_from_being_written(database: Database) -> None:
    store = MetricsStore(database, Clock())
    store.add(ID, StepMetrics(1, loss=1.0))
    store.discard(ID)
    assert store.flush(ID) == []
