"""Conventions that change: a family of intents, then another, then both with other labels than before.

Three phases of ``per_phase`` training tasks: family A, family B, and A and B together with new codes. What was right in
the first phase is wrong in the third: a memory has to learn B without losing A, and then to let go of both. Evaluation
asks for every convention that holds at that moment, so that forgetting is seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from agents.environments.base import Split, Task, in_turn, split_texts
from agents.environments.intent_tagging import SYSTEM_PROMPT, make_codes
from agents.environments.messages import INTENTS, load_banking77, make_messages
from agents.errors import EnvironmentDataError

PHASES = ("A", "B", "A+B changed")


@dataclass(frozen=True)
class DriftingConventions:
    """``families``: the intents of A and of B; without a folder the messages are made ones."""

    folder: Path | None = None
    families: tuple[tuple[str, ...], tuple[str, ...]] = (INTENTS[:3], INTENTS[3:])
    per_phase: int = 60
    eval_per_intent: int = 5
    eval_share: float = 0.3
    seed: int = 0
    system_prompt: str = SYSTEM_PROMPT
    name: str = "drifting-conventions"
    _train: tuple[Task, ...] = field(init=False, repr=False, compare=False)
    _eval: dict[str, list[str]] = field(init=False, repr=False, compare=False)
    _labels: tuple[dict[str, str], dict[str, str]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        first, second = self.families
        both = (*first, *second)
        if not first or not second or len(set(both)) != len(both) or self.per_phase < 1:
            raise EnvironmentDataError("two families without a common intent are needed, and tasks in each phase")
        texts = make_messages(both) if self.folder is None else load_banking77(self.folder, both)
        split = split_texts(texts, eval_share=self.eval_share, seed=self.seed)
        object.__setattr__(self, "_eval", split["eval"])
        object.__setattr__(self, "_labels", self._make_labels(both))
        object.__setattr__(self, "_train", tuple(self._make_train(split["train"])))

    def phase_of(self, episode: int) -> int:
        """0, 1 or 2: the phase in which training task ``episode`` lies."""
        return min(episode // self.per_phase, 2)

    def tasks(self, split: Split) -> Sequence[Task]:
        """Training: the three phases in order. Evaluation: all of them under the conventions of the last."""
        return self._train if split == "train" else self._evaluation(2)

    def evaluation(self, episode: int) -> Sequence[Task]:
        """Held-out messages of the families that were met, with the labels that hold after ``episode`` tasks."""
        return self._evaluation(self.phase_of(max(0, episode - 1)))

    def answers(self) -> Sequence[str]:
        """All labels of all phases."""
        return sorted({label for labels in self._labels for label in labels.values()})

    def _make_labels(self, intents: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
        """Labels before the change and after it: the same codes, each for another intent."""
        before = make_codes(intents, self.seed)
        names = sorted(before)
        after = {name: before[names[(place + 1) % len(names)]] for place, name in enumerate(names)}
        return before, after

    def _make_train(self, texts: dict[str, list[str]]) -> list[Task]:
        made: list[Task] = []
        used = {intent: 0 for intent in texts}
        for phase, intents in enumerate((*self.families, tuple(texts))):
            labels = self._labels[1 if phase == 2 else 0]
            for place in range(self.per_phase):
                intent = sorted(intents)[place % len(intents)]
                text = texts[intent][used[intent] % len(texts[intent])]  # from the front again when they run out
                used[intent] += 1
                made.append(Task(text, labels[intent], PHASES[phase]))
        return made

    def _evaluation(self, phase: int) -> list[Task]:
        labels = self._labels[1 if phase == 2 else 0]
        known = [intent for family in self.families[: min(phase, 1) + 1] for intent in family]
        texts = {intent: self._eval[intent][: self.eval_per_intent] for intent in known}
        families = {intent: "A" if intent in self.families[0] else "B" for intent in known}
        return [Task(text, labels[intent], families[intent]) for intent, text in in_turn(texts)]
