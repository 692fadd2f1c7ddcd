"""The fluency guard: does a configured workspace leave the model as fluent as it was?

The same questions are answered with the workspace off and on, with the same seeds, by the server's own decode loop.
Three numbers may not get worse by more than their limits:

    loss         mean negative log-likelihood of the answers under the stock model, nats per token
    repetition   share of 4-grams that occurred before in the same answer
    distinct     different bigrams over all bigrams of all answers (worse is less)

Loss and repetition are compared answer by answer. ``control`` puts random virtual tokens of real lengths, at full
weight, in place of the workspace's: the guard has to fail then, or it would not notice anything.

Not here: whether the workspace does any good (``held_out.py``, ``evaluation.py``).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from transformers import DynamicCache

from workspace.answering import Answered, Answering, answer_loss
from workspace.calibration import observe_text
from workspace.context import Context, Segment
from workspace.forward import PassiveContext
from workspace.held_out import random_kv
from workspace.modules import WorkspaceModules
from workspace.sampling import SamplingParams
from workspace.steering import Steering
from workspace.steering_types import Toggles
from workspace.text_quality import distinct, repetition

#: Questions of many kinds; their answers run on for a while.
QUESTIONS = (
    "Explain in simple words why the sky is blue.",
    "Write a short story about a lighthouse keeper who finds a letter.",
    "How do I bake a loaf of bread at home?",
    "What is the difference between a list and a tuple in Python?",
    "Describe a walk through an old forest in autumn.",
    "Give me some advice on how to prepare for a job interview.",
    "What happens when water freezes?",
    "Write a polite letter that asks a neighbour to keep quiet at night.",
    "Why do people celebrate birthdays?",
    "Summarise how a bicycle works.",
    "Tell me about the history of the printing press.",
    "How can I learn to play the guitar without a teacher?",
    "Describe the taste of a ripe mango to somebody who never ate one.",
    "What are the advantages and disadvantages of living in a big city?",
    "Write a dialogue between a cat and a dog who share a house.",
    "How does a vaccine protect the body?",
    "Explain what a loop is in programming, with an example.",
    "What should I pack for a week in the mountains?",
    "Why is sleep important for our health?",
    "Write a product description for a wooden chair.",
    "How do bees make honey?",
    "Describe a day in the life of a fisherman.",
    "What is inflation, and why does it matter?",
    "Give three tips for writing clear emails.",
)


class FluencyLimits(BaseModel):
    """How much worse each number may get."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    loss: float = Field(0.10, ge=0, description="Nats per token, mean over answers.")
    repetition: float = Field(0.05, ge=0, description="Share of repeated 4-grams, mean over answers.")
    distinct: float = Field(0.05, ge=0, description="Share of different bigrams.")


class FluencyOptions(BaseModel):
    """What is asked, and how."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    questions: int = Field(len(QUESTIONS), ge=1, description="So many of the given questions, from the first on.")
    tokens: int = Field(64, ge=8, description="Most tokens of an answer.")
    temperature: float = Field(0.2, ge=0, le=4)
    top_p: float = Field(0.9, gt=0, le=1)
    seed: int = Field(0, ge=0, description="Of the first question; each further one has the next.")


@dataclass(frozen=True, slots=True)
class Quality:
    """Of all answers of one side."""

    loss: float
    repetition: float
    distinct_1: float
    distinct_2: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Change:
    """How one number changed. ``error``: standard error of a paired mean; None where there are no pairs."""

    name: str
    change: float  #: positive is worse
    error: float | None
    limit: float

    @property
    def passed(self) -> bool:
        """Within its limit."""
        return self.change <= self.limit


@dataclass(frozen=True, slots=True)
class FluencyReport:
    """The guard's verdict, with all that led to it."""

    off: Quality
    on: Quality
    changes: tuple[Change, ...]
    questions: int
    equal: int  #: answers that are the same on both sides
    seeds: tuple[int, int]  #: first and last
    control: str | None

    @property
    def passed(self) -> bool:
        """True when nothing got worse beyond its limit."""
        return all(change.passed for change in self.changes)

    def to_json(self) -> dict[str, Any]:
        """JSON types."""
        return {**asdict(self), "passed": self.passed}

    def table(self) -> str:
        """For people."""
        lines = [f"{'':12}{'off':>9}{'on':>9}{'worse by':>10}{'limit':>8}"]
        sides = {
            "loss": (self.off.loss, self.on.loss),
            "repetition": (self.off.repetition, self.on.repetition),
            "distinct": (self.off.distinct_2, self.on.distinct_2),
        }
        for change in self.changes:
            off, on = sides[change.name]
            error = "" if change.error is None else f"  (standard error {change.error:.4f})"
            verdict = "" if change.passed else "  TOO MUCH"
            lines.append(
                f"{change.name:12}{off:9.4f}{on:9.4f}{change.change:+10.4f}{change.limit:8.2f}{error}{verdict}"
            )
        what = "random virtual tokens" if self.control == "random" else "workspace"
        lines.append(
            f"{self.questions} questions, seeds {self.seeds[0]} to {self.seeds[1]}, {self.off.tokens} and "
            f"{self.on.tokens} tokens; {self.equal} answers equal; {what}: {'passed' if self.passed else 'FAILED'}"
        )
        return "\n".join(lines)


def guard(
    steering: Steering,
    options: FluencyOptions | None = None,
    limits: FluencyLimits | None = None,
    *,
    questions: Sequence[str] = QUESTIONS,
    control: str | None = None,
    threads: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> FluencyReport:
    """Ask the questions off and on. ``control`` "random" tests the guard itself. ``progress(done, all)``."""
    options, limits = options or FluencyOptions(), limits or FluencyLimits()
    if control not in (None, "random"):
        raise ValueError(f"unknown control {control!r}; known is random")
    asked = list(questions[: options.questions])
    sides: tuple[list[Answered], list[Answered]] = ([], [])
    with Answering(steering.loaded, steering, threads=threads) as answering:
        noise = RandomTokens(steering, answering.render(_messages(asked[0])), options.seed) if control else None
        for number, question in enumerate(asked):
            params = SamplingParams(
                max_tokens=options.tokens,
                temperature=options.temperature,
                top_p=options.top_p,
                seed=options.seed + number,
            )
            sides[0].append(answering.answer(_messages(question), params))
            if noise is None:
                sides[1].append(answering.answer(_messages(question), params, Toggles(memory=False)))
            else:
                sides[1].append(answering.answer(_messages(question), params, context=noise.context()))
            if progress is not None:
                progress(number + 1, len(asked))
    measured = [[_measure(steering, answer) for answer in side] for side in sides]
    off, on = (_quality(side, numbers) for side, numbers in zip(sides, measured, strict=True))
    return FluencyReport(
        off=off,
        on=on,
        changes=(
            _paired("loss", 0, measured, limits.loss),
            _paired("repetition", 1, measured, limits.repetition),
            Change("distinct", off.distinct_2 - on.distinct_2, None, limits.distinct),
        ),
        questions=len(asked),
        equal=sum(a.token_ids == b.token_ids for a, b in zip(*sides, strict=True)),
        seeds=(options.seed, options.seed + len(asked) - 1),
        control=control,
    )


class RandomTokens:
    """The control: random directions of real lengths at a bias of 0 on the workspace's layers, from the answer on."""

    def __init__(self, steering: Steering, prompt_ids: Sequence[int], seed: int):
        modules = WorkspaceModules(steering.modules.shape, steering.config)
        observe_text(steering.hooked, modules.projector, torch.tensor(prompt_ids))
        self._layers = random_kv(modules, 1, seed)
        self._steering = steering

    def context(self) -> PassiveContext:
        """For one generation."""
        return _Carrying(self._steering, self._layers)


class _Carrying(PassiveContext):
    """Carries the same virtual tokens through all passes, visible from the end of the prompt on."""

    def __init__(self, steering: Steering, layers: Mapping[int, Any]):
        self._steering, self._layers = steering, dict(layers)
        self._segments: dict[int, Segment] = {}

    def begin(self, cache: DynamicCache, prompt_ids: Sequence[int]) -> None:
        """Their birth is the end of the prompt."""
        self._segments = self._steering.as_segments(self._layers, born=int(cache.get_seq_length()) + len(prompt_ids))

    def forward_kwargs(self, start: int, count: int) -> Mapping[str, Any]:
        """The same in every pass."""
        return {"workspace": Context(self._segments)}


def _messages(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def _measure(steering: Steering, answer: Answered) -> tuple[float, float]:
    """Loss and repetition of one answer."""
    loss = answer_loss(steering.loaded, answer.prompt_ids, answer.token_ids)
    return loss, repetition(answer.token_ids)


def _quality(answers: Sequence[Answered], measured: Sequence[tuple[float, float]]) -> Quality:
    texts = [answer.token_ids for answer in answers]
    return Quality(
        loss=statistics.fmean(loss for loss, _ in measured),
        repetition=statistics.fmean(repeated for _, repeated in measured),
        distinct_1=distinct(texts, 1),
        distinct_2=distinct(texts, 2),
        tokens=sum(len(text) for text in texts),
    )


def _paired(name: str, column: int, measured: Sequence[Sequence[tuple[float, float]]], limit: float) -> Change:
    differences = [on[column] - off[column] for off, on in zip(measured[0], measured[1], strict=True)]
    error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else None
    return Change(name, statistics.fmean(differences), error, limit)
