"""Whether a candidate may serve: it must not be worse than what it replaces, on questions that it has not seen.

With ``exact`` and ``ranked`` (shares of right answers) the candidate is compared with three rivals, question by
question: the long prompt, the question without any memory, and the cartridge that serves now (``must_beat_serving``).
It is non-inferior to a rival when, with 95 % one-sided confidence (paired bootstrap), it is not worse by more than the
margin:

    lower bound of  mean(candidate - rival)  >=  - margin

Not worse than nothing is not enough where nothing is right: it must also have learned something, which is that right
answers are likelier with it than without any memory (``nll``, upper bound of the mean difference below 0).

With ``kl`` there is no right answer, only the long prompt's distribution, from which the long prompt itself differs by
nothing. The candidate must then be nearer to it than the model without memory, with the same confidence,

    upper bound of  mean(kl(candidate) - kl(memoryless))  <  0

and not farther from it than the serving one by more than the margin, in nats per token. That is progress, not parity.

Where ``data.half_life`` is set, an older question counts less in all of these means: after conventions have changed,
what was right before them must not keep out who has learned the new ones.

Fewer questions than ``min_rows`` prove nothing, and the candidate is rejected: what serves goes on to serve. The gate
says yes or no and why, in words; promotion is the registry's.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from memory.distillation.config import GateConfig
from memory.distillation.errors import EvaluationError
from memory.distillation.evaluation import Evaluation, Metric
from memory.distillation.statistics import paired_difference

#: A long prompt that is right less often than this beyond the student's prompt alone is no standard to reach.
WORTHY = 0.20
_CALLED = {"long_prompt": "the long prompt", "memoryless": "no cartridge", "serving": "the serving cartridge"}


@dataclass(frozen=True, slots=True)
class Comparison:
    """The candidate and one rival, on one metric."""

    rival: str
    metric: str
    rows: int
    candidate: float  #: mean
    other: float
    difference: float
    low: float  #: two-sided 95 %
    high: float
    bound: float  #: the one-sided bound that decides
    passed: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """The decision, with its numbers."""

    passed: bool
    reason: str  #: in words, for people
    metric: str
    rows: int
    margin: float
    comparisons: tuple[Comparison, ...] = ()

    def numbers(self) -> dict[str, Any]:
        """For manifests and the database."""
        return asdict(self) | {"comparisons": [asdict(item) for item in self.comparisons]}


def judge(evaluation: Evaluation, config: GateConfig) -> Verdict:
    """Decide about ``evaluation.arms["cartridge"]``. Raises ``EvaluationError`` without that arm."""
    if "cartridge" not in evaluation.arms:
        raise EvaluationError("the candidate was not measured; evaluate() wants it as cartridge")
    mine = evaluation.arms["cartridge"].of(config.chosen)
    rows = int(np.isfinite(mine).sum())
    if rows < config.min_rows:
        return too_few(rows, config)
    rivals = ["memoryless"] if config.chosen == "kl" else ["long_prompt", "memoryless"]
    if config.must_beat_serving:
        rivals.append("serving")
    metric = config.chosen
    comparisons = [_compare(evaluation, rival, metric, config) for rival in rivals if rival in evaluation.arms]
    if metric != "kl" and "memoryless" in evaluation.arms and np.isfinite(evaluation.arms["memoryless"].nll).any():
        comparisons.append(_compare(evaluation, "memoryless", "nll", config))
    failed = [item for item in comparisons if not item.passed]
    told = "; ".join(_told(item, config) for item in (failed or comparisons))
    aged = "" if len(set(evaluation.weights or ())) < 2 else ", older ones counting less"
    reason = f"{'rejected' if failed else 'passed'} on {rows} held-out rows{aged}: {told}{_caveat(evaluation, config)}"
    return Verdict(not failed, reason, config.chosen, rows, config.margin, tuple(comparisons))


def too_few(rows: int, config: GateConfig) -> Verdict:
    """What is said where nothing can be proved."""
    what = {"ranked": " with candidates", "kl": " with the teacher's distribution"}.get(config.chosen, "")
    reason = (
        f"not enough held-out rows{what}: {rows}, gate.min_rows is {config.min_rows}. The candidate is rejected "
        "and what serves goes on; live through more, raise data.eval_share, or lower gate.min_rows"
    )
    return Verdict(False, reason, config.chosen, rows, config.margin)


def nothing_to_rank(config: GateConfig) -> Verdict:
    """Where all held-out rows have one answer, which then is the likeliest of the known ones with any prompt."""
    reason = (
        "all held-out rows have the same answer, so ranking the known answers tells nothing. The candidate is rejected "
        "and what serves goes on; live through more, or use gate.metric exact"
    )
    return Verdict(False, reason, config.chosen, 0, config.margin)


def _compare(evaluation: Evaluation, rival: str, metric: Metric, config: GateConfig) -> Comparison:
    one, other = (evaluation.arms[name].of(metric) for name in ("cartridge", rival))
    both = np.isfinite(one) & np.isfinite(other)
    one, other = one[both], other[both]
    weights = np.ones(len(one)) if evaluation.weights is None else np.array(evaluation.weights)[both]
    found = paired_difference(one, other, weights=weights)
    if metric in ("exact", "ranked"):
        bound, passed = found.lower, found.lower >= -config.margin - 1e-9
    else:
        bound, passed = found.upper, found.upper < (0.0 if rival == "memoryless" else config.margin)
    return Comparison(
        rival=rival,
        metric=metric,
        rows=int(both.sum()),
        candidate=round(float(np.average(one, weights=weights)), 4),
        other=round(float(np.average(other, weights=weights)), 4),
        difference=round(found.difference, 4),
        low=round(found.low, 4),
        high=round(found.high, 4),
        bound=round(bound, 4),
        passed=bool(passed),
    )


def _told(item: Comparison, config: GateConfig) -> str:
    rival = _CALLED[item.rival]
    if item.metric == "nll":
        return (
            f"right answers cost {item.candidate:.2f} nats against {item.other:.2f} with {rival}; with 95 % confidence "
            f"the difference is at most {item.bound:+.2f}, allowed is less than 0"
        )
    if item.metric == "kl":
        allowed = "less than 0" if item.rival == "memoryless" else f"at most {config.margin:g}"
        return (
            f"{item.candidate:.3f} nats from the long prompt against {item.other:.3f} with {rival}; with 95 % "
            f"confidence the difference is at most {item.bound:+.3f}, allowed is {allowed}"
        )
    return (
        f"{item.candidate:.1%} against {item.other:.1%} with {rival}; with 95 % confidence it is at least "
        f"{100 * item.bound:+.1f} points, allowed are {-100 * config.margin:+.1f}"
    )


def _caveat(evaluation: Evaluation, config: GateConfig) -> str:
    """What must not be claimed: parity with a prompt that does not work itself."""
    arms = evaluation.arms
    if config.chosen == "kl" or "long_prompt" not in arms or "memoryless" not in arms:
        return ""
    gain = float(np.nanmean(arms["long_prompt"].of(config.chosen)) - np.nanmean(arms["memoryless"].of(config.chosen)))
    if gain >= WORTHY:
        return ""
    return (
        f". The long prompt itself gains only {100 * gain:.1f} points over no cartridge, so this says nothing about "
        "parity with a memory that works"
    )
