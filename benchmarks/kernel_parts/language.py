"""language: an M8 kernel against a plain GPT of equal parameters and equal CPU time, in bits per byte.

tinyshakespeare, the first 90 % to train on, the last 10 % to be judged on. Both arms get the same number of
parameters (within 3 %), the same context, batches of the same bytes, the same warm-up and cosine schedule over their
CPU time, gradient steps of one thread, and an EMA of their weights. They take turns of a few CPU seconds, so that a
noisy machine is noisy for both; only their own training is on their clock. Learning rates are swept for each arm, and
the sweep goes on past the end of its grid while the end is best.

The kernel spends its parameters on hashed n-grams (looked up, not multiplied) and a few bytes of reach, and its
arithmetic on one small block applied eight times; it is judged after one pass. The GPT's shape is the best of those
tried for 30 to 75 CPU seconds (2 x 128; also 3 x 104, 3 x 96, 4 x 64, and 16 windows of 128 bytes). ``MB seen`` shows
what recursion costs: fewer bytes.
"""

from __future__ import annotations

import copy
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.kernel_parts.common import SWEEP_SEED, Options, spread, table, tinyshakespeare
from benchmarks.kernel_parts.gpt import GRADIENT_CLIP, Gpt, GptConfig, parameter_count
from qig_core.language import bits_per_byte, random_windows, text_loss
from qig_core.learning import TrainingDefaults
from qig_core.m8_kernel import KernelConfig, M8Kernel

CPU_SECONDS = 120.0  # of training, per arm and seed
SWEEP_SECONDS = 40.0
SWEEP_BYTES = 30_000  # of the held-out text, enough to choose a learning rate by
TURN_SECONDS = 2.0
CONTEXT = 64
ROWS = 8  # 512 bytes a step: small batches suit both arms at this budget
WARMUP_SHARE = 0.02
FLOOR = 0.1  # of the learning rate, where the cosine ends
EMA_DECAY = 0.995
DEEP_EVERY = 16  # every so many steps the kernel is supervised on a second pass as well
GPT = GptConfig(layers=2, width=128, heads=4, context=CONTEXT)
KERNEL: dict[str, Any] = {
    "width": 48, "hidden": 128, "blocks": 1, "heads": 2, "outer_cycles": 2, "inner_cycles": 3, "core": 8,
}  # fmt: skip
LEARNING_RATES = {"kernel": (2e-3, 4e-3, 8e-3), "GPT": (1e-3, 2e-3, 4e-3)}
_MAX_RATES = 6


@dataclass
class Arm:
    """A model that learns for a given time. ``loss`` takes windows and the number of the step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[Tensor, int], Tensor]
    logits: Callable[[nn.Module, Tensor], Tensor]
    lr: float
    budget: float
    text: Tensor
    windows: torch.Generator
    gradient_clip: float | None = None
    steps: int = 0
    spent: float = 0.0  # CPU seconds
    ema: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)

    def advance(self, seconds: float) -> None:
        """Train for a turn of CPU seconds, or for what is left of the budget."""
        until = min(self.spent + seconds, self.budget)
        while self.spent < until:
            begun = time.thread_time()
            self._step()
            self.spent += time.thread_time() - begun

    def _step(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * _schedule(self.spent / self.budget)
        windows = random_windows(self.text, CONTEXT, ROWS, self.windows)
        self.optimizer.zero_grad()
        self.loss(windows, self.steps).backward()  # type: ignore[no-untyped-call]
        if self.gradient_clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.gradient_clip)
        self.optimizer.step()
        with torch.no_grad():
            decay = min(EMA_DECAY, (1 + self.steps) / (10 + self.steps))
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)
        self.steps += 1

    def bits(self, text: Tensor) -> tuple[float, float]:
        """Bits per byte of the raw weights and of their EMA."""
        raw, ema = (
            bits_per_byte(lambda ids, model=model: self.logits(model, ids), text, CONTEXT)  # type: ignore[misc]
            for model in (self.model.eval(), self.ema)
        )
        self.model.train()
        return raw, ema


def _schedule(share: float) -> float:
    """Linear warm-up, then a cosine down to FLOOR, over the share of the CPU time that is spent."""
    cosine = FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
    return cosine * min(1.0, (share + 1e-3) / WARMUP_SHARE)


def kernel_arm(seed: int, lr: float, budget: float, text: Tensor) -> Arm:
    kernel = M8Kernel(kernel_config(parameter_count(Gpt(GPT))), seed=seed)

    def loss(windows: Tensor, step: int) -> Tensor:
        return text_loss(kernel, windows, passes=2 if step % DEEP_EVERY == 0 else 1).total

    optimizer = TrainingDefaults(lr=lr).optimizer(kernel)
    generator = torch.Generator().manual_seed(seed)
    return Arm(kernel, optimizer, loss, lambda model, ids: model(ids).logits, lr, budget, text, generator)


def gpt_arm(seed: int, lr: float, budget: float, text: Tensor) -> Arm:
    gpt = Gpt(GPT, seed)

    def loss(windows: Tensor, _: int) -> Tensor:
        return F.cross_entropy(gpt(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())

    generator = torch.Generator().manual_seed(seed)
    return Arm(gpt, gpt.optimizer(lr), loss, lambda model, ids: model(ids), lr, budget, text, generator, GRADIENT_CLIP)


ARMS = {"kernel": kernel_arm, "GPT": gpt_arm}


def kernel_config(parameters: int) -> KernelConfig:
    """The kernel whose n-gram table brings it to the given number of parameters."""

    def config(buckets: int) -> KernelConfig:
        return KernelConfig.preset("nano", context=CONTEXT, ngram_buckets=buckets, **KERNEL)

    few, more = (parameter_count(M8Kernel(config(buckets))) for buckets in (1000, 2000))
    return config(round(1000 + 1000 * (parameters - few) / (more - few)))


def run(options: Options) -> str:
    data = torch.tensor(list(tinyshakespeare(options)), dtype=torch.int64)
    border = int(0.9 * len(data))
    text, held = data[:border], data[border:]
    budget, sweep = CPU_SECONDS, SWEEP_SECONDS
    if options.quick:
        budget, sweep, held = 4.0, 2.0, held[:SWEEP_BYTES]
    rates = {name: _sweep(name, sweep, text, held[:SWEEP_BYTES]) for name in ARMS}
    results: dict[str, list[dict[str, float]]] = {name: [] for name in ARMS}
    for seed in options.seeds:
        arms = {name: make(seed, rates[name][0], budget, text) for name, make in ARMS.items()}
        while any(arm.spent < budget for arm in arms.values()):
            for arm in arms.values():
                arm.advance(TURN_SECONDS)
        for name, arm in arms.items():
            results[name].append(_result(arm, held))
            print(f"language: seed {seed}, {name}: {results[name][-1]}", file=sys.stderr, flush=True)
    return _report(results, rates, budget, sweep)


def _sweep(name: str, seconds: float, text: Tensor, held: Tensor) -> tuple[float, dict[float, float]]:
    """The best learning rate, and the EMA's bits per byte of each that was tried."""
    tried: dict[float, float] = {}
    grid = list(LEARNING_RATES[name])
    while grid:
        for lr in grid:
            arm = ARMS[name](SWEEP_SEED, lr, seconds, text)
            arm.advance(seconds)
            tried[lr] = arm.bits(held)[1]
            print(f"language: sweep, {name}: lr {lr:g} -> {tried[lr]:.4f}", file=sys.stderr, flush=True)
        best = min(tried, key=lambda lr: tried[lr])
        edge = {min(tried): best / 2, max(tried): best * 2}.get(best)
        grid = [edge] if edge is not None and len(tried) < _MAX_RATES else []
    return best, tried


def _result(arm: Arm, held: Tensor) -> dict[str, float]:
    raw, ema = arm.bits(held)
    return {
        "raw": raw,
        "ema": ema,
        "parameters": parameter_count(arm.model),
        "megabytes": arm.steps * ROWS * CONTEXT / 1e6,
        "microseconds": 1e6 * arm.spent / (arm.steps * ROWS * CONTEXT),
    }


def _report(
    results: dict[str, list[dict[str, float]]],
    rates: dict[str, tuple[float, dict[float, float]]],
    budget: float,
    sweep: float,
) -> str:
    rows = []
    for name, runs in results.items():
        rows.append(
            [
                name,
                f"{runs[0]['parameters']:,.0f}",
                f"{rates[name][0]:g}",
                spread([run["raw"] for run in runs]),
                spread([run["ema"] for run in runs]),
                spread([run["megabytes"] for run in runs], 2),
                f"{statistics.median(run['microseconds'] for run in runs):.0f}",
            ]
        )
    head = ["arm", "parameters", "lr", "bits/byte, raw", "bits/byte, EMA", "MB seen", "CPU us per byte"]
    gaps = [
        kernel["ema"] - gpt["ema"] for kernel, gpt in zip(results["kernel"], results["GPT"], strict=True)
    ]  # paired by seed
    if max(gaps) <= 0:
        verdict = "The kernel is no worse on every seed"
    elif min(gaps) > 0:
        verdict = "The GPT is better on every seed"
    else:
        verdict = "Neither is better on every seed"
    swept = "; ".join(
        f"{name}: " + ", ".join(f"{lr:g} -> {bits:.3f}" for lr, bits in sorted(tried.items()))
        for name, (_, tried) in rates.items()
    )
    return (
        f"{budget:.0f} CPU seconds per arm and seed, turns of {TURN_SECONDS:.0f} s, {ROWS} windows of {CONTEXT} bytes; "
        f"GPT {GPT.layers} x {GPT.width}; kernel {KERNEL}. Held out: the last 10 % of tinyshakespeare.\n\n"
        f"{table(head, rows)}\n\n"
        f"{verdict}: kernel minus GPT, EMA weights, {spread(gaps)} bits per byte.\n\n"
        f"Learning rates swept over {sweep:.0f} CPU seconds (EMA bits per byte): {swept}."
    )
