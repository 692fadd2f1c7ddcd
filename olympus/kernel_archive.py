"""A kernel as one file: a zip of safetensors and JSON that another server can prove intact before it uses it.

    manifest.json        who it is, its plan, vocabulary, checkpoint, and size and SHA-256 of every other file
    weights.safetensors  the weights that answer: averaged, the best ones where they are known
    model, ema, optim, best .safetensors and training.json      with ``training``: what it takes to train on

Nothing in it is executed or unpickled. No experience is in it, and no judgement: an imported kernel learns from the
history of the server that it comes to, and is examined there before it may rest.

Not here: reading one (``archive_reader``), which checkpoint is packed and what an import becomes (``kernel_transfer``).
"""

from __future__ import annotations

import hashlib
import json
import time
import zipfile
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import safetensors.torch
from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from torch import Tensor

from olympus.kernel_state import KernelState
from olympus.requests import Domain, Name
from qig_core.vocabulary import BOS, EOS, PAD, SEP, VOCAB_SIZE

FORMAT: Literal["olympus-kernel"] = "olympus-kernel"
VERSION: Literal[1] = 1
MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
TRAINING = "training.json"
#: Every name that may stand in an archive.
NAMES = frozenset({MANIFEST, WEIGHTS, TRAINING, *(f"{part}.safetensors" for part in ("model", "ema", "optim", "best"))})
#: The ids of the marks and their number: weights mean nothing under another assignment.
VOCABULARY = {"symbols": VOCAB_SIZE, "pad": PAD, "bos": BOS, "sep": SEP, "eos": EOS}
_EPOCH = (1980, 1, 1, 0, 0, 0)  # zip's own: equal content, equal bytes


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)


class FileEntry(_Part):
    """Size and SHA-256 of a file."""

    bytes: int = Field(ge=0)
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}\z")]


class Identity(_Part):
    """Who the kernel is. An import may change the name and the domain."""

    god_name: Name
    domain: Domain
    element: Annotated[str, StringConstraints(max_length=64)] = ""
    role: Annotated[str, StringConstraints(max_length=64)] = ""
    seed: int = Field(ge=0, lt=2**53)


class Origin(_Part):
    """Which checkpoint it was. ``weights`` is ``best``, or ``ema`` where no best ones were known or asked for."""

    name: Annotated[str, StringConstraints(pattern=r"^step-[0-9]{8}\z")]
    step: int = Field(ge=0, lt=10**8)
    weights: Literal["best", "ema"]
    holdout_loss: float | None = None
    phi: float | None = None


class ArchiveManifest(_Part):
    """What an archive says of itself."""

    format: Literal["olympus-kernel"]
    version: Literal[1]
    created_at: float
    kernel: Identity
    plan: dict[str, dict[str, Any]]
    vocabulary: dict[str, int]
    checkpoint: Origin
    training: bool
    files: dict[str, FileEntry]


class TrainingState(_Part):
    """``training.json``: the counters. Steps of the optimizer by parameter and by group."""

    step: int = Field(ge=0, lt=10**8)
    bytes_seen: int = Field(ge=0)
    train_seconds: float = Field(ge=0)
    loss_ema: float | None
    best_loss: float | None
    best_step: int | None = Field(ge=0, lt=10**8)
    lr_scale: float = Field(gt=0, le=1)
    ema_steps: int = Field(ge=0)
    parameter_steps: dict[str, Annotated[int, Field(ge=1)]]
    group_steps: list[Annotated[int, Field(ge=0)]]

    @classmethod
    def of(cls, state: KernelState) -> TrainingState:
        """Those of a live kernel."""
        optimizer, progress = state.optimizer.state_dict(), state.progress
        return cls(
            step=progress.step,
            bytes_seen=progress.bytes_seen,
            train_seconds=progress.train_seconds,
            loss_ema=progress.loss_ema,
            best_loss=progress.best_loss,
            best_step=progress.best_step,
            lr_scale=progress.lr_scale,
            ema_steps=state.ema.steps,
            parameter_steps={str(index): slots["step"] for index, slots in optimizer["state"].items()},
            group_steps=[group["steps"] for group in optimizer["param_groups"]],
        )


def pack(
    identity: Identity, origin: Origin, state: KernelState, weights: Mapping[str, Tensor], *, training: bool
) -> dict[str, bytes]:
    """The files of an archive by name, the manifest first. ``weights`` are those that answer."""
    files = {WEIGHTS: _tensor_bytes(weights)}
    if training:
        files |= {f"{part}.safetensors": _tensor_bytes(tensors) for part, tensors in state.tensors().items()}
        files[TRAINING] = _json(TrainingState.of(state).model_dump())
    manifest = ArchiveManifest(
        format=FORMAT,
        version=VERSION,
        created_at=time.time(),
        kernel=identity,
        plan=state.plan.to_json(),
        vocabulary=VOCABULARY,
        checkpoint=origin,
        training=training,
        files={
            name: FileEntry(bytes=len(data), sha256=hashlib.sha256(data).hexdigest()) for name, data in files.items()
        },
    )
    return {MANIFEST: _json(manifest.model_dump()), **files}


def stream(files: Mapping[str, bytes]) -> Iterator[bytes]:
    """A zip of ``files``, stored (weights do not compress), file by file."""
    sink = _Sink()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), data)
            yield sink.take()
    yield sink.take()


class _Sink:
    """A file to write to, whose content is taken away while it is written."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def write(self, data: bytes, /) -> int:
        self._parts.append(bytes(data))
        return len(data)

    def flush(self) -> None:
        """Nothing to do: everything is in memory."""

    def close(self) -> None:
        """Nothing to do, either."""

    def take(self) -> bytes:
        data = b"".join(self._parts)
        self._parts.clear()
        return data


def _tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    return safetensors.torch.save({name: tensor.detach().contiguous() for name, tensor in tensors.items()})


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, sort_keys=True, allow_nan=False, indent=1) + "\n").encode()
