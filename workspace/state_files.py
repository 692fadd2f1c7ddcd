"""Trained weights on disk: a directory with one safetensors file and the manifest that vouches for it.

``manifest.json`` names the weights' file with its size and SHA-256, the model that they were trained on, the shape and
the configuration, and how they were trained. A directory appears whole (``storage.files``); one that is there already
is renewed by writing the new weights beside the old, then the manifest, which is the switch, then removing the old: a
crash at any point leaves a directory that loads. What is read is what was hashed. No pickle anywhere.

Not here: what the tensors mean, and whether they fit a model (``modules.py``).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Never

import safetensors.torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from storage import files
from workspace.errors import StateDamaged, StateError, StateMismatch, StateNotFound

SCHEMA = 1
MANIFEST = "manifest.json"
_AGAIN = "train it again, or restore the directory from a copy"
_WEIGHTS = "weights-{}.safetensors"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TrainedModel(_Part):
    """The frozen model that the weights belong to. One model in two dtypes has two fingerprints."""

    name: str
    fingerprints: tuple[str, ...] = Field(min_length=1)


class StateShape(_Part):
    """Sizes of that model and its hooked layers."""

    hidden_size: int
    kv_heads: int
    head_dim: int
    layers: tuple[int, ...]


class TrainingRecord(_Part):
    """How the weights came about. ``parts`` names what was trained: other parts stay with their heuristics."""

    step: int = Field(ge=1)
    parts: tuple[str, ...] = Field(min_length=1)
    data_digest: str
    metrics: dict[str, Any] = Field(default_factory=dict)


class WeightsFile(_Part):
    """The one file that the manifest vouches for."""

    file: str = Field(pattern=r"^weights-[0-9a-f]{16}\.safetensors$")
    bytes: int
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class StateManifest(_Part):
    """All of ``manifest.json``."""

    version: int = Field(alias="schema")
    created_at: float
    model: TrainedModel
    shape: StateShape
    config: dict[str, Any]
    training: TrainingRecord
    weights: WeightsFile


def write_state(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    model: TrainedModel,
    shape: StateShape,
    config: Mapping[str, Any],
    training: TrainingRecord,
) -> StateManifest:
    """Make ``path`` hold this state, durably. Raises ``StateError`` for what could not be loaded again, ``OSError``."""
    if path.exists() and not path.is_dir():
        raise StateError(f"{path} is a file; trained weights are a directory, give the path of one")
    try:
        json.dumps(training.metrics, allow_nan=False)  # pydantic would write null for NaN
    except (ValueError, TypeError) as error:
        raise StateDamaged(f"{path}: not saved, its metrics do not fit JSON: {error}") from None
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise StateDamaged(f"{path}: not saved, {name} holds NaN or infinity; lower the learning rate")
    data = safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    digest = hashlib.sha256(data).hexdigest()
    manifest = StateManifest(
        schema=SCHEMA,
        created_at=time.time(),
        model=model,
        shape=shape,
        config=dict(config),
        training=training,
        weights=WeightsFile(file=_WEIGHTS.format(digest[:16]), bytes=len(data), sha256=digest),
    )
    text = json.dumps(manifest.model_dump(mode="json", by_alias=True), indent=1, sort_keys=True) + "\n"
    if path.is_dir():
        files.write_bytes(path / manifest.weights.file, data)
        files.write_bytes(path / MANIFEST, text.encode())
        _remove_others(path, manifest.weights.file)
    else:
        with files.publish_directory(path) as folder:
            (folder / manifest.weights.file).write_bytes(data)
            (folder / MANIFEST).write_bytes(text.encode())
    return manifest


def read_manifest(path: Path) -> StateManifest:
    """The manifest of the state at ``path``, without its weights: which model, which layers, how it was trained.

    Raises ``StateNotFound``, ``StateDamaged`` or ``StateMismatch``.
    """
    if not path.is_dir():
        raise StateNotFound(
            f"{path} is no directory of trained weights; train some with scripts/train_workspace.py, or leave "
            "workspace.state_path out to serve with heuristics"
        )
    source = path / MANIFEST
    try:
        value = json.loads(source.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise StateDamaged(f"{source} is missing, so {path} holds no finished state; {_AGAIN}") from None
    except (OSError, ValueError) as error:
        raise StateDamaged(f"{source} cannot be read ({error}); {_AGAIN}") from None
    if isinstance(value, dict) and value.get("schema", SCHEMA) != SCHEMA:
        raise StateMismatch(
            f"{source} was written as schema {value['schema']}, this version reads {SCHEMA}; use the version that "
            "wrote it, or train again"
        )
    try:
        return StateManifest.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise StateDamaged(f"{source}: {where}: {first['msg']}; {_AGAIN}") from None


def read_tensors(path: Path, manifest: StateManifest) -> dict[str, Tensor]:
    """The weights that ``manifest`` vouches for. Raises ``StateDamaged`` naming the file."""
    source = path / manifest.weights.file
    try:
        data = source.read_bytes()
    except OSError as error:
        raise StateDamaged(f"{source} cannot be read ({error.strerror or error}); {_AGAIN}") from None
    found = hashlib.sha256(data).hexdigest()
    if found != manifest.weights.sha256:
        raise StateDamaged(
            f"{source} has SHA-256 {found[:16]}..., {MANIFEST} says {manifest.weights.sha256[:16]}...; {_AGAIN}"
        )
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise StateDamaged(f"{source} is no safetensors file ({error}); {_AGAIN}") from None
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise StateDamaged(f"{source}: {name} holds NaN or infinity; train it again with a lower learning rate")
    return tensors


def _remove_others(path: Path, keep: str) -> None:
    """Weights that no manifest names any more; a crash before this leaves them to the next save."""
    for other in path.glob(_WEIGHTS.format("*")):
        if other.name != keep:
            other.unlink(missing_ok=True)


def _refuse_constant(text: str) -> Never:
    raise ValueError(f"it holds {text}, which is not JSON")
