"""Environments: the same in every process, nothing shared between training and evaluation, feedback word for word."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from agents.environments.associative_recall import AssociativeRecall
from agents.environments.base import Environment, Task, judge, lived_through
from agents.environments.drifting_conventions import PHASES, DriftingConventions
from agents.environments.intent_tagging import IntentTagging, intent_tagging, make_codes
from agents.environments.messages import INTENTS, load_banking77, make_messages
from agents.environments.registry import ENVIRONMENTS, make_environment
from agents.errors import EnvironmentDataError
from memory.distillation.answers import content_key, corrected_answer, went_wrong
from memory.distillation.replay_env import split_of
from memory.history import Record

ROOT = Path(__file__).parents[3]


def _banking(folder: Path, intents: int = 7, per_intent: int = 12) -> Path:
    """A folder in banking77's format, with a repetition across the two files."""
    names = [*INTENTS, "something_else"][:intents]
    lines = [f'"{name} message, number {number}",{name}' for number in range(per_intent) for name in names]
    (folder / "train.csv").write_text("\n".join(["text,category", *lines]) + "\n")
    repeated = f'"  {names[0].upper()}   Message, number 0",{names[0]}'
    (folder / "test.csv").write_text(f"text,category\n{repeated}\n")
    return folder


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_training_and_evaluation_share_no_observation(name: str) -> None:
    environment = make_environment(name)
    assert isinstance(environment, Environment)
    train, held_out = environment.tasks("train"), environment.tasks("eval")
    assert len(train) >= 30
    assert len(held_out) >= 20
    assert not {task.key for task in train} & {task.key for task in held_out}
    assert {task.answer for task in (*train, *held_out)} <= set(environment.answers())
    assert not any(task.answer in environment.system_prompt for task in train)


def test_the_same_in_every_process() -> None:
    code = (
        "from agents.environments.registry import *\n"
        "for name in ENVIRONMENTS:\n"
        "    for split in ('train', 'eval'):\n"
        "        print(name, *make_environment(name, seed=3).tasks(split), sep='|')"
    )
    told = set()
    for seed in ("1", "2"):
        command = [sys.executable, "-c", code]
        done = subprocess.run(
            command, cwd=ROOT, env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        )
        told.add(done.stdout)
    assert len(told) == 1
    assert "PAY" in told.pop()


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_another_seed_is_another_life(name: str) -> None:
    assert make_environment(name).tasks("train") != make_environment(name, seed=1).tasks("train")


def test_the_split_is_by_content_and_not_that_of_distillation() -> None:
    """The training side must still split into both sides when it is distilled."""
    environment = intent_tagging()
    sides = Counter(split_of(task.key, 0.15) for task in environment.tasks("train"))
    assert sides["eval"] >= 5
    texts = make_messages()
    shuffled = {name: [text.upper() + " " for text in reversed(found)] for name, found in texts.items()}
    other = IntentTagging("x", shuffled, environment.labels)
    assert [task.key for task in other.tasks("eval")] == [task.key for task in environment.tasks("eval")]


def test_judging_and_its_words() -> None:
    task = Task("which?", "OPS-RED")
    assert (judge(task, " OPS-RED\n").message, judge(task, " OPS-RED\n").score) == ("Correct!", 1.0)
    for wrong in ("ops-red", "OPS-RED.", "", "OPS-RED or OPS-BLUE"):
        assert judge(task, wrong).message == "Incorrect! The correct answer is OPS-RED."
        assert judge(task, wrong).score == 0.0


def _record(item: object, number: int) -> Record:
    fields = {name: getattr(item, name) for name in item.__dataclass_fields__ if name != "request_id"}  # type: ignore[attr-defined]
    return Record(id=number, content_hash="", created_at=0.0, deleted=False, **fields)


def test_a_life_that_was_lived_through_is_balanced_and_says_what_was_right() -> None:
    environment = intent_tagging(labels="codes")
    life = lived_through(environment.tasks("train")[:60], environment.answers(), domain="bank", mistakes=0.25, seed=1)
    assert Counter(item.meta["group"] for item in life) == dict.fromkeys(INTENTS, 10)
    records = [_record(item, number) for number, item in enumerate(life)]
    assert 8 <= sum(1 for record in records if went_wrong(record)) <= 22
    right = {task.observation: task.answer for task in environment.tasks("train")}
    assert all(corrected_answer(record) == right[record.observation] for record in records)
    assert len({item.request_id for item in life}) == 60
    assert life == lived_through(
        environment.tasks("train")[:60], environment.answers(), domain="bank", mistakes=0.25, seed=1
    )
    plain = lived_through(environment.tasks("train")[:6], environment.answers(), domain="bank", with_feedback=False)
    assert [(item.action, item.feedback, item.score) for item in plain] == [
        (task.answer, None, None) for task in environment.tasks("train")[:6]
    ]


def test_codes_are_arbitrary_distinct_and_differ_in_both_parts() -> None:
    codes = make_codes(INTENTS, 0)
    assert len({code.split("-")[0] for code in codes.values()}) == len(INTENTS)
    assert len({code.split("-")[1] for code in codes.values()}) == len(INTENTS)
    assert make_codes(INTENTS, 1) != codes
    with pytest.raises(EnvironmentDataError, match="at most 12"):
        make_codes([str(number) for number in range(13)], 0)


# banking77.


def test_banking77_from_a_folder(tmp_path: Path) -> None:
    texts = load_banking77(_banking(tmp_path), INTENTS[:2])
    assert {name: len(found) for name, found in texts.items()} == {INTENTS[0]: 13, INTENTS[1]: 12}
    environment = intent_tagging(tmp_path, intents=INTENTS[:2])
    tasks = [*environment.tasks("train"), *environment.tasks("eval")]
    assert len(tasks) == 24, "the repetition counts once"
    assert environment.name == "intents-banking77-semantic"
    assert {task.answer for task in tasks} == set(INTENTS[:2])


def test_banking77_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentDataError, match=r"train\.csv"):
        load_banking77(tmp_path)
    _banking(tmp_path)
    with pytest.raises(EnvironmentDataError, match="did you mean card_arrival"):
        load_banking77(tmp_path, ["card_arival"])
    (tmp_path / "test.csv").write_text("message,intent\nx,y\n")
    with pytest.raises(EnvironmentDataError, match=r"test\.csv, line 2"):
        load_banking77(tmp_path)


def test_the_real_banking77(shared_data: Path) -> None:
    environment = intent_tagging(shared_data / "banking77", labels="codes")
    assert len(environment.tasks("train")) > 600
    assert len(environment.tasks("eval")) > 250
    assert Counter(task.group for task in environment.tasks("eval")[:60]) == dict.fromkeys(INTENTS, 10)


@pytest.mark.parametrize(
    ("texts", "labels"),
    [
        ({"a": ["x"], "b": ["y"]}, {"a": "A", "b": "B"}),
        ({"a": [str(n) for n in range(30)]}, {"b": "B"}),
        ({"a": [str(n) for n in range(30)], "b": [str(n) for n in range(30, 60)]}, {"a": "A", "b": "A"}),
    ],
)
def test_texts_that_make_no_environment(texts: dict[str, list[str]], labels: dict[str, str]) -> None:
    with pytest.raises(EnvironmentDataError):
        IntentTagging("x", texts, labels)


# Recall.


def test_recall_asks_for_the_same_pairs_in_other_words() -> None:
    environment = AssociativeRecall(pairs=16, repeats=3)
    pairs = {task.group: task.answer for task in environment.tasks("train")}
    assert len(pairs) == len(set(pairs.values())) == 16
    assert not set(pairs) & set(pairs.values())
    assert {task.group: task.answer for task in environment.tasks("eval")} == pairs
    assert len({task.key for task in environment.tasks("train")}) == 48, "another template each time round"
    assert all(pairs[task.group] == task.answer for task in environment.tasks("train"))


def test_recall_is_examined_on_what_was_met() -> None:
    environment = AssociativeRecall(pairs=16)
    met = {task.group for task in environment.tasks("train")[:5]}
    assert {task.group for task in environment.evaluation(5)} == met
    assert len(environment.evaluation(0)) == 32


@pytest.mark.parametrize(
    "wrong", [{"pairs": 0}, {"pairs": 10**6}, {"repeats": 0}, {"eval_templates": ()}, {"train_templates": ("which?",)}]
)
def test_recall_that_cannot_be(wrong: dict[str, object]) -> None:
    with pytest.raises(EnvironmentDataError):
        AssociativeRecall(**wrong)  # type: ignore[arg-type]


# Drift.


def test_conventions_change_in_the_third_phase() -> None:
    environment = DriftingConventions(per_phase=12)
    train = environment.tasks("train")
    assert [Counter(task.group for task in train)[phase] for phase in PHASES] == [12, 12, 12]
    assert len({task.answer for task in train[:12]}) == 3
    assert not {task.answer for task in train[:12]} & {task.answer for task in train[12:24]}
    early, middle, late = (environment.evaluation(episode) for episode in (12, 24, 36))
    assert {task.group for task in early} == {"A"}
    assert {task.group for task in middle} == {"A", "B"}
    before = {task.observation: task.answer for task in middle}
    assert {task.observation for task in late} == set(before)
    assert all(before[task.observation] != task.answer for task in late), "what was right is wrong now"
    assert {task.answer for task in late} == {task.answer for task in middle}, "with the same codes"
    assert [environment.phase_of(episode) for episode in (0, 11, 12, 24, 99)] == [0, 0, 1, 2, 2]


def test_drift_that_cannot_be() -> None:
    with pytest.raises(EnvironmentDataError):
        DriftingConventions(families=(INTENTS[:3], INTENTS[2:4]))


def test_unknown_names() -> None:
    with pytest.raises(EnvironmentDataError, match="did you mean intents"):
        make_environment("intent")
    with pytest.raises(EnvironmentDataError, match="no sentences"):
        make_messages(["tax"])
    assert all(content_key(text) for found in make_messages().values() for text in found)
    assert {len(found) for found in make_messages().values()} == {40}
