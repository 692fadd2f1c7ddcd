"""The agent with the long prompt: everything it lived through stands before the observation, as far as it fits.

It is what a cartridge has to match, and the teacher that a cartridge is distilled from: its prompts are those of
``memory.distillation.prompt_builder``.
"""

from __future__ import annotations

from typing import Self

from agents.base import Act, AgentConfig, LoggingAgent, Speaker
from agents.experience_log import ExperienceLog
from lm.types import LanguageModel


class HistoryAgent(LoggingAgent):
    """``memoryless`` shows it nothing of what it lived through: the arm that every other is compared with."""

    name = "history"

    def __init__(
        self,
        lm: LanguageModel,
        log: ExperienceLog,
        config: AgentConfig | None = None,
        *,
        memoryless: bool = False,
        episode_id: str | None = None,
    ):
        super().__init__(log, episode_id)
        self.config = config or AgentConfig()
        self._speaker = Speaker(lm, self.config, default_system_prompt="")
        self._memoryless = memoryless
        if memoryless:
            self.name = "memoryless"

    def clone_for_episode(self, *, training: bool, episode_id: str | None = None) -> Self:
        """See ``MemoryAgent``."""
        return type(self)(
            self._speaker.lm,
            self._log_for(training),
            self.config,
            memoryless=self._memoryless,
            episode_id=episode_id,
        )

    def _answer(self, observation: str) -> Act:
        memory = [] if self._memoryless else self._remembered(self.log.records())
        prompt = self._speaker.build(observation, memory)
        return self._speaker.say(prompt.teacher_messages, experiences=len(prompt.included))
