"""A small world for the kernels: a database, a history, a hub, and kernels that train in milliseconds."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memory.history import History, NewExperience
from olympus.kernel_state import KernelPlan
from olympus.requests import ExperienceIn, SpawnRequest
from olympus.zeus import Zeus
from settings import Settings, load_settings
from storage.database import Database
from telemetry.hub import EventHub

TINY: dict[str, Any] = {"width": 16, "hidden": 16, "heads": 2, "context": 64, "supervision_steps": 1}


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
    chosen = {"spawn_default": False, "batch_size": 4, "evaluate_every": 10, **kernels}
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
