"""What an agent is: it acts on an observation, is told what came of it, and can be cloned for an episode.

An agent has a language model and a memory; kinds of agents differ in the memory, and in nothing else, so that what is
compared between them is the memory. ``LoggingAgent`` holds what most of them share: one experience per action, written
when its feedback comes, or when it turns out that none will.

An agent lives in one thread; its memory may be shared by many. Which task it has is the environment's business
(``environments``), and how many episodes it lives the runner's (``episodes.py``).
"""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, Self, runtime_checkable

from pydantic import BaseModel, ConfigDict, Field

from agents.errors import OutOfTurn
from agents.experience_log import ExperienceLog, freeze, save_snapshot, with_feedback
from lm.types import CartridgeRef, LanguageModel, MeasuringModel, Messages, Reply
from memory.distillation.prompt_builder import Count, Prompt, PromptBuilder, Style, estimate_tokens
from memory.history import NewExperience, Record


class AgentConfig(BaseModel):
    """How an agent speaks and how far it looks back. Kinds ignore what they have no use for.

    ``style``, ``system_prompt`` and ``merge_turns`` must be those that its cartridge was trained with, and what stands
    beside it (``recent``, ``recent_choice``) should be (``data.recent_turns``, ``data.recent_choice``). A small model
    goes on as its prompt began: shown its own mistakes with their corrections, it repeats them (``apply_corrections``).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    style: Style = Field("turns", description="turns: experiences as chat turns; list: all in one user message.")
    system_prompt: str | None = Field(None, description="System message; None: the kind's own.")
    merge_turns: bool = Field(False, description="Join feedback and next observation, for templates that alternate.")
    apply_corrections: bool = Field(
        False, description="Show what would have been right in place of what was said, and no feedback."
    )
    max_tokens: int = Field(32, ge=1, description="Longest action.")
    max_prompt_tokens: int = Field(
        4096, ge=16, description="Longest prompt, if the model's context holds it; the oldest experiences go first."
    )
    recent: int = Field(4, ge=0, description="Experiences in the prompt beside a cartridge (hybrid).")
    recent_choice: Literal["newest", "nearest"] = Field(
        "newest", description="Which: the newest, or those whose words are nearest to the observation (hybrid)."
    )
    neighbours: int = Field(8, ge=1, description="Nearest experiences in the prompt (knn).")
    stop: tuple[str, ...] = Field((), description="Texts that end an action.")


@dataclass(frozen=True, slots=True)
class Feedback:
    """What came of an action. ``score`` is 1 for right and 0 for wrong, None where nobody judged."""

    message: str | None
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Act:
    """An action, and what it was made of."""

    text: str
    reply: Reply
    messages: tuple[dict[str, str], ...]
    cartridges: tuple[CartridgeRef, ...] = ()
    experiences: int = 0  #: in the prompt


@runtime_checkable
class MemoryAgent(Protocol):
    """See the module docstring."""

    name: str

    def act(self, observation: str) -> Act:
        """Answer ``observation``. Raises ``AgentError`` or ``LanguageModelError``."""

    def observe(self, feedback: Feedback) -> None:
        """What came of the last action. Raises ``OutOfTurn`` when there is none."""

    def end_episode(self) -> None:
        """Nothing more will come: what waited for feedback is written down without it."""

    def clone_for_episode(self, *, training: bool, episode_id: str | None = None) -> Self:
        """An agent with the same model and configuration, and with nothing pending.

        ``training``: it shares this agent's memory and adds to it. Otherwise its memory is frozen as it is now, and
        what it lives through changes nothing.
        """

    def save_snapshot(self, folder: Path, snapshot_id: str) -> list[Path]:
        """Write the memory's snapshot files into ``folder``; returns them."""


class Speaker:
    """A language model asked in one manner; the part that all kinds share.

    Prompts are measured by the model's own tokenizer where the client has it, and otherwise by an estimate.
    """

    def __init__(self, lm: LanguageModel, config: AgentConfig, default_system_prompt: str):
        self.lm = lm
        self.config = config
        chosen = config.system_prompt
        self.system_prompt = default_system_prompt if chosen is None else chosen

    def build(self, observation: str, memory: Sequence[Record]) -> Prompt:
        """The prompt with as much of ``memory`` as fits, made as those that a teacher is asked with."""
        room = self.config.max_prompt_tokens
        count: Count = estimate_tokens
        if isinstance(self.lm, MeasuringModel):
            count = self.lm.count_tokens
            room = min(room, self.lm.context_length() - self.config.max_tokens)
        builder = PromptBuilder(
            style=self.config.style,
            system_prompt=self.system_prompt,
            count=count,
            max_tokens=room,
            merge_turns=self.config.merge_turns,
            apply_corrections=self.config.apply_corrections,
        )
        return builder.build(observation, memory)

    def say(self, messages: Messages, cartridges: Sequence[CartridgeRef] = (), experiences: int = 0) -> Act:
        """One greedy answer, stripped of white space at its ends; what no history keeps (NUL) is marked."""
        reply = self.lm.call(
            messages, max_tokens=self.config.max_tokens, stop=self.config.stop, cartridges=tuple(cartridges)
        )
        sent = tuple({"role": str(item["role"]), "content": str(item["content"])} for item in messages)
        return Act(reply.text.replace("\x00", "\ufffd").strip(), reply, sent, tuple(cartridges), experiences)


class LoggingAgent(ABC):
    """An agent that writes one experience per action into ``log``."""

    name: str = "agent"
    #: What its experiences name as their source.
    source: str = "agent"

    def __init__(self, log: ExperienceLog, episode_id: str | None = None):
        self.log = log
        self.episode_id = episode_id or f"ep-{uuid.uuid4().hex[:12]}"
        self._step = 0
        self._pending: NewExperience | None = None
        self._written: set[int] = set()

    def act(self, observation: str) -> Act:
        """Answer, and remember that it was answered. An action whose feedback never came is written down first."""
        self.end_episode()
        act = self._answer(observation)
        self._pending = NewExperience(
            observation=observation,
            action=act.text,
            domain=self.log.domain,
            source=self.source,
            episode_id=self.episode_id,
            meta=self._meta(act),
            request_id=f"{self.episode_id}/{self._step}",
        )
        self._step += 1
        return act

    def observe(self, feedback: Feedback) -> None:
        """Write the experience down with its feedback."""
        if self._pending is None:
            raise OutOfTurn("there is no action that feedback could be for; call act() first")
        self._write(with_feedback(self._pending, feedback.message, feedback.score))

    def end_episode(self) -> None:
        """Write down what waited for feedback."""
        if self._pending is not None:
            self._write(self._pending)

    def save_snapshot(self, folder: Path, snapshot_id: str) -> list[Path]:
        """``memory_{snapshot_id}.jsonl``."""
        return [save_snapshot(self.log, folder, snapshot_id)]

    @abstractmethod
    def _answer(self, observation: str) -> Act:
        """The action."""

    def _meta(self, act: Act) -> dict[str, Any]:
        """What is noted beside the experience."""
        return {"agent": self.name, "cartridges": [item.id for item in act.cartridges]}

    def _write(self, item: NewExperience) -> None:
        self._pending = None
        if item.observation or item.action:
            self._written.add(self.log.append(item).id)

    def _remembered(self, records: Sequence[Record]) -> list[Record]:
        """``records`` without what an interrupted run of this same episode left: its answer would be read there."""
        own, written = self.episode_id, self._written
        return [record for record in records if record.episode_id != own or record.id in written]

    def _log_for(self, training: bool) -> ExperienceLog:
        return self.log if training else freeze(self.log)
