"""What happens by itself: clocks, outcomes, the same at once, and never twice."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from olympus.errors import NotReady
from olympus.timetable import Job, JobBusy, Timetable, UnknownJob


@pytest.fixture
def timetable() -> Iterator[Timetable]:
    made = Timetable()
    yield made
    made.shutdown()
    made.check_invariants()


def _job(run: Callable[[], str], seconds: float = 3600.0, **fields: object) -> Job:
    return Job("look", "Look", "Looks.", seconds, "kernels:write", run, **fields)  # type: ignore[arg-type]


def _outcomes(timetable: Timetable) -> list[tuple[str, str, str, int]]:
    (told,) = timetable.describe()
    return [(item["by"], item["result"], item["told"], item["times"]) for item in told["outcomes"]]


def test_equal_outcomes_are_one_line_with_a_count(timetable: Timetable) -> None:
    answers = iter(["", "", "", "made a kernel", "", ""])
    timetable.add(_job(lambda: next(answers)))
    for _ in range(5):
        timetable.perform("look")
    timetable.perform("look", "local")
    assert _outcomes(timetable) == [
        ("local", "nothing", "", 1),
        ("schedule", "nothing", "", 1),
        ("schedule", "done", "made a kernel", 1),
        ("schedule", "nothing", "", 3),
    ]


def test_errors_are_outcomes_and_the_unexpected_stays_in_the_log(timetable: Timetable) -> None:
    errors = iter([NotReady("the model is loading"), ZeroDivisionError("a secret")])

    def fail() -> str:
        raise next(errors)

    timetable.add(_job(fail))
    timetable.perform("look")
    timetable.perform("look")
    assert _outcomes(timetable) == [
        ("schedule", "failed", "an unexpected error; see the server's log", 1),
        ("schedule", "failed", "the model is loading", 1),
    ]


def test_a_job_is_never_at_work_twice(timetable: Timetable) -> None:
    begun, finish = threading.Event(), threading.Event()

    def work() -> str:
        begun.set()
        assert finish.wait(10)
        return "worked"

    timetable.add(_job(work))
    worker = threading.Thread(target=timetable.perform, args=("look", "local"))
    worker.start()
    assert begun.wait(10)
    assert timetable.describe()[0]["at_work"]
    with pytest.raises(JobBusy):
        timetable.perform("look", "somebody")
    assert timetable.perform("look") is None, "the schedule comes again"
    finish.set()
    worker.join()
    assert _outcomes(timetable) == [("local", "done", "worked", 1)]
    assert not timetable.describe()[0]["at_work"]


def test_the_clock_calls_it_and_says_when_next(timetable: Timetable) -> None:
    called = threading.Event()

    def work() -> str:
        called.set()
        return ""

    timetable.add(_job(work, seconds=0.05))
    assert timetable.next_at("look") is None, "it has not begun"
    timetable.begin("look")
    coming = timetable.next_at("look")
    assert coming is not None
    assert abs(coming - time.time()) < 5
    assert called.wait(10)
    timetable.shutdown()
    assert timetable.next_at("look") is None


def test_a_job_with_a_clock_of_its_own_and_one_that_is_off(timetable: Timetable) -> None:
    timetable.add(_job(lambda: "", next_at=lambda: 123.0, off="kernels.auto_spawn is false"))
    (told,) = timetable.describe()
    assert (told["next_at"], told["off"], told["scope"]) == (123.0, "kernels.auto_spawn is false", "kernels:write")


def test_an_unknown_job_is_named(timetable: Timetable) -> None:
    timetable.add(_job(lambda: ""))
    for ask in (timetable.perform, timetable.scope_of, timetable.next_at):
        with pytest.raises(UnknownJob, match="known are look"):
            ask("bake")
