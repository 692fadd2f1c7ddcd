"""The correction of virtual tokens: nothing until trained, better on new text once trained, refused where foreign."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from workspace import correction as correction_module
from workspace.compaction_training import CorrectionTraining, train_correction
from workspace.context import Context
from workspace.correction import SummaryCorrection, load_correction, save_correction, shipped_correction
from workspace.errors import InvalidWorkspace, StateDamaged, StateMismatch, StateNotFound
from workspace.hooking import HookedModel
from workspace.models import LoadedModel
from workspace.window import ActiveWindow, WindowSettings

SETTINGS = WindowSettings(chunk_size=16, sinks=2, virtual_tokens=4, block=8, reference_queries=8)


@pytest.fixture
def llama(tiny_models: dict[str, LoadedModel]) -> Iterator[HookedModel]:
    """The tiny Llama, both layers hooked."""
    model = HookedModel(tiny_models["llama"], (0, 1))
    yield model
    model.remove()


def make_texts(count: int, first_seed: int = 0) -> list[Tensor]:
    """Random token ids from a small alphabet, [64] each."""
    seeds = range(first_seed, first_seed + count)
    return [torch.randint(2, 30, (64,), generator=torch.Generator().manual_seed(seed)) for seed in seeds]


@torch.no_grad()
def divergence(hooked: HookedModel, texts: list[Tensor], correction: SummaryCorrection | None) -> float:
    """Mean KL from the full context to the window over all tokens after the first eviction."""
    model, total = hooked.loaded.model, 0.0
    for ids in texts:
        window = ActiveWindow(hooked, DynamicCache(config=model.config), SETTINGS, correction=correction)
        truth = model(ids[None]).logits[0].float().log_softmax(-1)
        for first, count in window.pieces(len(ids)):
            recorder = window.recorder(count)
            context = Context(segments=window.segments(count), recorder=recorder)
            positions = torch.arange(first, first + count)[None]
            cache, part = window.cache, ids[None, first : first + count]
            logits = model(part, past_key_values=cache, position_ids=positions, workspace=context).logits[0]
            wanted = truth[first : first + count]
            total += float((wanted.exp() * (wanted - logits.float().log_softmax(-1))).sum())
            window.advance(count, recorder)
    return total / len(texts)


def test_untrained_it_changes_nothing() -> None:
    correction = SummaryCorrection((0, 1), 2, 8)
    parts = torch.randn(2, 2, 4, 8), torch.randn(2, 2, 4, 8), torch.randn(2, 2, 4)
    assert all(torch.equal(one, other) for one, other in zip(parts, correction(*parts), strict=True))


def test_training_helps_on_new_text(llama: HookedModel) -> None:
    heard: list[tuple[int, float]] = []
    recipe = CorrectionTraining(steps=240, learning_rate=1e-2, rank=4)
    correction = train_correction(
        llama, make_texts(60), recipe, SETTINGS, progress=lambda step, loss: heard.append((step, loss))
    )
    new = make_texts(16, first_seed=1000)
    assert divergence(llama, new, correction) < 0.98 * divergence(llama, new, None)
    assert [step for step, _ in heard] == list(range(240))
    assert correction.record is not None
    assert correction.record.step == 240
    assert correction.record.metrics["kl_last_quarter"] == pytest.approx(sum(loss for _, loss in heard[-60:]) / 60)
    assert all(parameter.grad is None for parameter in llama.loaded.model.parameters())


def test_the_same_recipe_gives_the_same_weights(llama: HookedModel) -> None:
    recipe = CorrectionTraining(steps=6, rank=2)
    one, other = (train_correction(llama, make_texts(3), recipe, SETTINGS) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(one.parameters(), other.parameters(), strict=True))


def test_texts_that_nothing_is_evicted_from_teach_nothing(llama: HookedModel) -> None:
    with pytest.raises(InvalidWorkspace, match="24 tokens"):
        train_correction(llama, [make_texts(1)[0][:24]], None, SETTINGS)


@pytest.mark.parametrize("bad", [{"steps": 0}, {"rank": 0}, {"learning_rate": 0.0}, {"clip": 0.0}])
def test_recipes_out_of_range_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(InvalidWorkspace):
        CorrectionTraining(**bad)  # type: ignore[arg-type]


def save(llama: HookedModel, folder: Path) -> SummaryCorrection:
    """A briefly trained correction in ``folder``."""
    correction = train_correction(llama, make_texts(2), CorrectionTraining(steps=4, rank=2), SETTINGS)
    save_correction(folder, correction, llama, fingerprints=(llama.loaded.fingerprint,))
    return correction


def test_it_comes_back_from_disk(llama: HookedModel, tmp_path: Path) -> None:
    correction = save(llama, tmp_path / "state")
    found = load_correction(tmp_path / "state", llama)
    assert all(torch.equal(*pair) for pair in zip(correction.parameters(), found.parameters(), strict=True))
    assert found.record == correction.record
    assert not any(parameter.requires_grad for parameter in found.parameters())


def test_weights_of_another_model_or_other_layers_are_refused(
    llama: HookedModel, tiny_models: dict[str, LoadedModel], tmp_path: Path
) -> None:
    save(llama, tmp_path / "state")
    other = HookedModel(tiny_models["gpt_oss"], (1,))
    with pytest.raises(StateMismatch, match="tiny-llama"):
        load_correction(tmp_path / "state", other)
    other.remove()
    llama.remove()
    fewer = HookedModel(tiny_models["llama"], (1,))
    with pytest.raises(StateMismatch, match="layers 0, 1"):
        load_correction(tmp_path / "state", fewer)
    fewer.remove()


def test_absent_and_damaged_weights_are_named(llama: HookedModel, tmp_path: Path) -> None:
    with pytest.raises(StateNotFound, match="nowhere"):
        load_correction(tmp_path / "nowhere", llama)
    save(llama, tmp_path / "state")
    (weights,) = (tmp_path / "state").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-8] + bytes(8))
    with pytest.raises(StateDamaged, match=weights.name):
        load_correction(tmp_path / "state", llama)


def test_what_ships_is_found_by_the_models_fingerprint(
    llama: HookedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(correction_module, "SHIPPED", tmp_path)
    assert shipped_correction(llama) is None
    correction = save(llama, tmp_path / "tiny" / "window")
    found = shipped_correction(llama)
    assert found is not None
    assert torch.equal(found.key_up, correction.key_up)
    llama.remove()
    fewer = HookedModel(llama.loaded, (1,))
    assert shipped_correction(fewer) is None
    fewer.remove()


def test_a_window_refuses_a_correction_for_other_layers(llama: HookedModel) -> None:
    cache = DynamicCache(config=llama.loaded.model.config)
    with pytest.raises(InvalidWorkspace, match="layers 1,"):
        ActiveWindow(llama, cache, SETTINGS, correction=SummaryCorrection((1,), 2, 8))
