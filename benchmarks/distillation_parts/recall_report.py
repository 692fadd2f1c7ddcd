"""Tables of the recall benchmark: every arm, recall against slots, and cartridges against their rivals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from benchmarks.kernel_parts.common import table
from memory.distillation.evaluation import ArmResult
from memory.distillation.statistics import mean_interval, paired_difference

Values = NDArray[np.float64]
WHOLE, TRAINED, UNTRAINED = "whole history", "cartridge", "cartridge, untrained"


@dataclass
class Found:
    """What an arm answered, history by history. ``budget`` is p: slots, or tokens of a shortened prompt; 0: neither."""

    pairs: int
    arm: str
    budget: int
    alone: list[ArmResult] = field(default_factory=list)
    after_another: list[ArmResult] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  #: CPU, of each training

    def recalled(self, results: Sequence[ArmResult] | None = None) -> Values:
        """[questions of all histories] 1 right, 0 wrong."""
        return np.concatenate([result.exact for result in (self.alone if results is None else results)])


def arms(found: Sequence[Found]) -> str:
    """One row for each arm."""
    lines = []
    for arm in found:
        results = arm.alone
        each = [float(result.exact.mean()) for result in results]
        slots, tokens = results[0].slots, float(np.mean([result.prompt_tokens.mean() for result in results]))
        kl = np.concatenate([result.kl for result in results])
        lines.append(
            [
                arm.pairs,
                arm.arm,
                f"{_interval(arm.recalled())} ({min(each):.2f} to {max(each):.2f})",
                _interval(arm.recalled(arm.after_another)) if arm.after_another else "",
                f"{np.nanmean(kl):.3f}",
                f"{tokens:.0f}",
                slots or "",
                f"{tokens + slots:.0f}",
                f"{np.median(arm.seconds):.0f}" if arm.seconds else "",
            ]
        )
    head = [
        "pairs",
        "arm",
        "recall [95 %] (histories)",
        "after another question",
        "KL, nats a token",
        "prompt tokens",
        "slots",
        "attended",
        "training, CPU s",
    ]
    return table(head, lines)


def capacity(found: Sequence[Found]) -> str:
    """Recall of the trained cartridge against its slots; in brackets slots per pair."""
    mine = {(arm.pairs, arm.budget): arm for arm in found if arm.arm == TRAINED}
    budgets = sorted({budget for _, budget in mine})
    lines = []
    for pairs in sorted({pairs for pairs, _ in mine}):
        cells = [
            f"{_interval(mine[pairs, budget].recalled())} ({budget / pairs:g})" if (pairs, budget) in mine else ""
            for budget in budgets
        ]
        lines.append([pairs, *cells])
    return table(["pairs", *(f"p = {budget} (slots per pair)" for budget in budgets)], lines)


def against(found: Sequence[Found]) -> str:
    """The trained cartridge minus what could stand in its place, paired by question over all histories."""
    lines = []
    for mine in (arm for arm in found if arm.arm == TRAINED):
        rivals = [
            arm for arm in found if arm.pairs == mine.pairs and arm is not mine and arm.budget in (0, mine.budget)
        ]
        for rival in rivals:
            told = paired_difference(mine.recalled(), rival.recalled())
            lines.append(
                [mine.pairs, mine.budget, rival.arm, f"{told.difference:+.3f} [{told.low:+.3f}, {told.high:+.3f}]"]
            )
    return table(["pairs", "p", "cartridge minus", "recall [95 %]"], lines)


def _interval(values: Values) -> str:
    told = mean_interval(values)
    return f"{told['mean']:.3f} [{told['low']:.3f}, {told['high']:.3f}]"
