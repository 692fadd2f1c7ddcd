"""What a training run needs to go on after ``kill -9`` as if nothing had happened: one directory per checkpoint.

    checkpoints/step-000050/state.safetensors   modules, Adam's moments, the random generator
    checkpoints/step-000050/manifest.json       step, place in the data, digests, what run it is

A checkpoint appears whole (``storage.files``); the newest that can be read is taken, one that cannot is passed over
and named in the log. It belongs to one model, one recipe and one set of texts, and is refused for others.

Shapes are those of the modules. Nothing here knows what is trained.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from storage import files
from workspace.errors import CheckpointDamaged, CheckpointMismatch

logger = logging.getLogger(__name__)

SCHEMA = 1
_STATE, _MANIFEST, _PREFIX = "state.safetensors", "manifest.json", "step-"
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True, slots=True)
class Place:
    """Where training stands: ``step`` steps are done, ``batch`` batches of ``epoch``."""

    step: int = 0
    epoch: int = 0
    batch: int = 0


def collect(modules: nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> dict[str, Tensor]:
    """Everything that decides the next step, by name."""
    tensors = {f"modules.{name}": tensor for name, tensor in modules.state_dict().items()}
    for name, parameter in modules.named_parameters():
        for moment, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{moment}.{name}"] = value
    tensors["generator"] = generator.get_state()
    return tensors


def restore(
    tensors: Mapping[str, Tensor], modules: nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator
) -> None:
    """The reverse of ``collect``, in place."""
    modules.load_state_dict({name.removeprefix("modules."): t for name, t in _of(tensors, "modules").items()})
    optimizer.state.clear()
    for name, parameter in modules.named_parameters():
        state = {moment: tensors[f"{moment}.{name}"] for moment in _MOMENTS if f"{moment}.{name}" in tensors}
        if state:
            optimizer.state[parameter] = {
                moment: value.clone() if moment == "step" else value.to(parameter.device, copy=True)
                for moment, value in state.items()
            }
    generator.set_state(tensors["generator"])


def _of(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(f"{part}.")}


class Checkpoints:
    """The checkpoints of one run. ``identity``: JSON values that say which run it is."""

    def __init__(self, folder: Path, identity: Mapping[str, Any], keep: int):
        self.folder = folder
        self._identity = json.loads(json.dumps(identity))
        self._keep = keep

    def write(self, place: Place, tensors: Mapping[str, Tensor]) -> Path:
        """Publish a checkpoint, then remove those beyond the newest ``keep``."""
        path = self.folder / f"{_PREFIX}{place.step:06}"
        if not path.exists():
            with files.publish_directory(path) as partial:
                data = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
                safetensors.torch.save_file(data, partial / _STATE)
                manifest = {
                    "schema": SCHEMA,
                    "place": {"step": place.step, "epoch": place.epoch, "batch": place.batch},
                    "sha256": files.sha256_file(partial / _STATE),
                    "identity": self._identity,
                }
                (partial / _MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
        for old in self._all()[: -self._keep]:
            files.remove_directory(old)
        return path

    def newest(self) -> tuple[Place, dict[str, Tensor]] | None:
        """The newest readable checkpoint; None where there is none at all.

        Raises ``CheckpointMismatch`` if it is of another run, ``CheckpointDamaged`` if none of them can be read.
        """
        problems = []
        for path in reversed(self._all()):
            try:
                return self._read(path)
            except CheckpointDamaged as error:
                logger.warning("%s", error)
                problems.append(str(error))
        if problems:
            raise CheckpointDamaged(f"no checkpoint can be read: {'; '.join(problems)}; train in a new folder")
        return None

    def _all(self) -> list[Path]:
        return sorted(path for path in self.folder.glob(f"{_PREFIX}*") if path.is_dir())

    def _read(self, path: Path) -> tuple[Place, dict[str, Tensor]]:
        try:
            manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
            place, identity, digest = Place(**manifest["place"]), manifest["identity"], manifest["sha256"]
            version = manifest["schema"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointDamaged(f"{path / _MANIFEST} cannot be read ({error!r})") from None
        if version != SCHEMA:
            raise CheckpointMismatch(f"{path} was written as schema {version}, this version reads {SCHEMA}")
        self._require_equal(path, identity)
        source = path / _STATE
        try:
            if files.sha256_file(source) != digest:
                raise CheckpointDamaged(f"{source} does not have the SHA-256 of its manifest")
            return place, safetensors.torch.load_file(source)
        except (OSError, SafetensorError) as error:
            raise CheckpointDamaged(f"{source} cannot be read ({error})") from None

    def _require_equal(self, path: Path, found: Any) -> None:
        flat_found, flat_now = _flat(found), _flat(self._identity)
        names = sorted({*flat_found, *flat_now})
        differ = [name for name in names if flat_found.get(name) != flat_now.get(name)]
        if differ:
            told = "; ".join(f"{name} was {flat_found.get(name)}, is {flat_now.get(name)}" for name in differ[:4])
            raise CheckpointMismatch(
                f"{path} is of another run: {told}; train in a new folder, or use the same model, texts and recipe"
            )


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested mappings as dotted names."""
    if not isinstance(value, dict):
        return {name: value}
    return {
        key: item for part, inner in value.items() for key, item in _flat(inner, f"{name}.{part}".strip(".")).items()
    }
