"""Slots: never more than the limit, given back exactly once."""

from __future__ import annotations

import random
import threading

import pytest

from olympus.admission import Admission, Slot, TooManyChats, TooManyStreams


def test_refusals_say_when_to_come_back() -> None:
    admission = Admission(1, 2)
    slots = [admission.chat(), admission.stream(), admission.stream()]
    with pytest.raises(TooManyChats, match="1 chats are open") as chats:
        admission.chat()
    with pytest.raises(TooManyStreams, match="2 event streams are open") as streams:
        admission.stream()
    assert (chats.value.status, streams.value.status) == (429, 503)
    assert chats.value.retry_after
    assert streams.value.retry_after
    assert admission.counts() == {
        "chats": 1,
        "max_chats": 1,
        "chats_refused": 1,
        "streams": 2,
        "max_streams": 2,
        "streams_refused": 1,
    }
    for slot in slots:
        slot.release()
        slot.release()
        assert not slot.held
        admission.check_invariants()
    assert admission.counts()["chats"] == admission.counts()["streams"] == 0


def test_a_slot_is_a_context_manager() -> None:
    admission = Admission(1, 1)
    with pytest.raises(KeyError), admission.chat():
        raise KeyError
    with admission.chat() as slot:
        assert slot.held


@pytest.mark.parametrize("limits", [(0, 1), (1, 0), (-1, 5)])
def test_limits_are_checked(limits: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Admission(*limits)


def test_many_threads_never_exceed_the_limit() -> None:
    admission = Admission(3, 1)
    most = 0
    lock = threading.Lock()

    def come_and_go(seed: int) -> None:
        nonlocal most
        rng = random.Random(seed)
        held: list[Slot] = []
        for _ in range(300):
            if held and rng.random() < 0.5:
                held.pop().release()
                continue
            try:
                held.append(admission.chat())
            except TooManyChats:
                continue
            with lock:
                most = max(most, admission.counts()["chats"])
            admission.check_invariants()
        for slot in held:
            slot.release()

    threads = [threading.Thread(target=come_and_go, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 3
    assert admission.counts()["chats"] == 0
    assert admission.counts()["chats_refused"] > 0
