"""Replay: the samples with their prompts, gold answers and splits, without the environment."""

from __future__ import annotations

from memory.distillation.answers import content_key
from memory.distillation.config import DataConfig, StrategyConfig
from memory.distillation.prompt_builder import PromptBuilder, estimate_tokens
from memory.distillation.replay_env import ReplayEnvironment, split_of
from memory.distillation.strategies.formation import make_strategy
from memory.history import Record
from tests.support.experiences import record, tagged


def environment(
    records: list[Record], strategy: StrategyConfig | None = None, seed: int = 0, **data: object
) -> ReplayEnvironment:
    builder = PromptBuilder("turns", "", estimate_tokens, 4000)
    config = DataConfig(**data)  # type: ignore[arg-type]
    return ReplayEnvironment(records, make_strategy(strategy or StrategyConfig(), seed), builder, config, seed)


def test_every_experience_is_asked_again_without_its_own_answer() -> None:
    items = list(environment(tagged(9)))
    assert [item.sample.record.id for item in items] == list(range(1, 10))
    for item in items:
        assert item.sample.record.id not in item.prompt.included
        assert item.prompt.student_messages == [{"role": "user", "content": item.sample.record.observation}]
    assert [item.failed for item in items] == [False, False, True] * 3
    assert items[2].gold == "OPS-RED"
    assert {item.strategy for item in items} == {"full_memory"}


def test_it_is_the_same_every_time() -> None:
    def made() -> list[object]:
        return list(environment(tagged(40), StrategyConfig(name="mixed", shuffle=True), seed=3))

    assert made() == made()


def test_equal_observations_count_once_and_lie_on_one_side() -> None:
    records = [record(1, "Q"), record(2, "q ", "b", "Correct!"), record(3, "other"), record(4, "gone", deleted=True)]
    assert [item.sample.record.id for item in environment(records)] == [2, 3]
    repeated = list(environment(records, latest_feedback_wins=False, eval_share=0.5))
    assert [item.sample.record.id for item in repeated] == [1, 2, 3]
    assert repeated[0].split == repeated[1].split


def test_feedback_targets_ask_only_where_the_answer_is_known() -> None:
    records = [*tagged(3), record(4, "nobody judged"), record(5, "wrong", "a", "Incorrect!")]
    assert [item.sample.record.id for item in environment(records, targets="feedback")] == [1, 2, 3]
    assert [item.gold for item in environment(records, targets="mixed")][3:] == [None, None]


def test_limits_keep_the_newest_experiences_and_the_first_rows() -> None:
    records = tagged(12)
    assert [sample.record.id for sample in environment(records, max_records=4).samples()] == [9, 10, 11, 12]
    focus = StrategyConfig(failure_focus=True)
    assert [sample.record.id for sample in environment(records, focus, max_rows=5).samples()] == [3, 6, 9, 12, 1]


def test_a_share_of_the_students_sees_recent_turns() -> None:
    items = list(environment(tagged(60), recent_turns=2, recent_share=0.5))
    shown = [len(item.prompt.student_messages) for item in items]
    assert set(shown) == {1, 7}  # two experiences are six turns
    assert 15 < shown.count(7) < 45
    assert set(len(i.prompt.student_messages) for i in environment(tagged(9), recent_turns=1, recent_share=1.0)) == {4}


def test_the_student_can_be_shown_the_nearest_experiences_and_never_its_own() -> None:
    texts = ["my card is lost", "euros for dollars", "the card was stolen", "a lost card", "top up"]
    records = [record(number, text, f"a{number}", "Correct!") for number, text in enumerate(texts, start=1)]
    shown = StrategyConfig(exclude_current=False)  # to the teacher
    items = list(environment(records, shown, recent_turns=2, recent_share=1.0, recent_choice="nearest"))
    window = StrategyConfig(name="rolling_window", window_k=1)
    again = list(environment(records, window, recent_turns=2, recent_share=1.0, recent_choice="nearest"))
    assert [item.prompt.student_messages for item in again] == [item.prompt.student_messages for item in items]
    said = {
        item.sample.record.id: [turn["content"] for turn in item.prompt.student_messages if turn["role"] == "assistant"]
        for item in items
    }
    assert said[1] == ["a3", "a4"]  # the nearest last
    assert said[2] == []
    assert "a4" not in said[4]
    assert said[4] == ["a3", "a1"]
    alone = environment(records, recent_turns=2, recent_share=0.0, recent_choice="nearest")
    assert {len(item.prompt.student_messages) for item in alone} == {1}


def test_the_split_is_by_content_and_has_about_its_share() -> None:
    keys = [content_key(f"observation {number}") for number in range(2000)]
    held_out = [key for key in keys if split_of(key, 0.15) == "eval"]
    assert 240 < len(held_out) < 360
    assert {split_of(key, 0.3) for key in held_out} == {"eval"}  # a larger share only adds
    assert {split_of(key, 0.0) for key in keys} == {"train"}
