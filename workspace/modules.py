"""The trainable parts of the workspace for one model shape, as one module that is saved and loaded whole.

Probe features -> slots -> projector, and the controller's network. About 0.6 million numbers for SmolLM2-135M with six
hooked layers. Construction is deterministic (its own seed; the global generator is left as it was), everything is
float32, and the model itself is not part of it.

Weights are of use only where they were trained: ``trained("virtual_kv")`` says whether to broadcast what the projector
makes of the slots, or what ``heuristic_kv`` makes of residuals. Random virtual tokens are never broadcast. The format
on disk is in ``state_files.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from workspace.controller import Controller, ControllerNet
from workspace.errors import StateMismatch
from workspace.projector import ModuleShape, Projector
from workspace.slots import ProbeFeatures, SlotUpdate, SlotWorkspace
from workspace.state_files import (
    StateManifest,
    StateShape,
    TrainedModel,
    TrainingRecord,
    read_manifest,
    read_tensors,
    write_state,
)
from workspace.workspace_config import DIALS, STRUCTURE, WorkspaceConfig

#: What can be trained, each on its own or together.
Part = Literal["virtual_kv", "static_tokens", "residual_delta", "controller"]
PARTS: tuple[Part, ...] = get_args(Part)


class WorkspaceModules(nn.Module):
    """Everything that is trained, for one model shape.

    ``record`` says how the weights were trained; None: they were not, and only heuristics may act.
    """

    def __init__(self, shape: ModuleShape, config: WorkspaceConfig, *, seed: int = 0):
        super().__init__()
        self.shape, self.config = shape, config
        self.record: TrainingRecord | None = None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            width = config.slot_width
            self.features = ProbeFeatures(shape.layers, shape.hidden_size, config.embedding_width, width)
            self.slots = SlotWorkspace(
                features=width,
                slots=config.slots,
                width=width,
                iterations=config.iterations,
                write_slots=config.write_slots,
            )
            self.projector = Projector(shape, config)
            self.controller = ControllerNet(width)

    @property
    def parameter_count(self) -> int:
        """Trainable numbers."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def state_bytes(self) -> int:
        """Bytes of all parameters and buffers, which is about the size of the file."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.state_dict().values())

    def trained(self, part: Part) -> bool:
        """True when the weights of ``part`` were trained."""
        return self.record is not None and part in self.record.parts

    def update(
        self, residuals: Mapping[int, Tensor], slots: Tensor | None = None, retrieved: Tensor | None = None
    ) -> SlotUpdate:
        """Let the slots [R, S, W] (None: the learnt first ones) see residuals and memories: see ``ProbeFeatures``."""
        update: SlotUpdate = self.slots(self.features(residuals, retrieved), slots)
        return update

    def new_controller(self) -> Controller:
        """For one generation: with the network where it was trained, else by heuristics."""
        return Controller(self.config.thresholds, self.controller if self.trained("controller") else None)

    def save(
        self,
        path: Path,
        *,
        model_name: str,
        fingerprints: Sequence[str],
        step: int,
        parts: Sequence[Part],
        data_digest: str,
        metrics: Mapping[str, Any],
    ) -> StateManifest:
        """Write the state to the directory ``path``, replacing what is there; crash-safe at any point.

        ``fingerprints`` are those of the model in every dtype in which the weights are known to work. Raises
        ``StateError`` when the result could not be loaded again (NaN, a file in the way).
        """
        unknown = sorted(set(parts) - set(PARTS))
        if unknown:
            raise ValueError(f"unknown parts {', '.join(unknown)}; known are {', '.join(PARTS)}")
        record = TrainingRecord(step=step, parts=tuple(parts), data_digest=data_digest, metrics=dict(metrics))
        manifest = write_state(
            path,
            self.state_dict(),
            model=TrainedModel(name=model_name, fingerprints=tuple(fingerprints)),
            shape=_state_shape(self.shape),
            config=self.config.trained_part(),
            training=record,
        )
        self.record = record
        return manifest

    @classmethod
    def load(
        cls, path: Path, *, fingerprint: str, shape: ModuleShape, config: WorkspaceConfig | None = None
    ) -> WorkspaceModules:
        """The state at ``path``, in evaluation mode, for the model of this ``fingerprint`` and ``shape``.

        What ``config`` does not set explicitly comes from the weights (``WorkspaceConfig.for_weights``). Raises
        ``StateNotFound``, ``StateDamaged`` or ``StateMismatch``; the message names the file and what to do.
        """
        manifest = read_manifest(path)
        _check_model(path, manifest, fingerprint)
        _check_shape(path, manifest.shape, _state_shape(shape))
        modules = cls(shape, _merged_config(path, manifest, config or WorkspaceConfig()))
        tensors = read_tensors(path, manifest)
        _check_tensors(path / manifest.weights.file, tensors, modules.state_dict())
        modules.load_state_dict(tensors)
        modules.record = manifest.training
        return modules.eval()

    def check_invariants(self) -> None:
        """Raise ``AssertionError`` if a number is not finite or the projector contradicts itself."""
        for name, tensor in self.state_dict().items():
            assert not tensor.is_floating_point() or bool(tensor.isfinite().all()), f"{name} holds NaN or infinity"
        self.projector.check_invariants()


def _state_shape(shape: ModuleShape) -> StateShape:
    return StateShape(
        hidden_size=shape.hidden_size, kv_heads=shape.kv_heads, head_dim=shape.head_dim, layers=shape.layers
    )


def _check_model(path: Path, manifest: StateManifest, fingerprint: str) -> None:
    if fingerprint not in manifest.model.fingerprints:
        raise StateMismatch(
            f"{path} was trained for {manifest.model.name} (fingerprint {', '.join(manifest.model.fingerprints)}), the "
            f"loaded model has {fingerprint}: other weights, another vocabulary or another dtype; load that model, or "
            "train weights for this one with scripts/train_workspace.py"
        )


def _check_shape(path: Path, found: StateShape, wanted: StateShape) -> None:
    differ = [
        f"{name} {getattr(found, name)} instead of {getattr(wanted, name)}"
        for name in StateShape.model_fields
        if getattr(found, name) != getattr(wanted, name)
    ]
    if differ:
        raise StateMismatch(
            f"{path} does not fit the hooked model: it has {', '.join(differ)}; hook the layers that it was trained "
            "with (leave workspace.hooked_layers out), or train again"
        )


def _merged_config(path: Path, manifest: StateManifest, config: WorkspaceConfig) -> WorkspaceConfig:
    known, given = {*STRUCTURE, *DIALS}, set(manifest.config)
    if unknown := sorted(given - known):
        raise StateMismatch(
            f"{path}/manifest.json: its config has unknown keys {', '.join(unknown)}; use the version that wrote it"
        )
    if missing := sorted(set(STRUCTURE) - given):
        raise StateMismatch(f"{path}/manifest.json: its config lacks {', '.join(missing)}; train again")
    try:
        return config.for_weights(manifest.config)
    except ValidationError as error:
        raise StateMismatch(f"{path} does not fit the configuration: {error.errors()[0]['msg']}") from None
    except ValueError as error:
        raise StateMismatch(f"{path} does not fit the configuration: {error}") from None


def _check_tensors(source: Path, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    problems = [f"lacks {name}" for name in sorted(set(wanted) - set(found))]
    problems += [f"has the unknown {name}" for name in sorted(set(found) - set(wanted))]
    for name in sorted(set(found) & set(wanted)):
        have, want = found[name], wanted[name]
        if have.shape != want.shape or have.dtype != want.dtype:
            problems.append(f"{name} is {have.dtype} {list(have.shape)} instead of {want.dtype} {list(want.shape)}")
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise StateMismatch(f"{source}: {'; '.join(problems[:4])}{more}; use the version that wrote it, or train again")
