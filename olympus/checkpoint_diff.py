"""What changed between two checkpoints of one kernel: its measurements, its mean basin, and its weights.

The weights are the averaged ones, which answer questions. Per part of the network, ``moved`` is the norm of the change
over the norm it had before (0: untouched; null where it was zero), and ``cosine`` the angle between before and after.
The basin distance is Fisher-Rao, in [0, pi]: both basins are means over the kernel's own held-out texts and share one
read-out, so it says how far what the kernel means by them has moved.

Not here: what both answer to the same question (``POST .../query`` takes ``checkpoint``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from olympus.checkpoint_files import Loaded
from olympus.checkpoints import CheckpointStore
from olympus.errors import CheckpointInvalid
from qig_core.geometry import fisher_rao_distance

#: The file of the weights that answer.
_WEIGHTS = "ema"
#: Progress fields that are compared as they are.
_PROGRESS = ("bytes_seen", "loss_ema", "holdout_loss", "baseline_loss", "best_loss", "lr_scale")
_INTEGRATION = ("phi", "kappa")
_PLASTICITY = ("dead_units", "eff_rank")


def compare(store: CheckpointStore, kernel_id: str, base: str, other: str) -> dict[str, Any]:
    """From ``base`` to ``other``, as JSON types. Raises ``CheckpointNotFound`` or ``CheckpointInvalid``."""
    before, after = (store.load(kernel_id, name, only=_WEIGHTS) for name in (base, other))
    numbers = {name: _change(_numbers(before).get(name), value) for name, value in _numbers(after).items()}
    return {
        "kernel_id": kernel_id,
        "base": _card(before),
        "other": _card(after),
        "numbers": numbers,
        "basin_distance": _basin_distance(before, after),
        "weights": _weights(before, after),
    }


def _card(loaded: Loaded) -> dict[str, Any]:
    manifest = loaded.manifest
    return {"id": loaded.name, "step": manifest.step, "created_at": manifest.created_at}


def _progress(loaded: Loaded) -> Mapping[str, Any]:
    progress: Mapping[str, Any] = loaded.state["progress"]
    return progress


def _numbers(loaded: Loaded) -> dict[str, float | None]:
    progress = _progress(loaded)
    parts = [(progress, _PROGRESS), (progress["integration"], _INTEGRATION), (progress["plasticity"], _PLASTICITY)]
    return {name: part.get(name) for part, names in parts for name in names}


def _change(before: float | None, after: float | None) -> dict[str, float | None]:
    known = before is not None and after is not None
    return {"base": before, "other": after, "change": after - before if known else None}  # type: ignore[operator]


def _basin_distance(before: Loaded, after: Loaded) -> float | None:
    basins = [_progress(loaded).get("basin") for loaded in (before, after)]
    if not all(basins):
        return None
    one, other = (torch.tensor(basin, dtype=torch.float64) for basin in basins)
    return round(float(fisher_rao_distance(one, other)), 6)


def _weights(before: Loaded, after: Loaded) -> dict[str, Any]:
    """All weights, and each part of the network: what stands before the first dot, ``blocks.0`` and so on apart."""
    one, other = before.tensors[_WEIGHTS], after.tensors[_WEIGHTS]
    shapes = [{name: tuple(tensor.shape) for name, tensor in tensors.items()} for tensors in (one, other)]
    if shapes[0] != shapes[1]:
        raise CheckpointInvalid(f"{before.name} and {after.name} have different networks; they cannot be compared")
    parts: dict[str, list[str]] = {}
    for name in one:
        parts.setdefault(_part_of(name), []).append(name)
    told = [{"part": part, **_moved([(one[name], other[name]) for name in names])} for part, names in parts.items()]
    whole = _moved([(one[name], other[name]) for name in one])
    return {**whole, "parts": sorted(told, key=lambda item: -item["moved"] if item["moved"] is not None else 0.0)}


def _part_of(name: str) -> str:
    first, _, rest = name.partition(".")
    second = rest.partition(".")[0]
    return f"{first}.{second}" if second.isdigit() else first


def _moved(pairs: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Over the tensors of a part together."""
    before = torch.cat([one.flatten().double() for one, _ in pairs])
    after = torch.cat([other.flatten().double() for _, other in pairs])
    norms = float(before.norm()), float(after.norm())
    cosine = float(before @ after) / (norms[0] * norms[1]) if all(norms) else None
    moved = float((after - before).norm()) / norms[0] if norms[0] else None
    return {
        "numbers": before.numel(),
        "moved": None if moved is None or not math.isfinite(moved) else round(moved, 6),
        "cosine": None if cosine is None else round(min(1.0, cosine), 6),
    }
