"""One pass of the student: the frozen model with virtual tokens and deltas made of what the slots have seen.

Exactly what serving does, teacher-forced: the slots see the probes update by update, a broadcast is visible from its
birth on, static tokens from the beginning, and a delta at each position is made of the residual at the one before. Two
differences, both in what is differentiated and not in the numbers a model without deltas gives:

- the kept context is read once without gradients (static tokens act on it all the same), and
- the residuals that deltas are made of come from a pass without deltas, so a delta does not see the deltas before it.

Gradients reach keys, values, biases and vectors, and through them the modules; the model is frozen.
Shapes: R rows, K kept context tokens, F fed tokens, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from workspace.context import Context, Delta, Recorder, Segment
from workspace.hooking import HookedModel
from workspace.merging import merge_segments
from workspace.modules import WorkspaceModules
from workspace.projector import LayerKV
from workspace.training_data import Batch, Update

Segments = Mapping[int, Segment]


def slots_after(modules: WorkspaceModules, updates: tuple[Update, ...]) -> Tensor:
    """Slots [R, S, W] after all updates; rows that lack one keep what they had."""
    slots: Tensor | None = None
    for update in updates:
        features = modules.features(update.residuals)  # [R, L * N, F], layer after layer
        mask = update.mask.repeat(1, len(modules.features.layers))
        slots = modules.slots(features, slots, mask).slots
    assert slots is not None, "a batch has at least the update of its prompts"
    return slots


def segments_of(layers: LayerKV, births: Tensor, dtype: torch.dtype) -> dict[int, Segment]:
    """Virtual tokens as a pass carries them, for the rows of ``births`` [R]; of one row, they are for all of them."""
    rows = births.shape[0]
    return {
        layer: Segment(
            keys.to(dtype).expand(rows, -1, -1, -1),
            values.to(dtype).expand(rows, -1, -1, -1),
            bias.float(),
            births.to(keys.device)[:, None].expand(-1, keys.shape[2]),
        )
        for layer, (keys, values, bias) in layers.items()
    }


@dataclass(frozen=True, slots=True, eq=False)
class DeltaMaker:
    """What deltas are made of. ``rounds`` passes approximate the residuals that the deltas before have changed."""

    modules: WorkspaceModules
    slots: Tensor  #: [R, S, W]
    rounds: int = 1


class Student:
    """Runs batches through a hooked model. Not thread-safe; holds nothing of a batch."""

    def __init__(self, hooked: HookedModel):
        self.hooked = hooked
        self._loaded = hooked.loaded

    def logits(self, batch: Batch, broadcast: Segments, static: Segments, deltas: DeltaMaker | None = None) -> Tensor:
        """What the model says after each fed token, [R, F, V], with these virtual tokens and deltas."""
        cache = self._read_prefix(batch, static)
        merged = merge_segments([source for source in (static, broadcast) if source])
        made = {} if deltas is None else self._deltas(batch, cache, merged, deltas)
        logits: Tensor = self._pass(batch, cache, Context(merged, made)).logits
        return logits

    def _deltas(self, batch: Batch, cache: DynamicCache, segments: Segments, maker: DeltaMaker) -> dict[int, Delta]:
        """A delta for each fed position, from the residual at the one before; none at the first, before the birth."""
        layers = maker.modules.shape.layers
        made: dict[int, Delta] = {}
        for number in range(maker.rounds):
            recorder = Recorder(layers, whole=True)
            with torch.no_grad():
                self._pass(batch, copy.deepcopy(cache), Context(segments, made, recorder=recorder), said=False)
            with torch.set_grad_enabled(number == maker.rounds - 1 and torch.is_grad_enabled()):
                made = _positional(maker, recorder, batch.births)
        return made

    @torch.no_grad()
    def _read_prefix(self, batch: Batch, static: Segments) -> DynamicCache:
        """A cache with the kept context."""
        cache = DynamicCache(config=self._loaded.model.config)
        kept = batch.prefix_ids.shape[1]
        if not kept:
            return cache
        device = self._loaded.device
        positions = batch.first[:, None] - kept + torch.arange(kept)
        self._loaded.model(
            batch.prefix_ids.to(device),
            attention_mask=batch.prefix_mask.to(device),
            position_ids=positions.clamp_min(0).to(device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=torch.zeros(1, dtype=torch.long, device=device),
            workspace=Context(static),
        )
        return cache

    def _pass(self, batch: Batch, cache: DynamicCache, context: Context, *, said: bool = True) -> Any:
        """Feed the tokens after the prefix; logits of all of them, or not ``said``. Their padding stands behind them,
        where causality hides it."""
        device, fed = self._loaded.device, batch.fed_ids.shape[1]
        mask = torch.cat((batch.prefix_mask, torch.ones_like(batch.fed_ids)), dim=1)
        positions = batch.first[:, None] + torch.arange(fed)
        return self._loaded.model(
            batch.fed_ids.to(device),
            attention_mask=mask.to(device),
            position_ids=positions.to(device),
            past_key_values=cache,
            use_cache=True,
            # By index: a slice of a batch is not contiguous, and torch would copy the output matrix for every row.
            logits_to_keep=torch.arange(fed if said else 1, device=device),
            workspace=context,
        )


def _positional(maker: DeltaMaker, recorder: Recorder, births: Tensor) -> dict[int, Delta]:
    """Vectors [R, F, hidden] from residuals [R, F, hidden] of the position before each."""
    layers = maker.modules.shape.layers
    before = {layer: recorder.residuals[layer].roll(1, dims=1) for layer in layers}
    rows, fed, hidden = before[layers[0]].shape
    flat = {layer: residual.reshape(rows * fed, hidden) for layer, residual in before.items()}
    slots = maker.slots.repeat_interleave(fed, dim=0)  # [R * F, S, W]
    vectors = maker.modules.projector.delta(slots, flat)
    return {layer: Delta(vector.view(rows, fed, hidden), births.to(vector.device)) for layer, vector in vectors.items()}
