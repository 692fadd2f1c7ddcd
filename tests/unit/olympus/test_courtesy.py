"""Training gives way in the middle of a step: forward, backward, and while Phi is measured."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from olympus.courtesy import Courtesy, Pace, within
from olympus.query_gate import QueryGate
from qig_core.integration import measure_integration
from qig_core.learning import collate, supervised_loss
from qig_core.m8_kernel import KernelConfig, M8Kernel
from qig_core.vocabulary import encode_pair


@pytest.fixture
def kernel() -> M8Kernel:
    return M8Kernel(KernelConfig.preset("nano", width=32, hidden=32, heads=2), seed=3)


def _loss(kernel: M8Kernel) -> torch.Tensor:
    batch = collate([encode_pair("where is my card", "card_arrival", 64), encode_pair("help", "other", 64)])
    return supervised_loss(kernel, batch.ids, batch.loss_mask, supervision_steps=1).total


class _Counting(Courtesy):
    looks = 0

    def __call__(self) -> None:
        self.looks += 1
        super().__call__()


@contextmanager
def _open_question(gate: QueryGate, seconds: float) -> Iterator[None]:
    """A question that another thread asks and that takes so long."""
    entered = threading.Event()

    def ask() -> None:
        with gate.question():
            entered.set()
            time.sleep(seconds)

    thread = threading.Thread(target=ask)
    thread.start()
    assert entered.wait(10)
    yield
    thread.join(10)


def test_it_looks_at_every_linear_map_forward_and_on_the_way_back(kernel: M8Kernel) -> None:
    courtesy = _Counting(QueryGate(4), 1.0)
    with within(courtesy, kernel):
        loss = _loss(kernel)
        forward = courtesy.looks
        loss.backward()
    config = kernel.config
    applications = config.outer_cycles * (config.inner_cycles + 1) * config.blocks * 4  # linear maps in a block
    assert forward >= applications
    last_cycle = applications // config.outer_cycles
    assert last_cycle <= courtesy.looks - forward <= forward
    before = courtesy.looks
    _loss(kernel).backward()
    assert courtesy.looks == before, "the hooks are gone"
    assert not any(module._forward_pre_hooks for module in kernel.modules())
    copy.deepcopy(kernel)  # hooks with a lock in them would make this fail


def test_it_changes_no_number(kernel: M8Kernel) -> None:
    plain = _loss(kernel)
    plain.backward()
    expected = [p.grad.clone() for p in kernel.parameters() if p.grad is not None]
    kernel.zero_grad()
    gate = QueryGate(4)
    with _open_question(gate, 0.05), within(Courtesy(gate, 0.02), kernel):
        loss = _loss(kernel)
        loss.backward()
    assert torch.equal(loss, plain)
    for before, parameter in zip(expected, kernel.parameters(), strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, before)


def test_a_step_holds_while_a_question_is_open(kernel: M8Kernel) -> None:
    gate = QueryGate(4)
    courtesy = Courtesy(gate, 10.0)
    with _open_question(gate, 0.3), within(courtesy, kernel):
        begun = time.perf_counter()
        _loss(kernel)
        assert time.perf_counter() - begun > 0.2
    assert 0.2 < courtesy.take_waited() < 5
    assert courtesy.take_waited() == 0


def test_a_crowd_cannot_stop_a_step(kernel: M8Kernel) -> None:
    gate = QueryGate(4)
    courtesy = Courtesy(gate, 0.1)
    with _open_question(gate, 2.0), within(courtesy, kernel):
        begun = time.perf_counter()
        _loss(kernel).backward()
        assert time.perf_counter() - begun < 1.5
        assert 0.1 <= courtesy.take_waited() < 1.0
        courtesy.renew()
        courtesy()
        assert courtesy.take_waited() >= 0.1, "the next step is held up anew"


def test_the_measurement_of_phi_gives_way_and_stays_what_it_is() -> None:
    states = torch.randn(2000, 8, generator=torch.Generator().manual_seed(1))
    after = states @ torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(2))).Q * 0.9
    courtesy = _Counting(QueryGate(4), 1.0)
    assert measure_integration(states, after, between=courtesy) == measure_integration(states, after)
    assert courtesy.looks >= 5


def test_beside_a_chat_a_thread_keeps_to_its_share(kernel: M8Kernel) -> None:
    chatting = threading.Event()
    chatting.set()
    pace = Pace(chatting.is_set, share=0.1, per_step_seconds=30.0, hurry=threading.Event())
    courtesy = Courtesy(QueryGate(4), 1.0, pace)
    with within(courtesy, kernel):
        begun, worked = time.perf_counter(), time.thread_time()
        for _ in range(3):
            _loss(kernel).backward()
        taken, worked = time.perf_counter() - begun, time.thread_time() - worked
        assert worked <= 0.2 * taken, "a tenth, and what lies before the first look and after the last one"
        assert 0.7 * taken <= courtesy.take_waited() <= taken
        chatting.clear()
        _loss(kernel).backward()
        assert courtesy.take_waited() == 0, "nobody chats"


def test_chats_cannot_stop_a_step_and_a_stop_ends_every_rest(kernel: M8Kernel) -> None:
    stop = threading.Event()
    courtesy = Courtesy(QueryGate(4), 1.0, Pace(lambda: True, share=0.001, per_step_seconds=0.3, hurry=stop))
    with within(courtesy, kernel):
        _loss(kernel).backward()
        assert 0.3 <= courtesy.take_waited() < 5
        stop.set()
        courtesy.renew()
        _loss(kernel).backward()
        assert courtesy.take_waited() < 0.3


@pytest.mark.parametrize(("share", "most"), [(0.0, 1.0), (1.5, 1.0), (0.5, -1.0)])
def test_a_pace_that_cannot_be_kept_is_refused(share: float, most: float) -> None:
    with pytest.raises(ValueError, match="share must be above 0"):
        Pace(lambda: True, share, most, threading.Event())


def test_nobody_to_give_way_to(kernel: M8Kernel) -> None:
    with within(None, kernel):
        _loss(kernel).backward()


def test_a_negative_bound_is_refused() -> None:
    with pytest.raises(ValueError, match="per_step_seconds"):
        Courtesy(QueryGate(1), -1)
