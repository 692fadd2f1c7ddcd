"""The agent that looks up the k nearest experiences and puts them into the prompt: what a memory has to be better than.

Nearness is whatever ``nearest`` says: ``WordNearest`` compares words (BM25), ``episodic_nearest`` asks the episodic
memory, which compares meanings as well. The nearest stands last, next to the observation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Self

from agents.base import Act, AgentConfig, LoggingAgent, Speaker
from agents.experience_log import ExperienceLog, FrozenLog
from lm.types import LanguageModel
from memory.catalog import Filters
from memory.history import History, Record
from memory.recall import WordIndex

if TYPE_CHECKING:  # faiss is imported by whoever has one
    from memory.episodic import EpisodicMemory

#: ``nearest(observation, limit)``: at most ``limit`` experiences, nearest first.
Nearest = Callable[[str, int], Sequence[Record]]


class WordNearest:
    """The experiences of a log that share the rarest words with an observation. Not for use from several threads."""

    def __init__(self, log: ExperienceLog):
        self._log = log
        self._indexed: list[tuple[int, str]] | None = None
        self._words: WordIndex | None = None

    def __call__(self, observation: str, limit: int) -> Sequence[Record]:
        """See ``Nearest``. The index is made anew when experiences came or went; feedback that came later is seen."""
        records = self._log.records()
        indexed = [(record.id, record.observation) for record in records]
        if indexed != self._indexed:
            self._indexed = indexed
            self._words = WordIndex([record.observation for record in records]) if records else None
        if self._words is None:
            return ()
        return [records[place] for place, _ in self._words.best(observation, limit)]


def episodic_nearest(episodic: EpisodicMemory, history: History) -> Callable[[ExperienceLog], Nearest]:
    """The search of an ``EpisodicMemory`` over ``history``, for ``KNNAgent(make_nearest=...)``.

    It finds what its follower has indexed, which is a moment behind the history.
    """

    def make(log: ExperienceLog) -> Nearest:
        def nearest(observation: str, limit: int) -> Sequence[Record]:
            found = [item.experience.id for item in episodic.search(observation, Filters(domain=log.domain), limit)]
            records = {record.id: record for record in history.many(found)}
            return [records[number] for number in found if number in records and not records[number].deleted]

        return nearest

    return make


class KNNAgent(LoggingAgent):
    """``make_nearest`` gives the search for a log; a clone gets one of its own."""

    name = "knn"

    def __init__(
        self,
        lm: LanguageModel,
        log: ExperienceLog,
        config: AgentConfig | None = None,
        *,
        make_nearest: Callable[[ExperienceLog], Nearest] = WordNearest,
        episode_id: str | None = None,
    ):
        super().__init__(log, episode_id)
        self.config = config or AgentConfig()
        self._speaker = Speaker(lm, self.config, default_system_prompt="")
        self._make_nearest = make_nearest
        self._nearest = make_nearest(log)

    def clone_for_episode(self, *, training: bool, episode_id: str | None = None) -> Self:
        """See ``MemoryAgent``."""
        return type(self)(
            self._speaker.lm,
            self._log_for(training),
            self.config,
            make_nearest=self._make_nearest,
            episode_id=episode_id,
        )

    def _answer(self, observation: str) -> Act:
        found = self._remembered(self._nearest(observation, self.config.neighbours))
        if isinstance(self.log, FrozenLog):  # a search over something that lives on must not see past the moment
            known = {record.id for record in self.log.kept}
            found = [record for record in found if record.id in known]
        prompt = self._speaker.build(observation, found[::-1])
        return self._speaker.say(prompt.teacher_messages, experiences=len(prompt.included))
