"""A ballot: what one kernel's own loss says about a proposed kernel's sample.

A kernel that knows the sample's answers already makes the proposed kernel redundant; one that does not says that there
is a gap. Three numbers per voter, in nats per byte of the action:

    loss      of its best snapshot on the sample
    baseline  of the context-free baseline, fitted to the sample with the judged experience left out (``FOLDS`` folds)
    home      its held-out loss in its own domain, and the baseline's there

    fit = (1 - loss / baseline) / (1 - home loss / home baseline), in [0, 1]

is the share of its competence at home that it has on the sample. The rule:

    ABSTAIN   it has not learned its own domain (the learning gate), so its loss says nothing
    FOR       its loss on the sample is not clearly below the baseline (the same gate): a coverage gap
    AGAINST   it is, and fit is at least ``REDUNDANT``: it serves this already
    ABSTAIN   it helps, but less than half as much as at home

What a voter's own domain holds of the sample it may have been trained on: it is asked only the rest and what it holds
out, where that is enough. Not here: how ballots are weighed and counted (``governance``).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from olympus.example import Example
from qig_core.baseline import MIN_GATE_ITEMS, ContextFreeBaseline, GateResult, learning_gate
from qig_core.inference import collate, evaluate_pairs
from qig_core.m8_kernel import M8Kernel
from qig_core.vocabulary import EncodedPair, encode_pair

Choice = Literal["for", "against", "abstain"]
FOLDS = 5
#: Share of its competence at home from which a voter calls a proposal redundant.
REDUNDANT = 0.5
#: Experiences of a sample that one voter is asked about: what bounds the time of a vote.
MOST_JUDGED = 48
LEAST_SAMPLE = MIN_GATE_ITEMS
_BATCH = 16


@dataclass(frozen=True, slots=True)
class Ballot:
    """One voter's answer with its evidence. Losses in nats per byte; None: not measured."""

    kernel_id: str
    god_name: str
    domain: str
    vote: Choice
    reason: str
    affinity: float
    loss: float | None = None
    baseline: float | None = None
    home_loss: float | None = None
    home_baseline: float | None = None
    fit: float = 0.0
    items: int = 0
    unseen: bool = True  # False: the voter may have been trained on what it was asked

    def to_json(self) -> dict[str, Any]:
        """Rounded, for an answer and for the audit log."""
        return {key: round(value, 4) if isinstance(value, float) else value for key, value in asdict(self).items()}


class Sample:
    """The experiences that stand for a proposal: up to ``MOST_JUDGED`` are judged, all shape the baseline."""

    def __init__(self, examples: Sequence[Example], holdout_percent: int):
        unique = {example.content_hash: example for example in examples if example.action}
        self.examples = [unique[digest] for digest in sorted(unique)]
        self._holdout_percent = holdout_percent
        self._by_context: dict[int, tuple[list[EncodedPair], Tensor]] = {}

    def __len__(self) -> int:
        return len(self.examples)

    def for_voter(self, known: Collection[str] | None) -> tuple[list[int], bool]:
        """Indices of what to ask a voter that may have learned from ``known`` hashes (None: from anything), and
        whether it cannot have been trained on them."""
        everything = list(range(len(self.examples)))
        unseen = [index for index in everything if self._unseen(self.examples[index].content_hash, known)]
        if len(unseen) >= LEAST_SAMPLE:
            return unseen[:MOST_JUDGED], True
        return everything[:MOST_JUDGED], False

    def encoded(self, context: int) -> tuple[list[EncodedPair], Tensor]:
        """All pairs as a kernel of that context sees them, and the left-out baseline's nats [N] of their actions."""
        if context not in self._by_context:
            pairs = [encode_pair(item.observation, item.action, context) for item in self.examples]
            self._by_context[context] = (pairs, _left_out_nats([pair.action for pair in pairs]))
        return self._by_context[context]

    def _unseen(self, digest: str, known: Collection[str] | None) -> bool:
        held_out = int(digest[:8], 16) % 100 < self._holdout_percent  # as in ``ExperienceBuffer.is_held_out``
        return held_out or (known is not None and digest not in known)


@dataclass(frozen=True, slots=True)
class Voter:
    """A kernel that is asked. ``progress`` as in its status; ``kernel`` is None when nothing was ever measured.

    ``known``: hashes of the sample that its domain holds; None for a kernel that learns from every domain.
    """

    kernel_id: str
    god_name: str
    domain: str
    affinity: float
    progress: Mapping[str, Any]
    kernel: M8Kernel | None
    known: frozenset[str] | None = frozenset()


def cast(voter: Voter, sample: Sample) -> Ballot:
    """The voter's ballot; see the module docstring."""
    home_loss, home_baseline = voter.progress.get("best_loss"), voter.progress.get("baseline_loss")
    blank = Ballot(voter.kernel_id, voter.god_name, voter.domain, "abstain", "", voter.affinity)
    if voter.kernel is None or home_loss is None or not home_baseline:
        return replace(blank, reason="nothing was measured on it yet")
    home = replace(blank, home_loss=home_loss, home_baseline=home_baseline)
    if not voter.progress.get("loss_ok"):
        why = voter.progress.get("gate_reason") or "not examined yet"
        return replace(home, reason=f"it has not learned its own domain: {why}")
    indices, unseen = sample.for_voter(voter.known)
    gate, loss, baseline = _measure(voter.kernel, sample, indices)
    fit = _fit(loss, baseline, home_loss, home_baseline) if gate.ok else 0.0
    vote, reason = _choose(gate, loss, baseline, fit)
    measured = replace(home, loss=loss, baseline=baseline, fit=fit, items=len(indices), unseen=unseen)
    return replace(measured, vote=vote, reason=reason)


def _choose(gate: GateResult, loss: float, baseline: float, fit: float) -> tuple[Choice, str]:
    shown = f"{loss:.3f} against the baseline's {baseline:.3f} nats per byte"
    if not gate.ok:
        return "for", f"a gap: {shown} is not clearly below"
    if fit >= REDUNDANT:
        return "against", f"redundant: {shown} is {fit:.0%} of what it saves at home"
    return "abstain", f"it helps a little: {shown} is {fit:.0%} of what it saves at home"


def _fit(loss: float, baseline: float, home_loss: float, home_baseline: float) -> float:
    home = 1.0 - home_loss / home_baseline
    return min(max((1.0 - loss / baseline) / home, 0.0), 1.0) if home > 0 else 0.0


def _measure(kernel: M8Kernel, sample: Sample, indices: Sequence[int]) -> tuple[GateResult, float, float]:
    """The gate, the kernel's loss and the baseline's, both in nats per byte over the chosen experiences."""
    pairs, baseline_nats = sample.encoded(kernel.config.context)
    chosen = [pairs[index] for index in indices]
    # A cropped action is judged as if it ended there, for both alike (as in ``examination``).
    judged = [EncodedPair(pair.ids, [*pair.loss_mask[:-1], True], pair.action, pair.truncated) for pair in chosen]
    batch = collate(judged)
    nats, symbols = evaluate_pairs(kernel, batch.ids, batch.loss_mask, _BATCH)
    expected = baseline_nats[list(indices)]
    total = float(symbols.sum())
    return learning_gate(nats, expected, symbols), float(nats.sum()) / total, float(expected.sum()) / total


def _left_out_nats(actions: Sequence[str]) -> Tensor:
    nats = torch.empty(len(actions), dtype=torch.float64)
    for fold in range(FOLDS):
        baseline = ContextFreeBaseline().fit(action for i, action in enumerate(actions) if i % FOLDS != fold)
        for index in range(fold, len(actions), FOLDS):
            nats[index] = baseline.nats(actions[index])
    return nats
