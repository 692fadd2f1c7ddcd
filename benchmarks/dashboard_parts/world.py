"""A data directory with many kernels that have lived for long, and the server on it.

The rows are those that the metrics store would have written: each curve goes row by row through its ``Ladder``, and
what its pruning would have kept goes into the table. There are five curves; every kernel has one of them, scaled.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa

from olympus.kernel_state import KernelPlan
from olympus.metrics_pyramid import KEEP, Ladder, Packed, Point
from storage import migrate
from storage.database import Database
from storage.models import Kernel, MetricPoint
from tests.support.server import Server, running

CURVES = 5
ROW_SECONDS = 0.25  # what a row of the finest level covers
BASELINE = 2.0
#: Nothing but the dashboard: no language model, no kernel by itself. Fifty tabs find room without a setting.
ENVIRON = {
    "OLYMPUS_MODEL__LOAD": "false",
    "OLYMPUS_KERNELS__SPAWN_DEFAULT": "false",
    "OLYMPUS_MEMORY__EPISODIC__EMBEDDING": "none",
}

Rows = list[tuple[int, Point]]


def fill(data_dir: Path, kernels: int, points: int, seed: int) -> list[str]:
    """Write ``kernels`` stopped kernels with ``points`` measured rows each; returns their ids, oldest first."""
    data_dir.mkdir(parents=True, exist_ok=True)
    database = Database(f"sqlite:///{data_dir / 'olympus.db'}")
    migrate.upgrade(database)
    curves = [curve(points, seed + number) for number in range(min(CURVES, kernels))]
    plan = KernelPlan.make("nano", {}).to_json()
    made = []
    for number in range(kernels):
        scale = 1.0 + 0.02 * (number // CURVES)
        rows = [(level, scaled(point, scale)) for level, point in curves[number % CURVES]]
        kernel_id = f"kernel-{number:02d}-{number:06x}"
        with database.write() as session:
            session.add(_kernel(kernel_id, number, plan, rows[-1][1], points))
            session.flush()
            session.execute(sa.insert(MetricPoint), [_row(kernel_id, level, point) for level, point in rows])
        made.append(kernel_id)
    database.close()
    return made


def curve(points: int, seed: int) -> Rows:
    """A life in ``points`` rows of level 0, summarised and pruned: (level, row), the newest row of level 0 last."""
    drawer, ladder = random.Random(seed), Ladder()
    levels: dict[int, list[Point]] = {}
    rate = 4.0 / points
    for step in range(1, points + 1):
        learned = math.exp(-rate * step)
        loss = 0.4 + 5.0 * learned + drawer.gauss(0, 0.08)
        values: dict[str, Packed] = {
            "loss": loss,
            "grad_norm": abs(drawer.gauss(0.3, 0.1)),
            "step_ms": 40 + drawer.random(),
        }
        if step % 40 == 0:
            values |= {"holdout_loss": 0.6 + 4.8 * learned + drawer.gauss(0, 0.03), "baseline_loss": BASELINE}
        if step % 20 == 0:
            values |= {"phi": 0.85 - 0.8 * learned + drawer.gauss(0, 0.01), "kappa": 0.05}
        for level, point in ladder.add(Point(step, step, ROW_SECONDS * step, "geometric", values)):
            levels.setdefault(level, []).append(point)
    top = max(levels)
    return [
        (level, point)
        for level in range(top, -1, -1)
        for point in (levels[level] if level == top else levels[level][-KEEP:])
    ]


def scaled(point: Point, scale: float) -> Point:
    """With every quantity times ``scale``; summaries scale as their values do."""

    def times(packed: Packed) -> Packed:
        return [packed[0], *(scale * value for value in packed[1:])] if isinstance(packed, list) else scale * packed

    return Point(
        point.first, point.step, point.at, point.regime, {name: times(value) for name, value in point.values.items()}
    )


def _row(kernel_id: str, level: int, point: Point) -> dict[str, object]:
    return {
        "kernel_id": kernel_id,
        "level": level,
        "step": point.step,
        "first_step": point.first,
        "at": point.at,
        "regime": point.regime,
        "values": point.values,
    }


def _kernel(kernel_id: str, number: int, plan: dict[str, object], newest: Point, points: int) -> Kernel:
    loss = newest.values["loss"]
    holdout = float(loss if isinstance(loss, float) else loss[1]) * (1 + number / 100)
    progress = {
        "step": points,
        "loss_ema": holdout,
        "holdout_loss": holdout,
        "baseline_loss": BASELINE,
        "integration": {"phi": 0.5 + 0.4 * ((number * 7) % 50) / 50},
    }
    return Kernel(
        id=kernel_id,
        god_name=f"kernel-{number:02d}",
        domain=f"domain-{number % 10}",
        state="stopped",
        wanted="stop",
        step=points,
        config=plan,
        seed=number,
        parents=[] if number == 0 else [f"kernel-{(number - 1) // 2:02d}-{(number - 1) // 2:06x}"],
        reason="user_request",
        summary={"progress": progress, "regime": "geometric"},
        created_at=1_700_000_000.0 + number,
    )


@contextmanager
def served(data_dir: Path) -> Iterator[Server]:
    """The server on ``data_dir``, stopped at the end."""
    with running(data_dir, ENVIRON) as server:
        yield server


def keep_training(server: Server, count: int) -> list[str]:
    """Spawn ``count`` small kernels that learn for the rest of the server's life; returns their ids."""
    lights = {"red": "stop", "green": "go", "amber": "wait"}
    pairs = [
        {"observation": f"{light} number {n}", "action": action} for light, action in lights.items() for n in range(40)
    ]
    made = []
    for number in range(count):
        body = {"name": f"live-{number}", "domain": "lights", "preset": "nano", "experiences": pairs, "force": True}
        made.append(server.json("POST", "/olympus/kernels/spawn", 201, json=body)["kernel"]["kernel_id"])
    return made
