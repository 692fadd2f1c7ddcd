"""Strategies: what the teacher sees, that it is the same every time, and that the answer never leaks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory.distillation.answers import content_key, went_wrong
from memory.distillation.config import StrategyConfig
from memory.distillation.strategies.base import MemoryFormationStrategy, Sample
from memory.distillation.strategies.formation import (
    ExcludeCurrent,
    FailureFocus,
    FullMemory,
    Mixed,
    RandomSubset,
    RollingWindow,
    Shuffled,
    make_strategy,
)
from memory.history import Record
from tests.support.experiences import record, tagged

NAMES = ["full_memory", "exclude_current", "rolling_window", "failure_focus", "random_subset", "mixed"]


def memory_ids(strategy: MemoryFormationStrategy, records: list[Record], number: int) -> list[int]:
    sample = next(item for item in strategy.iter_samples(records) if item.record.id == number)
    return [item.id for item in strategy.build_memory_for_sample(records, sample)]


def test_full_memory_is_everything_and_exclusion_is_by_content() -> None:
    records = [record(1, "Q one"), record(2, "q  ONE", "other action"), record(3, "q two")]
    assert memory_ids(FullMemory(), records, 1) == [1, 2, 3]
    assert memory_ids(ExcludeCurrent(FullMemory()), records, 1) == [3]


def test_a_window_is_what_came_before_filled_up_with_what_came_after() -> None:
    records = tagged(6)
    window = ExcludeCurrent(RollingWindow(3))
    assert memory_ids(window, records, 6) == [3, 4, 5]
    assert memory_ids(window, records, 2) == [1, 3, 4]
    assert memory_ids(window, records, 1) == [2, 3, 4]
    assert memory_ids(ExcludeCurrent(RollingWindow(9)), records, 3) == [1, 2, 4, 5, 6]


def test_a_subset_has_about_its_share_and_differs_between_samples() -> None:
    records = tagged(200)
    subset = RandomSubset(0.5, seed=1)
    one, two = memory_ids(subset, records, 1), memory_ids(subset, records, 2)
    assert one != two
    assert 70 < len(one) < 130
    assert memory_ids(RandomSubset(0.001, seed=1), records, 1)
    assert RandomSubset(0.5, 1).build_memory_for_sample([], Sample(records[0], "k")) == []


def test_failure_focus_puts_failures_first_and_keeps_all_of_them() -> None:
    records = tagged(30)
    focus = FailureFocus(FullMemory(), success_share=0.2, seed=0)
    order = [item.record for item in focus.iter_samples(records)]
    wrong = [item for item in records if went_wrong(item)]
    assert order[: len(wrong)] == wrong
    assert sorted(item.id for item in order) == [item.id for item in records]
    kept = memory_ids(focus, records, 1)
    assert {item.id for item in wrong} <= set(kept)
    assert len(wrong) < len(kept) < 25
    assert kept == sorted(kept)


def test_failure_focus_without_failures_is_not_blind() -> None:
    records = [item for item in tagged(4) if not went_wrong(item)]
    assert memory_ids(FailureFocus(FullMemory(), 0.0, 0), records, 1) == [item.id for item in records]


def test_a_mixture_gives_each_sample_one_of_its_parts() -> None:
    records = tagged(100)
    mixed = Mixed(((FullMemory(), 0.5), (RollingWindow(5), 0.5)), seed=0)
    labels = [mixed.label(item) for item in mixed.iter_samples(records)]
    assert 30 < labels.count("full_memory") < 70
    for sample, label in zip(mixed.iter_samples(records), labels, strict=True):
        expected = 100 if label == "full_memory" else 5
        assert len(mixed.build_memory_for_sample(records, sample)) == expected


def test_shuffling_changes_the_order_only() -> None:
    records = tagged(20)
    shuffled = memory_ids(Shuffled(FullMemory(), 0), records, 3)
    assert shuffled != sorted(shuffled)
    assert sorted(shuffled) == [item.id for item in records]


def test_tombstones_and_actions_without_observation_are_no_samples() -> None:
    records = [record(1, "o"), record(2, "", "said by itself"), record(3, "gone", deleted=True)]
    assert [item.record.id for item in FullMemory().iter_samples(records)] == [1]


@pytest.mark.parametrize(
    ("config", "label"),
    [
        (StrategyConfig(), "full_memory"),
        (StrategyConfig(name="rolling_window", failure_focus=True), "failure_focus+rolling_window"),
        (StrategyConfig(name="failure_focus", failure_focus=True), "failure_focus"),
        (StrategyConfig(name="random_subset", shuffle=True), "random_subset"),
        (StrategyConfig(name="mixed", mixture={"rolling_window": 1.0}), "rolling_window"),
    ],
)
def test_a_configuration_becomes_a_strategy(config: StrategyConfig, label: str) -> None:
    strategy = make_strategy(config, seed=0)
    sample = next(strategy.iter_samples(tagged(3)))
    assert strategy.label(sample) == label


def test_exclusion_can_be_switched_off_but_not_under_its_own_name() -> None:
    records = tagged(3)
    assert memory_ids(make_strategy(StrategyConfig(exclude_current=False), 0), records, 2) == [1, 2, 3]
    assert memory_ids(make_strategy(StrategyConfig(name="exclude_current", exclude_current=False), 0), records, 2) == [
        1,
        3,
    ]


histories = st.lists(
    st.tuples(
        st.sampled_from(["Alpha", "alpha ", "beta", "BETA", "gamma  delta", "gamma delta", "x"]),
        st.sampled_from([None, "Correct!", "Incorrect! The correct answer is c."]),
    ),
    min_size=1,
    max_size=20,
)


@given(
    lived=histories,
    name=st.sampled_from(NAMES),
    focus=st.booleans(),
    shuffle=st.booleans(),
    seed=st.integers(0, 3),
    window=st.integers(1, 5),
)
def test_no_strategy_shows_the_teacher_what_it_is_asked(
    lived: list[tuple[str, str | None]], name: str, focus: bool, shuffle: bool, seed: int, window: int
) -> None:
    records = [record(number, text, "a", said) for number, (text, said) in enumerate(lived, start=1)]
    config = StrategyConfig(name=name, failure_focus=focus, shuffle=shuffle, window_k=window)  # type: ignore[arg-type]
    strategy, again = make_strategy(config, seed), make_strategy(config, seed)
    samples = list(strategy.iter_samples(records))
    assert sorted(item.record.id for item in samples) == [item.id for item in records]
    for sample in reversed(samples):  # the order of asking does not matter
        memory = strategy.build_memory_for_sample(records, sample)
        assert all(content_key(item.observation) != sample.key for item in memory)
        assert len({item.id for item in memory}) == len(memory)
        assert memory == again.build_memory_for_sample(records, sample)
        others = [item for item in records if content_key(item.observation) != sample.key]
        assert bool(memory) == bool(others)
