"""Kernels that leave and arrive: which checkpoint is packed into an archive, and what becomes of one that comes in.

An import is a new kernel (new id) with a checkpoint of its own, so it answers at once and survives a restart. With
the training state it goes on at the step where it was; without, it starts at step 0 from the weights that answered,
with a fresh optimizer and its warm-up. Either way it learns from this server's history and is examined on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from olympus.archive_reader import KernelArchive, read_archive
from olympus.checkpoint_mirror import CheckpointMirror
from olympus.checkpoints import CheckpointStore
from olympus.errors import CheckpointNotFound
from olympus.experience_buffer import ExperienceBuffer
from olympus.kernel_archive import Identity, Origin, pack, stream
from olympus.kernel_rows import KernelRecord, KernelRows
from olympus.kernel_state import KernelPlan, KernelState
from olympus.requests import ImportRequest, SpawnRequest
from olympus.spawning import Registrar
from settings import KernelSettings


@dataclass(frozen=True, slots=True)
class KernelFile:
    """An archive to send. ``content`` yields its bytes."""

    name: str
    content: Iterator[bytes]


class KernelTransfer:
    """Packs and unpacks kernels. Safe to use from all threads."""

    def __init__(
        self,
        settings: KernelSettings,
        rows: KernelRows,
        registrar: Registrar,
        checkpoints: CheckpointStore,
        mirror: CheckpointMirror | None,
    ):
        self._settings = settings
        self._rows = rows
        self._registrar = registrar
        self._checkpoints = checkpoints
        self._mirror = mirror

    def export(self, kernel_id: str, checkpoint: str, *, training: bool) -> KernelFile:
        """An archive of a kernel's ``best`` or ``latest`` weights, or of a named checkpoint.

        ``best`` and ``latest`` are those of the newest checkpoint on disk. Raises ``CheckpointNotFound`` before the
        first one, and ``CheckpointInvalid`` for one that is damaged.
        """
        kernel = self._rows.get(kernel_id)
        if checkpoint in ("best", "latest"):
            loaded = self._checkpoints.newest(kernel_id).loaded
            if loaded is None:
                raise CheckpointNotFound(f"kernel {kernel_id} has no checkpoint yet; it has not been trained and saved")
        else:
            loaded = self._checkpoints.load(kernel_id, checkpoint)
        state = KernelState.restore(loaded)
        best = state.best if checkpoint == "best" else None
        progress, metrics = state.progress, loaded.manifest.metrics
        origin = Origin(
            name=loaded.name,
            step=progress.step,
            weights="ema" if best is None else "best",
            holdout_loss=metrics.get("holdout_loss") if best is None else progress.best_loss,
            phi=metrics.get("phi"),
        )
        weights = dict(state.ema.shadow.state_dict()) if best is None else best
        files = pack(_identity(kernel), origin, state, weights, training=training)
        return KernelFile(f"{kernel.id}-{loaded.name}.kernel.zip", stream(files))

    def admit(self, data: bytes, request: ImportRequest, actor: str) -> KernelRecord:
        """Make a kernel from an archive; it does not train yet.

        Raises ``ArchiveInvalid`` and whatever refuses a spawn (``DuplicateKernel``, ``KernelLimitReached``,
        ``StorageFull``).
        """
        archive = read_archive(data, self._settings.import_max_bytes)
        kernel, _ = self._registrar.register(self._as_spawn(archive, request), actor)
        try:
            self._publish(kernel, archive)
        except BaseException:
            self._rows.delete(kernel.id, actor)
            self._checkpoints.delete_kernel(kernel.id)
            raise
        origin = archive.manifest.checkpoint
        reason = f"imported: {archive.manifest.kernel.god_name}, {origin.weights} weights of {origin.name}"
        step = 0 if archive.training is None else archive.training.progress.step
        self._rows.set_state(kernel.id, kernel.state, reason, step=step)
        return self._rows.get(kernel.id)

    def _as_spawn(self, archive: KernelArchive, request: ImportRequest) -> SpawnRequest:
        """The request that makes the same plan: what differs from the preset, so that nothing is left to defaults."""
        identity, plan = archive.manifest.kernel, archive.plan.to_json()
        preset = str(plan["network"]["preset_name"])
        plain = KernelPlan.make(preset, {}).to_json()
        options = {
            name: value
            for part in ("network", "training")
            for name, value in plan[part].items()
            if value != plain[part][name] or name == "batch_size"  # the one that the settings may preset
        }
        taken = {kernel.god_name for kernel in self._rows.all()}
        own_name = None if identity.god_name in taken else identity.god_name
        return SpawnRequest(
            name=request.name or own_name,
            domain=request.domain or identity.domain,
            element=identity.element,
            role=identity.role,
            seed=identity.seed,
            preset=preset,
            config=options,
            train=False,
        )

    def _publish(self, kernel: KernelRecord, archive: KernelArchive) -> None:
        state = archive.training or _from_weights(archive)
        origin = archive.manifest.checkpoint
        state.progress.restored_from = f"{archive.manifest.kernel.god_name} {origin.name}, imported"
        settings = self._settings
        nothing = ExperienceBuffer(settings.buffer_capacity, settings.holdout_percent, state.seed).state_dict()
        metrics: dict[str, Any] = {"holdout_loss": None, "phi": None, "converged": False, "regime": "linear"}
        content = {**state.state(), "buffer": nothing}
        saved = self._checkpoints.publish(kernel.id, state.progress.step, state.tensors(), content, metrics)
        if self._mirror is not None:
            self._mirror.copy(kernel.id, saved["name"], urgent=True)


def _identity(kernel: KernelRecord) -> Identity:
    return Identity(
        god_name=kernel.god_name,
        domain=kernel.domain,
        element=str(kernel.config.get("element", "")),
        role=str(kernel.config.get("role", "")),
        seed=kernel.seed,
    )


def _from_weights(archive: KernelArchive) -> KernelState:
    """A kernel at the beginning of its training here, with weights that know something already."""
    state = KernelState(archive.plan, archive.manifest.kernel.seed)
    state.kernel.load_state_dict(archive.weights)
    state.ema.shadow.load_state_dict(archive.weights)
    loss = archive.manifest.checkpoint.holdout_loss
    if loss is not None:  # until the first examination here these are the weights to beat
        state.remember_best()
        state.progress.best_loss, state.progress.best_step = loss, 0
    return state
