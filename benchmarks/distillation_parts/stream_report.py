"""Tables of the agent stream: reward by phase and by block, forgetting, distillations.

Pure functions of the scores that ``agents.episodes`` writes and of the server's own rows about its runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.environments.drifting_conventions import PHASES
from agents.episodes import Score
from benchmarks.kernel_parts.common import table
from memory.distillation.statistics import mean_interval, paired_difference

Lives = Mapping[str, Sequence[Score]]
#: Examinations: after which phase, and of which family.
PROBES = ((0, "A"), (1, "A"), (1, "B"), (2, "A"), (2, "B"))


def lived(scores: Sequence[Score]) -> list[Score]:
    """The episodes of a life, in order."""
    return sorted((score for score in scores if score.mode == "train"), key=lambda score: score.episode)


def rewards(scores: Sequence[Score]) -> NDArray[np.float64]:
    """Reward of each episode [N]."""
    return np.array([score.score for score in lived(scores)])


def probe(scores: Sequence[Score], episodes: int, family: str) -> NDArray[np.float64]:
    """Scores of an examination's questions of one family, after so many ``episodes``, in their order."""
    found = [item for item in scores if item.mode == "eval" and item.episode == episodes and item.group == family]
    return np.array([score.score for score in sorted(found, key=lambda score: score.index)])


def by_phase(lives: Lives, per_phase: int) -> str:
    """Mean reward in each phase with its interval, the sum of the life, and what a prompt holds."""
    lines = []
    for name, scores in lives.items():
        episodes = lived(scores)
        got = rewards(scores)
        phases = [_interval(got[place * per_phase : (place + 1) * per_phase]) for place in range(len(PHASES))]
        tokens = np.array([score.prompt_tokens for score in episodes])
        slots = np.array([score.cartridge_slots for score in episodes])
        lines.append(
            [name, *phases, f"{got.sum():.0f} of {len(got)}", f"{tokens.mean():.0f}", f"{(tokens + slots).mean():.0f}"]
        )
    return table(["arm", *PHASES, "reward in all", "prompt tokens", "attended"], lines)


def by_block(lives: Lives, size: int) -> str:
    """Rewards of each block of ``size`` episodes, and the sum after it."""
    longest = max(len(rewards(scores)) for scores in lives.values())
    head = [f"{start + 1}-{min(start + size, longest)}" for start in range(0, longest, size)]
    lines = []
    for name, scores in lives.items():
        got = rewards(scores)
        cells = [
            f"{got[start : start + size].sum():.0f} ({got[: start + size].sum():.0f})"
            for start in range(0, longest, size)
        ]
        lines.append([name, *cells])
    return table(["arm", *head], lines)


def against(lives: Lives, mine: str, per_phase: int) -> str:
    """The reward of ``mine`` minus each other arm's, paired by episode, in each phase."""
    lines = []
    for name, scores in lives.items():
        if name == mine:
            continue
        one, other = rewards(lives[mine]), rewards(scores)
        parts = [slice(place * per_phase, (place + 1) * per_phase) for place in range(len(PHASES))]
        lines.append([name, *(_difference(one[part], other[part]) for part in (*parts, slice(None)))])
    return table([f"{mine} minus", *PHASES, "all"], lines)


def forgetting(lives: Lives, per_phase: int) -> str:
    """Held-out questions after each phase, and what B did to A: the same questions, after B and before."""
    lines = []
    for name, scores in lives.items():
        cells = [_interval(probe(scores, (phase + 1) * per_phase, family)) for phase, family in PROBES]
        before, after = probe(scores, per_phase, "A"), probe(scores, 2 * per_phase, "A")
        lines.append([name, *cells, _difference(after, before)])
    head = [f"{family} after {PHASES[phase]}" for phase, family in PROBES]
    return table(["arm", *head, "A: after B minus before"], lines)


def distillations(runs: Sequence[Mapping[str, Any]]) -> str:
    """One line per run: what started it, what it learned from, what it cost, and what the gate said."""
    lines = []
    for number, run in enumerate(runs, start=1):
        progress = run["progress"]
        arms = progress.get("evaluation", {}).get("arms", {})
        asked = progress.get("verdict", {}).get("rows", 0)
        lines.append(
            [
                number,
                run["trigger"],
                progress.get("experiences", ""),
                progress.get("data", {}).get("train_rows", ""),
                progress.get("training", {}).get("steps", ""),
                f"{run['cpu_seconds']:.0f}",
                asked,
                *(_exact(arms.get(name)) for name in ("cartridge", "serving", "long_prompt")),
                run["state"],
            ]
        )
    head = ["run", "trigger", "experiences", "rows", "steps", "CPU s", "asked", "candidate", "serving", "long prompt"]
    return table([*head, "ended"], lines)


def _exact(arm: Mapping[str, Any] | None) -> str:
    return "" if arm is None or "exact" not in arm else f"{arm['exact']['mean']:.2f}"


def _interval(values: NDArray[np.float64]) -> str:
    if not len(values):
        return ""
    told = mean_interval(values)
    return f"{told['mean']:.2f} [{told['low']:.2f}, {told['high']:.2f}]"


def _difference(one: NDArray[np.float64], other: NDArray[np.float64]) -> str:
    if not len(one) or len(one) != len(other):
        return ""
    found = paired_difference(one, other)
    return f"{found.difference:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"
