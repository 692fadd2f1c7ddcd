"""Where the weights of a model go: one device, all GPUs of the machine, or a map of the caller's.

More than one place is accelerate's doing (its hooks move what a layer needs to where the layer is). Nothing is moved
after loading. Which number type suits a device is decided in ``models.py``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from workspace.errors import UnsupportedModel

#: Names of modules and where they go: a GPU's number, "cpu" or "disk".
DeviceMap = Mapping[str, int | str]


@dataclass(frozen=True, slots=True)
class Placement:
    """``device`` is the one for which number type and attention are chosen; ``options`` go to ``from_pretrained``."""

    device: torch.device
    options: Mapping[str, Any] = field(default_factory=dict)


def choose_placement(device: str, device_map: DeviceMap | None, *, offload_dir: Path) -> Placement:
    """The placement for a setting: auto, cpu, cuda, cuda:0, or split: over all GPUs, and over main memory when those
    are full. A ``device_map`` says it module by module instead. Raises ``UnsupportedModel``.

    Weights for "disk" that are not stored as they are needed are written below ``offload_dir``.
    """
    if device_map is not None:
        numbers = [place for place in device_map.values() if place not in ("cpu", "disk")]
        first = choose_device(f"cuda:{numbers[0]}" if isinstance(numbers[0], int) else numbers[0]) if numbers else None
        where = first or torch.device("cpu")
        return Placement(where, {"device_map": dict(device_map), "offload_folder": str(offload_dir)})
    if device == "split":
        return Placement(choose_device("cuda"), {"device_map": "auto", "offload_folder": str(offload_dir)})
    where = choose_device(device)
    return Placement(where, {} if where.type == "cpu" else {"device_map": {"": where}})


def choose_device(device: str) -> torch.device:
    """One device. Raises ``UnsupportedModel`` when it is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UnsupportedModel(f"unknown device {device!r}; use auto, cpu, cuda, cuda:0 or split") from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UnsupportedModel(f"device {device!r} was asked for, but torch sees no CUDA device; use cpu or auto")
    return chosen


def offload_dir(cache_dir: Path, name: str) -> Path:
    """Where the weights of this model that stay on disk are kept, if there are any."""
    return cache_dir / "offload" / hashlib.sha256(name.encode()).hexdigest()[:16]


def entrance(model: Any) -> torch.device:
    """The device on which the model wants its token ids."""
    embedding = model.get_input_embeddings()
    hook = getattr(embedding, "_hf_hook", None)  # accelerate's, when the model lies in several places
    device = None if hook is None else getattr(hook, "execution_device", None)
    return embedding.weight.device if device is None else torch.device(device)


def stored_values(model: Any, name: str) -> torch.Tensor:
    """The values of a parameter wherever they are; one on disk is read, and not kept."""
    parameter: torch.Tensor = model.get_parameter(name)
    if parameter.device.type != "meta":
        return parameter
    module, _, leaf = name.rpartition(".")
    hook = getattr(model.get_submodule(module), "_hf_hook", None)
    found = None if hook is None else hook.weights_map[leaf]
    if found is None:
        raise UnsupportedModel(f"the weight {name} was not loaded")
    return torch.as_tensor(found).to(parameter.dtype)
