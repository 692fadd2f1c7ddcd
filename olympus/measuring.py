"""How often to measure, so that measuring stays a small share of training.

An examination's cost is computed from what it does, not timed: the network's passes over the questions against those
of a step. So a kernel is examined at the same steps on a busy machine, and after a restart, and patience, which counts
examinations, means the same everywhere. (Measured against the CPU time of steps on banking77: 2.8 steps where this says
3.4 for ``nano``, 3.7 where it says 4.1 for ``micro``; a kernel that has learned halts earlier and costs less.)

Phi's cost is timed: it depends on the states, and its schedule touches nothing that is restored.

Not here: measuring (``examination``, ``qig_core.integration``) and what follows from it (``training_session``).
"""

from __future__ import annotations

import math

from olympus.kernel_state import KernelPlan

#: The trained weights sit every so many of the EMA's examinations: they are shown for comparison only.
RAW_EVERY = 16
#: A backward pass through the last outer cycle, in outer cycles of a pass forward.
_BACKWARD_CYCLES = 2


def examination_cost(items: int, plan: KernelPlan) -> float:
    """What an examination with ``items`` questions costs, in steps of training; an upper bound."""
    network, training = plan.network, plan.training
    asked = items * network.supervision_steps * (1 + 1 / RAW_EVERY)
    passes = 1 + (network.supervision_steps - 1) / training.deep_every
    learned = training.batch_size * passes * (network.outer_cycles + _BACKWARD_CYCLES) / network.outer_cycles
    return asked / learned


def examination_interval(items: int, plan: KernelPlan, every: int, share: float) -> int:
    """Steps until the next examination: at least ``every``, more where it would cost more than ``share``."""
    return max(every, math.ceil(examination_cost(items, plan) / share))


def phi_interval(cost: float, step: float, every: int, share: float) -> int:
    """Steps until Phi is measured again, after a measurement of ``cost`` seconds; a step takes ``step`` on average."""
    return max(every, math.ceil(cost / share / max(step, 1e-6)))
