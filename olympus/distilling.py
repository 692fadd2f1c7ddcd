"""The distillation pipeline of a running server: its engine learns and teaches, and requests go first.

Here the parts meet that ``memory.distillation.pipeline`` asks for. Whoever teaches is named by the configuration; a
server's key comes from the environment variable that is named there, never from the configuration itself.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from memory.distillation.config import DistillConfig
from memory.distillation.errors import DistillationError, TeacherRefused
from memory.distillation.tally import estimate_tokens
from olympus.cartridge_desk import CartridgeDesk
from settings import Settings

if TYPE_CHECKING:  # torch is imported by whoever loads the model
    from lm.types import LanguageModel
    from memory.cartridges.shelf import CartridgeShelf
    from memory.distillation.pipeline import DistillationPipeline
    from memory.history import History
    from workspace.engine import Engine


def make_pipeline(
    settings: Settings,
    history: History,
    desk: CartridgeDesk,
    shelf: CartridgeShelf,
    engine: Engine,
    folder: Path,
) -> DistillationPipeline:
    """The pipeline around ``engine``. ``folder`` holds the runs' folders."""
    from memory.distillation.pipeline import DistillationPipeline, Surroundings

    return DistillationPipeline(
        Surroundings(
            history=history,
            registry=desk.registry,
            shelf=shelf,
            folder=folder,
            engine=engine,
            teacher=lambda config, stop: make_teacher(config, engine, settings.model.cache_dir, stop),
            between=give_way(engine, settings.distillation.serve_pause_ms / 1000),
            announce=desk.announce,
            threads=settings.distillation.threads,
        )
    )


def make_teacher(config: DistillConfig, engine: Engine, cache_dir: Path, stop: threading.Event) -> LanguageModel:
    """Who answers with the memory in its prompt. Raises ``DistillationError`` for one that cannot be had."""
    from lm.errors import LanguageModelError
    from lm.factory import lm_factory

    teacher = config.teacher
    key = None if teacher.api_key_env is None else os.environ.get(teacher.api_key_env)
    if teacher.api_key_env is not None and not key:
        raise DistillationError(f"teacher.api_key_env: the server's environment has no {teacher.api_key_env}; set it")
    try:
        return lm_factory(
            teacher.model, engine=engine, cache_dir=cache_dir, tokenizer=engine.loaded.tokenizer, api_key=key, stop=stop
        )
    except LanguageModelError as error:
        raise TeacherRefused(f"teacher.model: {error}") from error


def give_way(engine: Engine, pause_seconds: float) -> Callable[[], None]:
    """What the trainer calls at every layer: while a chat is being answered it waits ``pause_seconds`` each time."""

    def between() -> None:
        if pause_seconds and engine.stats().active:
            time.sleep(pause_seconds)

    return between


def token_counter(engine: Engine) -> Callable[[str], int]:
    """Tokens of a text for the triggers: long ones are estimated, a trigger need not be exact to the token."""

    def count(text: str) -> int:
        if len(text) > 20_000:
            return estimate_tokens(text)
        return len(engine.encode(text, after_prefix=True))  # which takes its turn with the tokenizer

    return count
