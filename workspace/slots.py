"""The slots: a small recurrent memory that sees residuals of the model and retrieved embeddings.

``ProbeFeatures`` brings what was seen to one width. ``SlotWorkspace`` lets slots compete for these inputs:

- Slot Attention (Locatello et al. 2020): softmax over slots, weighted mean over inputs, GRU and a residual MLP;
- implicit differentiation (Chang, Griffiths and Levine 2022): all rounds but the last run without gradients, which
  costs constant memory and is stabler;
- learnt first slots with the straight-through trick (Jia et al. 2023, BO-QSA): without it the implicit form gives them
  no gradient at all;
- competitive write (Goyal et al. 2022): the ``write_slots`` slots that claimed most of the inputs are written, the
  others keep what they held.

Not here: when to update (``controller.py``), what slots do to the model (``projector.py``). Nothing is random after
construction. Shapes: R rows, N inputs, F their width, L probed layers, S slots, W slot width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

#: Added to attention before the mean over inputs (Slot Attention): a slot that claims nothing averages everything.
EPSILON = 1e-8


class SlotUpdate(NamedTuple):
    """What one update gives."""

    slots: Tensor  #: [R, S, W]
    write: Tensor  #: [R, S] 1 where the slot was written, else 0; carries a gradient to who wins
    attention: Tensor  #: [R, S, N] share of each input that a slot claimed; sums to 1 over slots


class ProbeFeatures(nn.Module):
    """Residuals of the probed layers and retrieved embeddings -> inputs of the slots.

    Each residual is divided by its root mean square (layers differ by orders of magnitude) and projected by its own
    layer's matrix; the learnt offsets tell layers and memories apart.
    """

    def __init__(self, layers: Sequence[int], hidden_size: int, embedding_width: int, width: int):
        super().__init__()
        self.layers = tuple(layers)
        self.weight = nn.Parameter(torch.randn(len(self.layers), hidden_size, width) * hidden_size**-0.5)  # [L, h, F]
        self.offset = nn.Parameter(torch.randn(len(self.layers), 1, width) * 0.1)  # [L, 1, F]
        self.memory = nn.Linear(embedding_width, width)  # its bias is the memories' offset

    def forward(self, residuals: Mapping[int, Tensor], retrieved: Tensor | None = None) -> Tensor:
        """``residuals[layer]`` [R, hidden] or [R, T, hidden], of each probed layer; ``retrieved`` [R, K, E].

        Returns [R, N, F] with N = L * T + K, layer after layer, then memories. Raises ``KeyError`` for a layer that
        is missing.
        """
        seen = torch.stack([residuals[layer].to(self.weight) for layer in self.layers])  # [L, R, (T,) hidden]
        layers, rows, width = seen.shape[0], seen.shape[1], self.weight.shape[2]
        flat = functional.rms_norm(seen.reshape(layers, -1, seen.shape[-1]), seen.shape[-1:])  # [L, R * T, hidden]
        features = torch.baddbmm(self.offset, flat, self.weight)  # [L, R * T, F]
        features = features.view(layers, rows, -1, width).transpose(0, 1).reshape(rows, -1, width)
        if retrieved is None:
            return features
        memories = self.memory(functional.rms_norm(retrieved.to(self.weight), retrieved.shape[-1:]))  # [R, K, F]
        return torch.cat([features, memories], dim=1)


class SlotWorkspace(nn.Module):
    """``slots`` slots of ``width`` numbers that compete for inputs of width ``features``.

    ``straight_through`` False is the plain implicit form, whose first slots are never trained; it is here to compare.
    """

    def __init__(
        self,
        *,
        features: int,
        slots: int,
        width: int,
        iterations: int,
        write_slots: int | None = None,
        straight_through: bool = True,
    ):
        super().__init__()
        write_slots = slots if write_slots is None else write_slots
        if slots < 2 or iterations < 1 or not 1 <= write_slots <= slots:
            raise ValueError(
                "at least 2 slots, 1 iteration and from 1 to all slots that are written, got "
                f"{slots}, {iterations}, {write_slots}"
            )
        self.iterations = iterations
        self.write_slots = write_slots
        self.straight_through = straight_through
        # Orthogonal: slots that begin equal would stay equal for ever.
        self.first = nn.Parameter(nn.init.orthogonal_(torch.empty(slots, width)))  # [S, W]
        self.norm_inputs = nn.LayerNorm(features)
        self.norm_slots = nn.LayerNorm(width)
        self.norm_mlp = nn.LayerNorm(width)
        self.to_query = nn.Linear(width, width, bias=False)
        self.to_key_value = nn.Linear(features, 2 * width, bias=False)
        self.gru = nn.GRUCell(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))

    def start(self, rows: int) -> Tensor:
        """The learnt first slots, [R, S, W]."""
        return self.first.expand(rows, -1, -1)

    def forward(self, features: Tensor, slots: Tensor | None = None, mask: Tensor | None = None) -> SlotUpdate:
        """One update of ``slots`` [R, S, W] (None: the first ones) by ``features`` [R, N, F].

        ``mask`` [R, N] is False for inputs that a row lacks; a row that lacks all of them is not written.
        """
        begin = self.start(features.shape[0]) if slots is None else slots
        seen = self._see(features)
        current = begin
        with torch.no_grad():
            for _ in range(self.iterations - 1):
                current, _ = self._round(current, seen, mask)
        if self.straight_through:  # the value of current, the gradient of begin; the bracket is exactly zero
            current = current.detach() + (begin - begin.detach())
        else:
            current, begin = current.detach(), begin.detach()
        proposed, attention = self._round(current, seen, mask)
        write = self._compete(attention, mask)  # [R, S]
        return SlotUpdate(torch.lerp(begin, proposed, write[..., None]), write, attention)

    def _see(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """What all rounds share: [R, W, N] to score slots with, [R, N, 3 W] for the gates of the GRU.

        Queries' and gates' matrices are applied to the few inputs here rather than to the slots in every round, which
        by associativity is the same and takes a tenth off an update.
        """
        keys, values = self.to_key_value(self.norm_inputs(features)).chunk(2, dim=-1)  # [R, N, W] each
        scores = (keys @ self.to_query.weight) * keys.shape[-1] ** -0.5
        return scores.transpose(1, 2), functional.linear(values, self.gru.weight_ih, self.gru.bias_ih)

    def _round(self, slots: Tensor, seen: tuple[Tensor, Tensor], mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Slots compete once: proposed slots [R, S, W] and attention [R, S, N]."""
        scores, values = seen
        attention = (self.norm_slots(slots) @ scores).softmax(dim=1)
        if mask is None:
            weights = attention + EPSILON
            weights = weights / weights.sum(dim=-1, keepdim=True)
        else:
            attention = attention * mask[:, None]
            weights = (attention + EPSILON) * mask[:, None]
            weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(EPSILON)  # 0 where no input is there
        changed = self._gru(weights @ values, slots)
        return changed + self.mlp(self.norm_mlp(changed)), attention

    def _gru(self, inputs: Tensor, slots: Tensor) -> Tensor:
        """``self.gru`` with its input matrix applied already: ``inputs`` [R, S, 3 W] -> new slots [R, S, W]."""
        width = slots.shape[-1]
        memory = functional.linear(slots, self.gru.weight_hh, self.gru.bias_hh)  # [R, S, 3 W]
        reset, keep = (inputs[..., : 2 * width] + memory[..., : 2 * width]).sigmoid().chunk(2, dim=-1)
        proposed = torch.addcmul(inputs[..., 2 * width :], reset, memory[..., 2 * width :]).tanh()
        return torch.lerp(proposed, slots, keep)

    def _compete(self, attention: Tensor, mask: Tensor | None) -> Tensor:
        """1 for the slots that claimed most of the inputs, 0 for others; the gradient is that of the share. [R, S]."""
        if self.write_slots == attention.shape[1]:
            hard = attention.new_ones(attention.shape[:2])
            return hard if mask is None else hard * mask.any(dim=1, keepdim=True)
        share = attention.mean(dim=-1)  # [R, S]
        hard = torch.zeros_like(share).scatter(1, share.topk(self.write_slots, dim=1).indices, 1.0)
        if mask is not None:
            hard = hard * mask.any(dim=1, keepdim=True)
        return hard + (share - share.detach())
