"""Metrics: windows, batches, thinning, and what a crash undid."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from olympus.metrics_store import MetricsStore, StepMetrics
from storage.database import Database
from storage.models import Base, Kernel, KernelMetric

ID = "athena-0a1b2c"


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
        for kernel_id in (ID, "hermes-000000"):
            session.add(Kernel(id=kernel_id, god_name="x", domain="d", state="queued", config={}, seed=1))
    yield database
    database.close()


def test_a_window_is_one_row_with_the_mean_loss_and_the_newest_measurements(database: Database) -> None:
    clock = Clock()
    store = MetricsStore(database, clock)
    for step, loss, phi in ((1, 4.0, None), (2, 2.0, 0.5), (3, 3.0, None)):
        store.add(ID, StepMetrics(step, loss=loss, phi=phi))
        store.check_invariants()
    assert store.flush() == []
    clock.now = 0.3
    rows = store.flush()
    assert [(row["step"], row["loss"], row["phi"]) for row in rows] == [(3, 3.0, 0.5)]
    read = store.read(ID, None, 100)
    assert (read["step"], read["loss"], read["phi"], read["holdout_loss"]) == ([3], [3.0], [0.5], [None])
    assert read["next_since"] == 3
    assert store.read(ID, 3, 100)["next_since"] == 3
    assert store.read(ID, 3, 100)["step"] == []


def test_at_most_four_rows_a_second_for_each_kernel(database: Database) -> None:
    clock = Clock()
    store = MetricsStore(database, clock)
    for tick in range(1000):
        clock.now = tick / 100
        store.add(ID, StepMetrics(tick + 1, loss=1.0))
        store.flush()
    assert 36 <= store.read(ID, None, 10_000)["rows"] <= 40


def test_one_kernel_can_be_flushed_at_once(database: Database) -> None:
    store = MetricsStore(database, Clock())
    store.add(ID, StepMetrics(1, loss=1.0))
    store.add("hermes-000000", StepMetrics(1, loss=1.0))
    assert [row["kernel_id"] for row in store.flush(ID)] == [ID]


def test_reading_is_thinned_on_the_server(database: Database) -> None:
    rows = [{"kernel_id": ID, "step": step, "at": 0.0, "loss": float(step % 2)} for step in range(1, 10_001)]
    with database.write() as session:
        session.execute(sa.insert(KernelMetric), rows)
    store = MetricsStore(database, Clock())
    read = store.read(ID, None, 100)
    assert len(read["step"]) == 100
    assert read["rows"] == 10_000
    assert read["step"][-1] == read["next_since"] == 10_000
    assert all(loss == pytest.approx(0.5, abs=0.01) for loss in read["loss"])
    assert read["step"] == sorted(read["step"])
    assert len(store.read(ID, 9_950, 100)["step"]) == 50


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


def test_the_window_widens_with_the_number_of_rows(database: Database) -> None:
    rows = [{"kernel_id": ID, "step": step, "at": 0.0} for step in range(1, 8001)]
    with database.write() as session:
        session.execute(sa.insert(KernelMetric), rows)
    clock = Clock()
    store = MetricsStore(database, clock)
    store.begin(ID, 8000)
    store.add(ID, StepMetrics(8001, loss=1.0))
    clock.now = 0.4
    assert store.flush() == []
    clock.now = 0.51
    assert len(store.flush()) == 1


def test_discarding_keeps_a_deleted_kernel_from_being_written(database: Database) -> None:
    store = MetricsStore(database, Clock())
    store.add(ID, StepMetrics(1, loss=1.0))
    store.discard(ID)
    assert store.flush(ID) == []
