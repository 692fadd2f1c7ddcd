"""Recall of arbitrary pairs: which code word belongs to a name. Nothing but memory helps.

Keys and values are made of syllables, so they mean nothing. Training and evaluation ask about the same pairs in
different words. The templates can be replaced, for models that know no English.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from agents.environments.base import Split, Task
from agents.errors import EnvironmentDataError
from memory.distillation.strategies.base import chance

SYSTEM_PROMPT = "Answer with the code word only."
TRAIN_TEMPLATES = (
    "What is the code word for {key}?",
    "Which code word belongs to {key}?",
    "Tell me the code word of {key}.",
)
EVAL_TEMPLATES = ("{key}: which code word?", "I need the code word for {key}, please.")
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


@dataclass(frozen=True)
class AssociativeRecall:
    """``pairs`` pairs; every pair is met ``repeats`` times in training, in another template each time round."""

    pairs: int = 32
    repeats: int = 1
    seed: int = 0
    train_templates: tuple[str, ...] = TRAIN_TEMPLATES
    eval_templates: tuple[str, ...] = EVAL_TEMPLATES
    system_prompt: str = SYSTEM_PROMPT
    name: str = "associative-recall"
    _pairs: tuple[tuple[str, str], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        words = len(_CONSONANTS) ** 2 * len(_VOWELS) ** 2
        if self.pairs < 1 or self.repeats < 1 or 2 * self.pairs > words:
            raise EnvironmentDataError(f"between 1 and {words // 2} pairs, and at least one repeat")
        if set(self.train_templates) & set(self.eval_templates) or not (self.train_templates and self.eval_templates):
            raise EnvironmentDataError("training and evaluation need templates, and none in common")
        for template in (*self.train_templates, *self.eval_templates):
            if "{key}" not in template:
                raise EnvironmentDataError(f"the template {template!r} must contain {{key}}")
        object.__setattr__(self, "_pairs", self._make_pairs())

    def tasks(self, split: Split) -> Sequence[Task]:
        """Training: all pairs in random order, ``repeats`` times. Evaluation: each pair in each held-out template."""
        if split == "eval":
            return [
                Task(template.format(key=key), value, key)
                for template in self.eval_templates
                for key, value in self._pairs
            ]
        made = []
        for turn in range(self.repeats):
            pairs = list(enumerate(self._pairs))
            chance(self.seed, "order", str(turn)).shuffle(pairs)
            for place, (key, value) in pairs:
                template = self.train_templates[(place + turn) % len(self.train_templates)]
                made.append(Task(template.format(key=key), value, key))
        return made

    def evaluation(self, episode: int) -> Sequence[Task]:
        """Of the pairs that have been met by then; all of them before any was."""
        met = {task.group for task in self.tasks("train")[:episode]}
        return [task for task in self.tasks("eval") if task.group in met or not met]

    def answers(self) -> Sequence[str]:
        """The values."""
        return sorted(value for _, value in self._pairs)

    def _make_pairs(self) -> tuple[tuple[str, str], ...]:
        syllables = [first + second for first in _CONSONANTS for second in _VOWELS]
        words = ["".join(both) for both in itertools.product(syllables, syllables)]
        chance(self.seed, "words", str(self.pairs)).shuffle(words)
        return tuple(zip(words[: self.pairs], words[self.pairs : 2 * self.pairs], strict=True))
