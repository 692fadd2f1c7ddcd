"""The agent that acts with a cartridge, lives on, and has itself distilled.

It acts with the domain's cartridge and a few experiences in the prompt, appends every experience to the history and
tells a trigger. What the trigger starts runs elsewhere; when a new version serves, the memory names it and the next act
uses it: no restart, no pause.

The few are the newest, and before there is any cartridge all, as in ``HistoryAgent``; or they are those whose words are
nearest to the observation, with a cartridge and without (``recent_choice``). What has changed since the last
distillation is then at hand at once, as in ``KNNAgent``, and the cartridge knows what it is for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from agents.base import Act, AgentConfig, LoggingAgent, Speaker
from agents.experience_log import ExperienceLog
from agents.knn_agent import WordNearest
from agents.kv_memory_agent import SYSTEM_PROMPT
from lm.types import CartridgeRef, LanguageModel
from memory.distillation.prompt_builder import as_corrected, student_messages
from memory.history import NewExperience, Record
from memory.kv_cache_memory import KVCacheMemory

logger = logging.getLogger(__name__)

#: Told of a domain after each of its experiences; it decides by itself whether a distillation begins, and returns soon.
Trigger = Callable[[str], object]


class HybridKVHistoryAgent(LoggingAgent):
    """See the module docstring. ``trigger`` None: somebody else watches the history (a server's schedule does)."""

    name = "hybrid"

    def __init__(
        self,
        lm: LanguageModel,
        memory: KVCacheMemory,
        log: ExperienceLog,
        config: AgentConfig | None = None,
        *,
        trigger: Trigger | None = None,
        episode_id: str | None = None,
    ):
        super().__init__(log, episode_id)
        self.memory = memory
        self.config = config or AgentConfig()
        self._speaker = Speaker(lm, self.config, SYSTEM_PROMPT)
        self._trigger = trigger
        self._nearest = WordNearest(log)

    def swap(self, cartridge: CartridgeRef) -> None:
        """Act with ``cartridge`` from the next observation on: for triggers that report what came of a distillation.

        A memory that follows its domain needs no telling.
        """
        old = self.memory.swap(cartridge)
        logger.info("%s: %s instead of %s", self.log.domain, cartridge.id, [item.id for item in old])

    def clone_for_episode(self, *, training: bool, episode_id: str | None = None) -> Self:
        """See ``MemoryAgent``; an evaluation triggers nothing."""
        return type(self)(
            self._speaker.lm,
            self.memory if training else self.memory.frozen(),
            self._log_for(training),
            self.config,
            trigger=self._trigger if training else None,
            episode_id=episode_id,
        )

    def save_snapshot(self, folder: Path, snapshot_id: str) -> list[Path]:
        """Both memories' files."""
        return [*super().save_snapshot(folder, snapshot_id), self.memory.save_snapshot(folder, snapshot_id)]

    def _answer(self, observation: str) -> Act:
        cartridges = self.memory.references()
        if not cartridges:
            prompt = self._speaker.build(observation, self._before_any_cartridge(observation))
            return self._speaker.say(prompt.teacher_messages, experiences=len(prompt.included))
        beside = self._beside(observation)
        messages = student_messages(
            self.config.style,
            self._speaker.system_prompt,
            observation,
            [as_corrected(record) for record in beside] if self.config.apply_corrections else beside,
            merge_turns=self.config.merge_turns,
        )
        return self._speaker.say(messages, cartridges, len(beside))

    def _before_any_cartridge(self, observation: str) -> list[Record]:
        """What a cartridge will have beside it, where that is looked up; otherwise all, as ``HistoryAgent``."""
        if self.config.recent_choice == "nearest" and self.config.recent:
            return self._beside(observation)
        return self._remembered(self.log.records())

    def _beside(self, observation: str) -> list[Record]:
        """The experiences for the prompt; one more is read, for one of this episode that does not count."""
        count = self.config.recent
        if not count:
            return []
        if self.config.recent_choice == "nearest":
            return self._remembered(self._nearest(observation, count + 1))[:count][::-1]
        return self._remembered(self.log.records(count + 1))[-count:]

    def _write(self, item: NewExperience) -> None:
        super()._write(item)
        if self._trigger is None:
            return
        try:
            self._trigger(self.log.domain)
        except Exception:  # whatever a trigger runs into, the agent's life goes on; the next experience tells it again
            logger.exception("the distillation trigger of %s failed", self.log.domain)

    def _meta(self, act: Act) -> dict[str, Any]:
        return super()._meta(act) | {"recent": act.experiences if act.cartridges else None}
