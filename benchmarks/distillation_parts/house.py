"""The house of the benchmark: real messages, its labels, what an agent lived through, and held-out questions.

Six intents of banking77. An agent was wrong in a fifth of its episodes and was told the right label. Held-out messages
are others, by content; nothing is trained on them or chosen by them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from agents.environments.base import lived_through
from agents.environments.intent_tagging import IntentTagging, intent_tagging
from benchmarks.kernel_parts.common import MissingData, Options, cache_folder
from memory.distillation.encoding import Encoder
from memory.distillation.evaluation import ArmResult, Question, measure_arm
from memory.distillation.prompt_builder import student_messages, teacher_messages
from memory.history import NewExperience, Record, content_hash
from workspace.models import LoadedModel, load_model
from workspace.prefix import KVPrefix

MODEL = "smollm2-135m-instruct"
DOMAIN = "house"
Labels = Literal["semantic", "codes"]
Message = dict[str, str]


@dataclass(frozen=True)
class House:
    """One seed's world."""

    environment: IntentTagging
    episodes: list[Record]  #: all that was lived through, oldest first
    shown: list[Record]  #: those that the long prompt shows: the newest
    questions: list[Question]

    @property
    def system_prompt(self) -> str:
        """What is asked for."""
        return self.environment.system_prompt

    def student(self, observation: str) -> list[Message]:
        """The prompt without memory."""
        return student_messages("turns", self.system_prompt, observation)

    def after(self, records: Sequence[Record], observation: str) -> list[Message]:
        """The prompt after some experiences, in turns."""
        return teacher_messages("turns", self.system_prompt, observation, records)


def load(options: Options) -> LoadedModel:
    """The model, from the package."""
    return load_model(MODEL, cache_dir=cache_folder(), dtype="bfloat16")


def make_house(options: Options, labels: Labels, seed: int, *, episodes: int, shown: int, questions: int) -> House:
    """Raises ``MissingData`` without the messages."""
    if options.data is None or not (options.data / "banking77").is_dir():
        raise MissingData("banking77 is not on this machine; set OLYMPUS_SHARED_DATA to the folder that holds it")
    environment = intent_tagging(options.data / "banking77", labels=labels, seed=seed)
    tasks = environment.tasks("train")[:episodes]
    lived = [
        _record(number, item)
        for number, item in enumerate(lived_through(tasks, environment.answers(), domain=DOMAIN, seed=seed), start=1)
    ]
    newest = lived[-shown:]
    candidates = tuple(environment.answers())
    asked = [
        Question(
            task.key,
            tuple(student_messages("turns", environment.system_prompt, task.observation)),
            tuple(teacher_messages("turns", environment.system_prompt, task.observation, newest)),
            task.answer,
            candidates,
        )
        for task in environment.tasks("eval")[:questions]
    ]
    return House(environment, lived, newest, asked)


def ask(
    loaded: LoadedModel,
    name: str,
    house: House,
    conversations: Sequence[Sequence[Message]] | None = None,
    prefix: KVPrefix | None = None,
) -> ArmResult:
    """One arm on the house's questions; without ``conversations`` the bare question."""
    prompts = conversations or [list(question.student) for question in house.questions]
    print(f"  asking: {name}", file=sys.stderr, flush=True)
    return measure_arm(loaded, Encoder(loaded), name, prefix, prompts, house.questions)


def observation(question: Question) -> str:
    """What the customer wrote."""
    return str(question.student[-1]["content"])


def _record(number: int, item: NewExperience) -> Record:
    """The experience as the history would give it back."""
    return Record(
        id=number,
        domain=item.domain,
        source=item.source,
        observation=item.observation,
        action=item.action,
        feedback=item.feedback,
        score=item.score,
        session_id=None,
        episode_id=item.episode_id,
        messages=None,
        meta=dict(item.meta),
        content_hash=content_hash(item.observation, item.action),
        created_at=float(number),
        deleted=False,
    )
