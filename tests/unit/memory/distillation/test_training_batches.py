"""Which rows make a step, and how they lie in tensors."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from memory.distillation.encoding import Example, gold_targets
from memory.distillation.training_batches import common_length, epoch_order, micro_batches, rows_of_step, steps_of


def example(prompt: list[int], answer: list[int], weight: float = 1.0) -> Example:
    return Example(str(prompt), (*prompt, *answer), len(prompt), gold_targets(answer), weight)


@pytest.mark.parametrize(("examples", "rows"), [(10, 4), (3, 16), (7, 7), (5, 1)])
def test_every_epoch_has_every_row_once(examples: int, rows: int) -> None:
    taken = [index for step in range(35) for index in rows_of_step(step, examples, rows, seed=3)]
    assert len(taken) == 35 * min(rows, examples)
    for epoch in range(len(taken) // examples):
        part = taken[epoch * examples : (epoch + 1) * examples]
        assert sorted(part) == list(range(examples))
        assert part == epoch_order(epoch, examples, 3)


def test_steps_depend_on_seed_and_number_only() -> None:
    assert rows_of_step(7, 40, 8, seed=1) == rows_of_step(7, 40, 8, seed=1)
    assert rows_of_step(7, 40, 8, seed=1) != rows_of_step(7, 40, 8, seed=2)


def test_epochs_can_end_a_run_before_max_steps() -> None:
    assert steps_of(40, 16, 200, None) == 200
    assert steps_of(40, 16, 200, 2) == 5
    assert steps_of(40, 16, 3, 2) == 3
    assert steps_of(4, 16, 200, 2) == 2  # a step has no row twice


def test_common_beginning_ends_before_anything_is_predicted() -> None:
    one, other = example([1, 2, 3, 4], [9, 9]), example([1, 2, 3, 5], [9, 9])
    assert common_length([one, other]) == 3
    assert common_length([one, one]) == 3  # the last token of the prompt predicts the answer
    assert common_length([one, example([7, 2, 3], [1])]) == 0
    assert common_length([one, example([1], [2, 3, 4])]) == 0
    assert common_length([one]) == 3


def test_micro_batches_hold_every_target_at_its_place() -> None:
    examples = [example([1, 2, *range(10, 10 + size)], [3, 4, 5], weight=size) for size in (5, 1, 9, 2)]
    batches = micro_batches(examples, 2, most_tokens=16)
    assert all(batch.tokens <= 16 or len(batch.examples) == 1 for batch in batches)
    assert len(batches) == 3
    seen: Counter[str] = Counter()
    for batch in batches:
        assert (batch.mask.sum(1) == torch.tensor([e.fed - 2 for e in batch.examples])).all()
        assert batch.mask[:, 0].all()
        place = 0
        for row, item in enumerate(batch.examples):
            seen[item.name] += 1
            text = [*item.token_ids[2:]]
            for offset, gold in enumerate([3, 4, 5]):
                at = int(batch.places[place])
                assert int(batch.rows[place]) == row
                assert batch.ids[row, : at + 1].tolist() == text[: at + 1]
                assert text[at + 1] == gold
                assert at == item.start - 2 - 1 + offset
                assert int(batch.top_ids[place, 0]) == gold
                assert float(batch.weights[place]) == item.weight
                place += 1
        assert place == len(batch.rows)
    assert set(seen.values()) == {1}
    assert len(seen) == 4
