"""optimizer: DiagonalFisher against fused AdamW, on the same kernels, batches, decay groups and EMA.

A nano kernel learns six intents of banking77 (which six depends on the seed). All arms walk in lockstep, one step each
on the same batch, in an order that rotates from step to step, so that a noisy machine is noisy for all. Reported are
the held-out nats per byte of the EMA's action after equal steps, and after equal CPU time: where the quickest arm
ends, the others are read off their own curves. A step is forward, backward and optimizer, in CPU time; its ratio is to
fused AdamW's step on the same batch, the median over steps. What the model Fisher's sampling costs every tenth step
shows in the total.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.kernel_parts.common import SWEEP_SEED, Options, banking77, spread, table
from qig_core.inference import Batch
from qig_core.learning import Ema, TrainingDefaults, collate, evaluate_pairs, model_fisher_loss, supervised_loss
from qig_core.m8_kernel import KernelConfig, M8Kernel
from qig_core.optimizers import DiagonalFisherOptimizer
from qig_core.vocabulary import EncodedPair, encode_pair

INTENTS, HELD = 6, 120
STEPS, EVALUATE_EVERY = 150, 25
_MAX_RATES = 6
REFERENCE = "AdamW, fused"
FISHERS: dict[str, dict[str, Any]] = {
    "DiagonalFisher, empirical, p = 1/2 (default)": {},
    "DiagonalFisher, model, p = 1/2": {"fisher": "model", "relative_damping": 1e-2},
    "DiagonalFisher, model, p = 1": {"fisher": "model", "exponent": 1.0, "relative_damping": 1.0},
}
NAMES = (REFERENCE, *FISHERS)
# Where each sweep begins. The model's Fisher averages squares of single symbols' gradients, the empirical one squares
# the batch's mean, some hundred times smaller: with p = 1/2 the same step needs a learning rate ten or twenty times as
# large. With p = 1 the trust clip sets the length of the step.
LEARNING_RATES = dict(zip(NAMES, ((4e-3, 8e-3), (4e-3, 8e-3), (2e-2, 4e-2), (4e-3, 8e-3)), strict=True))


@dataclass
class Arm:
    """One optimizer on its own copy of the kernel. ``curve``: (CPU seconds, held-out nats per byte)."""

    name: str
    lr: float
    seed: int
    kernel: M8Kernel = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)
    step_seconds: list[float] = field(default_factory=list)
    curve: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.defaults = TrainingDefaults(lr=self.lr)
        self.kernel = M8Kernel(KernelConfig.preset("nano"), seed=self.seed)
        self.ema = Ema(self.kernel)
        self.labels = torch.Generator().manual_seed(self.seed)
        groups = [
            {"params": group["params"], "weight_decay": group["weight_decay"]}
            for group in self.defaults.optimizer(self.kernel).param_groups
        ]
        if self.name == REFERENCE:
            self.optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=self.defaults.betas, fused=True)
        else:
            options = FISHERS[self.name]
            self.optimizer = DiagonalFisherOptimizer(groups, lr=self.lr, betas=self.defaults.betas, **options)

    def step(self, batch: Batch) -> None:
        """One training step on the clock; the EMA, the same for all arms, is off it."""
        begun = time.thread_time()
        number = len(self.step_seconds)
        for group in self.optimizer.param_groups:
            group["lr"] = self.defaults.lr_at(number)
        if isinstance(self.optimizer, DiagonalFisherOptimizer) and self.optimizer.fisher_due:
            loss, samples = model_fisher_loss(self.kernel, batch.ids, batch.loss_mask, self.labels)
            self.optimizer.update_fisher(lambda: loss, samples)
        self.optimizer.zero_grad()
        passes = self.defaults.passes_at(number, self.kernel.config.supervision_steps)
        parts = supervised_loss(self.kernel, batch.ids, batch.loss_mask, supervision_steps=passes)
        parts.total.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.step_seconds.append(time.thread_time() - begun)
        self.ema.update(self.kernel)

    def evaluate(self, held: Batch) -> None:
        nats, symbols = evaluate_pairs(self.ema.shadow, held.ids, held.loss_mask)
        self.curve.append((sum(self.step_seconds), float(nats.sum() / symbols.sum())))

    def at_time(self, seconds: float) -> float:
        """The held-out loss at a CPU time, between two evaluations by linear interpolation."""
        times = [moment for moment, _ in self.curve]
        after = min(max(bisect_left(times, seconds), 1), len(times) - 1)
        (t0, low), (t1, high) = self.curve[after - 1], self.curve[after]
        return low + (high - low) * min((seconds - t0) / (t1 - t0), 1.0)


def run(options: Options) -> str:
    rows = banking77(options, "train")
    steps, every = (4, 2) if options.quick else (STEPS, EVALUATE_EVERY)
    swept = {name: _sweep(name, rows, steps) for name in NAMES}
    runs = []
    for seed in options.seeds:
        runs.append(_race([Arm(name, swept[name][0], seed) for name in NAMES], rows, seed, steps, every))
        print(f"optimizer: seed {seed}: " + "; ".join(f"{a.name} {a.curve[-1]}" for a in runs[-1]), file=sys.stderr)
    return _report(runs, swept, steps)


def _race(arms: list[Arm], rows: Sequence[tuple[str, str]], seed: int, steps: int, every: int) -> list[Arm]:
    train, held = _pairs(rows, seed, arms[0].kernel.config.context)
    draw, order = random.Random(seed), list(arms)
    for step in range(steps):
        batch = collate(draw.sample(train, arms[0].defaults.batch_size))
        for arm in order:
            arm.step(batch)
        order.append(order.pop(0))
        if (step + 1) % every == 0:
            for arm in arms:
                arm.evaluate(held)
    return arms


def _pairs(rows: Sequence[tuple[str, str]], seed: int, context: int) -> tuple[list[EncodedPair], Batch]:
    """Messages of six intents drawn by the seed: training pairs, and a held-out batch."""
    draw = random.Random(seed)
    names = set(draw.sample(sorted({intent for _, intent in rows}), INTENTS))
    chosen = [encode_pair(text, intent, context) for text, intent in rows if intent in names]
    draw.shuffle(chosen)
    return chosen[HELD:], collate(chosen[:HELD])


def _sweep(name: str, rows: Sequence[tuple[str, str]], steps: int) -> tuple[float, dict[float, float]]:
    """The learning rate with the best last held-out loss, and all that were tried; goes on while the end is best."""
    tried: dict[float, float] = {}
    grid = list(LEARNING_RATES[name])
    while grid:
        for lr in grid:
            tried[lr] = _race([Arm(name, lr, SWEEP_SEED)], rows, SWEEP_SEED, steps, steps)[0].curve[-1][1]
            print(f"optimizer: sweep, {name}: lr {lr:g} -> {tried[lr]:.4f}", file=sys.stderr, flush=True)
        best = min(tried, key=lambda lr: tried[lr])
        edge = {min(tried): best / 2, max(tried): best * 2}.get(best)
        grid = [edge] if edge is not None and len(tried) < _MAX_RATES else []
    return best, tried


def _report(runs: list[list[Arm]], swept: dict[str, tuple[float, dict[float, float]]], steps: int) -> str:
    """``runs``: per seed, the arms in the order of NAMES."""
    table_rows, last = [], {}
    for index, name in enumerate(NAMES):
        arms = [run[index] for run in runs]
        last[name] = [arm.curve[-1][1] for arm in arms]
        equal = [arm.at_time(min(other.curve[-1][0] for other in run)) for arm, run in zip(arms, runs, strict=True)]
        ratios = [_ratio(arm, run[0]) for arm, run in zip(arms, runs, strict=True)]
        milliseconds = statistics.median(1e3 * second for arm in arms for second in arm.step_seconds)
        totals = [arm.curve[-1][0] / run[0].curve[-1][0] for arm, run in zip(arms, runs, strict=True)]
        cells = [spread(last[name]), spread(equal), f"{milliseconds:.1f}", spread(ratios), spread(totals)]
        table_rows.append([name, f"{swept[name][0]:g}", *cells])
    head = ["arm", "lr", f"nats/byte, {steps} steps", "nats/byte, equal CPU time", "step ms"]
    head += ["step / AdamW's", "total / AdamW's"]
    best = {name: statistics.median(values) for name, values in last.items()}
    winner = min(best, key=lambda name: best[name])
    gaps = "; ".join(
        f"{name}: {spread([ours - theirs for ours, theirs in zip(last[name], last[REFERENCE], strict=True)])}"
        for name in FISHERS
    )
    tries = "; ".join(
        f"{name}: " + ", ".join(f"{lr:g} -> {loss:.3f}" for lr, loss in sorted(tried.items()))
        for name, (_, tried) in swept.items()
    )
    return (
        f"nano, {INTENTS} intents of banking77, batches of {TrainingDefaults().batch_size}, "
        f"{HELD} messages held out. Lower is better.\n\n"
        f"{table(head, table_rows)}\n\n"
        f"Lowest median after equal steps: {winner}. Minus AdamW, paired by seed: {gaps}.\n\n"
        f"Sweeps: {tries}."
    )


def _ratio(arm: Arm, reference: Arm) -> float:
    return statistics.median(a / b for a, b in zip(arm.step_seconds, reference.step_seconds, strict=True))
