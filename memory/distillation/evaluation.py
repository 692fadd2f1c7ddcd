"""What a cartridge is worth on held-out questions, beside the prompts that it shall replace.

Every arm answers the same questions, each with its own way to the memory:

    memoryless    the student's prompt alone: the question, and beside it what ``data.recent_turns`` shows
    long_prompt   the question after the memory in the prompt, as the teacher saw it
    cartridge     the same after the trained prefix
    serving       the same after the prefix that serves now

Measured for each question: whether the greedy answer is the right one, as text (``exact``); whether the right one is
the likeliest of the known answers (``ranked``, where there are candidates); the right answer's negative log-likelihood
(``nll``, nats); the divergence from what the teacher said (``kl``, nats per token, where its distribution is known);
and what it costs: tokens of the prompt, and places that attention reads (``attended``), where slots are never hidden.

Not here: whether the numbers suffice (``gate.py``), speed, agents.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from memory.distillation.answers import same_answer
from memory.distillation.encoding import Encoder, Message, row_name
from memory.distillation.errors import EvaluationError
from memory.distillation.reading import Reader
from memory.distillation.rows import Row
from memory.distillation.statistics import mean_interval
from memory.distillation.student import Between, Student
from memory.distillation.usage import give_back_memory, torch_threads
from workspace.harmony_output import choose_output
from workspace.models import LoadedModel
from workspace.prefix import KVPrefix, fit_prefix

ArmName = Literal["memoryless", "long_prompt", "cartridge", "serving"]
Metric = Literal["exact", "ranked", "kl", "nll"]
#: Tokens by which an answer may be longer than the longest known one before it counts as wrong.
_MORE_TOKENS = 4


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """A held-out observation."""

    key: str  #: its content key
    student: tuple[Message, ...]  #: without the memory, as a server with the cartridge gets it
    teacher: tuple[Message, ...]  #: with it
    answer: str  #: the right one, or the teacher's where nobody knows
    candidates: tuple[str, ...] = ()  #: all answers that are possible, the right one among them
    row: Row | None = None  #: with the teacher's distribution

    def __post_init__(self) -> None:
        if self.candidates and self.answer not in self.candidates:
            raise EvaluationError(f"question {self.key}: the answer {self.answer!r} is none of the candidates")

    @property
    def weight(self) -> float:
        """How much it counts beside others: less where its row is old and ``data.half_life`` says so."""
        return 1.0 if self.row is None else self.row.recency


@dataclass(frozen=True, slots=True, eq=False)
class ArmResult:
    """Of N questions, in their order. NaN where something was not measured."""

    name: str
    answers: tuple[str, ...]
    exact: NDArray[np.float64]  #: [N] 1 right, 0 wrong
    ranked: NDArray[np.float64]  #: [N]
    nll: NDArray[np.float64]  #: [N]
    kl: NDArray[np.float64]  #: [N]
    prompt_tokens: NDArray[np.int64]  #: [N]
    slots: int
    seconds: float

    @property
    def attended(self) -> float:
        """Mean places that attention reads before the answer."""
        return float(self.prompt_tokens.mean()) + self.slots

    def of(self, metric: Metric) -> NDArray[np.float64]:
        """The values of ``metric`` [N]."""
        values: NDArray[np.float64] = getattr(self, metric)
        return values

    def numbers(self) -> dict[str, Any]:
        """For reports: means with their 95 % bootstrap intervals."""
        told: dict[str, Any] = {
            "prompt_tokens": round(float(self.prompt_tokens.mean()), 1),
            "slots": self.slots,
            "attended": round(self.attended, 1),
            "seconds": round(self.seconds, 2),
        }
        for metric in ("exact", "ranked", "nll", "kl"):
            values = self.of(metric)
            values = values[np.isfinite(values)]
            if len(values):
                told[metric] = {"rows": len(values), **mean_interval(values)}
        return told


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All arms on the same questions."""

    keys: tuple[str, ...]
    arms: dict[str, ArmResult] = field(default_factory=dict)
    weights: tuple[float, ...] | None = None  #: of the questions; None: all count alike

    def numbers(self) -> dict[str, Any]:
        """For reports and manifests."""
        return {"questions": len(self.keys), "arms": {name: arm.numbers() for name, arm in self.arms.items()}}


def question_of(row: Row, teacher: Sequence[Message], candidates: Sequence[str] = ()) -> Question:
    """A held-out row as a question. ``teacher``: the messages with the memory, of which rows know nothing."""
    student = tuple({"role": message.role, "content": message.content} for message in row.messages[:-1])
    key = str(row.metadata.get("content_key", ""))
    return Question(key, student, tuple(teacher), row.answer.content, tuple(candidates), row)


def evaluate(
    loaded: LoadedModel,
    questions: Sequence[Question],
    *,
    cartridge: KVPrefix | None = None,
    serving: KVPrefix | None = None,
    long_prompt: bool = True,
    max_tokens: int | None = None,
    threads: int = 0,
    between: Between | None = None,
    progress: Callable[[str], None] | None = None,
) -> Evaluation:
    """Measure the arms that are given. Rows are batched; ``between`` is called before each layer, as in training.

    ``threads`` of torch, 0 for its setting. ``max_tokens``: of a greedy answer; by default a little more than the
    longest known answer. ``progress`` hears the name of each arm before it starts. Raises ``EvaluationError`` without
    questions, ``PrefixMismatch`` and ``InvalidPrompt``.
    """
    if not questions:
        raise EvaluationError("there are no held-out questions; raise data.eval_share or live through more")
    arms: dict[str, tuple[KVPrefix | None, list[tuple[Message, ...]]]] = {
        "memoryless": (None, [question.student for question in questions])
    }
    if long_prompt:
        arms["long_prompt"] = (None, [question.teacher for question in questions])
    for name, prefix in (("cartridge", cartridge), ("serving", serving)):
        if prefix is not None:
            arms[name] = (fit_prefix(loaded, prefix), [question.student for question in questions])
    encoder = Encoder(loaded)
    done: dict[str, ArmResult] = {}
    for name, (prefix, conversations) in arms.items():
        if progress is not None:
            progress(name)
        with torch_threads(threads):
            done[name] = measure_arm(
                loaded, encoder, name, prefix, conversations, questions, max_tokens=max_tokens, between=between
            )
        give_back_memory()
    return Evaluation(
        tuple(question.key for question in questions), done, tuple(question.weight for question in questions)
    )


def measure_arm(
    loaded: LoadedModel,
    encoder: Encoder,
    name: str,
    prefix: KVPrefix | None,
    conversations: Sequence[Sequence[Message]],
    questions: Sequence[Question],
    *,
    max_tokens: int | None = None,
    between: Between | None = None,
) -> ArmResult:
    """One arm: each question asked by its conversation, after ``prefix``."""
    began = time.perf_counter()
    after = prefix is not None
    prompts = [encoder.prompt(messages, after_prefix=after) for messages in conversations]
    known = [
        [encoder.answer(messages, text, after_prefix=after) for text in (question.candidates or (question.answer,))]
        for messages, question in zip(conversations, questions, strict=True)
    ]
    longest = max(len(ids) for of_question in known for ids in of_question)
    most = max_tokens or longest + _MORE_TOKENS
    count = len(questions)
    answers, scores = [""] * count, [[0.0]] * count
    reader = Reader(loaded, prefix, between=between)
    for group in reader.groups(prompts, room=max(most, longest)):
        said = reader.greedy(group, most)
        scored = reader.scores(group, [known[index] for index in group.indices])
        for row, index in enumerate(group.indices):
            answers[index] = spoken(encoder.loaded, prompts[index], said[row])
            scores[index] = scored[row]
    right = [question.candidates.index(question.answer) if question.candidates else 0 for question in questions]
    return ArmResult(
        name=name,
        answers=tuple(answers),
        exact=np.array([float(same_answer(a, q.answer)) for a, q in zip(answers, questions, strict=True)]),
        ranked=np.array(
            [
                float(int(np.argmax(of_question)) == place) if question.candidates else np.nan
                for of_question, place, question in zip(scores, right, questions, strict=True)
            ]
        ),
        nll=np.array([-of_question[place] for of_question, place in zip(scores, right, strict=True)]),
        kl=_divergences(loaded, encoder, prefix, conversations, questions, between),
        prompt_tokens=np.array([len(prompt) for prompt in prompts]),
        slots=0 if prefix is None else prefix.slots,
        seconds=time.perf_counter() - began,
    )


def spoken(loaded: LoadedModel, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """The text of an answer as a client would see it, without its end token, reasoning or stop strings."""
    parser = choose_output(loaded, prompt, None)
    ended = ids[-1] if ids and ids[-1] in loaded.eos_ids else None
    text = "".join(parser.push(token).content for token in (ids if ended is None else ids[:-1]))
    text += parser.flush(ended).content
    for stop in loaded.chat_stop:
        text = text.split(stop)[0]
    return text.strip()


def _divergences(
    loaded: LoadedModel,
    encoder: Encoder,
    prefix: KVPrefix | None,
    conversations: Sequence[Sequence[Message]],
    questions: Sequence[Question],
    between: Between | None,
) -> NDArray[np.float64]:
    """KL from the teacher, mean over the answer's tokens [N]; NaN where its distribution is not known."""
    found = np.full(len(questions), np.nan)
    examples = []
    for index, (messages, question) in enumerate(zip(conversations, questions, strict=True)):
        if question.row is None or question.row.answer.top_logprobs is None:
            continue
        name = row_name(index, question.row)
        options: Mapping[str, Any] = {"name": name, "top_k": 1 << 20, "max_tokens": loaded.context_length}
        example = encoder.answered(messages, question.row, after_prefix=prefix is not None, **options)
        examples.append((index, example))
    if not examples:
        return found
    layers = None if prefix is None else list(zip(prefix.keys, prefix.values, strict=True))
    places = {id(example): index for index, example in examples}
    for losses in Student(loaded, between=between).losses(layers, [example for _, example in examples]):
        for example, of_row in losses.by_example():
            found[places[id(example)]] = float(of_row.mean())
    return found
