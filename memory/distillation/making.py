"""Makes one row: replay of an experience with the teacher or from feedback, or a question of self-study.

A task is a name and a function; the name is the same in every attempt of a run, so that the journal can tell which are
done. What cannot become a row is an outcome with a reason, not an exception; only a teacher that is away is one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from lm.types import Reply, Trace
from memory.distillation.answers import content_key, corrected_answer, same_answer
from memory.distillation.config import DistillConfig, SeedType
from memory.distillation.errors import BadRow, ObservationTooLong
from memory.distillation.journal import Outcome
from memory.distillation.prompt_builder import Prompt, PromptBuilder
from memory.distillation.replay_env import ReplayEnvironment, ReplayItem
from memory.distillation.rows import Row, RowMessage, flatten_topk
from memory.distillation.self_study import clean_question, question_messages
from memory.distillation.strategies.base import Sample
from memory.distillation.teaching import Refused, Teacher
from workspace.errors import RequestError

_LEAST_RECENCY = 1e-6  # above 0: what counts nothing is no row


@dataclass(frozen=True, slots=True)
class Task:
    """One sample to be made. ``make`` may be called from any thread."""

    name: str
    needs_teacher: bool
    make: Callable[[], Outcome]


class RowMaker:
    """Knows how each kind of row is made."""

    def __init__(
        self, replay: ReplayEnvironment, config: DistillConfig, teacher: Teacher | None, builder: PromptBuilder
    ):
        self._replay, self._config, self._teacher, self._builder = replay, config, teacher, builder
        newest = len(replay.records) - 1
        self._age = {record.id: newest - place for place, record in enumerate(replay.records)}

    def tasks(self) -> list[Task]:
        """All of a run, in the order in which they are made."""
        tasks: list[Task] = []
        if self._config.data.replay:
            tasks += [self._replay_task(sample) for sample in self._replay.samples()]
        study = self._config.data.self_study
        if self._replay.records:
            for number in range(study.rows):
                kind = study.types[number % len(study.types)]
                name = f"{kind}:{number}"
                tasks.append(Task(name, True, partial(self._study, name, kind, number)))
        return tasks

    def _replay_task(self, sample: Sample) -> Task:
        name = f"replay:{sample.record.id}"
        gold = None if self._config.data.targets == "teacher" else corrected_answer(sample.record)
        if gold is not None:
            return Task(name, False, partial(self._from_feedback, name, sample, gold))
        return Task(name, True, partial(self._from_teacher, name, sample))

    def _from_feedback(self, name: str, sample: Sample, gold: str) -> Outcome:
        """The known answer as text; no teacher, no tokens: the trainer's template makes them."""
        item = self._replay.item(sample, teacher=False)
        return self._row(name, item, RowMessage("assistant", gold), {"target": "feedback", "teacher_tokens": 0})

    def _from_teacher(self, name: str, sample: Sample) -> Outcome:
        try:
            item = self._replay.item(sample)
        except ObservationTooLong as error:
            return Outcome(name, None, str(error), bad=True)
        except RequestError as error:  # the template does not take such turns
            raise Refused(f"{error}; if roles must alternate, set data.merge_turns: true") from error
        reply, trace = self._ask(item.prompt)
        if self._config.data.filter_incorrect and item.gold is not None and not same_answer(reply.text, item.gold):
            return Outcome(name, None, "the teacher's answer contradicts the feedback")
        try:
            answer = self._answer(reply, trace)
        except BadRow as error:
            return Outcome(name, None, f"the teacher's answer is no target: {error}", bad=True)
        return self._row(name, item, answer, self._taught(item.prompt, reply))

    def _row(self, name: str, item: ReplayItem, answer: RowMessage, about: dict[str, Any]) -> Outcome:
        record = item.sample.record
        recency = self._recency(record.id)
        metadata: dict[str, Any] = {
            **about,
            "content_key": item.sample.key,
            "experience_id": record.id,
            "split": item.split,
            "weight": recency * (self._config.training.failure_weight if item.failed else 1.0),
            "kind": "replay",
            "strategy": item.strategy,
            "dropped": item.prompt.dropped,
            "memory": len(item.prompt.included),
        }
        if item.failed is not None:
            metadata["failed"] = item.failed
        if item.gold is not None:
            metadata["gold"] = item.gold
        if recency != 1.0:
            metadata["recency"] = recency
        if self._replay.asked_again(item.sample.key):
            metadata["asked_again"] = True
        return self._outcome(name, item.prompt, answer, metadata)

    def _recency(self, experience_id: int) -> float:
        """What is left of an experience's weight at its age."""
        half_life = self._config.data.half_life
        return 1.0 if half_life is None else max(_LEAST_RECENCY, 0.5 ** (self._age[experience_id] / half_life))

    def _study(self, name: str, kind: SeedType, number: int) -> Outcome:
        study = self._config.data.self_study
        memory = self._replay.chunk(name, study.memory_records)
        seed = self._config.seed + number
        written = self._teaching.write(
            question_messages(kind, name, memory, self._config.seed),
            max_tokens=study.question_tokens,
            temperature=study.temperature,
            seed=seed,
        )
        question = clean_question(written)
        if not question:
            return Outcome(name, None, "the teacher wrote no question")
        key = content_key(question)
        if self._replay.split(key) == "eval" and self._replay.holds(key):
            return Outcome(name, None, "the question is a held-out observation")
        try:
            others = [record for record in memory if content_key(record.observation) != key]
            prompt = self._builder.build(question, others)
            reply, trace = self._ask(prompt)
            answer = self._answer(reply, trace)
        except ObservationTooLong as error:
            return Outcome(name, None, str(error), bad=True)
        except BadRow as error:
            return Outcome(name, None, f"the teacher's answer is no target: {error}", bad=True)
        metadata = {
            **self._taught(prompt, reply),
            "content_key": key,
            "split": "train",
            "weight": 1.0,
            "kind": kind,
            "strategy": "self_study",
            "dropped": prompt.dropped,
            "memory": len(prompt.included),
        }
        return self._outcome(name, prompt, answer, metadata)

    @property
    def _teaching(self) -> Teacher:
        if self._teacher is None:
            raise AssertionError("generate_dataset checks that there is a teacher where one is needed")
        return self._teacher

    def _ask(self, prompt: Prompt) -> tuple[Reply, Trace]:
        return self._teaching.answer(prompt.teacher_messages, self._config.top_logprobs)

    def _answer(self, reply: Reply, trace: Trace) -> RowMessage:
        """The teacher's own tokens, with its candidates at each of them. Raises ``BadRow``."""
        if not trace.token_ids:
            raise BadRow("it is empty")
        top = flatten_topk(trace.topk_token_ids, trace.topk_logprobs, self._config.top_mass)
        return RowMessage("assistant", reply.text, trace.token_ids, top)

    @staticmethod
    def _taught(prompt: Prompt, reply: Reply) -> dict[str, Any]:
        tokens = reply.prompt_tokens or prompt.tokens
        return {"target": "teacher", "teacher_tokens": tokens, "finish_reason": reply.finish_reason}

    def _outcome(self, name: str, prompt: Prompt, answer: RowMessage, metadata: dict[str, Any]) -> Outcome:
        seen = [item for item in prompt.student_messages if item["role"] != "system"]
        messages = (*(RowMessage(item["role"], item["content"]) for item in seen), answer)
        try:
            row = Row(messages, self._config.system_prompt, metadata, str(metadata["kind"]))
        except BadRow as error:
            return Outcome(name, None, str(error), bad=True)
        return Outcome(name, row)
