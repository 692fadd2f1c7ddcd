"""The strategies, and how a configuration composes them.

FullMemory, ExcludeCurrent, RandomSubset and shuffling are those that proved themselves in the public implementation
of the original plan; RollingWindow and FailureFocus were declared there. Exclusion there was by index: an observation
that is repeated then leaks its answer. Here it is by content.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from memory.distillation.answers import content_key, went_wrong
from memory.distillation.config import StrategyConfig
from memory.distillation.strategies.base import MemoryFormationStrategy, Sample, chance
from memory.history import Record


@dataclass(frozen=True)
class FullMemory(MemoryFormationStrategy):
    """Everything."""

    name: str = "full_memory"

    def build_memory_for_sample(self, records: Sequence[Record], sample: Sample) -> list[Record]:
        return list(records)


@dataclass(frozen=True)
class RollingWindow(MemoryFormationStrategy):
    """The ``k`` experiences before the sample; where fewer came before, those after it fill up.

    Filling up is not cheating: the prefix will hold all of them. A teacher without memory would teach nothing.
    """

    k: int
    name: str = "rolling_window"

    def build_memory_for_sample(self, records: Sequence[Record], sample: Sample) -> list[Record]:
        before = [record for record in records if record.id < sample.record.id]
        after = [record for record in records if record.id > sample.record.id]
        kept = before[-self.k :]
        return kept + after[: self.k - len(kept)]


@dataclass(frozen=True)
class RandomSubset(MemoryFormationStrategy):
    """Each experience with the probability ``share``, anew for each sample; never none if there is any."""

    share: float
    seed: int
    name: str = "random_subset"

    def build_memory_for_sample(self, records: Sequence[Record], sample: Sample) -> list[Record]:
        dice = chance(self.seed, "subset", sample.key)
        kept = [record for record in records if dice.random() < self.share]
        return kept or ([dice.choice(records)] if records else [])


@dataclass(frozen=True)
class ExcludeCurrent(MemoryFormationStrategy):
    """Everything but what has the sample's observation, wherever and however often it was lived through."""

    inner: MemoryFormationStrategy
    name: str = "exclude_current"

    def iter_samples(self, records: Sequence[Record]) -> Iterator[Sample]:
        return self.inner.iter_samples(records)

    def build_memory_for_sample(self, records: Sequence[Record], sample: Sample) -> list[Record]:
        others = [record for record in records if content_key(record.observation) != sample.key]
        return self.inner.build_memory_for_sample(others, sample)

    def label(self, sample: Sample) -> str:
        return self.inner.label(sample)


@dataclass(frozen=True)
class FailureFocus(MemoryFormationStrategy):
    """Failures first among the samples; in memory all failures (they carry the corrections) and some of the rest."""

    inner: MemoryFormationStrategy
    success_share: float
    seed: int
    name: str = "failure_focus"

    def iter_samples(self, records: Sequence[Record]) -> Iterator[Sample]:
        samples = list(self.inner.iter_samples(records))
        yield from (sample for sample in samples if went_wrong(sample.record))
        yield from (sample for sample in samples if not went_wrong(sample.record))

    def build_memory_for_sample(self, records: Sequence[Record], sample: Sample) -> list[Record]:
        dice = chance(self.seed, "success", sample.key)
        drawn = [(record, dice.random() < self.success_share) for record in records]
        kept = [record for record, lucky in drawn if lucky or went_wrong(record)]
        return self.inner.build_memory_for_sample(kept or records, sample)

    def label(self, sample: Sample) -> str:
        inner = self.inner.label(sample)
        return self.name if inner == "full_memory" else f"{self.name}+{inner}"


@dataclass(frozen=True)
class Shuffled(MemoryFormationStrategy):
    """The inner strategy's memory in random order, so that the prefix does not learn an order that means nothing."""

    inner: MemoryFormationStrategy
    seed: int
    name: str = "shuffled"

    def iter_samples(self, records: Sequence[Record]) -> Iterator[Sample]:
        return self.inner.iter_samples(records)

    def build_memory_for_sample(self, records: Sequence[Record], sample: Sample) -> list[Record]:
        memory = self.inner.build_memory_for_sample(records, sample)
        chance(self.seed, "order", sample.key).shuffle(memory)
        return memory

    def label(self, sample: Sample) -> str:
        return self.inner.label(sample)


@dataclass(frozen=True)
class Mixed(MemoryFormationStrategy):
    """A curriculum: each sample gets one of several strategies, by chance and in the given shares."""

    parts: tuple[tuple[MemoryFormationStrategy, float], ...]
    seed: int
    name: str = "mixed"

    def build_memory_for_sample(self, records: Sequence[Record], sample: Sample) -> list[Record]:
        return self._part(sample).build_memory_for_sample(records, sample)

    def label(self, sample: Sample) -> str:
        return self._part(sample).label(sample)

    def _part(self, sample: Sample) -> MemoryFormationStrategy:
        strategies, shares = zip(*self.parts, strict=True)
        dice = chance(self.seed, "part", sample.key)
        chosen: MemoryFormationStrategy = dice.choices(strategies, weights=shares)[0]
        return chosen


def make_strategy(config: StrategyConfig, seed: int) -> MemoryFormationStrategy:
    """Compose what ``config`` asks for. Exclusion is outermost, so that windows and subsets are filled with others."""
    strategy = _formation(config, seed)
    if config.failure_focus and config.name != "failure_focus":
        strategy = FailureFocus(strategy, config.success_share, seed)
    if config.shuffle:
        strategy = Shuffled(strategy, seed)
    if config.exclude_current or config.name == "exclude_current":
        strategy = ExcludeCurrent(strategy)
    return strategy


def _formation(config: StrategyConfig, seed: int) -> MemoryFormationStrategy:
    if config.name == "rolling_window":
        return RollingWindow(config.window_k)
    if config.name == "random_subset":
        return RandomSubset(config.subset_share, seed)
    if config.name == "failure_focus":
        return FailureFocus(FullMemory(), config.success_share, seed)
    if config.name == "mixed":
        parts = [(make_strategy(_single(config, name), seed), share) for name, share in sorted(config.mixture.items())]
        return Mixed(tuple(parts), seed)
    return FullMemory()


def _single(config: StrategyConfig, name: str) -> StrategyConfig:
    """``config`` for one part of a mixture: the name alone, as the wrappers come around the whole."""
    changes = {"name": name, "exclude_current": False, "failure_focus": False, "shuffle": False}
    return config.model_copy(update=changes)
