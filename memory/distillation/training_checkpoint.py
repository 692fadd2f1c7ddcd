"""The files of a training run: what it needs to go on after ``kill -9``, and the cartridge as others read it.

    state/step-000050/      prefix in float32, Adam's moments, what the run knows so far (workspace.training_checkpoint)
    cache-step50.pt         the prefix at that step in the layout of the Cartridges library
    cache_last.pt           symbolic link to the newest of them; when the run is over, to the one that was chosen

The state is written first, so that what others can see can always be gone on from. Everything appears whole or not at
all. Of both kinds the newest ``keep_last`` stay, and the one that was chosen.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor

from memory.cartridges.manifest import DtypeName
from memory.cartridges.torch_format import write_torch_file
from memory.distillation.errors import CheckpointUnusable, TrainerDiskFull
from memory.distillation.trainable import TrainablePrefix
from storage import files
from workspace.errors import CheckpointDamaged, CheckpointMismatch
from workspace.prefix import KVPrefix
from workspace.training_checkpoint import Checkpoints, Place

LAST = "cache_last.pt"
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")
_FILE = re.compile(r"cache-step(\d+)\.pt")


@dataclass(slots=True)
class RunState:
    """What a run knows besides its tensors."""

    step: int = 0
    best_step: int = 0
    worse: int = 0  #: evaluations since the best
    evaluated: int = -1  #: the last step that was
    loss: float = math.nan
    first_loss: float = math.nan
    held_out: float = math.inf
    first_held_out: float = math.inf
    best_held_out: float = math.inf
    seconds: float = 0.0  #: of all calls together

    def tensor(self) -> Tensor:
        """As one tensor."""
        return torch.tensor([float(getattr(self, name)) for name in self.__slots__], dtype=torch.float64)

    @classmethod
    def of(cls, tensor: Tensor) -> RunState:
        """The reverse of ``tensor``."""
        counts, numbers = tensor[:4].tolist(), tensor[4:].tolist()
        return cls(*(int(count) for count in counts), *numbers)

    def numbers(self) -> dict[str, Any]:
        """For logs and manifests: what is finite."""
        names = ("best_step", "first_loss", "loss", "first_held_out", "best_held_out", "seconds")
        found = {name: getattr(self, name) for name in names}
        return {name: round(value, 6) for name, value in found.items() if math.isfinite(value)}


def collect(
    state: RunState, prefix: TrainablePrefix, optimizer: torch.optim.Optimizer, best: KVPrefix
) -> dict[str, Tensor]:
    """Everything that decides the next step, by name."""
    tensors: dict[str, Tensor] = {"state": state.tensor()}
    for name, parameter in prefix.named():
        tensors[f"trained.{name}"] = parameter
        for moment, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{moment}.{name}"] = value
    for layer, (keys, values) in enumerate(zip(best.keys, best.values, strict=True)):
        tensors[f"best.keys.{layer}"], tensors[f"best.values.{layer}"] = keys, values
    return tensors


def restore(
    tensors: Mapping[str, Tensor], prefix: TrainablePrefix, optimizer: torch.optim.Optimizer
) -> tuple[RunState, KVPrefix]:
    """The reverse of ``collect``: parameters and moments in place, the state and the best prefix returned."""
    best: dict[str, list[Tensor]] = {"keys": [], "values": []}
    with torch.no_grad():
        for name, parameter in prefix.named():
            parameter.copy_(tensors[f"trained.{name}"])
            optimizer.state[parameter] = {
                moment: tensors[f"{moment}.{name}"].to("cpu" if moment == "step" else parameter.device, copy=True)
                for moment in _MOMENTS
            }
            part = name.split(".")[0]
            best[part].append(tensors[f"best.{name}"].to(parameter.device))
    return RunState.of(tensors["state"]), KVPrefix(tuple(best["keys"]), tuple(best["values"]))


class RunCheckpoints:
    """Of one run in ``folder``. ``identity``: JSON values that say which run it is."""

    def __init__(self, folder: Path, identity: Mapping[str, Any], keep_last: int):
        self.folder = folder
        self._keep = keep_last
        self._states = Checkpoints(folder / "state", identity, keep_last)

    def write(self, step: int, state: Mapping[str, Tensor], prefix: KVPrefix, frozen: int) -> None:
        """Publish both kinds for ``step``, point ``cache_last.pt`` to it, then remove what is old."""
        with disk_errors(self.folder):
            self._states.write(Place(step), state)
            self._publish(step, prefix, frozen)

    def has(self, step: int) -> bool:
        """Whether ``step`` was written."""
        return (self._states.folder / f"step-{step:06}").exists()

    def choose(self, step: int, prefix: KVPrefix, frozen: int) -> Path:
        """The run is over and ``prefix``, from ``step``, is its result: ``cache_last.pt`` points to it."""
        with disk_errors(self.folder):
            return self._publish(step, prefix, frozen)

    def newest(self) -> tuple[int, dict[str, Tensor]] | None:
        """Step and state of the newest readable checkpoint, None where there is none. Raises ``CheckpointUnusable``."""
        try:
            found = self._states.newest()
        except (CheckpointDamaged, CheckpointMismatch) as error:
            raise CheckpointUnusable(str(error)) from error
        return None if found is None else (found[0].step, found[1])

    def _publish(self, step: int, prefix: KVPrefix, frozen: int) -> Path:
        path = self.folder / f"cache-step{step}.pt"
        dtype = cast("DtypeName", str(prefix.keys[0].dtype).removeprefix("torch."))
        write_torch_file(path, prefix.keys, prefix.values, frozen, dtype)
        link = files.partial_path(self.folder / LAST)
        os.symlink(path.name, link)
        os.replace(link, self.folder / LAST)
        files.fsync_directory(self.folder)
        self._prune(kept=path)
        return path

    def _prune(self, kept: Path) -> None:
        found = sorted((int(match[1]), path) for path in self.folder.iterdir() if (match := _FILE.fullmatch(path.name)))
        for _, path in found[: -self._keep]:
            if path != kept:
                path.unlink()


def discard_training(folder: Path) -> None:
    """Remove what a run that cannot be gone on with left in ``folder``."""
    for path in folder.iterdir():
        if _FILE.fullmatch(path.name) or path.name == LAST:
            path.unlink()
    if (folder / "state").is_dir():
        files.remove_directory(folder / "state")


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn "no space left" into ``TrainerDiskFull``."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        if not full:
            raise
        raise TrainerDiskFull(
            f"the disk of {folder} is full ({files.free_bytes(folder)} bytes free); free some space and start the run "
            "again: it goes on from its last checkpoint"
        ) from error
