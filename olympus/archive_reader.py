"""Reading a kernel's archive (``kernel_archive``) from anybody: nothing is trusted before it is proved.

In this order: names and sizes of the zip's entries, before one is read; sizes and SHA-256 of the files; the manifest,
strictly typed; its plan, within the same bounds as a spawn request; names, types and shapes in the headers of the
tensor files against what that plan needs, computed on torch's meta device, so that no weight is allocated before they
agree; at last the values, which must be finite. Whatever fails is ``ArchiveInvalid`` (422) and says what.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import TypeVar

import safetensors.torch
import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from olympus.errors import InvalidRequest
from olympus.kernel_archive import (
    MANIFEST,
    NAMES,
    TRAINING,
    VOCABULARY,
    WEIGHTS,
    ArchiveManifest,
    TrainingState,
)
from olympus.kernel_state import KernelPlan, KernelState, Progress
from qig_core.errors import KernelMathError
from qig_core.m8_kernel import M8Kernel

_MAX_JSON = 1 << 20
_MOST_ENTRIES = len(NAMES)

Files = Mapping[str, bytes]
Shapes = dict[str, tuple[int, ...]]
Model = TypeVar("Model", bound=BaseModel)


class ArchiveInvalid(InvalidRequest):
    """The file is not a kernel that this version can use; the message says what is wrong with it."""

    code = "invalid_archive"


@dataclass(frozen=True, slots=True)
class KernelArchive:
    """A proven archive in memory. ``training`` None: it holds the answering weights only."""

    manifest: ArchiveManifest
    plan: KernelPlan
    weights: dict[str, Tensor]
    training: KernelState | None


def read_archive(data: bytes, max_bytes: int) -> KernelArchive:
    """Prove and load an archive whose files together may have ``max_bytes``. Raises ``ArchiveInvalid``."""
    files = _unzip(data, max_bytes)
    manifest = _manifest(files)
    plan = _plan(manifest)
    try:
        with torch.device("meta"):
            blueprint = M8Kernel(plan.network)
    except KernelMathError as error:
        raise ArchiveInvalid(f"its plan is not possible here: {error}") from None
    shapes = {name: tuple(tensor.shape) for name, tensor in blueprint.state_dict().items()}
    weights = _tensors(files, WEIGHTS, shapes)
    training = _training(files, manifest, plan, blueprint, shapes) if manifest.training else None
    return KernelArchive(manifest, plan, weights, training)


# -- the zip ------------------------------------------------------------------------------------------------------


def _unzip(data: bytes, max_bytes: int) -> dict[str, bytes]:
    try:
        with zipfile.ZipFile(BytesIO(data)) as archive:
            entries = archive.infolist()
            _check_entries(entries, max_bytes)
            return {entry.filename: _read_entry(archive, entry) for entry in entries}
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError, OverflowError) as error:
        # RuntimeError: encrypted entries, and NotImplementedError for what the zip format has beyond its basics
        raise ArchiveInvalid(f"the file is not a whole zip archive: {error or type(error).__name__}") from None


def _check_entries(entries: list[zipfile.ZipInfo], max_bytes: int) -> None:
    names = [entry.filename for entry in entries]
    unknown = next((name for name in names if name not in NAMES), None)
    if unknown is not None:
        raise ArchiveInvalid(f"{_shown(unknown)} does not belong into a kernel's archive")
    if len(set(names)) != len(names) or len(names) > _MOST_ENTRIES:
        raise ArchiveInvalid("a file stands in the archive twice")
    total = sum(entry.file_size for entry in entries)
    if total > max_bytes:
        raise ArchiveInvalid(f"its files have {total:,} bytes; kernels.import_max_bytes allows {max_bytes:,}")


def _read_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ArchiveInvalid(f"{entry.filename} is compressed in a way that is not supported")
    with archive.open(entry) as handle:
        data = handle.read(entry.file_size + 1)  # never more than was announced
    if len(data) != entry.file_size:
        raise ArchiveInvalid(f"{entry.filename} has another size than the archive says")
    return data


# -- the manifest -------------------------------------------------------------------------------------------------


def _manifest(files: Files) -> ArchiveManifest:
    manifest = _parse(ArchiveManifest, files, MANIFEST)
    odd = (set(manifest.files) | {MANIFEST}) ^ set(files)
    if odd:
        raise ArchiveInvalid(f"{_shown(min(odd))}: the manifest and the archive's files do not agree")
    for name, entry in manifest.files.items():
        if len(files[name]) != entry.bytes or hashlib.sha256(files[name]).hexdigest() != entry.sha256:
            raise ArchiveInvalid(f"{name} does not match the SHA-256 in the manifest; the file is damaged")
    if manifest.vocabulary != VOCABULARY:
        raise ArchiveInvalid("the kernel was trained with another vocabulary than this version uses")
    return manifest


def _plan(manifest: ArchiveManifest) -> KernelPlan:
    network, training = manifest.plan.get("network", {}), dict(manifest.plan.get("training", {}))
    betas = training.pop("betas", None)
    try:
        plan = KernelPlan.make(str(network.get("preset_name")), {**network, **training})
    except InvalidRequest as error:
        raise ArchiveInvalid(f"its plan is not possible here: {error}") from None
    if betas != [*plan.training.betas]:
        raise ArchiveInvalid(f"it was trained with betas {_shown(betas)}, which this version does not offer")
    return plan


def _parse(model: type[Model], files: Files, name: str) -> Model:
    if name not in files:
        raise ArchiveInvalid(f"{name} is missing; this is not a kernel's archive")
    if len(files[name]) > _MAX_JSON:
        raise ArchiveInvalid(f"{name} is larger than {_MAX_JSON:,} bytes")
    try:
        return model.model_validate_json(files[name])
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part) for part in problem["loc"])[:120]
        raise ArchiveInvalid(f"{name}: {place}: {problem['msg']}" if place else f"{name}: {problem['msg']}") from None


# -- the tensors --------------------------------------------------------------------------------------------------


def _tensors(files: Files, name: str, shapes: Shapes) -> dict[str, Tensor]:
    """A file's tensors, once its header says that they are the ones in ``shapes``, all of them float32."""
    if name not in files:
        raise ArchiveInvalid(f"{name} is missing")
    _check_header(files[name], name, shapes)
    try:
        tensors = safetensors.torch.load(files[name])
    except SafetensorError as error:
        raise ArchiveInvalid(f"{name} is not a safetensors file: {error}") from None
    bad = next((key for key, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())), None)
    if bad is not None:
        raise ArchiveInvalid(f"{name}: {bad} holds a value that is not a finite number")
    return tensors


def _check_header(data: bytes, name: str, shapes: Shapes) -> None:
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not 0 < length <= min(len(data) - 8, _MAX_JSON):
        raise ArchiveInvalid(f"{name} is not a safetensors file")
    try:
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        found = {key: (entry["dtype"], tuple(entry["shape"])) for key, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ArchiveInvalid(f"{name} has no usable safetensors header") from None
    for key in sorted(shapes.keys() | found.keys()):
        if key not in shapes:
            raise ArchiveInvalid(f"{name}: its plan has no tensor {_shown(key)}")
        if found.get(key) != ("F32", shapes[key]):
            raise ArchiveInvalid(
                f"{name}: its plan needs {key} as F32 {list(shapes[key])}, the file has {_shown(found.get(key))}"
            )


def _training(
    files: Files, manifest: ArchiveManifest, plan: KernelPlan, blueprint: M8Kernel, shapes: Shapes
) -> KernelState:
    """A kernel whose weights, averages and optimizer are bit for bit those that were saved."""
    saved = _parse(TrainingState, files, TRAINING)
    _check_counters(saved, files, manifest)
    optimizer = plan.training.optimizer(blueprint)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    groups = optimizer.state_dict()["param_groups"]
    if not saved.parameter_steps.keys() <= {str(index) for index in range(len(parameters))}:
        raise ArchiveInvalid(f"{TRAINING}: its optimizer knows parameters that the plan does not have")
    if len(saved.group_steps) != len(groups):
        raise ArchiveInvalid(f"{TRAINING}: its optimizer has {len(saved.group_steps)} groups, not {len(groups)}")
    slots: Shapes = {
        f"{index}.{slot}": tuple(parameters[int(index)].shape)
        for index in saved.parameter_steps
        for slot in ("momentum", "fisher")
    }
    moments = _tensors(files, "optim.safetensors", slots)
    if any(bool((tensor < 0).any()) for key, tensor in moments.items() if key.endswith(".fisher")):
        raise ArchiveInvalid("optim.safetensors: a Fisher information is negative")
    state = KernelState(plan, manifest.kernel.seed)
    state.kernel.load_state_dict(_tensors(files, "model.safetensors", shapes))
    shadow = _tensors(files, "ema.safetensors", shapes)
    state.ema.load_state_dict({"steps": saved.ema_steps, "decay": plan.training.ema_decay, "shadow": shadow})
    per_parameter = {
        int(index): {"step": steps, **{slot: moments[f"{index}.{slot}"] for slot in ("momentum", "fisher")}}
        for index, steps in saved.parameter_steps.items()
    }
    resumed = [{**group, "steps": steps} for group, steps in zip(groups, saved.group_steps, strict=True)]
    state.optimizer.load_state_dict({"state": per_parameter, "param_groups": resumed})
    if saved.best_loss is not None:
        state.best = _tensors(files, "best.safetensors", shapes)
    state.progress = Progress(
        step=saved.step,
        bytes_seen=saved.bytes_seen,
        train_seconds=saved.train_seconds,
        loss_ema=saved.loss_ema,
        best_loss=saved.best_loss,
        best_step=saved.best_step,
        lr_scale=saved.lr_scale,
        next_phi=saved.step,
    )
    return state


def _check_counters(saved: TrainingState, files: Files, manifest: ArchiveManifest) -> None:
    if saved.step != manifest.checkpoint.step:
        raise ArchiveInvalid(f"{TRAINING}: it is at step {saved.step}, the manifest at {manifest.checkpoint.step}")
    has_best = "best.safetensors" in files
    if {saved.best_loss is not None, saved.best_step is not None} != {has_best}:
        raise ArchiveInvalid(f"{TRAINING}: the best loss, its step and best.safetensors belong together")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
