"""The agent whose memory is a cartridge: no history in the prompt, and nothing written.

What it sends is ``student_messages``, the prompt that cartridges are trained with. Where its memory follows a domain,
it acts with a newly promoted cartridge from the next observation on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

from agents.base import Act, AgentConfig, Feedback, Speaker
from agents.errors import NoCartridge, OutOfTurn
from lm.types import LanguageModel
from memory.distillation.prompt_builder import student_messages
from memory.kv_cache_memory import KVCacheMemory

#: Of the original implementation. Give the system prompt of the distillation instead: the same text has to be there.
SYSTEM_PROMPT = "You are a helpful assistant. Use the attached cartridge as your long-term memory."


class KVMemoryAgent:
    """``by_server``: the server attaches the domain's cartridge by itself, so an empty memory is no error."""

    name = "kv"

    def __init__(
        self, lm: LanguageModel, memory: KVCacheMemory, config: AgentConfig | None = None, *, by_server: bool = False
    ):
        self.memory = memory
        self.config = config or AgentConfig()
        self._speaker = Speaker(lm, self.config, SYSTEM_PROMPT)
        self._by_server = by_server
        self._acted = False

    def act(self, observation: str) -> Act:
        """Answer with the cartridges of this moment. Raises ``NoCartridge``."""
        cartridges = self.memory.references()
        if not cartridges and not self._by_server:
            where = f"the domain {self.memory.domain!r}" if self.memory.domain else "this memory"
            raise NoCartridge(f"{where} has no cartridge to act with; distill it and promote the result, or name one")
        speaker = self._speaker
        messages = student_messages(
            self.config.style, speaker.system_prompt, observation, merge_turns=self.config.merge_turns
        )
        act = speaker.say(messages, cartridges)
        self._acted = True
        return act

    def observe(self, feedback: Feedback) -> None:
        """Nothing is written: a cartridge is trained, not told."""
        if not self._acted:
            raise OutOfTurn("there is no action that feedback could be for; call act() first")
        self._acted = False

    def end_episode(self) -> None:
        """Nothing waits."""
        self._acted = False

    def clone_for_episode(self, *, training: bool, episode_id: str | None = None) -> Self:
        """A training clone follows the same memory; otherwise it keeps the cartridges of this moment."""
        memory = self.memory if training else self.memory.frozen()
        return type(self)(self._speaker.lm, memory, self.config, by_server=self._by_server)

    def save_snapshot(self, folder: Path, snapshot_id: str) -> list[Path]:
        """``kv_memory_{snapshot_id}.json``."""
        return [self.memory.save_snapshot(folder, snapshot_id)]
