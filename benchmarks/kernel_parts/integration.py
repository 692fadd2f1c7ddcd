"""Which architecture integrates, and does it cost learning? The ablation behind docs/kernels.md.

Eight intents of banking77 (about 130 messages each); 200 messages held out. Every arm is a nano kernel with the
default training and one thing changed; same batches, same number of steps. Reported: the best held-out loss of the
averaged weights (nats per action byte), then Phi of the weights at the end. The directions are those of the design:

    1  noise of the kernel's own          ``noise``         Phi is also shown with that noise instead of 20 dB
    2  a core of eight units              ``core-identity`` each unit remembers itself: a core without coupling
    3  the horizon                        Phi is taken over one outer cycle; ``pass 2`` is the same, one pass later
    4  coupling by design                 ``core``          the core turned by an orthogonal matrix in every cycle
    5  an auxiliary loss                  ``aux``           minus 0.01 times the stochastic interaction of the units

``shuffled`` arms see labels in random order: they may integrate, they must not learn.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_parts.common import Options, banking77, spread, table
from qig_core.baseline import ContextFreeBaseline, learning_gate
from qig_core.inference import collate, evaluate_pairs
from qig_core.integration import kernel_states, measure_integration
from qig_core.learning import Ema, TrainingDefaults, supervised_loss
from qig_core.m8_kernel import KernelConfig, M8Kernel
from qig_core.read_out import projection
from qig_core.vocabulary import PAD, EncodedPair, encode_pair

INTENTS = 8
HELD_OUT = 200
AUXILIARY_WEIGHT = 0.01


@dataclass(frozen=True)
class Arm:
    name: str
    config: dict[str, Any] = field(default_factory=dict)
    auxiliary: bool = False
    shuffled: bool = False


#: ``core`` is what the presets use, so the others say what they do without.
ARMS = (
    Arm("plain", {"core": 0}),
    Arm("noise", {"core": 0, "noise": 0.1}),
    Arm("core-identity", {"core": 8, "core_mixing": "identity"}),
    Arm("core", {"core": 8}),
    Arm("core+noise", {"core": 8, "noise": 0.1}),
    Arm("plain+aux", {"core": 0}, auxiliary=True),
    Arm("core shuffled", {"core": 8}, shuffled=True),
    Arm("plain+aux shuffled", {"core": 0}, auxiliary=True, shuffled=True),
)


@dataclass
class Result:
    best_loss: float
    gate_ok: bool
    phi_start: float
    phi: float
    phi_second_pass: float
    phi_own_noise: float | None
    kappa: float
    gate: float | None
    step_ms: float


def run(options: Options) -> str:
    """All arms, seed by seed, so that a noisy hour hits them alike."""
    steps = 60 if options.quick else 300
    results: dict[str, list[Result]] = {arm.name: [] for arm in ARMS}
    for seed in options.seeds:
        for arm in ARMS:
            results[arm.name].append(_live(arm, seed, steps, options))
            print(f"  {arm.name} seed {seed}: {results[arm.name][-1]}", flush=True)
    head = [
        "arm",
        "held-out nats/byte",
        "gate",
        "Phi untrained",
        "Phi trained",
        "pass 2",
        "own noise",
        "kappa",
        "k",
        "ms",
    ]
    return f"{INTENTS} intents, {steps} steps, nano, n-grams off.\n\n" + table(
        head, [_row(a, results[a.name]) for a in ARMS]
    )


def _row(arm: Arm, found: list[Result]) -> list[str]:
    own = [r.phi_own_noise for r in found if r.phi_own_noise is not None]
    gates = [r.gate for r in found if r.gate is not None]
    return [
        arm.name,
        spread([r.best_loss for r in found], 4),
        f"{sum(r.gate_ok for r in found)}/{len(found)}",
        spread([r.phi_start for r in found], 2),
        spread([r.phi for r in found], 3),
        f"{statistics.median(r.phi_second_pass for r in found):.2f}",
        f"{statistics.median(own):.2f}" if own else "",
        f"{statistics.median(r.kappa for r in found):.3f}",
        f"{statistics.median(gates):.2f}" if gates else "",
        f"{statistics.median(r.step_ms for r in found):.0f}",
    ]


def _live(arm: Arm, seed: int, steps: int, options: Options) -> Result:
    train, held = _pairs(arm, options)
    kernel = M8Kernel(KernelConfig.preset("nano", ngram_buckets=0, association=0, **arm.config), seed=seed)
    defaults = TrainingDefaults()
    optimizer, ema, drawer = defaults.optimizer(kernel), Ema(kernel, defaults.ema_decay), random.Random(seed)
    noise = torch.Generator().manual_seed(seed) if kernel.config.noise > 0 else None
    questions, probe = collate(held), collate(held[:60]).ids
    baseline = ContextFreeBaseline().fit(pair.action for pair in train)
    reference = torch.tensor([baseline.nats(pair.action) for pair in held], dtype=torch.float64)
    started = _phi(kernel.eval(), probe)
    kernel.train()
    best, gate_ok, seconds = math.inf, False, 0.0
    for step in range(steps):
        batch = collate(drawer.sample(train, defaults.batch_size))
        begun = time.thread_time()
        for group in optimizer.param_groups:
            group["lr"] = defaults.lr_at(step)
        optimizer.zero_grad(set_to_none=True)
        passes = defaults.passes_at(step, kernel.config.supervision_steps)
        loss = supervised_loss(kernel, batch.ids, batch.loss_mask, supervision_steps=passes, noise=noise).total
        if arm.auxiliary:
            loss = loss - AUXILIARY_WEIGHT * _stochastic_interaction(kernel, batch.ids)
        loss.backward()
        optimizer.step()
        ema.update(kernel)
        seconds += time.thread_time() - begun
        if (step + 1) % 50 == 0 or step + 1 == steps:
            nats, symbols = evaluate_pairs(ema.shadow, questions.ids, questions.loss_mask)
            found = float(nats.sum() / symbols.sum())
            if found < best:
                best, gate_ok = found, learning_gate(nats, reference, symbols).ok
    shadow = ema.shadow
    report = measure_integration(*kernel_states(shadow, probe))
    assert report.phi is not None
    assert report.kappa is not None
    own = None
    if noise is not None:
        drawn = torch.Generator().manual_seed(0)
        own = measure_integration(*kernel_states(shadow, probe, noise=drawn), snr_db=60.0).phi
    return Result(
        best_loss=best,
        gate_ok=bool(gate_ok),
        phi_start=started,
        phi=report.phi,
        phi_second_pass=_phi(shadow, probe, passes=2),
        phi_own_noise=own,
        kappa=report.kappa,
        gate=None if kernel.core is None else float(torch.sigmoid(kernel.core.gate.detach())),
        step_ms=1000 * seconds / steps,
    )


def _phi(kernel: M8Kernel, probe: Tensor, passes: int = 1) -> float:
    phi = measure_integration(*kernel_states(kernel, probe, passes=passes)).phi
    assert phi is not None
    return phi


def _pairs(arm: Arm, options: Options) -> tuple[list[EncodedPair], list[EncodedPair]]:
    rows = banking77(options, "train")
    intents = sorted({intent for _, intent in rows})
    chosen = set(random.Random(5).sample(intents, INTENTS))
    rows = [(text, intent) for text, intent in rows if intent in chosen]
    random.Random(0).shuffle(rows)
    if arm.shuffled:
        labels = [intent for _, intent in rows]
        random.Random(1).shuffle(labels)
        rows = [(text, label) for (text, _), label in zip(rows, labels, strict=True)]
    pairs = [encode_pair(text, intent, 256) for text, intent in rows]
    return pairs[HELD_OUT:], pairs[:HELD_OUT]


def _stochastic_interaction(kernel: M8Kernel, ids: Tensor) -> Tensor:
    """SI of the eight read-out units over the last outer cycle, differentiable in the last cycle; 20 dB of noise."""
    with torch.no_grad():
        before = kernel(ids, state_loops=True).loops[-2]
    states: list[Tensor] = []
    hook = kernel.head.register_forward_pre_hook(lambda _, given: states.append(given[0]))
    kernel(ids)
    hook.remove()
    valid, basis = ids != PAD, projection(kernel.config.width, 8)
    x, y = (_standardised(state[valid].double() @ basis) for state in (before, states[0]))
    units = torch.eye(8, dtype=torch.float64) * 0.01
    cov_x, cov_y, cov_yx = x.mT @ x / len(x) + units, y.mT @ y / len(y) + units, y.mT @ x / len(x)
    residual = cov_y - cov_yx @ torch.linalg.solve(cov_x, cov_yx.mT)
    alone = cov_y.diagonal() - cov_yx.diagonal().square() / cov_x.diagonal()
    return 0.5 * (alone.log().sum() - torch.linalg.slogdet(residual)[1])


def _standardised(units: Tensor) -> Tensor:
    centred = units - units.mean(0)
    return centred / centred.square().mean(0).sqrt()
