"""Fixtures for the kernels' lives; the helpers are in ``kernel_world``."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from memory.history import History
from olympus.zeus import Zeus
from storage.database import Database
from storage.models import Base
from telemetry.hub import EventHub
from tests.unit.olympus.kernel_world import World, make_settings


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def make_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., World]]:
    """A factory; call it again with the same directory to simulate a restart."""
    monkeypatch.delenv("REPL_ID", raising=False)
    made: list[World] = []

    def make(start: bool = True, busy: Callable[[], bool] = lambda: False, **kernels: Any) -> World:
        settings = make_settings(tmp_path, **kernels)
        database = Database(settings.database_url)
        Base.metadata.create_all(database.engine)
        history, hub, stop = History(database), EventHub(), threading.Event()
        world = World(
            settings, database, history, hub, stop, Zeus(settings, database, history, hub, stop, serving_busy=busy)
        )
        made.append(world)
        if start:
            world.zeus.start()
        return world

    yield make
    for world in made:
        world.stop.set()
        world.zeus.shutdown(10)
        world.database.close()
