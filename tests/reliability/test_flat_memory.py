"""Memory stays flat while a kernel trains for very long.

Two proofs, because 100,000 steps of even the smallest network take five minutes: 20,000 real steps of a session with
everything around it (history that grows and forgets, examinations, Phi, metrics, checkpoints with retention), and
100,000 steps of everything but the network. ``OLYMPUS_TEST_STEPS=100000`` makes the first one the whole claim.
"""

from __future__ import annotations

import gc
import os
import random
import statistics
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

from memory.history import History, NewExperience, Record
from olympus.checkpoints import CheckpointStore
from olympus.experience_buffer import ExperienceBuffer
from olympus.experience_source import ExperienceSource
from olympus.kernel_state import KernelPlan
from olympus.metrics_store import MetricsStore, StepMetrics
from olympus.training_session import TrainingSession
from olympus.zeus import Zeus
from storage.database import Database
from storage.models import Base, Kernel
from telemetry.hub import EventHub
from tests.unit.olympus.kernel_world import make_settings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

STEPS = int(os.environ.get("OLYMPUS_TEST_STEPS", "20000"))
ALLOWED_MIB = 6.0
SMALLEST = {
    "width": 2, "hidden": 1, "heads": 1, "blocks": 1, "context": 32, "basin_dim": 2, "reach": 1,
    "supervision_steps": 1, "batch_size": 1, "core": 0, "ngram_buckets": 0,
}  # fmt: skip


class Clock:
    """Half a second per look, so that every flush finds a finished window."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.5
        return self.now


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'flat.db'}")
    Base.metadata.create_all(database.engine)
    yield database
    database.close()


def growth_mib(work: Callable[[int], None], steps: int) -> tuple[float, list[float]]:
    """MiB by which the memory of the last quarter exceeds that of the second; the first is the warm-up."""
    process, samples = psutil.Process(), list[float]()
    for step in range(1, steps + 1):
        work(step)
        if step % max(1, steps // 80) == 0:
            gc.collect()
            samples.append(process.memory_info().rss / 2**20)
    quarter = len(samples) // 4
    return statistics.median(samples[-quarter:]) - statistics.median(samples[quarter : 2 * quarter]), samples


def tell(capsys: pytest.CaptureFixture[str], steps: int, grown: float, samples: list[float]) -> None:
    """The numbers, for whoever runs the test."""
    with capsys.disabled():
        sys.stdout.write(f"\n{steps} steps: {samples[0]:.0f} to {samples[-1]:.0f} MiB; grown by {grown:+.2f} MiB\n")


def test_a_session_that_trains_for_long(tmp_path: Path, database: Database, capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(1)
    settings = make_settings(
        tmp_path,
        patience_evaluations=10**9,
        evaluate_every=200,
        phi_every=2000,
        buffer_capacity=256,
        holdout_percent=20,
    )
    history, stop = History(database), threading.Event()
    zeus = Zeus(settings, database, history, EventHub(), stop)
    plan = KernelPlan.make("nano", SMALLEST)
    values = {"id": "athena-000000", "god_name": "athena", "domain": "d", "state": "queued", "seed": 7}
    kernel = zeus.rows.create({**values, "config": plan.to_json(), "parents": [], "reason": "test"}, "test")
    metrics = MetricsStore(database, Clock())
    history.append([NewExperience(f"q{n}", f"{n % 9}", "d", "api") for n in range(100)])
    session, _ = TrainingSession.open(kernel, settings.kernels, ExperienceSource(history, "d"), zeus.checkpoint_store)
    session.sync()
    metrics.begin(kernel.id, 0)

    def work(step: int) -> None:
        metrics.add(kernel.id, session.advance())
        session.new_snapshots()
        if step % 10 == 0:
            metrics.flush()
        if step % 50 == 0:
            stored = history.append([NewExperience(f"new {step} {n}", f"{n}", "d", "api") for n in range(5)])
            history.delete(experience_id=stored[0].id)
            session.sync()
        if step % 100 == 0:
            measured = session.checkpoint_metrics(False)
            zeus.checkpoint_store.publish(kernel.id, step, session.tensors(), session.state(), measured)
            session.report()

    grown, samples = growth_mib(work, STEPS)
    tell(capsys, STEPS, grown, samples)
    assert session.step == STEPS
    assert len(zeus.checkpoint_store.describe(kernel.id)["checkpoints"]) < 20
    assert grown < ALLOWED_MIB


def test_everything_around_the_network_over_100_000_steps(
    tmp_path: Path, database: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    with database.write() as session:
        session.add(Kernel(id="athena-000000", god_name="x", domain="d", state="training", config={}, seed=1))
    kernel, drawer = "athena-000000", random.Random(0)
    settings = make_settings(tmp_path).kernels
    metrics, hub = MetricsStore(database, Clock()), EventHub()
    store = CheckpointStore(tmp_path / "kernels", database, settings.retention, 100)
    buffer = ExperienceBuffer(512, 15, seed=1)
    watcher = hub.subscribe(where={"kernel_id": kernel})
    weights = {"model": {"w": torch.zeros(64, 64)}}

    def work(step: int) -> None:
        metrics.add(kernel, StepMetrics(step, loss=drawer.random(), phi=drawer.random(), grad_norm=1.0, step_ms=2.0))
        hub.publish("kernel.metric", {"kernel_id": kernel, "step": step}, key=kernel)
        buffer.add(_record(step))
        if step % 3 == 0:
            buffer.forget([step - 2])
        if step % 5 == 0 and buffer.training():
            buffer.sample(16, step)
        if step % 20 == 0:
            metrics.flush()
        if step % 200 == 0:
            store.publish(kernel, step, weights, {"step": step}, {"holdout_loss": 1.0 / step})

    with watcher:
        grown, samples = growth_mib(work, 100_000)
    tell(capsys, 100_000, grown, samples)
    assert len(metrics.read(kernel)["step"]) <= 2000
    buffer.check_invariants()
    assert grown < ALLOWED_MIB


def _record(number: int) -> Record:
    return Record(
        id=number,
        domain="d",
        session_id=None,
        episode_id=None,
        source="api",
        observation=f"observation {number}",
        action=f"action {number % 7}",
        feedback=None,
        score=None,
        messages=None,
        meta={},
        content_hash=f"{number * 2654435761 % 2**64:064x}",
        created_at=float(number),
        deleted=False,
    )
