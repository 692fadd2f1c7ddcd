"""What a training step sees: order, chances, padding, and the updates that serving would make."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.support.workspace_training import RECIPE, WORKSPACE, captured
from workspace.capture_blob import Blob
from workspace.capture_folder import Capture, CaptureEntry
from workspace.errors import CaptureMismatch, TrainingConfigError
from workspace.models import LoadedModel
from workspace.projector import ModuleShape
from workspace.training_config import LossWeights, TrainingConfig, make_config, read_recipe
from workspace.training_data import (
    Draw,
    assemble,
    check_layers,
    check_model,
    controller_examples,
    draw_rows,
    epoch_batches,
    fixed_rows,
    of_split,
)


@pytest.fixture(scope="module")
def capture(tiny: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Capture:
    return captured(tiny, tmp_path_factory.mktemp("captured"))


@pytest.fixture(scope="module")
def blobs(capture: Capture) -> list[Blob]:
    """Two windows and a short chat."""
    chat = next(entry for entry in capture.entries if entry.kind == "chat")
    return [capture.read(entry) for entry in (capture.entries[0], chat, capture.entries[1])]


def entry(index: int, tokens: int) -> CaptureEntry:
    return CaptureEntry(index=index, file=f"{index}", bytes=1, sha256=f"{index:064}", tokens=tokens, prompt_tokens=1)


def test_an_epoch_takes_every_text_once_and_similar_lengths_together() -> None:
    entries = [entry(i, 10 + 7 * i % 90) for i in range(64)]
    batches = epoch_batches(entries, 4, seed=1, epoch=0)
    assert Counter(item.index for batch in batches for item in batch) == Counter(range(64))
    assert batches == epoch_batches(entries, 4, seed=1, epoch=0)
    assert batches != epoch_batches(entries, 4, seed=1, epoch=1)
    assert batches != epoch_batches(entries, 4, seed=2, epoch=0)
    spread = sum(max(e.tokens for e in batch) - min(e.tokens for e in batch) for batch in batches) / len(batches)
    assert spread < 20  # by chance it would be about 54
    assert all(len(batch) == 4 for batch in epoch_batches(entries[:62], 4, seed=1, epoch=0))
    assert [len(batch) for batch in epoch_batches(entries[:3], 4, seed=1, epoch=0)] == [3]


def test_chances_come_from_the_generator_alone(blobs: list[Blob]) -> None:
    config = RECIPE.model_copy(update={"mid_answer_share": 0.5, "keep": (2, 9)})
    one, two = (torch.Generator().manual_seed(5) for _ in range(2))
    drawn = [draw_rows(blobs, config, one) for _ in range(200)]
    assert drawn == [draw_rows(blobs, config, two) for _ in range(200)]
    assert 70 < sum(whole for _, whole in drawn) < 130
    assert {row.keep for rows, whole in drawn for row in rows if not whole} == {2, 9}
    assert all(len({row.keep for row in rows}) == 1 for rows, _ in drawn)
    births = Counter(rows[0].birth for rows, _ in drawn)
    window = blobs[0]
    assert 70 < births[window.prompt_tokens] < 130
    assert set(births) <= set(range(window.prompt_tokens, window.tokens - config.least_targets + 1))
    assert max(births) == window.tokens - config.least_targets


@pytest.mark.parametrize("keep", [None, 1, 5, 1000])
def test_rows_are_padded_where_nobody_looks(keep: int | None, blobs: list[Blob]) -> None:
    batch = assemble(blobs, fixed_rows(blobs, keep), RECIPE)
    assert batch.whole == (keep is None)
    for row, blob in enumerate(blobs):
        kept = batch.prefix_ids[row][batch.prefix_mask[row].bool()]
        count = int(batch.target_mask[row].sum())
        fed = batch.fed_ids[row, :count]
        assert batch.first[row] == blob.prompt_tokens - 1
        length = blob.prompt_tokens if keep is None else min(keep, blob.prompt_tokens)
        seen = torch.cat((kept, fed, batch.target_ids[row, count - 1 : count]))
        assert torch.equal(seen, blob.input_ids[blob.prompt_tokens - length :])
        assert torch.equal(batch.target_ids[row, : count - 1], fed[1:])
        assert batch.base_loss is not None
        assert blob.statistics is not None
        assert torch.equal(batch.base_loss[row, :count], blob.statistics[:, 3])
        assert batch.top_ids is not None
        assert blob.teacher is not None
        assert torch.equal(batch.top_ids[row, :count], blob.teacher.ids)
    assert not batch.prefix_mask[:, :1].all() or keep == 1 or batch.prefix_mask.all()


def test_targets_are_capped(blobs: list[Blob]) -> None:
    batch = assemble(blobs, fixed_rows(blobs, None), RECIPE.model_copy(update={"most_targets": 4, "least_targets": 2}))
    assert batch.fed_ids.shape == (3, 4)
    assert batch.target_mask.all()


def test_updates_come_as_in_serving(blobs: list[Blob]) -> None:
    """``update_every`` 3: with the prompt, then before the 3rd, 6th, ... answer token is fed."""
    window = blobs[0]
    prompt = window.prompt_tokens
    draws = [Draw(prompt + 7, None), Draw(blobs[1].prompt_tokens, None), Draw(prompt + 1, None)]
    batch = assemble(blobs, draws, RECIPE)
    counts = [update.mask.sum(dim=1).tolist() for update in batch.updates]
    assert counts[0] == [16, min(16, blobs[1].prompt_tokens), 16]
    assert counts[1:] == [[2, 0, 0], [3, 0, 0]]  # answer tokens 0-1 and 2-4; 5 and 6 were not complete
    layer = next(iter(window.residuals))
    places = (window.probe_positions >= prompt + 2) & (window.probe_positions < prompt + 5)
    assert torch.equal(batch.updates[2].residuals[layer][0], window.residuals[layer][places])


def test_recorded_updates_win(blobs: list[Blob]) -> None:
    prompt = blobs[0].prompt_tokens
    steered = dataclasses.replace(blobs[0], updates=torch.tensor([prompt, prompt + 1, prompt + 6]))
    batch = assemble([steered], [Draw(prompt + 7, None)], RECIPE)
    assert [int(update.mask.sum()) for update in batch.updates] == [16, 1, 5]


def test_the_controller_learns_from_the_birth_on(blobs: list[Blob]) -> None:
    blob = blobs[0]
    inputs, targets = controller_examples(blob, WORKSPACE.thresholds, blob.prompt_tokens + 4)
    count = blob.tokens - blob.prompt_tokens - 4
    assert inputs.shape == (count, 6)
    assert targets.shape == (count, 4)
    assert ((targets >= 0) & (targets <= 1)).all()
    assert blob.statistics is not None
    torch.testing.assert_close(inputs[:, 1], blob.statistics[4:, 1])  # best probability
    assert inputs[0, 5] == 0  # a broadcast has just been
    assert inputs[1, 5] > 0


def test_what_losses_need_must_have_been_captured(tiny: LoadedModel, tmp_path: Path) -> None:
    capture = captured(tiny, tmp_path, top_k=0)
    blob = capture.read(capture.entries[0])
    with pytest.raises(TrainingConfigError, match=r"losses.distillation needs the teacher's distributions"):
        assemble([blob], fixed_rows([blob], None), RECIPE)
    plain = TrainingConfig(workspace=WORKSPACE.model_copy(update={"static_tokens": 0}), least_targets=3)
    assert assemble([blob], fixed_rows([blob], None), plain).top_ids is None


def test_texts_of_another_model_or_other_layers(capture: Capture) -> None:
    assert capture.header is not None
    shape = ModuleShape(32, 2, 8, capture.header.layers)
    check_model(capture, ["def", capture.header.fingerprint])
    check_layers(capture, shape)
    with pytest.raises(CaptureMismatch, match=r"was captured from tiny-llama .* the loaded model has abc"):
        check_model(capture, ["abc"])
    for found in (capture, dataclasses.replace(capture, header=None)):
        with pytest.raises(CaptureMismatch, match=r"layers \[.*\] with 32 numbers, hooked are \[0, 1, 5\] with 32"):
            check_layers(found, ModuleShape(32, 2, 8, (0, 1, 5)))


def test_splits(capture: Capture) -> None:
    train, held_out = of_split(capture, "train"), of_split(capture, "held_out")
    assert len(train) + len(held_out) == len(capture.entries)
    assert {item.kind for item in held_out} == {"fox", "chat"}


# Recipes.


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 0}, "recipe: epochs: Input should be greater than or equal to 1"),
        ({"epoch": 3}, "epoch: Extra inputs are not permitted"),
        ({"losses": {"cross_entropy": -1}}, "losses.cross_entropy"),
        ({"parts": ["virtual_kv", "virtual_kv"]}, "names a part twice"),
        ({"parts": ["everything"]}, "parts.0"),
        ({"parts": ["static_tokens"]}, "if and only if workspace.static_tokens is above 0"),
        ({"workspace": {"static_tokens": 4}}, "if and only if workspace.static_tokens is above 0"),
        ({"losses": {"controller": 1}}, "if and only if losses.controller is above 0"),
        ({"losses": {"cross_entropy": 0}}, "what is to be learnt"),
        ({"keep": [0]}, "at least 1 token"),
        ({"keep": []}, "keep names no number of tokens"),
        ({"least_targets": 500}, r"least_targets \(500\) exceeds most_targets"),
    ],
)
def test_recipes_that_make_no_sense(values: dict[str, object], message: str) -> None:
    with pytest.raises(TrainingConfigError, match=message):
        make_config(values, "recipe")


def test_recipe_files(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("training: {epochs: 2, losses: {distillation: 0.5}}\ncapture: {seed: 4}\n")
    assert make_config(read_recipe(path)["training"], str(path)).losses == LossWeights(distillation=0.5)
    for text in ("training: [", "[]", "trainign: {}"):
        path.write_text(text)
        with pytest.raises(TrainingConfigError, match=r"recipe.yaml"):
            read_recipe(path)
