"""A kernel of the default preset reaches an honest ``converged`` on real data; on shuffled labels it never does.

Both integrate: that is the architecture's doing. Only the one that learned, and has learned all that it can
for now, may be called converged.
"""

from __future__ import annotations

import csv
import random
import threading
import time
from pathlib import Path

import pytest
import torch

from memory.history import History, NewExperience
from olympus.experience_source import ExperienceSource
from olympus.kernel_rows import KernelRecord
from olympus.kernel_state import KernelPlan
from olympus.resting import Rest
from olympus.training_session import TrainingSession
from olympus.zeus import Zeus
from settings import KernelSettings, load_settings
from storage.database import Database
from storage.migrate import upgrade
from telemetry.hub import EventHub
from tests.reliability.test_learning_over_rest import INTENTS

SEED = 20261123
CPU_SECONDS = 20 * 60


class _Life:
    """One kernel that trains on one domain, without threads."""

    def __init__(self, zeus: Zeus, history: History, settings: KernelSettings, domain: str):
        plan = KernelPlan.make(settings.preset, {"batch_size": settings.batch_size})
        values = {"id": f"{domain}-000000", "god_name": domain, "domain": domain, "state": "queued", "seed": SEED}
        values |= {"config": plan.to_json(), "parents": [], "reason": "test"}
        kernel: KernelRecord = zeus.rows.create(values, "test")
        source = ExperienceSource(history, domain)
        self.session, _ = TrainingSession.open(kernel, settings, source, zeus.checkpoint_store)
        self.session.sync()
        self.seconds = 0.0

    def step(self) -> Rest | None:
        begun = time.thread_time()
        self.session.advance()
        self.seconds += time.thread_time() - begun
        return self.session.verdict()

    def __str__(self) -> str:
        progress, judged = self.session.progress, self.session.convergence()
        return (
            f"step {progress.step}, {self.seconds:.0f} CPU s, held-out {progress.holdout_loss:.4f}, best "
            f"{progress.best_loss:.4f}, baseline {progress.baseline_loss:.4f}, Phi {judged.phi_mean:.3f} "
            f"+- {judged.phi_std:.3f}; {judged.reason}"
        )


@pytest.mark.slow
@pytest.mark.timeout(4 * CPU_SECONDS)
def test_a_default_kernel_converges_and_its_shuffled_control_does_not(shared_data: Path, tmp_path: Path) -> None:
    with open(shared_data / "banking77" / "train.csv", newline="", encoding="utf-8") as handle:
        rows = [(row["text"], row["category"]) for row in csv.DictReader(handle) if row["category"] in INTENTS]
    rng = random.Random(SEED)
    rng.shuffle(rows)
    labels = [label for _, label in rows]
    rng.shuffle(labels)
    settings = load_settings(environ={}, overrides={"data_dir": str(tmp_path), "kernels": {"spawn_default": False}})
    tmp_path.mkdir(exist_ok=True)
    database = Database(settings.database_url)
    upgrade(database)
    history, hub = History(database), EventHub(64)
    history.append([NewExperience(text, label, "real", "api") for text, label in rows])
    history.append(
        [NewExperience(text, label, "shuffled", "api") for (text, _), label in zip(rows, labels, strict=True)]
    )
    zeus = Zeus(settings, database, history, hub, threading.Event())
    torch.set_num_threads(1)
    try:
        real = _Life(zeus, history, settings.kernels, "real")
        rest = None
        while rest is None and real.seconds < CPU_SECONDS:
            rest = real.step()
        print(f"seed {SEED}: {len(rows)} messages; real: {real}")  # noqa: T201
        assert rest is not None, "neither converged nor settled in time"
        assert rest.state == "converged", rest.reason
        assert all(condition.ok for condition in real.session.convergence().conditions)

        control = _Life(zeus, history, settings.kernels, "shuffled")
        verdict, gates = None, set()
        while verdict is None and control.session.step < real.session.step:
            verdict = control.step()
            gates.add(control.session.progress.loss_ok)
        print(f"shuffled: {control}")  # noqa: T201
        assert verdict is None or verdict.state != "converged"
        assert True not in gates, "the control passed the learning gate"
    finally:
        database.close()
