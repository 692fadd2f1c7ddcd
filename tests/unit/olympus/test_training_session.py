"""One kernel's training: it learns, it resumes bit by bit, it comes to rest, it wakes."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from memory.history import NewExperience
from olympus import rehearsal
from olympus.checkpoints import CheckpointStore
from olympus.experience_source import ExperienceSource
from olympus.kernel_rows import KernelRecord
from olympus.kernel_state import KernelState
from olympus.snapshot import weights_checksum
from olympus.training_session import TrainingDiverged, TrainingSession
from settings import KernelSettings
from tests.unit.olympus.kernel_world import World, make_settings, tiny_plan, write_facts


class Bench:
    """A kernel's row, source and checkpoints without Zeus."""

    def __init__(self, world: World, settings: KernelSettings):
        self.world, self.settings = world, settings
        values = {"id": "athena-000000", "god_name": "athena", "domain": "d", "state": "queued", "seed": 7}
        values |= {"config": tiny_plan().to_json(), "parents": [], "reason": "test"}
        self.kernel: KernelRecord = world.zeus.rows.create(values, "test")
        self.store = CheckpointStore(world.zeus.checkpoint_root, world.database, settings.retention, 100)

    def open(self, lr_scale: float = 1.0) -> TrainingSession:
        source = ExperienceSource(self.world.history, "d")
        session, damaged = TrainingSession.open(self.kernel, self.settings, source, self.store, lr_scale=lr_scale)
        assert damaged == ()
        session.sync()
        return session

    def save(self, session: TrainingSession) -> None:
        metrics = session.checkpoint_metrics(False)
        self.store.publish(self.kernel.id, session.step, session.tensors(), session.state(), metrics)


@pytest.fixture
def bench(make_world: Callable[..., World], tmp_path: Path) -> Bench:
    settings = make_settings(tmp_path, patience_evaluations=3, holdout_percent=30).kernels
    return Bench(make_world(start=False), settings)


def test_a_resumed_kernel_repeats_the_next_losses_bit_by_bit(bench: Bench) -> None:
    write_facts(bench.world.history, 120)
    live = bench.open()
    for _ in range(23):
        live.advance()
    bench.save(live)
    expected = [live.advance().loss for _ in range(20)]
    resumed = bench.open()
    resumed.live.check_invariants()
    assert resumed.step == 23
    assert [resumed.advance().loss for _ in range(20)] == expected
    assert weights_checksum(resumed.live.kernel) == weights_checksum(live.live.kernel)
    assert weights_checksum(resumed.live.ema.shadow) == weights_checksum(live.live.ema.shadow)
    assert resumed.progress.best_loss == live.progress.best_loss
    assert resumed.progress.unimproved == live.progress.unimproved


def test_one_step_changes_nearly_every_tensor(bench: Bench) -> None:
    write_facts(bench.world.history, 60)
    session = bench.open()
    before = {name: tensor.clone() for name, tensor in session.live.kernel.named_parameters()}
    session.advance()
    after = dict(session.live.kernel.named_parameters())
    changed = sum(not torch.equal(before[name], after[name]) for name in before)
    assert changed > 0.9 * len(before)


def test_it_learns_and_the_best_weights_are_the_best(bench: Bench) -> None:
    write_facts(bench.world.history, 150)
    session = bench.open()
    losses = []
    for _ in range(70):
        session.advance()
        if session.just_evaluated:
            losses.append(session.progress.holdout_loss)
    assert losses[-1] is not None
    assert losses[0] is not None
    assert losses[-1] < 0.7 * losses[0]
    assert session.progress.best_loss == min(loss for loss in losses if loss is not None)
    snapshots = {snapshot.which: snapshot for snapshot in session.new_snapshots()}
    assert snapshots["best"].holdout_loss == session.progress.best_loss
    for snapshot in snapshots.values():
        snapshot.check_invariants()
    session.live.check_invariants()


def test_a_changed_examination_is_sat_by_the_best_weights_too(bench: Bench) -> None:
    write_facts(bench.world.history, 80)
    session = bench.open()
    for _ in range(20):
        session.advance()
    first = session.progress.examination
    mark = session.progress.best_loss
    write_facts(bench.world.history, 80, start=1000)
    session.sync()
    session._evaluate()
    assert session.progress.examination != first
    best = session.live.best_kernel()
    assert best is not None
    exam = session._examiner.examine(best)
    assert exam is not None
    assert session.progress.best_loss == exam.loss
    assert session.progress.best_loss != mark


def test_without_held_out_experience_it_still_comes_to_rest(bench: Bench) -> None:
    write_facts(bench.world.history, 40)
    session = bench.open()
    session._buffer.forget([item.id for item in session._buffer.holdout()])
    while session.verdict() is None:
        session.advance()
        assert session.step < 100
    rest = session.verdict()
    assert rest is not None
    assert rest.state == "settled"
    assert session.progress.holdout_loss is None
    assert session.progress.integration["phi"] is None
    assert "held-out" in session.progress.integration["reason"]


def test_a_full_window_of_high_phi_converges_only_below_the_baseline(bench: Bench) -> None:
    write_facts(bench.world.history, 120)
    session = bench.open()
    for _ in range(100):
        session.live.phi_window.add(0.75)
    assert session.verdict() is None
    assert "baseline" in session.convergence().reason or "yet measured" in session.convergence().reason
    session.progress.loss_ok = True
    assert session.verdict() is None
    assert "no better held-out loss in 0 examinations" in session.convergence().reason
    session.progress.unimproved = session._settings.plateau_evaluations
    rest = session.verdict()
    assert rest is not None
    assert rest.state == "converged"


def test_the_waking_rules(bench: Bench) -> None:
    write_facts(bench.world.history, 100)
    session = bench.open()
    for _ in range(10):
        session.advance()
    session.remember_rest("settled", "because")
    bench.save(session)
    rest = bench.open().still_rests()
    assert rest is not None
    assert (rest.state, rest.reason) == ("settled", "because")
    write_facts(bench.world.history, 10, start=2000)  # 10 %: not enough
    assert bench.open().still_rests() is not None
    write_facts(bench.world.history, 12, start=3000)  # 22 %
    woken = bench.open()
    assert woken.still_rests() is None
    woken.wake()
    assert woken.progress.unimproved == 0
    assert woken.progress.rest == {}


def test_a_worse_held_out_loss_wakes(bench: Bench) -> None:
    write_facts(bench.world.history, 100)
    session = bench.open()
    for _ in range(10):
        session.advance()
    session.remember_rest("settled", "because")
    session.progress.rest["loss"] = (session.progress.best_loss or 0.0) / 1.2
    bench.save(session)
    assert bench.open().still_rests() is None


def test_phi_stays_within_its_share_of_the_time(bench: Bench) -> None:
    write_facts(bench.world.history, 400)
    session = bench.open()
    measured: list[int] = []
    for _ in range(60):
        before = session.progress.phi_seconds
        if session.advance().phi is not None:
            cost, pause = session.progress.phi_seconds - before, session.progress.next_phi - session.step
            step_seconds = session.progress.train_seconds / session.step
            assert cost <= 1.001 * bench.settings.phi_share * pause * step_seconds
            measured.append(session.step)
    assert measured
    assert session.live.phi_window.last is not None


def test_divergence_is_an_error_and_a_restart_is_more_careful(bench: Bench) -> None:
    write_facts(bench.world.history, 60)
    session = bench.open()
    with torch.no_grad():
        next(session.live.kernel.parameters()).fill_(math.nan)
    with pytest.raises(TrainingDiverged, match="not finite at step 1"):
        session.advance()
    careful = bench.open(lr_scale=0.5)
    careful.advance()
    assert careful.live.optimizer.param_groups[0]["lr"] == 0.5 * careful.live.plan.training.lr_at(0)


def test_the_report_is_strict_json(bench: Bench) -> None:
    import json

    write_facts(bench.world.history, 60)
    session = bench.open()
    for _ in range(11):
        session.advance()
    json.dumps(session.report(), allow_nan=False)
    json.dumps(session.state(), allow_nan=False)


def test_a_deleted_experience_is_not_drawn_again(bench: Bench) -> None:
    write_facts(bench.world.history, 60)
    session = bench.open()
    session.advance()
    victim = session._buffer.training()[0]
    bench.world.history.delete(experience_id=victim.id)
    session.sync()
    assert victim.id not in {item.id for step in range(50) for item in session._buffer.sample(16, step)}


@pytest.mark.parametrize("options", [{"priority_share": 0.5}, {"der_alpha": 0.5}, {"source_cap_percent": 60}])
def test_resuming_is_bit_exact_with_every_way_of_rehearsing(
    make_world: Callable[..., World], tmp_path: Path, options: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearsal, "LEARNED", 10.0)  # a kernel of 60 steps is no master
    settings = make_settings(tmp_path, patience_evaluations=3, holdout_percent=30, **options).kernels
    bench = Bench(make_world(start=False), settings)
    write_facts(bench.world.history, 60)
    live = bench.open()
    for _ in range(30):
        live.advance()
    bench.save(live)
    if "der_alpha" in options:
        assert live._rehearsal.logits is not None
        assert len(live._rehearsal.logits) > 0
    write_facts(bench.world.history, 20, start=500)
    live.sync()
    expected = [live.advance().loss for _ in range(8)]
    resumed = bench.open()
    assert [resumed.advance().loss for _ in range(8)] == expected
    assert weights_checksum(resumed.live.kernel) == weights_checksum(live.live.kernel)
    resumed._buffer.check_invariants()


def test_new_experience_is_tested_before_it_is_trained_on(bench: Bench) -> None:
    write_facts(bench.world.history, 60)
    session = bench.open()
    assert session.report()["prequential"]["tested"] == 60
    for _ in range(5):
        session.advance()
    bench.save(session)
    write_facts(bench.world.history, 10, start=700)
    session.sync()
    session.sync()
    assert session.report()["prequential"]["tested"] == 70
    resumed = bench.open()
    assert resumed.report()["prequential"] == session.report()["prequential"]
    assert resumed.progress.prequential_seconds > 0


def test_another_domain_wakes_a_kernel_at_rest_and_the_same_one_does_not(bench: Bench) -> None:
    """Fewer new experiences than growth needs: what wakes it is what they are."""
    write_facts(bench.world.history, 400)
    session = bench.open()
    for _ in range(80):
        session.advance()
    session.remember_rest("settled", "because")
    bench.save(session)
    write_facts(bench.world.history, 40, start=5000)
    rest = bench.open().still_rests()
    assert rest is not None
    assert rest.state == "settled"
    drawer = random.Random(5)
    strange = ["".join(drawer.choice("qxzjvk") for _ in range(6)) for _ in range(32)]
    bench.world.history.append([NewExperience(f"{word} {n}", word[::-1], "d", "api") for n, word in enumerate(strange)])
    woken = bench.open()
    assert woken.still_rests() is None
    assert "drift" in woken.wake()
    (drift,) = woken.new_drifts()
    assert drift.step == 80
    assert drift.after > drift.before
    assert woken.new_drifts() == []
    assert woken.report()["drift"]["last"]["reason"] == drift.reason
    assert woken.report()["drift"]["detections"] == 1


def test_plasticity_is_looked_at_and_paid_for(bench: Bench) -> None:
    write_facts(bench.world.history, 60)
    session = bench.open()
    for _ in range(10):
        session.advance()
    plasticity = session.progress.plasticity
    assert plasticity["units"] == 2 * 16
    assert 1.0 <= plasticity["eff_rank"] <= plasticity["width"] == 16
    assert plasticity["weight_norm"] > 0
    assert session.progress.plasticity_seconds > 0


def test_kernel_state_round_trip_without_steps() -> None:
    state = KernelState(tiny_plan(), seed=3)
    assert weights_checksum(KernelState(tiny_plan(), seed=3).kernel) == weights_checksum(state.kernel)
    assert weights_checksum(KernelState(tiny_plan(), seed=4).kernel) != weights_checksum(state.kernel)
    state.check_invariants()
