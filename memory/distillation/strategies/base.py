"""What a strategy is: which experiences become samples, and what memory the teacher has for each.

A strategy is a pure function of the records and a seed, so a run that is repeated or continued makes the same prompts.
Strategies are composed by wrapping: the outer one narrows the records, the inner one chooses among what is left.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from memory.distillation.answers import content_key
from memory.history import Record


@dataclass(frozen=True, slots=True)
class Sample:
    """One thing to answer again. ``key`` is the content key of its observation."""

    record: Record
    key: str


class MemoryFormationStrategy(ABC):
    """Subclasses say how a memory is formed; by default every experience with an observation is a sample."""

    #: As in the configuration.
    name: str

    def iter_samples(self, records: Sequence[Record]) -> Iterator[Sample]:
        """The samples, in the order in which they should be made: a limit on rows cuts off the end."""
        for record in records:
            if record.observation and not record.deleted:
                yield Sample(record, content_key(record.observation))

    @abstractmethod
    def build_memory_for_sample(self, records: Sequence[Record], sample: Sample) -> list[Record]:
        """The experiences that the teacher sees for ``sample``, oldest first (unless shuffling is the point).

        ``records`` come by increasing id and are not changed.
        """

    def label(self, sample: Sample) -> str:
        """The strategy that forms this sample's memory, for the row's metadata."""
        return self.name


def chance(seed: int, what: str, of: str) -> random.Random:
    """A generator of its own for one decision about one sample, the same in every process and order of calls."""
    return random.Random(f"{seed}/{what}/{of}")
