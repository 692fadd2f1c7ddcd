"""Tables: every arm's answers with intervals, and the candidate against each rival on the same questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.kernel_parts.common import table
from memory.distillation.evaluation import ArmResult
from memory.distillation.statistics import mean_interval, paired_difference

MARGIN = 0.05


def arms(found: Sequence[Mapping[str, ArmResult]]) -> str:
    """One row per arm, the questions of all seeds together."""
    lines = []
    for name in found[0]:
        here = [seed[name] for seed in found if name in seed]
        exact, ranked, nll = (np.concatenate([arm.of(metric) for arm in here]) for metric in ("exact", "ranked", "nll"))
        tokens = float(np.mean([arm.prompt_tokens.mean() for arm in here]))
        each = ", ".join(f"{arm.exact.mean():.2f}" for arm in here)
        lines.append(
            [
                name,
                f"{_interval(exact)} ({each})",
                _interval(ranked),
                f"{nll.mean():.2f}",
                f"{tokens:.0f}",
                here[0].slots,
                f"{tokens + here[0].slots:.0f}",
            ]
        )
    head = [
        "arm",
        "exact match [95 %] (each seed)",
        "ranked [95 %]",
        "nats of the answer",
        "prompt tokens",
        "slots",
        "attended",
    ]
    return table(head, lines)


def against(found: Sequence[Mapping[str, ArmResult]], mine: str, rivals: Sequence[str]) -> str:
    """The candidate minus each rival, exact match, paired by question over all seeds."""
    lines = []
    for rival in rivals:
        pairs = [(seed[mine].exact, seed[rival].exact) for seed in found if rival in seed]
        one, other = np.concatenate([pair[0] for pair in pairs]), np.concatenate([pair[1] for pair in pairs])
        difference = paired_difference(one, other)
        verdict = "yes" if difference.lower >= -MARGIN else "no"
        lines.append([rival, f"{difference.difference:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]", verdict])
    return table([f"{mine} minus", "exact match [95 %]", f"not worse by {MARGIN:.0%} (one-sided 95 %)"], lines)


def _interval(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> str:
    told = mean_interval(values)
    return f"{told['mean']:.2f} [{told['low']:.2f}, {told['high']:.2f}]"
