"""Reading on where a kernel stopped: an exact cache of the recursion, so that a byte costs one position, not the text.

The recursion is causal in all its loops, and its depth is decided at SEP, before the action begins. So the state of a
position never changes once it has been computed, and later positions need of it the keys and values only: those of
every application of a block (pass x cycle x loop x block). A text that goes on runs its new positions alone; many
candidate actions run side by side against the keys and values of one observation.

Exact: what is kept is what a forward pass over the whole text computes, up to the order of float32 additions (tests:
logits within 1e-5 relative, greedy texts and depths equal). A text without SEP decides its depth anew at every
position, as a forward pass over the text up to there does.

Noise (``Noise``) is drawn once per row and position. Rows that repeat one text are then independent rollouts of it.

Not here: choosing what comes next (``inference.py``, ``rollouts.py``).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from qig_core.errors import InvalidConfig, InvalidInput
from qig_core.forest import Forest
from qig_core.m8_kernel import Attend, Carry, KernelConfig, M8Kernel, read_position
from qig_core.vocabulary import PAD, SEP

_BRANCH_POSITIONS = 4096  # in one batch: what fits into the caches of a CPU, and few calls per byte

_KEPT_BYTES = 256 << 20


def rows_at_once(config: KernelConfig, ids: int) -> int:
    """How many texts of ``ids`` ids may be read together, so that their keys and values stay below 256 MB."""
    applications = config.supervision_steps * config.outer_cycles * (config.inner_cycles + 1) * config.blocks
    row = 2 * 4 * applications * config.width * (config.memory_tokens + ids)
    return max(1, _KEPT_BYTES // row)


@dataclass(frozen=True)
class Noise:
    """Gaussian noise of deviation ``level`` on z_H after each cycle (PTRM, arXiv 2605.19943); a rollout draws its own.

    ``level`` may differ from what the kernel was trained with (``KernelConfig.noise``).
    """

    level: float
    generator: torch.Generator  # on the kernel's device

    def __post_init__(self) -> None:
        if not (math.isfinite(self.level) and 0 <= self.level <= 1):
            raise InvalidConfig(f"the noise level must be in [0, 1], got {self.level}")


@dataclass(frozen=True)
class _Kept:
    """Keys and values of one pass, for its A applications of a block in their order."""

    keys: Tensor  # [A, B, H, capacity, d]
    values: Tensor  # [A, B, H, capacity, d]

    @classmethod
    def empty(cls, *shape: int, device: torch.device) -> _Kept:
        return cls(torch.empty(shape, device=device), torch.empty(shape, device=device))

    def take(self, rows: Tensor) -> _Kept:
        return _Kept(self.keys[:, rows], self.values[:, rows])


class _Append:
    """Attention of new positions to all kept ones and themselves; their keys and values are kept, too."""

    def __init__(self, kept: _Kept, start: int, mask: Tensor | None):
        self._kept, self._start, self._mask = kept, start, mask
        self._application = 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        end = self._start + q.shape[2]
        keys, values = self._kept.keys[self._application], self._kept.values[self._application]
        self._application += 1
        keys[:, :, self._start : end] = k
        values[:, :, self._start : end] = v
        if self._start == 0:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return F.scaled_dot_product_attention(q, keys[:, :, :end], values[:, :, :end], attn_mask=self._mask)


class _Branch:
    """Attention of the bins of a forest to the kept positions of their observation and to their own ancestors."""

    def __init__(self, kept: _Kept, length: int, bins: int, mask: Tensor):
        self._kept, self._length, self._bins, self._mask = kept, length, bins, mask
        self._application = 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [B * G, H, Q, d]."""
        keys, values = self._kept.keys[self._application], self._kept.values[self._application]
        self._application += 1
        keys, values = self._beside(keys, k), self._beside(values, v)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=self._mask)

    def _beside(self, kept: Tensor, own: Tensor) -> Tensor:
        seen = kept[:, None, :, : self._length].expand(-1, self._bins, -1, -1, -1).flatten(0, 1)
        return torch.cat((seen, own), dim=2)


class Continuation:
    """A batch of texts that were read and can be continued. See the module docstring.

    After each call ``logits`` [B, V] predict what follows the last id of each row. ``depth`` [B], ``pooled`` [B, D],
    ``basin`` and ``halt_logit`` [B] are those of the position where the observation is complete.
    """

    @torch.inference_mode()
    def __init__(self, kernel: M8Kernel, texts: Sequence[Sequence[int]], room: int = 0, noise: Noise | None = None):
        """Read ``texts``, ids of any lengths; ``room``: how many ids may follow. The kernel must be in eval mode."""
        _check(kernel, texts, room)
        self.kernel, self.noise = kernel, noise
        device = kernel.memory.device
        longest = max(len(text) for text in texts)
        ids = torch.tensor([[*text, *([PAD] * (longest - len(text)))] for text in texts], device=device)
        self.lengths = torch.tensor([len(text) for text in texts], device=device)  # [B] ids read
        self._table = kernel.embedding.table()
        self._skip = kernel.config.memory_tokens
        self._capacity = self._skip + longest + room
        self._filled = 0  # positions kept, memory tokens included
        self._passes: list[_Kept] = []
        self._told = (ids == SEP).any(dim=1)  # [B] rows whose depth is decided
        back = torch.arange(-kernel.config.look_back, 0, device=device)
        self._recent = ids.gather(1, (self.lengths[:, None] + back).clamp_min(0))  # [B, look_back], the last ids
        self._recall = None if kernel.association is None else kernel.association.recall(ids)
        # Before and with what ``extend`` read last, for ``retract``.
        self._recalled, self._spread = self._recall, self._recent
        self._read(kernel._input(ids), read_position(ids), self.lengths - 1)
        self._latest = self.logits[:, None]

    @property
    def room(self) -> int:
        """How many more ids may follow."""
        return self._capacity - self._filled

    # -- reading ----------------------------------------------------------------------------------------------

    def _read(self, x: Tensor, marks: Tensor, last: Tensor) -> None:
        """Passes over the whole texts until every row has halted; without SEP, as many as there may be."""
        kernel, skip = self.kernel, self._skip
        cos, sin = kernel.cos[: x.shape[1]], kernel.sin[: x.shape[1]]
        carry, rows = kernel._start(x), torch.arange(len(x), device=x.device)
        running = torch.ones_like(self._told)
        self.depth = torch.zeros_like(self.lengths)
        for number in range(kernel.config.supervision_steps):
            self._passes.append(self._keep())
            answer, carry = self._pass(carry, x, cos, sin, _Append(self._passes[-1], 0, None))
            state = answer[:, skip:]
            pooled = state[rows, marks]  # [B, D]
            halt = kernel.halt(pooled).squeeze(-1)
            if number == 0:
                self.pooled, self.halt_logit, self._state = pooled, halt, state[rows, last]
            else:
                self.pooled = torch.where(running[:, None], pooled, self.pooled)
                self.halt_logit = torch.where(running, halt, self.halt_logit)
                self._state = torch.where(running[:, None], state[rows, last], self._state)
            self.depth += running
            running = running & (halt <= 0)
            if not bool((running | ~self._told).any()):
                break
        self._filled = x.shape[1]
        self.basin = kernel.basin_of(self.pooled)
        self.logits = kernel.head(self._state)
        if kernel.association is not None and self._recall is not None:
            self.logits = self.logits + kernel.association.after(self._recall)

    @torch.inference_mode()
    def extend(self, ids: Tensor) -> Tensor:
        """Read ids [B, L] after what was read, which must be equally long in all rows. Logits [B, L, V] after each."""
        if ids.dim() != 2 or len(ids) != len(self.lengths) or not 1 <= ids.shape[1] <= self.room:
            raise InvalidInput(f"ids must be [{len(self.lengths)}, 1 to {self.room}], got {list(ids.shape)}")
        start, new = self._filled, ids.shape[1]
        if not bool((self.lengths + self._skip == start).all()):
            raise InvalidInput("only texts of one length can be extended together")
        x = self._embed(ids[:, None]).squeeze(1)
        mask = torch.ones(new, start + new, dtype=torch.bool, device=x.device).tril(start) if new > 1 else None
        cos, sin = self.kernel.cos[start : start + new], self.kernel.sin[start : start + new]
        state = self._think(x, cos, sin, [_Append(kept, start, mask) for kept in self._passes])
        self._filled += new
        self.lengths = self.lengths + new
        self._spread = torch.cat((self._recent, ids), dim=1)
        self._recent = self._spread[:, new:]
        logits: Tensor = self.kernel.head(state)
        self._recalled = self._recall
        if self.kernel.association is not None and self._recall is not None:
            spoken, self._recall = self.kernel.association.follow(self._recall, ids)
            logits = logits + spoken
        self._latest, self.logits = logits, logits[:, -1]
        return logits

    @torch.inference_mode()
    def retract(self, count: int) -> None:
        """Unread the last ``count`` ids of the latest ``extend``, but not all of them."""
        read = self._latest.shape[1]
        if not 0 <= count < read:
            raise InvalidInput(f"{count} of the {read} ids that were read last cannot be retracted")
        self._filled -= count
        self.lengths = self.lengths - count
        self._latest = self._latest[:, : read - count]
        kept = self._spread[:, self._spread.shape[1] - read :][:, : read - count]  # [B, read - count]
        if self.kernel.association is not None and self._recalled is not None:
            _, self._recall = self.kernel.association.follow(self._recalled, kept)
        self._spread = self._spread[:, : self._spread.shape[1] - count]
        self._recent = self._spread[:, self._spread.shape[1] - self._recent.shape[1] :]
        self.logits = self._latest[:, -1]

    @torch.inference_mode()
    def branch(self, forest: Forest) -> Tensor:
        """Log-probabilities [B, C] of the forest's candidates, each as what follows each row.

        Nothing is added to what was read. The work is that of the forest's nodes.
        """
        scores = torch.empty(len(self.lengths), forest.count, dtype=torch.float64, device=self.lengths.device)
        size = max(1, _BRANCH_POSITIONS // max(forest.nodes, 1))
        told = bool(self._told.all())
        depth = self.depth if told else torch.full_like(self.depth, len(self._passes))
        # Rows that think equally long go together: nobody runs passes that do not count.
        for passes in set(depth.tolist()):
            for rows in torch.split(torch.nonzero(depth == passes).squeeze(-1), size):
                part = self if len(rows) == len(scores) else self._take(rows, passes)
                scores[rows] = part._branch(forest)
        return scores

    def _take(self, rows: Tensor, depth: int) -> Continuation:
        part = copy.copy(self)
        for name in ("lengths", "logits", "depth", "_told", "_recent"):
            setattr(part, name, getattr(self, name)[rows])
        part._passes = [kept.take(rows) for kept in self._passes[:depth]]
        part._recall = None if self._recall is None else self._recall.take(rows)
        return part

    def _branch(self, forest: Forest) -> Tensor:
        first = torch.log_softmax(self.logits, dim=-1)  # [B, V]
        rows, (bins, size) = len(self.lengths), forest.source.shape
        if forest.nodes == 0:
            return forest.score(first, first.new_empty(rows, bins, size, first.shape[1]))
        texts = self._embed(forest.texts.expand(rows, -1, -1))  # [B, C, L, D]
        x = texts[:, forest.source, forest.depth].flatten(0, 1)  # [B * G, Q, D]
        begin = self._skip + self.lengths  # [B]
        places = (begin[:, None, None] + forest.depth).flatten(0, 1)[:, None]  # [B * G, 1, Q]
        seen = torch.arange(self._filled, device=x.device) < begin[:, None]  # [B, S]
        seen = seen[:, None, None].expand(-1, bins, size, -1)
        mask = torch.cat((seen, forest.ancestors.expand(rows, -1, -1, -1)), dim=-1).flatten(0, 1)[:, None]
        attends = [_Branch(kept, self._filled, bins, mask) for kept in self._passes]
        state = self._think(x, self.kernel.cos[places], self.kernel.sin[places], attends, forest)
        logits = self.kernel.head(state).view(rows, bins, size, -1)
        if self.kernel.association is not None and self._recall is not None:
            logits = logits + self.kernel.association.beside(self._recall, forest)
        return forest.score(first, torch.log_softmax(logits, dim=-1))

    def check_invariants(self) -> None:
        """What is kept is as long as what was read."""
        assert int(self.lengths.max()) + self._skip == self._filled <= self._capacity
        assert int(self.depth.max()) <= len(self._passes)

    # -- the recursion ----------------------------------------------------------------------------------------

    def _keep(self) -> _Kept:
        config = self.kernel.config
        applications = config.outer_cycles * (config.inner_cycles + 1) * config.blocks
        dim = config.width // config.heads
        return _Kept.empty(
            applications, len(self.lengths), config.heads, self._capacity, dim, device=self.lengths.device
        )

    def _embed(self, texts: Tensor) -> Tensor:
        """What follows each row, ids [B, C, L] -> inputs [B, C, L, D]; the first ones look back into the row."""
        rows, count, length = texts.shape
        x = texts.new_empty(rows, count, length, self.kernel.config.width, dtype=self._table.dtype)
        reaches = self.lengths.clamp_max(self._recent.shape[1])  # a short text has less to look back at
        for reach in set(reaches.tolist()):
            chosen = torch.nonzero(reaches == reach).squeeze(-1)
            recent = self._recent[chosen, self._recent.shape[1] - reach :]  # [b, reach]
            ids = torch.cat((recent[:, None].expand(-1, count, -1), texts[chosen]), dim=-1).flatten(0, 1)
            local = self.kernel._local(F.embedding(ids, self._table), ids)[:, reach:]
            x[chosen] = local.view(len(chosen), count, length, -1)
        return x

    def _think(
        self, x: Tensor, cos: Tensor, sin: Tensor, attends: Sequence[_Append | _Branch], forest: Forest | None = None
    ) -> Tensor:
        """Inputs of new positions [B, L, D] -> what is answered from, each at its own depth, [B, L, D]."""
        carry = self.kernel._start(x)
        alike = bool(self._told.all()) and bool((self.depth == len(attends)).all())
        state, running = x, torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        for number, attend in enumerate(attends, start=1):
            answer, carry = self._pass(carry, x, cos, sin, attend, forest)
            state = answer if alike or number == 1 else torch.where(running[..., None], answer, state)
            if not alike:
                repeats = len(x) // len(self.lengths)
                told, depth = (t.repeat_interleave(repeats)[:, None] for t in (self._told, self.depth))
                running = running & torch.where(told, depth > number, self.kernel.halt(answer).squeeze(-1) <= 0)
        return state

    def _pass(
        self, carry: Carry, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, forest: Forest | None = None
    ) -> tuple[Tensor, Carry]:
        high, low = carry
        answer = high
        for _ in range(self.kernel.config.outer_cycles):
            answer, high, low = self.kernel._cycle(high, low, x, cos, sin, None, attend)
            if self.noise is not None and self.noise.level > 0:
                high = high + self.noise.level * self._draw(high, forest)
        return answer, (high, low)

    def _draw(self, high: Tensor, forest: Forest | None) -> Tensor:
        """Noise of the shape of ``high``. In a forest one draw per row and depth: a rollout is one course of noise."""
        assert self.noise is not None
        if forest is None:
            return self.kernel._noise_like(high, self.noise.generator)
        places = high.new_empty(len(self.lengths), forest.longest, high.shape[-1])
        return self.kernel._noise_like(places, self.noise.generator)[:, forest.depth].flatten(0, 1)


def _check(kernel: M8Kernel, texts: Sequence[Sequence[int]], room: int) -> None:
    if kernel.training:
        raise InvalidInput("a kernel reads in eval mode; call kernel.eval() first")
    if not texts or room < 0:
        raise InvalidInput(f"reading needs at least one text and room >= 0, got {len(texts)} and {room}")
    shortest, longest = min(len(text) for text in texts), max(len(text) for text in texts)
    if shortest < 1 or longest + room > kernel.config.context:
        raise InvalidInput(
            f"texts must have 1 to {kernel.config.context - room} ids ({room} more are to follow); "
            f"these have {shortest} to {longest}"
        )
