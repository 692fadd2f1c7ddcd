"""From examples to what one pass of the student reads: which rows make a step, and how they lie in tensors.

Steps take rows from a stream of shuffled epochs, so every step is full and depends on nothing but the seed and its
number: a run that was killed goes on with the very batches that it would have had.

Within a step rows are sorted by length and cut into micro-batches of at most so many tokens, which bounds memory and
leaves little padding. What all rows of a step have in common at their beginning (the template's system message, an
instruction) is taken out: it is read once for all of them (``student.py``). Padding stands behind the text, where
causality hides it, and index equals position, which sliding windows need.

Shapes: R rows, T tokens, N targets of all rows, K candidates.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from memory.distillation.encoding import Example


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """Rows without their common beginning, and what they are to say."""

    ids: Tensor  #: [R, T]
    mask: Tensor  #: [R, T] bool: False on padding
    rows: Tensor  #: [N] which row predicts the target
    places: Tensor  #: [N] and which of its tokens here
    top_ids: Tensor  #: [N, K]
    top_logprobs: Tensor  #: [N, K]
    weights: Tensor  #: [N] float32, of the row
    examples: tuple[Example, ...]

    @property
    def tokens(self) -> int:
        """With padding."""
        return self.ids.numel()


def steps_of(examples: int, rows: int, max_steps: int, epochs: int | None) -> int:
    """Number of steps in a run."""
    if epochs is None:
        return max_steps
    return min(max_steps, -(-epochs * examples // min(rows, examples)))


def rows_of_step(step: int, examples: int, rows: int, seed: int) -> list[int]:
    """Indices of the rows of ``step`` (from 0), all different unless an epoch ends within it."""
    rows = min(rows, examples)
    chosen: list[int] = []
    place = step * rows
    while len(chosen) < rows:
        epoch, offset = divmod(place + len(chosen), examples)
        chosen.extend(epoch_order(epoch, examples, seed)[offset : offset + rows - len(chosen)])
    return chosen


def epoch_order(epoch: int, examples: int, seed: int) -> list[int]:
    """All indices in the order of that epoch."""
    order = list(range(examples))
    random.Random(f"{seed}:{epoch}").shuffle(order)
    return order


def common_length(examples: Sequence[Example]) -> int:
    """Tokens that all examples begin with, none of which predicts a target."""
    most = min(int(example.places[0]) for example in examples)
    first = examples[0].token_ids
    for example in examples[1:]:
        while first[:most] != example.token_ids[:most]:
            most = next(place for place in range(most) if first[place] != example.token_ids[place])
    return most


def micro_batches(examples: Sequence[Example], common: int, most_tokens: int) -> list[MicroBatch]:
    """``examples`` without their first ``common`` tokens, by length, in batches of at most ``most_tokens``."""
    batches: list[list[Example]] = [[]]
    for example in sorted(examples, key=lambda item: item.fed):  # ascending, so the last of a batch is its longest
        if batches[-1] and (len(batches[-1]) + 1) * (example.fed - common) > most_tokens:
            batches.append([])
        batches[-1].append(example)
    return [_collate(batch, common) for batch in batches if batch]


def _collate(examples: Sequence[Example], common: int) -> MicroBatch:
    longest = max(example.fed for example in examples) - common
    ids = np.zeros((len(examples), longest), dtype=np.int64)
    mask = np.zeros((len(examples), longest), dtype=bool)
    width = max(example.targets.top_ids.shape[1] for example in examples)
    top_ids, top_logprobs = [], []
    for row, example in enumerate(examples):
        fed = example.token_ids[common : example.fed]
        ids[row, : len(fed)], mask[row, : len(fed)] = fed, True
        targets = example.targets
        missing = ((0, 0), (0, width - targets.top_ids.shape[1]))
        top_ids.append(np.pad(targets.top_ids, missing))
        top_logprobs.append(np.pad(targets.top_logprobs, missing, constant_values=-np.inf))
    counts = [len(example.targets.offsets) for example in examples]
    return MicroBatch(
        ids=torch.from_numpy(ids),
        mask=torch.from_numpy(mask),
        rows=torch.from_numpy(np.repeat(np.arange(len(examples)), counts)),
        places=torch.from_numpy(np.concatenate([example.places - common for example in examples])),
        top_ids=torch.from_numpy(np.concatenate(top_ids)),
        top_logprobs=torch.from_numpy(np.concatenate(top_logprobs)),
        weights=torch.from_numpy(np.repeat([example.weight for example in examples], counts).astype(np.float32)),
        examples=tuple(examples),
    )
