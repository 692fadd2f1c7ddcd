"""Test, then train: the numbers are those of the kernel asked, bounded, and survive a restart."""

from __future__ import annotations

import json

import pytest
import torch

from olympus.prequential import FADING, MAX_TESTED, PrequentialTest, examine
from qig_core.inference import collate, evaluate_pairs, generate
from qig_core.learning import supervised_loss
from qig_core.m8_kernel import KernelConfig, M8Kernel
from qig_core.vocabulary import EncodedPair, encode_pair, encode_prompt


def kernel() -> M8Kernel:
    return M8Kernel(KernelConfig.preset("nano", width=16, hidden=16, heads=2, context=64), seed=1).eval()


def pair(number: int, action: str = "go") -> EncodedPair:
    return encode_pair(f"light {number}", action, 64)


def test_losses_are_those_of_an_examination() -> None:
    pairs = [pair(number, "stop" if number % 3 else "go on") for number in range(20)]
    batch = collate(pairs)
    nats, symbols = evaluate_pairs(kernel(), batch.ids, batch.loss_mask)
    results = examine(kernel(), pairs)
    assert [result.loss for result in results] == pytest.approx((nats / symbols).tolist(), rel=1e-5)


def test_right_means_that_greedy_generation_would_say_so() -> None:
    subject = kernel()
    batch = collate([pair(1, "a")] * 4)
    optimizer = torch.optim.Adam(subject.parameters(), lr=1e-2)
    for _ in range(25):
        optimizer.zero_grad()
        supervised_loss(subject, batch.ids, batch.loss_mask, supervision_steps=1).total.backward()
        optimizer.step()
    for number, action in ((1, "a"), (1, "b"), (2, "zz")):
        said = generate(subject, encode_prompt(f"light {number}", 64, 8), 8)
        (result,) = examine(subject, [pair(number, action)])
        assert result.right == (said.finished and said.text == action)
    assert examine(subject, [pair(1, "a")])[0].right


def test_running_means_and_bounds() -> None:
    test = PrequentialTest()
    assert test.report()["mean_loss"] is None
    test.put(kernel(), [], step=0)
    test.check_invariants()
    pairs = [pair(number) for number in range(MAX_TESTED + 30)]
    test.put(kernel(), pairs, step=0)
    test.check_invariants()
    report = test.report()
    results = examine(kernel(), pairs[30:])
    assert (report["tested"], report["skipped"]) == (MAX_TESTED, 30)
    assert report["mean_loss"] == pytest.approx(sum(item.loss for item in results) / MAX_TESTED)
    faded = results[0].loss
    for item in results[1:]:
        faded = FADING * faded + (1 - FADING) * item.loss
    assert report["loss"] == pytest.approx(faded)


def test_it_survives_a_restart() -> None:
    live, resumed = PrequentialTest(), PrequentialTest()
    for part in range(4):
        pairs = [pair(number) for number in range(10 * part, 10 * part + 10)]
        live.put(kernel(), pairs, part)
        saved = json.loads(json.dumps(resumed.state_dict(), allow_nan=False))
        resumed = PrequentialTest()
        resumed.load_state_dict(saved)
        resumed.put(kernel(), pairs, part)
    assert resumed.report() == live.report()
    assert resumed.state_dict() == live.state_dict()
