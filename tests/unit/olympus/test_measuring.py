"""How often to measure: bounded, repeatable, and honest about its cost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from olympus.checkpoints import CheckpointStore
from olympus.examination import Examiner
from olympus.example import Example
from olympus.experience_buffer import ExperienceBuffer
from olympus.experience_source import ExperienceSource
from olympus.kernel_state import KernelPlan
from olympus.measuring import examination_cost, examination_interval, phi_interval
from olympus.training_session import TrainingSession
from qig_core.inference import evaluate_pairs, run_to_halt
from qig_core.m8_kernel import M8Kernel
from qig_core.vocabulary import PAD, EncodedPair, encode_pair
from tests.unit.olympus.kernel_world import TINY, World, make_settings, tiny_plan, write_facts


def test_more_questions_come_less_often_and_never_more_often_than_asked() -> None:
    plan = KernelPlan.make("nano", {})
    intervals = [examination_interval(items, plan, 25, 0.07) for items in (0, 1, 8, 16, 32, 64)]
    assert intervals == sorted(intervals)
    assert intervals[0] == intervals[1] == 25
    assert examination_cost(64, plan) / intervals[-1] <= 0.07
    assert examination_interval(64, plan, 25, 1.0) == 25


@pytest.mark.parametrize("preset", ["nano", "micro", "small"])
def test_the_default_share_holds_for_every_preset(preset: str) -> None:
    plan = KernelPlan.make(preset, {})
    assert 2.5 < examination_cost(64, plan) < 6
    assert examination_cost(64, plan) / examination_interval(64, plan, 25, 0.07) <= 0.07


def test_phi_comes_so_often_that_it_keeps_its_share() -> None:
    assert phi_interval(cost=0.059, step=0.1, every=5, share=0.06) == 10
    assert phi_interval(cost=0.001, step=0.1, every=5, share=0.06) == 5
    assert phi_interval(cost=0.001, step=0.0, every=5, share=0.06) > 1000


def test_a_kernel_is_examined_at_the_same_steps_after_a_restart(
    make_world: Callable[..., World], tmp_path: Path
) -> None:
    world = make_world(start=False)
    settings = make_settings(tmp_path, evaluation_share=0.07, holdout_percent=30, patience_evaluations=10_000).kernels
    write_facts(world.history, 150)
    values = {"id": "athena-000000", "god_name": "athena", "domain": "d", "state": "queued", "seed": 7}
    values |= {"config": tiny_plan().to_json(), "parents": [], "reason": "test"}
    kernel = world.zeus.rows.create(values, "test")
    store = CheckpointStore(world.zeus.checkpoint_root, world.database, settings.retention, 100)

    def opened() -> TrainingSession:
        session, _ = TrainingSession.open(kernel, settings, ExperienceSource(world.history, "d"), store)
        session.sync()
        return session

    def examined(session: TrainingSession, steps: int) -> list[int]:
        return [session.step for _ in range(steps) if session.advance() and session.just_evaluated]

    live = opened()
    first = examined(live, 45)
    interval = first[1] - first[0]
    assert first[0] == 10
    assert interval > 10, "so many questions would cost more than their share"
    store.publish(kernel.id, live.step, live.tensors(), live.state(), live.checkpoint_metrics(False))
    expected = examined(live, 80)
    again = opened()
    assert examined(again, 80) == expected
    assert again.progress.best_loss == live.progress.best_loss
    assert (again.progress.evaluations, again.progress.unimproved) == (
        live.progress.evaluations,
        live.progress.unimproved,
    )


# -- the examination itself -------------------------------------------------------------------------------------


@pytest.fixture
def examiner() -> Examiner:
    """Over questions of very different length."""
    buffer = ExperienceBuffer(400, 50, seed=1)
    for number in range(120):
        text = f"question {number} " + "x" * (7 * number % 30)
        item = Example(number, text, f"answer {number % 5}", None, f"{number * 2654435761 % 2**32:08x}")
        buffer._hold_out(item) if number % 2 else buffer._learn_from(item)
    found = Examiner(buffer, lambda item: encode_pair(item.observation, item.action, 64))
    found.refresh()
    return found


def test_an_examination_equals_asking_one_by_one(examiner: Examiner) -> None:
    kernel = M8Kernel(KernelPlan.make("nano", TINY).network, seed=3).train()
    exam = examiner.examine(kernel)
    assert exam is not None
    assert kernel.training, "its mode is given back"
    batch = examiner._batch
    assert batch is not None
    nats, symbols = evaluate_pairs(kernel, batch.ids, batch.loss_mask, batch_size=1)
    assert torch.allclose(exam.nats, nats, atol=1e-4)
    assert exam.loss == pytest.approx(float(nats.sum() / symbols.sum()), abs=1e-5)
    kernel.eval()
    alone = [run_to_halt(kernel, row[row != PAD].unsqueeze(0)).basin[0] for row in batch.ids]
    assert exam.basin.sum() == pytest.approx(1.0, abs=1e-5)
    expected = torch.stack(alone).sqrt().mean(dim=0) ** 2
    assert torch.allclose(exam.basin, expected / expected.sum(), atol=1e-3)


def test_the_probe_is_of_like_length_and_large_enough_where_it_can_be(examiner: Examiner) -> None:
    probe = examiner.probe
    assert probe is not None
    lengths = (probe != PAD).sum(dim=1)
    assert int(lengths.sum()) >= 1408
    assert int(lengths.sum()) < 1408 + 64
    assert float((probe == PAD).float().mean()) < 0.25


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_few_questions_are_all_probes(count: int) -> None:
    from olympus.examination import _middle

    pairs = [EncodedPair([1] * (length + 3), [True] * (length + 3), "x", False) for length in range(count)]
    assert _middle(pairs, 1408) == pairs
