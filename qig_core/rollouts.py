"""Several answers instead of one: stochastic rollouts of the recursion, and which of them to give.

PTRM (arXiv 2605.19943): noise at each step of a recursion turns one deterministic answer into samples of what the
kernel might answer; the rollouts run side by side as rows of one batch, and one is picked. How the pick is made
matters more than how many there are ("Speed is Confidence", arXiv 2601.19085: most failures are failures to select):

    log_prob   the highest mean log-probability of the rollout's own symbols
    halt       the highest halt logit: the head that was trained to know whether all symbols are right
    majority   the text that most rollouts agree on, among them the highest mean log-probability

Measured on six intents of banking77 (nano; one kernel trained without noise, one with 0.1; 100 held-out messages each;
eight rollouts). Standard error of an accuracy: 0.05, so these are hints and no proof:

    accuracy of          one greedy answer   log_prob   halt   majority   any rollout right   mean ranking, against one
    noise 0.1            0.58 / 0.61         .60 / .61  .62 / .60  .58 / .61   .64 / .72      .60 / .63, .58 / .63
    noise 0.3            0.58 / 0.61         .61 / .64  .56 / .63  .62 / .63   .73 / .82      .57 / .59, .58 / .63

``log_prob`` is the default because it was never worse than one answer. What selection leaves lying is larger than what
it gains.

For a ranking nothing is picked: the candidates' probabilities are averaged over the rollouts (``rank_candidates``).

Not here: the noise itself (``incremental.Noise``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qig_core.errors import InvalidInput
from qig_core.inference import Generation

Pick = Literal["log_prob", "halt", "majority"]


@dataclass(frozen=True)
class Alternative:
    """One distinct text among the rollouts."""

    text: str
    count: int
    confidence: float  # the highest among those that say it


@dataclass(frozen=True)
class Chosen:
    """``picked`` is what to answer; ``agreement`` the share of rollouts that say the same, in (0, 1]."""

    picked: Generation
    agreement: float
    alternatives: tuple[Alternative, ...]  # the other texts, those that are said most first


def choose(rollouts: Sequence[Generation], pick: Pick = "log_prob") -> Chosen:
    """Pick one of several rollouts of the same question. Raises InvalidInput when there is none."""
    if not rollouts:
        raise InvalidInput("there is no rollout to choose from")
    count = Counter(tuple(rollout.ids) for rollout in rollouts)
    keys = {
        "log_prob": lambda rollout: (0.0, rollout.mean_log_prob),
        "halt": lambda rollout: (rollout.halt_logit, rollout.mean_log_prob),
        "majority": lambda rollout: (count[tuple(rollout.ids)], rollout.mean_log_prob),
    }
    picked = max(rollouts, key=keys[pick])
    others = {tuple(rollout.ids) for rollout in rollouts} - {tuple(picked.ids)}
    best = {ids: max((r for r in rollouts if tuple(r.ids) == ids), key=lambda r: r.mean_log_prob) for ids in others}
    alternatives = [Alternative(best[ids].text, count[ids], best[ids].confidence) for ids in others]
    alternatives.sort(key=lambda other: (-other.count, -other.confidence, other.text))
    return Chosen(picked, count[tuple(picked.ids)] / len(rollouts), tuple(alternatives))
