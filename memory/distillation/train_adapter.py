"""One entry to two trainers: ours, and that of the Cartridges library where it is installed.

``training.trainer: inprocess`` (the default) trains in this process, on a CPU or a GPU (``trainer.py``).
``training.trainer: cartridges`` hands the same rows, prefix and numbers to ``cartridges.train.train``, which wants a
GPU and knows Llama and Qwen 3 (``cartridges_backend.py``).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from memory.distillation.cartridges_backend import train_with_library
from memory.distillation.config import TrainingConfig
from memory.distillation.rows import Row
from memory.distillation.student import Between
from memory.distillation.trainer import Progress, TrainingResult, train_cartridge
from workspace.models import LoadedModel
from workspace.prefix import KVPrefix


def train(
    loaded: LoadedModel,
    train: Sequence[Row],
    evaluation: Sequence[Row],
    config: TrainingConfig,
    init: KVPrefix,
    *,
    folder: Path,
    stop: threading.Event | None = None,
    progress: Callable[[Progress], None] | None = None,
    between: Between | None = None,
) -> TrainingResult:
    """Train with the trainer that ``config`` names; arguments and errors as for ``train_cartridge``.

    The library cannot be stopped, resumed or held: ``stop``, ``progress`` and ``between`` are for ours. Raises
    ``BackendMissing`` where it is asked for and absent.
    """
    if config.trainer == "cartridges":
        return train_with_library(loaded, train, evaluation, config, init, folder=folder)
    return train_cartridge(
        loaded, train, evaluation, config, init, folder=folder, stop=stop, progress=progress, between=between
    )
