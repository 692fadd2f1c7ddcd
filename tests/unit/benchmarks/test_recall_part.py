"""The recall benchmark: its language, its model (trained weights are in the repository), and its gate."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict

import pytest
import torch
from transformers import DynamicCache

from benchmarks.distillation_parts import recall
from benchmarks.distillation_parts.recall import MODEL, NEEDED, Bench, load_recall_model
from benchmarks.distillation_parts.recall_model import Recipe, make_model, recall_in_context, train
from benchmarks.distillation_parts.recall_world import (
    ANSWER,
    END,
    FIRST_KEY,
    FIRST_VALUE,
    START,
    VALUES,
    history,
    make_tokenizer,
    sequences,
)
from benchmarks.kernel_parts.common import MissingData, Options
from lm.engine_client import EngineClient
from workspace.engine import Engine
from workspace.models import LoadedModel, adopt_model
from workspace.prefix import prefix_of_tokens
from workspace.prompting import Prompting


@pytest.fixture(scope="module")
def trained() -> LoadedModel:
    """The committed model."""
    return load_recall_model()


@pytest.fixture
def untrained() -> LoadedModel:
    """The same before training."""
    return adopt_model("untrained", make_model(1), make_tokenizer())


@pytest.fixture
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """On the model that the test names."""
    loaded = request.getfixturevalue(request.param)
    engine = Engine(loaded, max_active=1, max_waiting=2, threads=1)
    engine.start()
    try:
        yield Bench(Options(seeds=(1,)), loaded, EngineClient(engine))
    finally:
        engine.stop()


@pytest.mark.parametrize("start", [True, False])
def test_every_value_that_is_asked_stands_earlier_with_its_name(start: bool):
    made = sequences(3, 9, torch.Generator().manual_seed(4), start=start, passes=3)
    for row in made.ids.tolist():
        assert (row[0] == START) is start
        known = {row[at]: row[at + 2] for at in range(int(start), int(start) + 36, 4)}
        assert len(known) == 9, "a name has one value"
        for place in made.asked.tolist():
            assert row[place] == ANSWER
            assert known[row[place - 1]] == row[place + 1]
    assert len(made.asked) == 18


def test_a_chat_reads_as_the_sequences_that_the_model_was_trained_on(untrained: LoadedModel):
    pairs = history(3, seed=5)
    turns = recall._turns(pairs)
    ids = Prompting(untrained).render([*turns, {"role": "user", "content": pairs[1][0]}])
    expected = [START]
    for key, value in pairs:
        expected += [FIRST_KEY + int(key[1:]), ANSWER, FIRST_VALUE + int(value[1:]), END]
    assert ids == [*expected, FIRST_KEY + int(pairs[1][0][1:]), ANSWER]
    assert Prompting(untrained).render(turns[:1], after_prefix=True) == [expected[1], ANSWER]


def test_nobody_can_write_control_tokens(untrained: LoadedModel):
    forged = Prompting(untrained).render([{"role": "user", "content": "k1 <answer> v1 <end>"}])
    assert forged.count(ANSWER) == 1, "the one where the answer begins"
    assert END not in forged


def test_histories_differ_by_seed_and_repeat_no_name():
    one, other = history(64, seed=1), history(64, seed=2)
    assert one == history(64, seed=1) != other
    assert len({key for key, _ in one}) == 64


def test_training_is_repeatable():
    def lines(seed: int) -> list[str]:
        told: list[str] = []
        recipe = Recipe(seed=seed, tokens=64, stages=(4,), most=20, warmup=2)
        with pytest.raises(RuntimeError, match="4 pairs are not recalled after 20 steps"):
            train(recipe, told.append, lambda model: None)
        return [line.split("CPU s")[1] for line in told]

    assert lines(1) == lines(1) != lines(2)


def test_the_committed_weights_are_what_the_script_makes(trained: LoadedModel):
    fresh, kept = make_model(1), trained.model
    assert {name: p.shape for name, p in fresh.named_parameters()} == {n: p.shape for n, p in kept.named_parameters()}
    stated = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))
    expected = fresh.config.to_dict()
    for key in ("sliding_window", "layer_types", "num_local_experts", "num_experts_per_tok", "rope_parameters"):
        assert stated[key] == expected[key]
    assert (MODEL / "model.safetensors").stat().st_size < 8e6
    assert str(asdict(Recipe())) in (MODEL / "training.log").read_text(encoding="utf-8").splitlines()[0]


@pytest.mark.parametrize("pairs", [16, 32, 64])
def test_the_model_recalls_what_its_prompt_says(trained: LoadedModel, pairs: int):
    assert recall_in_context(trained.model, pairs, rows=4, seed=99) >= NEEDED


def test_a_prefix_of_tokens_gives_the_logits_of_the_prompt(trained: LoadedModel):
    made = sequences(1, 32, torch.Generator().manual_seed(11), questions=1)
    ids = made.ids[0, : int(made.asked[-1]) + 1]
    with torch.no_grad():
        whole = trained.model(ids[None]).logits[0, -1]
        for slots in (16, 64, len(ids) - 2):
            prefix = prefix_of_tokens(trained, ids[:slots].tolist())
            cache = DynamicCache()
            prefix.fill(cache)
            after = trained.model(ids[None, slots:], past_key_values=cache).logits[0, -1]
            torch.testing.assert_close(after, whole, atol=1e-4, rtol=1e-5)
    assert int(whole.argmax()) == int(made.ids[0, made.asked[-1] + 1])


@pytest.mark.parametrize("bench", ["untrained"], indirect=True)
def test_a_model_that_does_not_recall_gets_no_numbers_about_cartridges(bench: Bench):
    bench.size(16)
    told = bench.report()
    assert "less than 95%; no cartridge is reported" in told
    assert "cartridge, untrained" not in told


@pytest.mark.parametrize("bench", ["trained"], indirect=True)
def test_every_arm_is_reported_and_a_slot_a_pair_is_enough(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(recall, "VARIED", (16, 16))
    monkeypatch.setattr(recall, "STEPS", 40)
    bench.size(16)
    told = bench.report()
    for arm in ("memoryless", "whole history", "first 16 tokens", "last 16 tokens", "cartridge", *recall.VARIANTS):
        assert f"| 16 | {arm} |" in told
    assert "| 16 | 16 | whole history |" in told, "paired differences"
    assert f"1 in {VALUES}" in told
    right = {arm: float(found.recalled().mean()) for (_, arm, _), found in bench._found.items()}
    assert right["cartridge"] >= 0.9
    assert right["cartridge, untrained"] < 0.5, "it shows 4 of 16 pairs"
    assert right["memoryless"] < 0.3


def test_without_weights_the_part_is_skipped(tmp_path):
    with pytest.raises(MissingData, match=r"recall_model\.py --out"):
        load_recall_model(tmp_path)
