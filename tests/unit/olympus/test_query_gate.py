"""The door for questions: how many, in which order, and that training gives way."""

from __future__ import annotations

import os
import sys
import threading
import time

import pytest

from olympus.query_gate import QueryGate, TooManyQueries, be_nice


def test_above_the_limit_it_refuses_at_once() -> None:
    gate = QueryGate(2, at_once=1)
    with gate.question():
        waiting = threading.Thread(target=_pass_through, args=(gate,))
        waiting.start()
        while gate.counts()["open"] < 2:
            time.sleep(0.001)
        with pytest.raises(TooManyQueries) as refused, gate.question():
            pass
        assert (refused.value.status, refused.value.retry_after) == (503, 1.0)
        gate.check_invariants()
    waiting.join(10)
    assert gate.counts() == {"open": 0, "limit": 2, "refused": 1}
    gate.check_invariants()


def _pass_through(gate: QueryGate) -> None:
    with gate.question():
        pass


def test_no_more_than_the_seats_are_inside() -> None:
    gate, inside, most = QueryGate(64, at_once=2), [0], [0]
    lock = threading.Lock()

    def ask() -> None:
        with gate.question():
            with lock:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
            time.sleep(0.005)
            with lock:
                inside[0] -= 1

    threads = [threading.Thread(target=ask) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert most[0] == 2
    assert gate.counts()["open"] == 0


def test_an_error_inside_leaves_the_door_open() -> None:
    gate = QueryGate(1)
    for _ in range(3):
        with pytest.raises(KeyError), gate.question():
            raise KeyError
    gate.check_invariants()


def test_training_gives_way_while_a_question_is_open_and_no_longer_than_it_must() -> None:
    gate, passed = QueryGate(4), threading.Event()

    def train() -> None:
        gate.give_way(30)
        passed.set()

    thread = threading.Thread(target=train)
    with gate.question():
        thread.start()
        assert not passed.wait(0.1)
    assert passed.wait(10)
    thread.join(10)
    with gate.question():
        gate.give_way(0.01)  # returns, though the question is open
    gate.give_way(30)  # and at once when none is


def test_impossible_doors_are_errors() -> None:
    for limit, at_once in ((0, None), (1, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            QueryGate(limit, at_once)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps a niceness per thread")
def test_niceness_is_the_threads_own() -> None:
    found: list[tuple[bool, int]] = []

    def run() -> None:
        found.append((be_nice(7), os.getpriority(os.PRIO_PROCESS, threading.get_native_id())))
        found.append((be_nice(3), os.getpriority(os.PRIO_PROCESS, threading.get_native_id())))  # never back

    before = os.getpriority(os.PRIO_PROCESS, 0)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join(10)
    expected = max(7, before)
    assert found == [(True, expected), (True, expected)]
    assert os.getpriority(os.PRIO_PROCESS, 0) == before
    assert not be_nice(0)
