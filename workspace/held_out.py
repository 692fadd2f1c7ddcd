"""Loss on held-out texts, hooks off and on, with controls: does the workspace help, and is it the context that helps?

Every text is asked in the same way each time (the broadcast comes at the end of its prompt), so that arms are paired:

    none        no virtual tokens, no deltas
    trained     what the modules make of the text's own context
    other       the same made of another text's context of the same kind: what is gained by being trained at all
    stranger    the same made of the context of another kind of text: what the slots know of the kind
    random      random directions of real lengths, at a bias of 0: what a broken workspace would do
    heuristic   the model's own projections of what the probes saw (``heuristic_kv.py``), at the weights' bias or -2,
                whichever is less: above that they are known to do harm

Nothing is trained here. Shapes as in ``training_forward.py``.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from workspace.capture_blob import Blob
from workspace.capture_folder import Capture
from workspace.context import Segment
from workspace.heuristic_kv import heuristic_kv
from workspace.hooking import HookedModel
from workspace.modules import WorkspaceModules
from workspace.projector import LayerKV
from workspace.training_config import TrainingConfig
from workspace.training_data import Batch, assemble, fixed_rows, of_split
from workspace.training_forward import DeltaMaker, Segments, Student, segments_of, slots_after
from workspace.training_losses import row_means, token_losses

Arm = Literal["none", "trained", "other", "stranger", "random", "heuristic"]
ARMS: tuple[Arm, ...] = get_args(Arm)
_HEURISTIC_BIAS = -2.0


@dataclass(frozen=True, slots=True)
class ArmLoss:
    """Losses of the same texts with one arm. ``keep`` None: the student has the whole context."""

    kind: str
    keep: int | None
    arm: Arm
    rows: tuple[float, ...]  #: nats per token, one for each text

    @property
    def mean(self) -> float:
        """Over texts."""
        return statistics.fmean(self.rows)

    def against(self, base: ArmLoss) -> tuple[float, float]:
        """Mean difference to ``base``, text by text, and its standard error."""
        differences = [mine - its for mine, its in zip(self.rows, base.rows, strict=True)]
        error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else 0.0
        return statistics.fmean(differences), error


def held_out_blobs(capture: Capture, rows: int) -> dict[str, list[Blob]]:
    """The first ``rows`` held-out texts of each kind."""
    found: dict[str, list[Blob]] = {}
    for entry in of_split(capture, "held_out"):
        blobs = found.setdefault(entry.kind, [])
        if len(blobs) < rows:
            blobs.append(capture.read(entry))
    return found


@torch.no_grad()
def measure(
    student: Student,
    modules: WorkspaceModules,
    blobs: Mapping[str, Sequence[Blob]],
    config: TrainingConfig,
    *,
    arms: Iterable[Arm] = ARMS,
    keeps: Sequence[int | None] = (None,),
    seed: int = 0,
) -> list[ArmLoss]:
    """Loss of every kind, context and arm. ``config`` gives rows of a pass, targets, and what the modules were
    trained for; ``seed`` is that of the random arm."""
    modules.eval()
    found = []
    plain = config.model_copy(
        update={"losses": config.losses.model_copy(update={"distillation": 0.0, "controller": 0.0})}
    )
    kinds = list(blobs)
    for number, (kind, texts) in enumerate(blobs.items()):
        strange = blobs[kinds[(number + 1) % len(kinds)]]
        for keep in keeps:
            rows: dict[Arm, list[float]] = {arm: [] for arm in arms}
            for start in range(0, len(texts), config.rows):
                piece = texts[start : start + config.rows]
                batch = assemble(piece, fixed_rows(piece, keep), plain)
                # Where there is only one text of a kind, or one kind, the arms equal "trained" and "other".
                seen: dict[Arm, Batch] = {"trained": batch}
                sources: dict[Arm, Sequence[Blob]] = {"other": texts, "stranger": strange}
                for arm, source in sources.items():
                    chosen = [source[(start + place + 1) % len(source)] for place in range(len(piece))]
                    seen[arm] = assemble(chosen, fixed_rows(chosen, keep), plain)
                for arm, losses in rows.items():
                    logits = _logits(student, modules, batch, seen.get(arm, batch), config, arm, piece, seed + start)
                    mask = batch.target_mask.to(logits.device)
                    losses += row_means(token_losses(logits, batch.target_ids).to(mask.device), mask).tolist()
            found += [ArmLoss(kind, keep, arm, tuple(losses)) for arm, losses in rows.items()]
    return found


def _logits(
    student: Student,
    modules: WorkspaceModules,
    batch: Batch,
    seen: Batch,
    config: TrainingConfig,
    arm: Arm,
    blobs: Sequence[Blob],
    seed: int,
) -> Tensor:
    hooked = student.hooked
    dtype = hooked.loaded.dtype
    if arm == "none":
        return student.logits(batch, {}, {})
    if arm == "random":
        layers = random_kv(modules, batch.rows, seed)
        return student.logits(batch, segments_of(layers, batch.births, dtype), {})
    if arm == "heuristic":
        return student.logits(batch, _heuristic(hooked, modules, blobs, batch.births), {})
    slots = slots_after(modules, seen.updates)
    broadcast, static = steered(modules, slots, batch.births, dtype, config.parts)
    deltas = DeltaMaker(modules, slots, config.delta_rounds) if "residual_delta" in config.parts else None
    return student.logits(batch, broadcast, static, deltas)


def steered(
    modules: WorkspaceModules, slots: Tensor, births: Tensor, dtype: torch.dtype, parts: Sequence[str]
) -> tuple[Segments, Segments]:
    """Virtual tokens of the slots and the static ones, as far as ``parts`` has them."""
    broadcast = segments_of(modules.projector.kv(slots), births, dtype) if "virtual_kv" in parts else {}
    static = (
        segments_of(modules.projector.static(), torch.zeros_like(births), dtype) if "static_tokens" in parts else {}
    )
    return broadcast, static


def random_kv(modules: WorkspaceModules, rows: int, seed: int, bias: float = 0.0) -> LayerKV:
    """Random directions, as long as real keys and values of their head; on the CPU."""
    projector, tokens = modules.projector, modules.config.virtual_tokens
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, projector.shape.kv_heads, tokens, projector.shape.head_dim)
    made: LayerKV = {}
    for place, layer in enumerate(projector.shape.layers):
        keys, values = (
            functional.normalize(torch.randn(shape, generator=generator), dim=-1) * norms[place].cpu()[:, None, None]
            for norms in (projector.key_norms, projector.value_norms)
        )
        made[layer] = (keys, values, torch.full((1, 1, tokens), bias))
    return made


def _heuristic(
    hooked: HookedModel, modules: WorkspaceModules, blobs: Sequence[Blob], births: Tensor
) -> dict[int, Segment]:
    """Text by text, because short prompts have fewer probes than virtual tokens; what a row lacks is hidden."""
    config, device = modules.config, hooked.loaded.device
    layers = {layer: hooked.decoder_layers[layer] for layer in modules.shape.layers}
    rows = []
    for blob in blobs:
        shown = blob.probe_positions < blob.prompt_tokens
        residuals = {layer: residual[shown][None].to(device) for layer, residual in blob.residuals.items()}
        rows.append(heuristic_kv(residuals, layers, config.virtual_tokens))
    found = {}
    for layer in layers:
        counts = [row[layer][0].shape[2] for row in rows]
        most = max(counts)
        keys, values = (
            torch.cat([functional.pad(row[layer][part], (0, 0, 0, most - row[layer][part].shape[2])) for row in rows])
            for part in (0, 1)
        )
        found[layer] = Segment(
            keys * config.kv_plan_scale,
            values * config.kv_projection_scale,
            torch.full((1, 1, most), min(config.kv_plan_bias, _HEURISTIC_BIAS), device=keys.device),
            births.to(keys.device)[:, None].expand(-1, most),
            mask=(torch.arange(most)[None] < torch.tensor(counts)[:, None]).to(keys.device),
        )
    return found
