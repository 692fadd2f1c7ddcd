"""A running Zeus: how fast kernels train, how long a question takes, idle and beside three that train.

A real Zeus with a real database in a temporary folder learns eight intents of banking77. Three kernels of one preset
train; a fourth, trained beforehand and paused, is asked over ``Zeus.query`` (no HTTP), at a steady pace and one at a
time. Blocks with the three paused and with the three training alternate, so that a noisy minute hits both. Latency is
wall time, as a client sees it: run this on a machine that does nothing else. The share of overhead is the trainer's
own account (``status.cost``) over that minute: Phi, examinations and checkpoints against all of its time.

    rank       eight candidates
    generate   at most 32 bytes, greedy
    samples    the same ranking with eight rollouts
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.kernel_parts.common import Options, banking77, table
from memory.history import History
from olympus.requests import ExperienceIn, QueryRequest, SpawnRequest
from olympus.zeus import Zeus
from settings import load_settings
from storage.database import Database
from storage.models import Base
from telemetry.hub import EventHub

INTENTS = 8
EXPERIENCES = 600
TRAINERS = 3
PACE_SECONDS = 0.05
PRESETS = ("nano", "micro", "small")
_TRAINING = ("preset", "seed", "steps/s", "trained bytes/s", "overhead share", "Phi", "exams", "checkpoints")
_ASKING = ("preset", "seed", "question", "idle p50", "p95", "training p50", "p95", "ratio p50", "ratio p95")


def run(options: Options) -> str:
    """Tables of training and of latency, one row per preset and seed."""
    training, asking = list[list[str]](), list[list[str]]()
    for seed in options.seeds[:1] if options.quick else options.seeds:
        for preset in PRESETS[:1] if options.quick else PRESETS:
            with open_zeus() as zeus:
                trained, asked = _measure(zeus, preset, seed, options)
            training.append(trained)
            asking += asked
            print(f"  {preset} seed {seed}: {trained} {asked}", flush=True)
    return "\n\n".join(
        (
            f"{TRAINERS} kernels training at once, {EXPERIENCES} messages of {INTENTS} intents.",
            table(_TRAINING, training),
            f"Questions every {PACE_SECONDS * 1000:.0f} ms, milliseconds of wall time.",
            table(_ASKING, asking),
        )
    )


def _measure(zeus: Zeus, preset: str, seed: int, options: Options) -> tuple[list[str], list[list[str]]]:
    messages = messages_of(options)
    items = tuple(ExperienceIn(observation=text, action=label) for text, label in messages)
    asked = spawn(zeus, "asked", preset, seed, items)
    wait_for_step(zeus, asked, 5 if options.quick else 100)
    zeus.pause(asked)
    trainers = [spawn(zeus, f"trainer-{number}", preset, seed + number, items) for number in range(TRAINERS)]
    for kernel in trainers:
        wait_for_step(zeus, kernel, 2 if options.quick else 10)
    speed = _throughput(zeus, trainers, 5.0 if options.quick else 60.0)
    latency: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in _questions(messages)}
    rounds, count = (2, 8) if options.quick else (4, 40)
    for _ in range(rounds):
        for busy in (False, True):
            set_training(zeus, trainers, busy)
            for name, request in _questions(messages).items():
                latency[name][busy].extend(_ask(zeus, asked, request, messages, count))
    return [preset, str(seed), *speed], [[preset, str(seed), name, *_row(*both)] for name, both in latency.items()]


def _questions(messages: list[tuple[str, str]]) -> dict[str, QueryRequest]:
    labels = tuple(sorted({label for _, label in messages}))
    return {
        "rank": QueryRequest(input="?", candidates=labels),
        "generate": QueryRequest(input="?", max_tokens=32),
        "samples": QueryRequest(input="?", candidates=labels, samples=8, seed=1),
    }


def messages_of(options: Options) -> list[tuple[str, str]]:
    """Messages with their intents, of the most frequent ones."""
    rows = banking77(options, "train")
    intents = {name for name, _ in Counter(label for _, label in rows).most_common(INTENTS)}
    return [row for row in rows if row[1] in intents][: EXPERIENCES // 5 if options.quick else EXPERIENCES]


@contextmanager
def open_zeus(serving_busy: Callable[[], bool] = lambda: False) -> Iterator[Zeus]:
    """A Zeus on a database of its own; ``serving_busy`` tells training whether an answer is being generated."""
    with tempfile.TemporaryDirectory(prefix="olympus-service-") as folder:
        chosen = {"spawn_default": False, "patience_evaluations": 100_000, "max_concurrent": TRAINERS}
        settings = load_settings(environ={}, overrides={"data_dir": str(Path(folder) / "data"), "kernels": chosen})
        database, stop = Database(settings.database_url), threading.Event()
        Base.metadata.create_all(database.engine)
        zeus = Zeus(settings, database, History(database), EventHub(), stop, serving_busy=serving_busy)
        zeus.start()
        try:
            yield zeus
        finally:
            stop.set()
            zeus.shutdown(60)
            database.close()


def spawn(zeus: Zeus, name: str, preset: Any, seed: int, items: tuple[ExperienceIn, ...]) -> str:
    """A kernel that trains on ``items``; its id."""
    request = SpawnRequest(name=name, domain=name, preset=preset, seed=seed, experiences=items, force=True)
    return str(zeus.spawn(request)["kernel"]["kernel_id"])


def wait_for_step(zeus: Zeus, kernel: str, step: int) -> None:
    """Return when it has taken so many steps."""
    while zeus.status(kernel)["step"] < step:
        time.sleep(0.2)


def set_training(zeus: Zeus, kernels: list[str], training: bool) -> None:
    """Pause or resume them, and return when that is so."""
    for kernel in kernels:
        if training != zeus.trainer.is_busy(kernel):
            _ = zeus.resume(kernel) if training else zeus.pause(kernel)
    while any(zeus.trainer.is_busy(kernel) != training for kernel in kernels):
        time.sleep(0.05)
    time.sleep(1.0)  # the first steps after a checkpoint was loaded are not typical


def _throughput(zeus: Zeus, kernels: list[str], seconds: float) -> list[str]:
    """Steps and trained bytes per second of all kernels together, and where a trainer's time goes."""
    before, begun = [zeus.status(kernel) for kernel in kernels], time.perf_counter()
    time.sleep(seconds)
    after, passed = [zeus.status(kernel) for kernel in kernels], time.perf_counter() - begun
    steps = sum(b["step"] - a["step"] for a, b in zip(before, after, strict=True))
    seen = sum(b["bytes_seen"] - a["bytes_seen"] for a, b in zip(before, after, strict=True))
    parts = {
        part: sum(
            b["cost"][f"{part}_seconds"] - a["cost"][f"{part}_seconds"] for a, b in zip(before, after, strict=True)
        )
        for part in ("train", "phi", "evaluation", "checkpoint")
    }
    whole = sum(parts.values())
    overhead = [f"{parts[part] / whole:.1%}" for part in ("phi", "evaluation", "checkpoint")]
    return [f"{steps / passed:.1f}", f"{seen / passed:.0f}", f"{1 - parts['train'] / whole:.1%}", *overhead]


def _ask(zeus: Zeus, kernel: str, question: QueryRequest, messages: list[tuple[str, str]], count: int) -> list[float]:
    """Milliseconds of each question, asked one after the other at the pace."""
    latencies = list[float]()
    for number in range(count):
        request = question.model_copy(update={"input": messages[number % len(messages)][0]})
        begun = time.perf_counter()
        zeus.query(kernel, request)
        took = time.perf_counter() - begun
        latencies.append(took * 1000)
        time.sleep(max(0.0, PACE_SECONDS - took))
    return latencies


def _row(idle: list[float], busy: list[float]) -> list[str]:
    points = [(statistics.median(values), statistics.quantiles(values, n=20)[-1]) for values in (idle, busy)]
    ratios = [f"{busy_point / idle_point:.2f}" for idle_point, busy_point in zip(*points, strict=True)]
    return [f"{value:.1f}" for pair in points for value in pair] + ratios
