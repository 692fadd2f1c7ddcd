"""The kernels' lives with real data and real deaths.

Real data: banking77 messages through ``Zeus.feed`` into kernels that train on their own threads. Real deaths: a
process that kills itself with SIGKILL in each phase of saving a checkpoint.
"""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from memory.history import History
from olympus.experience_source import ExperienceSource
from olympus.requests import ExperienceIn, QueryRequest, SpawnRequest
from olympus.training_session import TrainingSession
from olympus.zeus import Zeus
from settings import Settings, load_settings
from storage.database import Database
from storage.files import PARTIAL_PREFIX
from storage.models import Base
from telemetry.hub import EventHub

ROOT = Path(__file__).resolve().parents[2]
BANKING = Path(os.environ.get("OLYMPUS_SHARED_DATA", ROOT.parent / "shared" / "data")) / "banking77" / "train.csv"
INTENTS = ("activate_my_card", "card_arrival", "visa_or_mastercard", "country_support", "request_refund", "change_pin")
MESSAGES = 320
STEPS = 240


class Home:
    """A database, a history and Zeus over one directory."""

    def __init__(self, path: Path, **kernels: Any):
        overrides = {"data_dir": str(path), "kernels": {"spawn_default": False, **kernels}}
        self.settings: Settings = load_settings(environ={}, overrides=overrides)
        self.database = Database(self.settings.database_url)
        Base.metadata.create_all(self.database.engine)
        self.history = History(self.database)
        self.stop = threading.Event()
        self.zeus = Zeus(self.settings, self.database, self.history, EventHub(), self.stop)

    def close(self) -> None:
        self.stop.set()
        self.zeus.shutdown(20)
        self.database.close()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    monkeypatch.delenv("REPL_ID", raising=False)
    made = Home(
        tmp_path, batch_size=8, holdout_percent=25, evaluate_every=25, patience_evaluations=10_000, max_concurrent=2
    )
    made.zeus.start()
    yield made
    made.close()


def banking_messages() -> list[tuple[str, str]]:
    """Short messages of six intents, shuffled with a fixed seed."""
    with BANKING.open(encoding="utf-8", newline="") as handle:
        rows = [(row["text"], row["category"]) for row in csv.DictReader(handle)]
    chosen = sorted({(text, intent) for text, intent in rows if intent in INTENTS and len(text) <= 45})
    random.Random(0).shuffle(chosen)
    return chosen[:MESSAGES]


@pytest.mark.timeout(900)
@pytest.mark.skipif(not BANKING.exists(), reason="the banking77 messages are not here; set OLYMPUS_SHARED_DATA")
def test_a_kernel_learns_real_intents_and_its_shuffled_control_does_not(
    home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    messages = banking_messages()
    labels = [intent for _, intent in messages]
    random.Random(1).shuffle(labels)
    kernels: dict[str, str] = {}
    for name, actions in (("athena", [intent for _, intent in messages]), ("eris", labels)):
        request = SpawnRequest(name=name, domain=name, seed=0, config={"lr": 5e-3}, train=False)
        kernels[name] = str(home.zeus.spawn(request)["kernel"]["kernel_id"])
        batch = [
            ExperienceIn(observation=text, action=action) for (text, _), action in zip(messages, actions, strict=True)
        ]
        assert home.zeus.feed(kernels[name], batch)["accepted"] == MESSAGES
    begun = time.monotonic()
    for kernel in kernels.values():
        home.zeus.resume(kernel)
    latencies = _train_until(home, kernels, begun)
    found = {name: home.zeus.status(kernel) for name, kernel in kernels.items()}
    seconds = time.monotonic() - begun
    for kernel in kernels.values():
        home.zeus.pause(kernel)
    with capsys.disabled():
        _tell(found, seconds, latencies)
    honest, control = found["athena"]["loss"], found["eris"]["loss"]
    assert honest["below_baseline"] is True, honest
    assert honest["holdout"] < honest["baseline_context_free"]
    assert control["below_baseline"] is False, control
    assert found["athena"]["convergence"]["loss_ok"] is True
    assert found["eris"]["convergence"]["converged"] is False
    answer = home.zeus.query(kernels["athena"], QueryRequest(input="How do I change my PIN?", candidates=INTENTS))
    assert answer["output"] == "change_pin"


def _train_until(home: Home, kernels: dict[str, str], begun: float) -> list[float]:
    """Query while both train; returns the latencies in milliseconds."""
    latencies: list[float] = []
    while min(home.zeus.status(kernel)["step"] for kernel in kernels.values()) < STEPS:
        assert time.monotonic() - begun < 800, "training is far too slow"
        asked = time.perf_counter()
        home.zeus.query(kernels["athena"], QueryRequest(input="where is my card", candidates=INTENTS))
        latencies.append((time.perf_counter() - asked) * 1000)
        time.sleep(0.2)
    return latencies


def _tell(found: dict[str, dict[str, Any]], seconds: float, latencies: list[float]) -> None:
    """What was measured, for whoever runs the test; pytest is told to let it through."""
    ordered = sorted(latencies)
    p50, p95 = ordered[len(ordered) // 2], ordered[int(len(ordered) * 0.95)]
    lines = [
        f"{MESSAGES} messages, two kernels, {seconds:.1f} s; queries meanwhile: p50 {p50:.0f} ms, p95 {p95:.0f} ms"
    ]
    for name, status in found.items():
        loss, cost = status["loss"], status["cost"]
        spent = ", ".join(f"{part} {cost[f'{part}_seconds']:.1f} s" for part in ("train", "evaluation", "phi"))
        held_out = f"held-out {loss['holdout']:.4f}, baseline {loss['baseline_context_free']:.4f} nats/byte"
        lines.append(
            f"{name}: step {status['step']}, {held_out}, phi {status['phi']['value']}; {spent}; {loss['gate']}"
        )
    sys.stdout.write("\n" + "\n".join(lines) + "\n")


# -- death in each phase of a save ------------------------------------------------------------------------------

#: ``fsync3``: at the third fsync. There are seven before the rename (the files and their directory), one after it.
FSYNCS = tuple(f"fsync{number}" for number in range(1, 9))
PHASES = ("file", "manifest", *FSYNCS, "rename", "renamed", "row", "retention", "unindex")
TINY = {"width": 16, "hidden": 16, "heads": 2, "context": 64, "supervision_steps": 1, "ngram_buckets": 0}

#: Trains, saves every five steps, writes down every loss, and dies in the phase when step 10 is being saved. All
#: fault injection is here; the product knows nothing of it.
_VICTIM = """
import json, os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from tests.integration import test_kernel_lives as lives
from olympus import checkpoints
from storage import files

def live(folder, phase):
    home, session = lives.open_session(folder)
    store, kernel = home.zeus.checkpoint_store, home.zeus.rows.all()[0].id
    write, fsync, rename = Path.write_bytes, os.fsync, os.rename
    armed = lambda: session.step == 10
    die = lambda: os.kill(os.getpid(), signal.SIGKILL)
    def write_bytes(self, data):
        if armed() and phase == "file" and self.name == "optim.safetensors":
            write(self, data[: len(data) // 2]); die()
        if armed() and phase == "manifest" and self.name == "manifest.json":
            die()
        return write(self, data)
    synced = 0
    def os_fsync(handle):
        nonlocal synced
        synced += armed()
        if armed() and phase == f"fsync{synced}":
            die()
        return fsync(handle)
    def os_rename(old, new):
        publishing = str(new.name).startswith("step-")
        if armed() and phase == "rename" and publishing:
            die()
        rename(old, new)
        if armed() and (phase, publishing) in (("renamed", True), ("retention", False)):
            die()
    Path.write_bytes, files.os.fsync, files.os.rename = write_bytes, os_fsync, os_rename
    upsert, delete_row = store._upsert, store._delete_row
    store._upsert = lambda *a, **k: die() if armed() and phase == "row" else upsert(*a, **k)
    store._delete_row = lambda *a, **k: die() if armed() and phase == "unindex" else delete_row(*a, **k)
    with open(Path(folder) / "losses.jsonl", "a") as log:
        while session.step < 40:
            metrics = session.advance()
            print(json.dumps([metrics.step, metrics.loss]), file=log, flush=True)
            if session.step % 5 == 0:
                measured = session.checkpoint_metrics(False)
                store.publish(kernel, session.step, session.tensors(), session.state(), measured)

for phase in sys.argv[3].split(","):
    child = os.fork()
    if child == 0:
        try:
            live(os.path.join(sys.argv[2], phase), phase)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    print(phase, os.WTERMSIG(status) if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}")
"""


def open_session(folder: str | Path) -> tuple[Home, TrainingSession]:
    """A home with one tiny kernel that nobody else trains, and a session of it. Every loss is examined at step 1."""
    home = Home(Path(folder), evaluate_every=5, batch_size=4, patience_evaluations=10_000, autostart=False)
    rows = home.zeus.rows.all()
    if not rows:
        home.zeus.start()
        home.zeus.spawn(SpawnRequest(name="athena", domain="d", seed=5, config=TINY, train=False))
        rows = home.zeus.rows.all()
        drawer = random.Random(0)
        words = [drawer.choice(("red", "green", "amber")) for _ in range(80)]
        facts = [ExperienceIn(observation=f"{word} light {n}", action=word) for n, word in enumerate(words)]
        home.zeus.feed(rows[0].id, facts)
        home.zeus.shutdown(5)
    source = ExperienceSource(home.history, "d")
    session, _ = TrainingSession.open(rows[0], home.settings.kernels, source, home.zeus.checkpoint_store)
    session.sync()
    return home, session


@pytest.fixture(scope="module")
def graves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory for each phase, left behind by a process that was killed there."""
    folder = tmp_path_factory.mktemp("graves")
    command = [
        sys.executable,
        "-W",
        "ignore::DeprecationWarning",
        "-c",
        _VICTIM,
        str(ROOT),
        str(folder),
        ",".join(PHASES),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "REPL_ID": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, cwd=ROOT, check=False)
    assert done.stdout.split("\n")[:-1] == [f"{phase} {int(signal.SIGKILL)}" for phase in PHASES], done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("phase", PHASES)
def test_killed_while_saving_it_boots_and_repeats_the_same_losses(graves: Path, phase: str) -> None:
    folder = graves / phase
    lived = dict(json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines())
    assert max(lived) == 10
    durable = phase in ("fsync8", "renamed", "row", "retention", "unindex")
    home, _ = open_session(folder)
    try:
        kernel = home.zeus.rows.all()[0].id
        home.zeus.rows.set_state(kernel, "training")  # as a thread would have left it
        home.zeus.start()
        assert home.zeus.status(kernel)["state"] == "paused"
        home.zeus.checkpoint_store.check_invariants()
        assert not [path for path in folder.rglob(f"{PARTIAL_PREFIX}*")]
        steps = [row["step"] for row in home.zeus.checkpoints(kernel)["checkpoints"]]
        assert steps[0] == (10 if durable else 5)
    finally:
        home.close()
    again, session = open_session(folder)
    try:
        assert session.step == steps[0]
        repeated = [session.advance() for _ in range(20)]
        assert {m.step: m.loss for m in repeated if m.step in lived} == {
            step: loss for step, loss in lived.items() if step > steps[0]
        }
        session.live.check_invariants()
    finally:
        again.close()
