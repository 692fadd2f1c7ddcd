"""Tasks to live on: an observation, the one right answer, and feedback in the words that memories are distilled from.

A task is one step: the agent answers, the environment judges. Everything is a function of texts and a seed, the same in
every process. Training and evaluation never share an observation: they are split by its content, so that the same text
twice lies on one side.

How many episodes are lived, and what is written down, is the runner's business (``agents/episodes.py``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from agents.base import Feedback
from agents.errors import EnvironmentDataError
from memory.distillation.answers import content_key
from memory.distillation.strategies.base import chance
from memory.history import NewExperience

Split = Literal["train", "eval"]


@dataclass(frozen=True, slots=True)
class Task:
    """``group`` is what scores are also reported by: an intent, a phase."""

    observation: str
    answer: str
    group: str = ""

    @property
    def key(self) -> str:
        """The content key of the observation."""
        return content_key(self.observation)


@runtime_checkable
class Environment(Protocol):
    """See the module docstring."""

    @property
    def name(self) -> str:
        """For reports and folders."""

    @property
    def system_prompt(self) -> str:
        """Says what is asked for, without giving any answer away."""

    def tasks(self, split: Split) -> Sequence[Task]:
        """All tasks of a split, in the order in which they are lived through."""

    def evaluation(self, episode: int) -> Sequence[Task]:
        """What an agent that has lived ``episode`` training tasks should be asked, with the answers of that moment."""

    def answers(self) -> Sequence[str]:
        """Every answer that is ever right, for ranking and for drawing wrong ones."""


def judge(task: Task, action: str) -> Feedback:
    """Exact match, white space at the ends aside."""
    if action.strip() == task.answer:
        return Feedback("Correct!", 1.0)
    return Feedback(f"Incorrect! The correct answer is {task.answer}.", 0.0)


def lived_through(
    tasks: Iterable[Task],
    answers: Sequence[str],
    *,
    domain: str,
    mistakes: float = 0.2,
    seed: int = 0,
    with_feedback: bool = True,
) -> list[NewExperience]:
    """Experiences of ``tasks`` as an agent would have them that is wrong in a share ``mistakes`` of the cases.

    A wrong action is one of the other ``answers``. Without feedback every action is right and nothing is said to it.
    """
    made = []
    for number, task in enumerate(tasks):
        dice = chance(seed, "life", f"{number}/{task.key}")
        others = [answer for answer in answers if answer != task.answer]
        wrong = with_feedback and bool(others) and dice.random() < mistakes
        action = dice.choice(others) if wrong else task.answer
        feedback = judge(task, action) if with_feedback else Feedback(None, None)
        made.append(
            NewExperience(
                observation=task.observation,
                action=action,
                domain=domain,
                source="environment",
                feedback=feedback.message,
                score=feedback.score,
                episode_id=f"{domain}-{seed}-{number:06d}"[:64],
                request_id=f"{domain}/{seed}/{number}/{task.key}"[:128],
                meta={"group": task.group},
            )
        )
    return made


def split_texts(
    texts: Mapping[str, Sequence[str]], *, eval_share: float, seed: int
) -> dict[Split, dict[str, list[str]]]:
    """Every class's texts without repetitions, split by content and shuffled by content.

    The salt keeps this split apart from the one that distillation makes of the training side by the same key.
    """
    if not 0 < eval_share < 1:
        raise EnvironmentDataError(f"eval_share must lie between 0 and 1, got {eval_share}")
    found: dict[Split, dict[str, list[str]]] = {"train": {}, "eval": {}}
    seen: set[str] = set()
    for label in sorted(texts):
        placed: dict[Split, list[tuple[str, str]]] = {"train": [], "eval": []}
        for text in texts[label]:
            key = content_key(text)
            if key in seen:
                continue
            seen.add(key)
            digest = hashlib.sha256(f"environment/{seed}/{key}".encode()).hexdigest()
            split: Split = "eval" if int(digest[:8], 16) / 0x1_0000_0000 < eval_share else "train"
            placed[split].append((digest[8:], text))
        for split, items in placed.items():
            if not items:
                raise EnvironmentDataError(f"{label!r} has no text for {split}; give it more than {len(texts[label])}")
            found[split][label] = [text for _, text in sorted(items)]
    return found


def in_turn(texts: Mapping[str, Sequence[str]]) -> list[tuple[str, str]]:
    """(class, text), the classes taking turns, so that any first n are balanced as far as the texts last."""
    longest = max((len(items) for items in texts.values()), default=0)
    return [
        (label, texts[label][place]) for place in range(longest) for label in sorted(texts) if place < len(texts[label])
    ]
