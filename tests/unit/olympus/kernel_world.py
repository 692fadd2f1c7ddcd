"""A small world for the kernels: a database, a history, a hub, and kernels that train in milliseconds."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memory.history import History, NewExperience
from olympus.kernel_archive import Identity, Origin, pack, stream
from olympus.kernel_state import KernelPlan, KernelState
from olympus.requests import ExperienceIn, SpawnRequest
from olympus.zeus import Zeus
from qig_core.learning import collate, supervised_loss
from qig_core.vocabulary import encode_pair
from settings import Settings, load_settings
from storage.database import Database
from telemetry.hub import EventHub

TINY: dict[str, Any] = {
    "width": 16,
    "hidden": 16,
    "heads": 2,
    "context": 64,
    "supervision_steps": 1,
    "ngram_buckets": 0,
}


@dataclass
class World:
    """Everything a kernel lives in."""

    settings: Settings
    database: Database
    history: History
    hub: EventHub
    stop: threading.Event
    zeus: Zeus

    def tiny(self, name: str = "athena", domain: str = "d", **changes: Any) -> str:
        """Spawn a tiny kernel and return its id."""
        request = SpawnRequest(
            name=name, domain=domain, config={**TINY, **changes.pop("config", {})}, seed=1, **changes
        )
        return str(self.zeus.spawn(request)["kernel"]["kernel_id"])

    def wait_for(self, kernel_id: str, *states: str, seconds: float = 30.0, step: int = 0) -> dict[str, Any]:
        """The status, once the kernel is in one of the states and has reached the step."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            status = self.zeus.status(kernel_id)
            self.zeus.trainer.check_invariants()
            if status["state"] in states and status["step"] >= step:
                return status
            time.sleep(0.02)
        raise AssertionError(f"{kernel_id} is {status['state']} at step {status['step']}: {status['state_reason']}")


def make_settings(tmp_path: Path, **kernels: Any) -> Settings:
    """Settings for tests; nothing is read from the environment."""
    chosen = {
        "spawn_default": False,
        "batch_size": 4,
        "evaluate_every": 10,
        "evaluation_share": 1.0,
        "niceness": 0,
        **kernels,
    }
    return load_settings(environ={}, overrides={"data_dir": str(tmp_path / "data"), "kernels": chosen})


def facts(count: int, start: int = 0) -> list[ExperienceIn]:
    """A learnable stream: the answer follows from the first word."""
    words = {"red": "stop", "green": "go", "amber": "wait"}
    drawer = random.Random(start)
    chosen = [drawer.choice(sorted(words)) for _ in range(count)]
    return [ExperienceIn(observation=f"{word} light {start + i}", action=words[word]) for i, word in enumerate(chosen)]


def write_facts(history: History, count: int, start: int = 0, domain: str = "d") -> None:
    """The same, straight into the history."""
    history.append([NewExperience(item.observation, item.action, domain, "api") for item in facts(count, start)])


def tiny_plan() -> KernelPlan:
    """The plan of ``World.tiny``."""
    return KernelPlan.make("nano", TINY)


def trained_state(steps: int = 3, seed: int = 1) -> KernelState:
    """A tiny kernel that has taken some steps, with a best one behind it."""
    state = KernelState(tiny_plan(), seed)
    batch = collate([encode_pair(item.observation, item.action, 64) for item in facts(6)])
    for _ in range(steps):
        state.optimizer.zero_grad(set_to_none=True)
        supervised_loss(state.kernel, batch.ids, batch.loss_mask).total.backward()  # type: ignore[no-untyped-call]
        state.optimizer.step()
        state.ema.update(state.kernel)
        state.progress.step += 1
        if state.progress.step == 2:
            state.remember_best()
            state.progress.best_loss, state.progress.best_step = 1.25, 2
    return state


def archive_files(
    state: KernelState | None = None, *, training: bool = False, name: str = "pallas"
) -> dict[str, bytes]:
    """The files of a kernel's archive."""
    state = state or trained_state()
    identity = Identity(god_name=name, domain="d", seed=state.seed)
    origin = Origin(name=f"step-{state.progress.step:08d}", step=state.progress.step, weights="ema", holdout_loss=1.5)
    return pack(identity, origin, state, state.ema.shadow.state_dict(), training=training)


def archive_bytes(state: KernelState | None = None, *, training: bool = False, name: str = "pallas") -> bytes:
    """A kernel's archive."""
    return b"".join(stream(archive_files(state, training=training, name=name)))
