"""The checkpoint directory: what is in it, how it is written, and how it is proved intact before it is used.

``<root>/<kernel id>/step-00000123/`` holds ``*.safetensors`` (tensors by name), ``state.json`` (everything that is
not a tensor) and ``manifest.json``, written last, with the size and SHA-256 of each other file. The directory is
published whole by ``storage.files``; one without a valid manifest does not count. A file is read once: the bytes that
are hashed are the bytes that are parsed. No pickle anywhere.

Not here: rows, retention and quotas (``checkpoints``), what the tensors mean (``kernel_state``).
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from olympus.errors import CheckpointInvalid
from storage import files

SCHEMA = 1
MANIFEST = "manifest.json"
STATE = "state.json"
SUFFIX = ".safetensors"
_NAME = re.compile(r"step-([0-9]{8})")
_FILE = re.compile(r"[a-z][a-z0-9_]{0,31}(\.safetensors|\.json)")

TensorFiles = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a checkpoint says of itself. ``metrics`` holds held-out loss, Phi and whether it had converged."""

    kernel_id: str
    step: int
    created_at: float
    metrics: dict[str, Any]
    files: dict[str, dict[str, Any]]
    sha256: str

    @property
    def bytes(self) -> int:
        """Size of the listed files."""
        return sum(int(entry["bytes"]) for entry in self.files.values())


@dataclass(frozen=True, slots=True)
class Loaded:
    """A verified checkpoint in memory: ``tensors[file][name]``."""

    name: str
    manifest: Manifest
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def checkpoint_name(step: int) -> str:
    """``step-00000123``; names sort by step."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step of a checkpoint's name; None when it is not one."""
    match = _NAME.fullmatch(name)
    return int(match.group(1)) if match else None


def write_checkpoint(
    final: Path,
    *,
    kernel_id: str,
    step: int,
    tensors: TensorFiles,
    state: Mapping[str, Any],
    metrics: Mapping[str, Any],
) -> Manifest:
    """Publish a checkpoint at ``final``. Raises ``FileExistsError`` when it exists, ``OSError`` on a full disk."""
    contents: dict[str, bytes] = {
        f"{name}{SUFFIX}": safetensors.torch.save({key: tensor.contiguous() for key, tensor in part.items()})
        for name, part in tensors.items()
    }
    contents[STATE] = _json(state)
    manifest = {
        "schema": SCHEMA,
        "kernel_id": kernel_id,
        "step": step,
        "created_at": time.time(),
        "metrics": dict(metrics),
        "files": {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in contents.items()
        },
    }
    with files.publish_directory(final) as folder:
        for name, data in contents.items():
            (folder / name).write_bytes(data)
        (folder / MANIFEST).write_bytes(_json(manifest))
    return read_manifest(final)


def publish_copy(final: Path, contents: Mapping[str, bytes]) -> Manifest:
    """Publish files from elsewhere, manifest included, after proving that they are a checkpoint.

    Raises ``CheckpointInvalid``; nothing is published then.
    """
    with files.publish_directory(final) as folder:
        for name, data in contents.items():
            if _FILE.fullmatch(name) is None:
                raise CheckpointInvalid(f"{final.name}: unexpected file name {name!r}")
            (folder / name).write_bytes(data)
        read_contents(folder)
    return read_manifest(final)


def read_manifest(path: Path) -> Manifest:
    """The manifest, checked for shape and for the presence and size of its files, not yet for their content.

    Raises ``CheckpointInvalid`` with the reason.
    """
    try:
        raw = (path / MANIFEST).read_bytes()
        value = json.loads(raw)
        manifest = Manifest(
            kernel_id=str(value["kernel_id"]),
            step=int(value["step"]),
            created_at=float(value["created_at"]),
            metrics=dict(value["metrics"]),
            files={str(name): dict(entry) for name, entry in value["files"].items()},
            sha256=hashlib.sha256(raw).hexdigest(),
        )
        schema = value["schema"]
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointInvalid(f"{path.name}: no usable manifest ({error.__class__.__name__})") from None
    if schema != SCHEMA:
        raise CheckpointInvalid(f"{path.name}: written as schema {schema}, this version reads {SCHEMA}")
    if step_of(path.name) not in (None, manifest.step):
        raise CheckpointInvalid(f"{path.name}: its manifest says step {manifest.step}")
    for name, entry in manifest.files.items():
        if _FILE.fullmatch(name) is None:
            raise CheckpointInvalid(f"{path.name}: unexpected file name {name!r}")
        if not (path / name).is_file() or (path / name).stat().st_size != entry.get("bytes"):
            raise CheckpointInvalid(f"{path.name}: {name} is missing or has another size")
    return manifest


def read_contents(path: Path) -> dict[str, bytes]:
    """Every file's bytes, each equal to its SHA-256, and the manifest's. Raises ``CheckpointInvalid``."""
    manifest = read_manifest(path)
    contents = {name: _verified(path, name, manifest) for name in manifest.files}
    return {**contents, MANIFEST: (path / MANIFEST).read_bytes()}


def load_checkpoint(path: Path, only: str | None = None) -> Loaded:
    """Read and verify; ``only`` names one tensor file to read besides the state. Raises ``CheckpointInvalid``."""
    manifest = read_manifest(path)
    wanted = [name for name in manifest.files if name.endswith(SUFFIX) and only in (None, name.removesuffix(SUFFIX))]
    try:
        tensors = {
            name.removesuffix(SUFFIX): safetensors.torch.load(_verified(path, name, manifest)) for name in wanted
        }
        state = json.loads(_verified(path, STATE, manifest))
    except (SafetensorError, KeyError, ValueError) as error:
        raise CheckpointInvalid(f"{path.name}: cannot be read ({error.__class__.__name__})") from None
    return Loaded(path.name, manifest, tensors, state)


def _verified(path: Path, name: str, manifest: Manifest) -> bytes:
    try:
        data = (path / name).read_bytes()
    except OSError as error:
        raise CheckpointInvalid(f"{path.name}: {name} cannot be read ({error.__class__.__name__})") from None
    if hashlib.sha256(data).hexdigest() != manifest.files[name].get("sha256"):
        raise CheckpointInvalid(f"{path.name}: {name} does not match its SHA-256")
    return data


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, sort_keys=True, allow_nan=False) + "\n").encode()
