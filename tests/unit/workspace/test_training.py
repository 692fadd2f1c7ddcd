"""Training on a tiny model: the loss falls, a kill changes nothing, and what is broken is refused by name."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from storage import files
from tests.support.workspace_training import RECIPE, WORKSPACE, captured
from workspace import training_checkpoint
from workspace.capture_folder import Capture, read_capture
from workspace.errors import (
    BlobDamaged,
    CaptureMismatch,
    CheckpointDamaged,
    CheckpointMismatch,
    StateMismatch,
    TrainingConfigError,
    TrainingDiverged,
    TrainingError,
)
from workspace.held_out import ARMS, held_out_blobs, measure
from workspace.hooking import HookedModel
from workspace.models import LoadedModel
from workspace.modules import WorkspaceModules
from workspace.projector import ModuleShape
from workspace.state_files import read_manifest
from workspace.steering import Steering
from workspace.training import TrainingResult, learning_share, train
from workspace.training_config import TrainingConfig
from workspace.training_forward import Student


class Killed(BaseException):
    """Stands for ``kill -9``: nothing catches it."""


@pytest.fixture(scope="module")
def capture(tiny: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Capture:
    return captured(tiny, tmp_path_factory.mktemp("captured"))


def run(loaded: LoadedModel, capture: Capture, output: Path, **changes: Any) -> TrainingResult:
    return train(loaded, capture, output, RECIPE.model_copy(update=changes))


def steps(output: Path) -> list[dict[str, Any]]:
    """Logged steps without their times."""
    lines = [json.loads(line) for line in (output / "progress.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def weights(output: Path) -> dict[str, torch.Tensor]:
    manifest = read_manifest(output / "state")
    from workspace.state_files import read_tensors

    return read_tensors(output / "state", manifest)


# It learns.


def test_training_lowers_the_loss_on_texts_it_never_saw(tiny: LoadedModel, capture: Capture, tmp_path: Path) -> None:
    """The tiny model is random, so nearly everything is to be learnt; the held-out text has other sentences."""
    recipe = TrainingConfig(
        parts=("virtual_kv", "static_tokens"),
        workspace=WORKSPACE.model_copy(update={"kv_plan_bias": 0.0}),
        keep=(4,),
        rows=4,
        epochs=20,
        least_targets=3,
        learning_rate=1e-2,
        static_learning_rate=3e-2,
        held_out_rows=4,
        evaluate_every=1000,
    )
    result = train(tiny, capture, tmp_path / "run", recipe)
    assert result.finished
    found = result.metrics["held_out"]["fox"]
    assert set(found) == {"whole", "last 4"}
    for context in found.values():
        assert context["change"] < -0.2
        assert context["change"] < -2 * context["error"]
    first = [line["cross_entropy"] for line in steps(tmp_path / "run")[:3]]
    last = [line["cross_entropy"] for line in steps(tmp_path / "run") if "cross_entropy" in line][-3:]
    assert sum(last) < sum(first) - 1.5


def test_weights_serve_where_they_were_trained(tiny: LoadedModel, capture: Capture, tmp_path: Path) -> None:
    result = run(tiny, capture, tmp_path / "run")
    assert result.state is not None
    steering = Steering(tiny, RECIPE.workspace.model_copy(update={"state_path": result.state}))
    try:
        assert all(steering.modules.trained(part) for part in RECIPE.parts)
        assert steering.modules.record is not None
        assert steering.modules.record.step == result.step
        assert steering.modules.record.data_digest == capture.digest
        assert steering.modules.projector.calibrated
        steering.modules.check_invariants()
        assert not steering.modules.features.memory.weight.any(), "nobody trained it"
    finally:
        steering.close()


def test_only_the_named_parts_are_trained(tiny: LoadedModel, capture: Capture, tmp_path: Path) -> None:
    plain = WORKSPACE.model_copy(update={"static_tokens": 0})
    recipe = TrainingConfig(parts=("residual_delta",), workspace=plain, least_targets=3, rows=3, epochs=1)
    train(tiny, capture, tmp_path / "run", recipe)
    hooked = HookedModel(tiny)
    before = WorkspaceModules(ModuleShape.of(hooked), plain, seed=recipe.seed).state_dict()
    hooked.remove()
    changed = {name for name, tensor in weights(tmp_path / "run").items() if not torch.equal(tensor, before[name])}
    assert {"projector.gate", "projector.basis", "slots.first"} <= changed
    assert not {name for name in changed if name.startswith(("controller", "projector.weight", "projector.bias"))}


def test_a_controller_alone_learns_its_heuristics(tiny: LoadedModel, capture: Capture, tmp_path: Path) -> None:
    plain = WORKSPACE.model_copy(update={"static_tokens": 0})
    recipe = TrainingConfig.model_validate(
        {"parts": ("controller",), "workspace": plain, "losses": {"controller": 1.0}, "rows": 3, "epochs": 30}
    )
    train(tiny, capture, tmp_path / "run", recipe)
    lines = [line for line in steps(tmp_path / "run") if "controller" in line]
    assert lines[-1]["controller"] < lines[0]["controller"] / 3
    assert "cross_entropy" not in lines[0]


# Kills.


def interrupted(phase: str, at: int, monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> None:
    """Run ``work`` until it dies in its ``at``-th checkpoint, or in its ``at``-th step."""
    seen = 0

    def count() -> bool:
        nonlocal seen
        seen += 1
        return seen == at

    with monkeypatch.context() as patched:
        if phase == "in a step":
            original = torch.optim.AdamW.step

            def step(self: Any, *args: Any) -> Any:
                if count():
                    raise Killed
                return original(self, *args)

            patched.setattr(torch.optim.AdamW, "step", step)
        elif phase == "while writing the tensors":
            save_file = training_checkpoint.safetensors.torch.save_file

            def save(tensors: Any, path: Path) -> None:
                if count():
                    path.write_bytes(b"half of it")
                    raise Killed
                save_file(tensors, path)

            patched.setattr(training_checkpoint.safetensors.torch, "save_file", save)
            # nothing cleans up after a kill
            patched.setattr(files.shutil, "rmtree", lambda *_, **__: None)
        elif phase == "between publishing and removing":
            remove = files.remove_directory

            def dying(path: Path) -> None:
                if count():
                    raise Killed
                remove(path)

            patched.setattr(files, "remove_directory", dying)
        else:
            append = files.append_line

            def torn(path: Path, line: str) -> None:
                if count():
                    with open(path, "a") as handle:
                        handle.write(line[:5])
                    raise Killed
                append(path, line)

            patched.setattr(files, "append_line", torn)
        with pytest.raises(Killed):
            work()
    assert seen == at


@pytest.mark.parametrize(
    ("phase", "at"),
    [
        ("in a step", 1),
        ("in a step", 4),
        ("while writing the tensors", 1),
        ("while writing the tensors", 2),
        ("between publishing and removing", 1),
        ("in the log", 5),
    ],
)
def test_a_killed_run_goes_on_to_the_same_bits(
    phase: str, at: int, tiny: LoadedModel, capture: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(tiny, capture, whole)
    interrupted(phase, at, monkeypatch, lambda: run(tiny, capture, cut))
    result = run(tiny, capture, cut)
    assert result.finished
    assert steps(cut) == steps(whole)
    one, two = weights(whole), weights(cut)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert list(cut.rglob(f"{files.PARTIAL_PREFIX}*")) == []
    assert len(list((cut / "checkpoints").iterdir())) == 2


def test_stopped_and_called_again(tiny: LoadedModel, capture: Capture, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(tiny, capture, whole)
    stop = threading.Event()
    parts = train(
        tiny, capture, cut, RECIPE, progress=lambda report: stop.set() if report.step == 3 else None, stop=stop
    )
    assert (parts.finished, parts.step, parts.state) == (False, 3, None)
    assert run(tiny, capture, cut).finished
    assert steps(cut) == steps(whole)


def test_a_finished_run_is_not_trained_again(tiny: LoadedModel, capture: Capture, tmp_path: Path) -> None:
    first = run(tiny, capture, tmp_path / "run")
    reports: list[Any] = []
    again = train(tiny, capture, tmp_path / "run", RECIPE, progress=reports.append)
    assert (again.step, again.metrics, reports) == (first.step, first.metrics, [])


def test_a_damaged_checkpoint_is_passed_over(tiny: LoadedModel, capture: Capture, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(tiny, capture, whole)
    run(tiny, capture, cut)
    shutil.rmtree(cut / "state")
    newest, older = sorted((cut / "checkpoints").iterdir(), reverse=True)
    (newest / "state.safetensors").write_bytes(b"damaged")
    assert run(tiny, capture, cut).finished
    assert all(torch.equal(tensor, weights(cut)[name]) for name, tensor in weights(whole).items())
    for path in (newest, older):
        (path / "manifest.json").write_text("{")
    with pytest.raises(CheckpointDamaged, match=r"no checkpoint can be read: .*manifest.json cannot be read"):
        run(tiny, capture, cut)


# Refusals.


def test_a_run_belongs_to_its_recipe_texts_and_model(
    tiny: LoadedModel, capture: Capture, tmp_path: Path, tiny_models: dict[str, LoadedModel]
) -> None:
    run(tiny, capture, tmp_path / "run")
    with pytest.raises(CheckpointMismatch, match=r"step-.* is of another run: recipe.learning_rate was 0.002, is 0.5"):
        run(tiny, capture, tmp_path / "run", learning_rate=0.5)
    fewer = Capture(capture.manifest, capture.header, capture.entries[1:])
    with pytest.raises(CheckpointMismatch, match="texts was"):
        run(tiny, fewer, tmp_path / "run")
    with pytest.raises(CaptureMismatch, match=r"manifest.jsonl was captured from tiny-llama"):
        run(tiny_models["gpt_oss"], capture, tmp_path / "other")


def test_weights_of_another_model_are_refused_as_a_beginning(
    tiny: LoadedModel, capture: Capture, tmp_path: Path
) -> None:
    result = run(tiny, capture, tmp_path / "run", most_steps=1)
    assert result.state is not None
    manifest = json.loads((result.state / "manifest.json").read_text())
    manifest["model"] = {"name": "another", "fingerprints": ["abc"]}
    (result.state / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StateMismatch, match=r"state was trained for another"):
        train(tiny, capture, tmp_path / "next", RECIPE, begin=result.state)


def test_training_can_begin_with_weights(tiny: LoadedModel, capture: Capture, tmp_path: Path) -> None:
    first = run(tiny, capture, tmp_path / "run")
    train(tiny, capture, tmp_path / "next", RECIPE.model_copy(update={"learning_rate": 1e-9}), begin=first.state)
    a, b = weights(tmp_path / "run"), weights(tmp_path / "next")
    assert all(torch.allclose(a[name], b[name], atol=0.2) for name in a if "static" not in name)
    with pytest.raises(CheckpointMismatch, match="begin was"):
        train(tiny, capture, tmp_path / "next", RECIPE.model_copy(update={"learning_rate": 1e-9}))


def test_a_blob_that_was_altered_ends_training_by_name(tiny: LoadedModel, tmp_path: Path) -> None:
    capture = captured(tiny, tmp_path)
    path = capture.manifest.parent / capture.entries[2].file
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(BlobDamaged, match=r"blobs/000002.safetensors has SHA-256"):
        run(tiny, read_capture(capture.manifest), tmp_path / "run")


def test_numbers_that_are_none_name_the_texts(
    tiny: LoadedModel, capture: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = RECIPE.model_copy(update={"learning_rate": 1.0, "static_learning_rate": 1.0, "warmup_steps": 0})
    from workspace import training

    broken = training.losses_of

    def infinite(*args: Any) -> Any:
        found = broken(*args)
        object.__setattr__(found, "total", found.total * float("nan"))
        return found

    monkeypatch.setattr(training, "losses_of", infinite)
    with pytest.raises(TrainingDiverged, match=r"step 1: losses .*nan.*blobs/\d+.safetensors.*lower learning_rate"):
        train(tiny, capture, tmp_path / "run", recipe)
    assert not (tmp_path / "run/state").exists()


def test_no_texts_to_train_on(tiny: LoadedModel, capture: Capture, tmp_path: Path) -> None:
    held_out = Capture(capture.manifest, capture.header, tuple(e for e in capture.entries if e.split == "held_out"))
    with pytest.raises(TrainingConfigError, match=r"manifest.jsonl lists no texts of the split train"):
        run(tiny, held_out, tmp_path / "run")


def test_one_folder_one_training(tiny: LoadedModel, capture: Capture, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    lock = files.DataDirLock(tmp_path / "run")
    lock.acquire()
    try:
        with pytest.raises(TrainingError, match="is being trained in by process"):
            run(tiny, capture, tmp_path / "run")
    finally:
        lock.release()
    assert run(tiny, capture, tmp_path / "run", most_steps=1).finished, "hooks and lock were given back"


# Numbers.


def test_the_learning_rate_warms_up_and_comes_down() -> None:
    config = RECIPE.model_copy(update={"warmup_steps": 4, "final_share": 0.1})
    shares = [learning_share(step, 20, config) for step in range(1, 21)]
    assert shares[:4] == [0.25, 0.5, 0.75, 1.0]
    assert shares[4:] == sorted(shares[4:], reverse=True)
    assert shares[-1] == pytest.approx(0.1)


def test_arms_are_paired_and_reproducible(tiny: LoadedModel, capture: Capture) -> None:
    hooked = HookedModel(tiny)
    try:
        modules = WorkspaceModules(ModuleShape.of(hooked), WORKSPACE)
        with torch.no_grad():
            modules.projector.key_norms.fill_(6.0)
            modules.projector.value_norms.fill_(6.0)
        blobs = held_out_blobs(capture, 3)
        assert {kind: len(texts) for kind, texts in blobs.items()} == {"fox": 3, "chat": 1}
        found = measure(Student(hooked), modules, blobs, RECIPE, keeps=(None, 4))
        again = measure(Student(hooked), modules, blobs, RECIPE, keeps=(None, 4))
    finally:
        hooked.remove()
    assert found == again
    assert [(item.kind, item.keep, item.arm) for item in found] == [
        (kind, keep, arm) for kind in ("fox", "chat") for keep in (None, 4) for arm in ARMS
    ]
    by_arm = {item.arm: item for item in found if item.kind == "fox" and item.keep is None}
    base = by_arm["none"]
    for place, blob in enumerate(blobs["fox"]):
        assert blob.statistics is not None
        assert base.rows[place] == pytest.approx(float(blob.statistics[:, 3].mean()), abs=1e-3)
    assert base.against(base) == (0.0, 0.0)
    assert len({by_arm[arm].rows for arm in ARMS}) == len(ARMS)
