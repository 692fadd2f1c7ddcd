"""The arms on a tiny model, whose answers are known from plain passes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from memory.distillation.encoding import Encoder
from memory.distillation.errors import EvaluationError
from memory.distillation.evaluation import Evaluation, Question, evaluate, question_of, spoken
from memory.distillation.initialisers import text_prefix
from memory.distillation.losses import amount
from memory.distillation.student import Student
from memory.distillation.trainer import train_cartridge
from tests.support.tiny_cartridges import TRAINING, teacher_row, tiny_loaded
from workspace.errors import PrefixMismatch
from workspace.models import LoadedModel
from workspace.prefix import KVPrefix, prefix_of_tokens

MEMORY = tuple(
    {"role": role, "content": content}
    for turn in ("fox", "dog", "owl")
    for role, content in (("user", f"{turn} sleeps"), ("assistant", f"Paris is the {turn}"))
)
TEXTS = ("fox", "dog", "owl", "fox sleeps", "dog sleeps", "who is Bern")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return tiny_loaded(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def questions(loaded: LoadedModel) -> list[Question]:
    """What the model says with the memory is right; the last three have candidates."""
    found = []
    for number, text in enumerate(TEXTS):
        row = teacher_row(loaded, list(MEMORY), text, top_k=320)
        candidates = (row.answer.content, "Bern is", "zzz") if number >= 3 else ()
        found.append(question_of(row, [*MEMORY, {"role": "user", "content": text}], candidates))
    return found


@pytest.fixture(scope="module")
def measured(loaded: LoadedModel, questions: list[Question]) -> Evaluation:
    """With the whole memory as prefix, which is the long prompt by other means."""
    whole = prefix_of_tokens(loaded, Encoder(loaded).conversation(MEMORY))
    return evaluate(loaded, questions, cartridge=whole, max_tokens=3)


def test_the_long_prompt_says_what_the_teacher_said(measured: Evaluation) -> None:
    arm = measured.arms["long_prompt"]
    assert arm.exact.tolist() == [1.0] * 6
    np.testing.assert_allclose(arm.kl, 0, atol=1e-4)
    assert arm.slots == 0


def test_a_prefix_of_the_whole_memory_is_the_long_prompt(measured: Evaluation) -> None:
    long, cartridge = measured.arms["long_prompt"], measured.arms["cartridge"]
    assert cartridge.answers == long.answers
    np.testing.assert_allclose(cartridge.kl, long.kl, atol=1e-4)
    np.testing.assert_allclose(cartridge.nll, long.nll, rtol=1e-3, atol=1e-3)
    assert cartridge.attended == long.attended
    assert cartridge.prompt_tokens.sum() < long.prompt_tokens.sum()


def test_without_memory_it_is_another_model(measured: Evaluation) -> None:
    arm = measured.arms["memoryless"]
    assert arm.exact.sum() < 6
    assert (arm.kl > 0.01).all()


def test_ranked_only_where_there_are_candidates(measured: Evaluation) -> None:
    for arm in measured.arms.values():
        assert np.isnan(arm.ranked[:3]).all()
        assert np.isin(arm.ranked[3:], (0.0, 1.0)).all()


def test_divergence_is_the_trainers(loaded: LoadedModel, questions: list[Question]) -> None:
    """What the gate measures is what was minimised."""
    prefix = text_prefix(loaded, MEMORY, 16)
    arm = evaluate(loaded, questions, cartridge=prefix, long_prompt=False).arms["cartridge"]
    encoder = Encoder(loaded)
    examples = [
        encoder.example(question.row, name="x", top_k=320, max_tokens=99) for question in questions if question.row
    ]
    found = Student(loaded).losses(list(zip(prefix.keys, prefix.values, strict=True)), examples)
    loss = sum(item.weighted() for item in found) / sum(amount(example) for example in examples)
    assert float(arm.kl.mean()) == pytest.approx(loss, rel=1e-4)  # all answers are of the same length


def test_training_shows(
    loaded: LoadedModel, questions: list[Question], tmp_path_factory: pytest.TempPathFactory
) -> None:
    rows = [question.row for question in questions if question.row is not None]
    init = text_prefix(loaded, MEMORY, 16)
    config = TRAINING.model_copy(update={"max_steps": 30, "evaluate_every": 30})
    trained = train_cartridge(loaded, rows, [], config, init, folder=tmp_path_factory.mktemp("run"))
    found = evaluate(loaded, questions, cartridge=trained.prefix, serving=init, long_prompt=False)
    assert found.arms["cartridge"].kl.mean() < 0.5 * found.arms["serving"].kl.mean()
    assert found.arms["cartridge"].slots == found.arms["serving"].slots == 16


def test_numbers_are_plain(measured: Evaluation) -> None:
    told = json.loads(json.dumps(measured.numbers(), allow_nan=False))
    assert told["questions"] == 6
    assert told["arms"]["long_prompt"]["exact"] == {"rows": 6, "mean": 1.0, "low": 1.0, "high": 1.0}
    assert told["arms"]["cartridge"]["ranked"]["rows"] == 3


def test_between_and_progress_are_told(loaded: LoadedModel, questions: list[Question]) -> None:
    arms: list[str] = []
    layers: list[int] = []
    evaluate(
        loaded, questions[:1], cartridge=text_prefix(loaded, "a", 16), progress=arms.append,
        between=lambda: layers.append(1),
    )  # fmt: skip
    assert arms == ["memoryless", "long_prompt", "cartridge"]
    assert len(layers) > 12


def test_what_cannot_be_measured(loaded: LoadedModel) -> None:
    with pytest.raises(EvaluationError, match="no held-out questions"):
        evaluate(loaded, [])
    with pytest.raises(EvaluationError, match="none of the candidates"):
        Question("k", ({"role": "user", "content": "a"},), (), "x", ("y",))


def test_spoken_leaves_out_the_end_and_what_follows_a_stop(loaded: LoadedModel) -> None:
    ids = loaded.tokenizer.encode("Paris", add_special_tokens=False)
    prompt = Encoder(loaded).prompt([{"role": "user", "content": "a"}], after_prefix=False)
    assert spoken(loaded, prompt, [*ids, 1]) == "Paris"
    assert spoken(loaded, prompt, ids) == "Paris"
    assert spoken(loaded, prompt, []) == ""


def test_a_prefix_of_another_model_is_refused(loaded: LoadedModel, questions: list[Question]) -> None:
    good = text_prefix(loaded, "a", 16)
    with pytest.raises(PrefixMismatch):
        evaluate(loaded, questions, cartridge=KVPrefix(good.keys[:2], good.values[:2]))
