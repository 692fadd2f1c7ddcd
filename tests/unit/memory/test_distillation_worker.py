"""The worker: progress reaches rows and watchers, and every way to end a run leaves it as it should be."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from memory.distillation import worker as module
from memory.distillation.errors import NothingToDistil
from memory.distillation.runs import Run, RunStore
from memory.distillation.worker import DistillationWorker, Interrupted, Outcome, Pipeline, Report
from storage.database import Database
from storage.models import Base, DistillationRun


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RunStore]:
    database = Database(f"sqlite:///{tmp_path / 'runs.db'}")
    Base.metadata.create_all(database.engine)
    yield RunStore(database)
    database.close()


@pytest.fixture
def told() -> list[dict[str, Any]]:
    return []


@pytest.fixture
def work(store: RunStore, told: list[dict[str, Any]]) -> Iterator[Callable[[Pipeline], DistillationWorker]]:
    made: list[DistillationWorker] = []

    def start(pipeline: Pipeline, **options: Any) -> DistillationWorker:
        worker = DistillationWorker(store, pipeline, lambda _, data: told.append(data), **options)
        made.append(worker)
        worker.start()
        return worker

    yield start
    for worker in made:
        assert worker.stop(10)


def _create(store: RunStore, domain: str = "bank") -> str:
    return store.create(domain, trigger="manual", config={}, cursor=0).id


def _until(store: RunStore, run: str, *states: str, seconds: float = 20) -> Run:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = store.get(run)
        if found.state in states:
            return found
        time.sleep(0.01)
    raise AssertionError(f"run is {store.get(run)}")


def _endless(run: Run, report: Report, stop: threading.Event) -> Outcome:
    report({"stage": "training", "fraction": 0.25})
    stop.wait(30)
    raise Interrupted


def test_progress_and_outcome_are_rows_and_events(
    store: RunStore, work: Callable[..., DistillationWorker], told: list[dict[str, Any]]
) -> None:
    def pipeline(run: Run, report: Report, stop: threading.Event) -> Outcome:
        report({"stage": "dataset", "fraction": 0.1})
        report({"stage": "training", "fraction": 0.5, "loss": 1.0})
        return Outcome("promoted", {"fraction": 1.0, "cartridge": "bank_v0001"})

    run = _create(store)
    work(pipeline)
    ended = _until(store, run, "promoted")
    expected = {"stage": "training", "loss": 1.0, "fraction": 1.0, "cartridge": "bank_v0001", "cursor": 0}
    assert ended.progress == {**expected, "attempts": 1}
    deadline = time.monotonic() + 5
    while told[-1]["state"] != "promoted" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [item["progress"]["stage"] for item in told] == ["dataset", "training", "training"]
    assert told[-1]["state"] == "promoted"
    store.check_invariants()


@pytest.mark.parametrize(
    ("error", "said"),
    [(NothingToDistil("bank has no experiences"), "bank has no experiences"), (KeyError("x"), "the server's log")],
)
def test_errors_end_the_run_and_not_the_worker(
    store: RunStore, work: Callable[..., DistillationWorker], error: Exception, said: str
) -> None:
    def pipeline(run: Run, report: Report, stop: threading.Event) -> Outcome:
        if run.domain == "bad":
            raise error
        return Outcome("rejected", {})

    bad, good = _create(store, "bad"), _create(store, "good")
    work(pipeline)
    assert said in str(_until(store, bad, "failed").error)
    _until(store, good, "rejected")


def test_cancel_reaches_a_running_run(store: RunStore, work: Callable[..., DistillationWorker]) -> None:
    run = _create(store)
    worker = work(_endless)
    _until(store, run, "running")
    store.cancel(run)
    worker.wake()
    assert _until(store, run, "cancelled").progress["fraction"] == 0.25


def test_a_stop_hands_the_run_to_the_next_worker(store: RunStore, work: Callable[..., DistillationWorker]) -> None:
    run = _create(store)
    worker = work(_endless)
    while store.get(run).progress.get("stage") != "training":
        time.sleep(0.01)
    assert worker.stop(10)
    waiting = store.get(run)
    assert (waiting.state, waiting.progress["attempts"], waiting.progress["fraction"]) == ("queued", 0, 0.25)
    work(lambda run, report, stop: Outcome("promoted"))
    _until(store, run, "promoted")


def test_what_breaks_while_the_server_stops_is_no_failure(
    store: RunStore, work: Callable[..., DistillationWorker]
) -> None:
    def pipeline(run: Run, report: Report, stop: threading.Event) -> Outcome:
        report({"stage": "dataset"})
        stop.wait(30)
        raise NothingToDistil("the engine that was to teach has stopped")

    run = _create(store)
    worker = work(pipeline)
    while store.get(run).progress.get("stage") != "dataset":
        time.sleep(0.01)
    assert worker.stop(10)
    assert (store.get(run).state, store.get(run).error) == ("queued", None)


def test_who_lost_the_lease_writes_nothing_more(
    store: RunStore, work: Callable[..., DistillationWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BEAT_SECONDS", 0.02)
    seen = threading.Event()

    def pipeline(run: Run, report: Report, stop: threading.Event) -> Outcome:
        with store._database.write() as session:
            session.get_one(DistillationRun, run.id).lease_owner = "another"
        assert stop.wait(10)
        seen.set()
        return Outcome("promoted")

    run = _create(store)
    work(pipeline)
    assert seen.wait(20)
    time.sleep(0.1)
    assert store.get(run).state == "running"  # as the other one, who leads it now, left it


def test_nothing_begins_before_it_is_ready(store: RunStore, work: Callable[..., DistillationWorker]) -> None:
    ready = threading.Event()
    run = _create(store)
    worker = work(lambda run, report, stop: Outcome("promoted"), ready=ready.is_set)
    time.sleep(0.2)
    assert store.get(run).state == "queued"
    ready.set()
    worker.wake()
    _until(store, run, "promoted")


def test_many_reports_are_few_events(
    store: RunStore, work: Callable[..., DistillationWorker], told: list[dict[str, Any]]
) -> None:
    def pipeline(run: Run, report: Report, stop: threading.Event) -> Outcome:
        for step in range(500):
            numbers: Mapping[str, Any] = {"stage": "training", "step": step}
            report(numbers)
        return Outcome("promoted")

    run = _create(store)
    work(pipeline)
    assert _until(store, run, "promoted").progress["step"] == 499
    assert len(told) < 20
