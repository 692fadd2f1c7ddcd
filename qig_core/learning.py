"""Learning from (observation, action) pairs: the supervised loss, the EMA copy, and the defaults that work.

Deep supervision (TRM, arXiv 2510.04871): the same batch gets several passes; each starts from the detached carry of
the one before and is judged by itself, so the kernel learns to improve an answer, not only to give one. The halt head
learns whether all symbols of the action are already right.

What it does not do: choose batches, own threads, step the optimizer, or save anything.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qig_core.association import LR_FACTOR
from qig_core.errors import InvalidConfig, InvalidInput
from qig_core.inference import (
    Answer,
    Batch,
    Generation,
    basin_of_texts,
    by_length,
    candidate_confidences,
    collate,
    evaluate_pairs,
    generate,
    rank_candidates,
    run_to_halt,
)
from qig_core.m8_kernel import Carry, M8Kernel
from qig_core.optimizers import DiagonalFisherOptimizer
from qig_core.replay import MAX_SYMBOLS, Distillation
from qig_core.vocabulary import PAD

__all__ = [
    "Answer",
    "Batch",
    "Ema",
    "Generation",
    "LossParts",
    "TrainingDefaults",
    "basin_of_texts",
    "candidate_confidences",
    "collate",
    "evaluate_pairs",
    "generate",
    "model_fisher_loss",
    "rank_candidates",
    "run_to_halt",
    "supervised_loss",
]


# A batch is run in up to _MAX_GROUPS groups of similar length: less padding, the same loss. A group of fewer symbols
# costs more in calls than it saves in padding (measured: 22-byte rows are twice as fast in one group).
_MAX_GROUPS = 4
_GROUP_SYMBOLS = 500


@dataclass(frozen=True)
class TrainingDefaults:
    """Hyper-parameters for a few hundred to a few thousand experiences."""

    lr: float = 4e-3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.05
    warmup_steps: int = 20
    batch_size: int = 16
    observation_weight: float = 0.1
    halt_weight: float = 0.1
    deep_every: int = 4
    ema_decay: float = 0.999

    def __post_init__(self) -> None:
        """Raises InvalidConfig; betas are checked by the optimizer."""
        for name in ("lr", "weight_decay", "observation_weight", "halt_weight"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InvalidConfig(f"training option {name}={value} must be a finite number, at least 0")
        if self.warmup_steps < 0 or self.batch_size < 1 or self.deep_every < 1:
            raise InvalidConfig("training needs warmup_steps >= 0, batch_size >= 1 and deep_every >= 1")
        if not 0 <= self.ema_decay < 1:
            raise InvalidConfig(f"training option ema_decay={self.ema_decay} must be in [0, 1)")

    def lr_at(self, step: int) -> float:
        """Linear warm-up, then constant: a kernel that learns continuously has no last step to anneal to."""
        return self.lr * min(1.0, (step + 1) / max(self.warmup_steps, 1))

    def set_lr(self, optimizer: torch.optim.Optimizer, step: int, scale: float = 1.0) -> None:
        """The learning rate of a step, for every group in its own proportion."""
        for group in optimizer.param_groups:
            group["lr"] = self.lr_at(step) * scale * group.get("lr_factor", 1.0)

    def passes_at(self, step: int, limit: int) -> int:
        """Passes to supervise in this step: all of them in every ``deep_every``-th step, otherwise one.

        Measured on six banking77 intents: two passes in every step learn no faster per step and cost 1.7 times as much.
        """
        return limit if step % self.deep_every == 0 else 1

    def optimizer(self, kernel: M8Kernel) -> DiagonalFisherOptimizer:
        """DiagonalFisher with decay on matrices of the recursion only, not on embeddings, memory or biases."""
        decayed = [p for name, p in kernel.named_parameters() if name.startswith("blocks.") and p.dim() == 2]
        chosen = {id(p) for p in decayed}
        linear = [] if kernel.association is None else list(kernel.association.parameters())
        chosen |= {id(p) for p in linear}
        others = [p for p in kernel.parameters() if id(p) not in chosen]
        groups = [{"params": decayed, "weight_decay": self.weight_decay}, {"params": others, "weight_decay": 0.0}]
        if linear:
            groups.append({"params": linear, "weight_decay": 0.0, "lr_factor": LR_FACTOR})
        return DiagonalFisherOptimizer(groups, lr=self.lr, betas=self.betas)


@dataclass(frozen=True)
class LossParts:
    """A loss to descend, and what it is made of: detached, the nats and halt of the first pass."""

    total: Tensor  # scalar with gradient, mean over passes
    action_nats_per_byte: float
    observation_nats_per_byte: float
    halt: float
    exact: float  # share of rows whose action is right in every symbol after their last pass
    item_nats: Tensor  # [N] action nats per byte of each row after its last pass: the priority of its experience


def supervised_loss(
    kernel: M8Kernel,
    ids: Tensor,
    loss_mask: Tensor,
    weights: Tensor | None = None,
    supervision_steps: int | None = None,
    observation_weight: float = TrainingDefaults.observation_weight,
    halt_weight: float = TrainingDefaults.halt_weight,
    noise: torch.Generator | None = None,
    distillation: Distillation | None = None,
) -> LossParts:
    """Deeply supervised loss of a batch: ids [N, T] padded right, loss_mask [N, T] aligned with ids.

    ``weights`` [N] >= 0 scale rows (feedback). Total = action nats per byte + observation_weight * nats per byte of
    the observation (it regularises, and gives the basin something to know) + halt_weight * halt loss, averaged over
    ``supervision_steps`` passes (default: the kernel's own). One backward; the passes share no graph. ``noise`` draws
    the recursion's noise of a kernel that has some (``KernelConfig.noise``). ``distillation`` adds alpha times the
    mean squared distance to stored logits (``replay``), in the first pass.
    """
    if ids.shape != loss_mask.shape:
        raise InvalidInput(f"ids {list(ids.shape)} and loss_mask {list(loss_mask.shape)} must have one shape")
    if not bool(loss_mask[:, 1:].any()):
        raise InvalidInput("no symbol of the batch is an action; the loss mask is empty")
    passes = kernel.config.supervision_steps if supervision_steps is None else supervision_steps
    row = torch.ones(len(ids), device=ids.device) if weights is None else weights.to(ids.device, torch.float32)
    mask = loss_mask & (ids != PAD)
    seen = (ids != PAD) & ~loss_mask
    # Denominators of the whole batch, so that the split by length changes the cost and not the loss.
    norm = _Norms(
        action=(mask[:, 1:] * row.unsqueeze(1)).sum().clamp_min(1e-6),
        observation=(seen[:, 1:] * row.unsqueeze(1)).sum().clamp_min(1e-6),
        rows=row.sum().clamp_min(1e-6),
    )
    tally = _Tally(len(ids), ids.device)
    groups = min(max(int((ids != PAD).sum()) // _GROUP_SYMBOLS, 1), _MAX_GROUPS)
    for index, length in by_length(ids, groups):
        chunk = _Chunk(ids[index, :length], mask[index, :length], seen[index, :length], row[index], index)
        _supervise(kernel, chunk, norm, passes, (observation_weight, halt_weight), tally, noise, distillation)
    return LossParts(
        total=torch.stack(tally.losses).sum() / passes + tally.distance(distillation),
        action_nats_per_byte=tally.action,
        observation_nats_per_byte=tally.observation,
        halt=tally.halt,
        exact=float(tally.exact.mean()),
        item_nats=tally.item_nats,
    )


@dataclass(frozen=True)
class _Norms:
    action: Tensor
    observation: Tensor
    rows: Tensor


@dataclass(frozen=True)
class _Chunk:
    ids: Tensor  # [C, T]
    mask: Tensor  # [C, T] action symbols
    seen: Tensor  # [C, T] observation symbols
    row: Tensor  # [C] weights
    index: Tensor  # [C] rows of the batch

    def take(self, rows: Tensor) -> _Chunk:
        return _Chunk(self.ids[rows], self.mask[rows], self.seen[rows], self.row[rows], self.index[rows])


class _Tally:
    """Sums over the chunks of one batch; the floats are those of the first pass."""

    def __init__(self, rows: int, device: torch.device):
        self.losses: list[Tensor] = []
        self.action = self.observation = self.halt = 0.0
        self.exact = torch.zeros(rows, device=device)
        self.item_nats = torch.zeros(rows, device=device)
        self.distances: list[Tensor] = []

    def distance(self, distillation: Distillation | None) -> Tensor | float:
        """alpha times the mean distance of the rows that have stored logits."""
        if distillation is None or not self.distances:
            return 0.0
        return distillation.alpha * torch.stack(self.distances).mean()

    def compare(self, chunk: _Chunk, logits: Tensor, distillation: Distillation) -> None:
        """Note the action's logits of each row, and how far they are from the stored ones."""
        for number, index in enumerate(chunk.index.tolist()):
            now = logits[number, chunk.mask[number, 1:]][:MAX_SYMBOLS]  # [S, V]
            distillation.found[index] = now.detach()
            stored = distillation.targets[index]
            if stored is not None:
                self.distances.append((now - stored.to(now)).square().mean())


def _supervise(
    kernel: M8Kernel,
    chunk: _Chunk,
    norm: _Norms,
    passes: int,
    weights: tuple[float, float],
    tally: _Tally,
    noise: torch.Generator | None,
    distillation: Distillation | None,
) -> None:
    """Passes over one chunk, each from the detached carry of the one before.

    A row that is right should have halted, which the halt head is told; further passes practise on the others.
    """
    carry: Carry | None = None
    for number in range(passes):
        output = kernel(chunk.ids, carry, noise=noise)
        target, action = chunk.ids[:, 1:], chunk.mask[:, 1:]  # [C, T - 1]
        logits, row = output.logits[:, :-1], chunk.row.unsqueeze(1)
        nats = F.cross_entropy(logits.transpose(1, 2), target, reduction="none")  # [C, T - 1]
        right = ((logits.argmax(-1) == target) | ~action).all(dim=1)  # [C]
        halt = F.binary_cross_entropy_with_logits(output.halt_logit, right.float(), reduction="none")
        action_loss = (nats * action * row).sum() / norm.action
        observation_loss = (nats * chunk.seen[:, 1:] * row).sum() / norm.observation
        halt_loss = (halt * chunk.row).sum() / norm.rows
        tally.losses.append(action_loss + weights[0] * observation_loss + weights[1] * halt_loss)
        tally.item_nats[chunk.index] = ((nats * action).sum(1) / action.sum(1).clamp_min(1)).detach()
        tally.exact[chunk.index] = right.float()
        if number == 0:
            tally.action += float(action_loss.detach())
            tally.observation += float(observation_loss.detach())
            tally.halt += float(halt_loss.detach())
            if distillation is not None:
                tally.compare(chunk, logits, distillation)
        again = torch.nonzero(~right).squeeze(-1)
        if len(again) == 0:
            break
        chunk = chunk.take(again)
        carry = (output.carry[0][again], output.carry[1][again])


def model_fisher_loss(
    kernel: M8Kernel, ids: Tensor, loss_mask: Tensor, generator: torch.Generator | None = None
) -> tuple[Tensor, int]:
    """Mean nats of action symbols drawn from the kernel itself, and how many were drawn.

    The closure for ``DiagonalFisherOptimizer.update_fisher`` of a ``fisher="model"`` optimizer, one pass deep.
    """
    logits = kernel(ids).logits[:, :-1][loss_mask[:, 1:]]  # [S, V]
    drawn = torch.multinomial(torch.softmax(logits.detach(), dim=-1), 1, generator=generator).squeeze(-1)
    return F.cross_entropy(logits, drawn), len(drawn)


class Ema:
    """Exponential moving average of a kernel's weights: the copy that evaluates, answers and is measured.

    decay_t = min(decay, (1 + t) / (10 + t)), so that a young average is not dominated by the random start.
    """

    def __init__(self, kernel: M8Kernel, decay: float = TrainingDefaults.ema_decay):
        if not 0 <= decay < 1:
            raise InvalidConfig(f"the EMA decay must be in [0, 1), got {decay}")
        self.decay = decay
        self.steps = 0
        self.shadow: M8Kernel = copy.deepcopy(kernel).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, kernel: M8Kernel) -> None:
        """Fold in the weights after one optimizer step."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        torch._foreach_lerp_(list(self.shadow.parameters()), list(kernel.parameters()), 1 - decay)

    def snapshot(self) -> M8Kernel:
        """An independent copy, for readers on other threads: swap the reference, never the weights."""
        return copy.deepcopy(self.shadow)

    def state_dict(self) -> dict[str, Any]:
        """``{"steps", "decay", "shadow"}``; shadow is a state dict of tensors."""
        return {"steps": self.steps, "decay": self.decay, "shadow": self.shadow.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shadow.load_state_dict(state["shadow"])
        self.steps, self.decay = int(state["steps"]), float(state["decay"])
