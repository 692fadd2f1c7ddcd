"""Replays a history without the environment that it was lived in: every sample with its prompts, gold answer and split.

The order is the strategy's, and everything is a function of the records, the configuration and its seed, so that a run
which was interrupted finds the same items again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from memory.distillation.answers import content_key, corrected_answer, latest_by_content, went_wrong
from memory.distillation.config import DataConfig
from memory.distillation.prompt_builder import Prompt, PromptBuilder
from memory.distillation.strategies.base import MemoryFormationStrategy, Sample, chance
from memory.history import Record
from memory.recall import WordIndex


@dataclass(frozen=True, slots=True)
class ReplayItem:
    """One sample, ready to be asked. ``gold`` is the answer known to be right; ``failed`` None when nobody judged."""

    sample: Sample
    prompt: Prompt
    gold: str | None
    failed: bool | None
    split: str
    strategy: str


class ReplayEnvironment:
    """The samples of ``records`` under one strategy. Iterate it as often as you like."""

    def __init__(
        self,
        records: Sequence[Record],
        strategy: MemoryFormationStrategy,
        builder: PromptBuilder,
        config: DataConfig,
        seed: int,
    ):
        living = [record for record in records if not record.deleted]
        newest = sorted(living, key=lambda record: record.id)[-config.max_records :]
        self.records = latest_by_content(newest) if config.latest_feedback_wins else newest
        self._strategy, self._builder, self._config, self._seed = strategy, builder, config, seed
        self._keys = {content_key(record.observation) for record in self.records}
        self._words: WordIndex | None = None
        self._memory = self.records
        if config.strict_hold_out and config.hold_out == "observations":
            self._memory = [record for record in self.records if self.split(content_key(record.observation)) == "train"]

    def samples(self) -> list[Sample]:
        """What is asked, the limit on rows applied."""
        samples = self._strategy.iter_samples(self.records)
        if self._config.targets == "feedback":
            samples = (sample for sample in samples if corrected_answer(sample.record) is not None)
        return list(samples)[: self._config.max_rows]

    def item(self, sample: Sample, *, teacher: bool = True) -> ReplayItem:
        """One sample's prompts; without ``teacher`` the student's alone. Raises ``ObservationTooLong``."""
        shown = teacher or self._config.recent_turns > 0
        memory = self._strategy.build_memory_for_sample(self._memory, sample) if shown else []
        observation, recent = sample.record.observation, self._recent(sample, memory)
        build = self._builder
        prompt = build.build(observation, memory, recent) if teacher else build.student(observation, recent)
        return ReplayItem(
            sample,
            prompt,
            gold=corrected_answer(sample.record),
            failed=went_wrong(sample.record),
            split=self.split(sample.key),
            strategy=self._strategy.label(sample),
        )

    def split(self, key: str) -> str:
        """Whether an observation is trained on or held out."""
        return "train" if self._config.hold_out == "reasks" else split_of(key, self._config.eval_share)

    def asked_again(self, key: str) -> bool:
        """Whether a trained row is also one to evaluate with, where nothing is held out."""
        return self._config.hold_out == "reasks" and split_of(key, self._config.eval_share) == "eval"

    def holds(self, key: str) -> bool:
        """Whether an observation with this content key was lived through."""
        return key in self._keys

    def chunk(self, name: str, most: int) -> list[Record]:
        """Up to ``most`` experiences in their order, chosen by chance for ``name``."""
        dice = chance(self._seed, "chunk", name)
        chosen = dice.sample(range(len(self._memory)), min(most, len(self._memory)))
        return [self._memory[index] for index in sorted(chosen)]

    def __iter__(self) -> Iterator[ReplayItem]:
        for sample in self.samples():
            yield self.item(sample)

    def _recent(self, sample: Sample, memory: Sequence[Record]) -> list[Record]:
        """What the student is shown, in the share of samples that have it: the newest of ``memory``, or the nearest."""
        most = self._config.recent_turns
        if not most or chance(self._seed, "recent", sample.key).random() >= self._config.recent_share:
            return []
        if self._config.recent_choice == "nearest":
            return self._nearest(sample, most)
        return sorted(memory, key=lambda record: record.id)[-most:]

    def _nearest(self, sample: Sample, most: int) -> list[Record]:
        """The ``most`` nearest of all other experiences, whatever the teacher sees; the nearest last, as agents do."""
        if self._words is None:
            self._words = WordIndex([record.observation for record in self._memory])
        best = self._words.best(sample.record.observation, len(self._memory))
        found = [self._memory[place] for place, _ in best]
        return [record for record in found if content_key(record.observation) != sample.key][:most][::-1]


def split_of(key: str, eval_share: float) -> str:
    """``train`` or ``eval`` by content key: equal observations never lie on both sides, in this run or a later one."""
    return "eval" if int(key[:8], 16) / 0x1_0000_0000 < eval_share else "train"
