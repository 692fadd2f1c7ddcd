"""The trainable parts together: deterministic, cheap to describe, and their state survives or is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from storage import files
from workspace.errors import StateDamaged, StateError, StateMismatch, StateNotFound
from workspace.modules import PARTS, WorkspaceModules
from workspace.projector import ModuleShape
from workspace.state_files import MANIFEST, read_manifest
from workspace.workspace_config import WorkspaceConfig

SHAPE = ModuleShape(hidden_size=24, kv_heads=2, head_dim=8, layers=(1, 5))
CONFIG = WorkspaceConfig(
    slots=4, slot_width=16, write_slots=2, virtual_tokens=8, static_tokens=2, delta_rank=3, embedding_width=6
)
PRINT = "0123456789abcdef"
RECORD: dict[str, Any] = {
    "model_name": "tiny",
    "fingerprints": [PRINT, "fedcba9876543210"],
    "step": 12,
    "parts": ["virtual_kv", "residual_delta"],
    "data_digest": "d" * 64,
    "metrics": {"held_out": 3.25},
}


def residuals(seed: int = 2) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {layer: torch.randn(3, 24, generator=generator) for layer in SHAPE.layers}


@pytest.fixture
def modules() -> WorkspaceModules:
    """Modules that look trained: gates open, norms observed."""
    made = WorkspaceModules(SHAPE, CONFIG, seed=3)
    with torch.no_grad():
        made.projector.gate.fill_(0.1)
    for layer in SHAPE.layers:
        made.projector.observe(layer, torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8))
    return made


def everything(modules: WorkspaceModules) -> list[Tensor]:
    """All that the parts give for one input."""
    slots = modules.update(residuals(), None, torch.ones(3, 2, 6)).slots
    made = [
        tensor
        for part in (modules.projector.kv(slots), modules.projector.static())
        for t in part.values()
        for tensor in t
    ]
    logits = modules.controller(torch.ones(3, 6), slots)
    return [slots, logits, *made, *modules.projector.delta(slots, residuals()).values()]


def load(path: Path, **changes: Any) -> WorkspaceModules:
    return WorkspaceModules.load(path, **{"fingerprint": PRINT, "shape": SHAPE, **changes})


# In memory.


def test_construction_is_deterministic_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first, second, other = (WorkspaceModules(SHAPE, CONFIG, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.features.weight, other.features.weight)


def test_size_of_the_smollm2_workspace() -> None:
    """Small enough to ship: the issue allows 10 MB."""
    made = WorkspaceModules(ModuleShape(576, 3, 64, (0, 5, 10, 15, 20, 25)), WorkspaceConfig())
    assert made.parameter_count == sum(parameter.numel() for parameter in made.parameters())
    assert 500_000 < made.parameter_count < 800_000
    assert made.parameter_count * 4 <= made.state_bytes < 4 << 20


def test_untrained_modules_claim_nothing_and_their_controller_is_heuristic(modules: WorkspaceModules) -> None:
    assert not any(modules.trained(part) for part in PARTS)
    decision = modules.new_controller().step(torch.zeros(50), 3, torch.zeros(1, 4, 16))
    assert decision.numbers["learned"] == 0


def test_every_parameter_is_trained_together(modules: WorkspaceModules) -> None:
    torch.manual_seed(0)
    loss = sum((tensor * torch.randn_like(tensor)).sum() for tensor in everything(modules))
    assert isinstance(loss, Tensor)
    loss.backward()
    for name, parameter in modules.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
    modules.check_invariants()


def test_broken_numbers_are_noticed(modules: WorkspaceModules) -> None:
    with torch.no_grad():
        modules.slots.first[0, 0] = float("nan")
    with pytest.raises(AssertionError, match=r"slots.first holds NaN"):
        modules.check_invariants()


# On disk.


def test_a_round_trip_is_exact_to_the_bit(modules: WorkspaceModules, tmp_path: Path) -> None:
    path = tmp_path / "state"
    modules.save(path, **RECORD)
    loaded = load(path)
    before, after = modules.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(a, b) for a, b in zip(everything(modules), everything(loaded), strict=True))
    assert loaded.record is not None
    assert (loaded.record.step, loaded.record.data_digest) == (12, "d" * 64)
    assert loaded.record.metrics == {"held_out": 3.25}
    assert [part for part in PARTS if loaded.trained(part)] == ["virtual_kv", "residual_delta"]
    assert not loaded.training
    loaded.check_invariants()


def test_the_manifest_tells_what_to_hook_before_anything_is_built(modules: WorkspaceModules, tmp_path: Path) -> None:
    modules.save(tmp_path / "state", **RECORD)
    manifest = read_manifest(tmp_path / "state")
    assert manifest.shape.layers == (1, 5)
    assert manifest.model.name == "tiny"
    assert manifest.config == CONFIG.trained_part()
    assert "state_path" not in manifest.config


def test_weights_work_in_every_dtype_that_they_list(modules: WorkspaceModules, tmp_path: Path) -> None:
    modules.save(tmp_path / "state", **RECORD)
    load(tmp_path / "state", fingerprint="fedcba9876543210")


def test_a_trained_controller_comes_back_as_one(modules: WorkspaceModules, tmp_path: Path) -> None:
    modules.save(tmp_path / "state", **{**RECORD, "parts": ["controller"]})
    decision = load(tmp_path / "state").new_controller().step(torch.zeros(50), 3, torch.zeros(1, 4, 16))
    assert decision.numbers["learned"] == 1


def test_the_configuration_keeps_what_was_set_and_takes_the_rest_from_the_weights(
    modules: WorkspaceModules, tmp_path: Path
) -> None:
    modules.save(tmp_path / "state", **RECORD)
    loaded = load(tmp_path / "state", config=WorkspaceConfig(enabled=True, kv_plan_bias=-1.5))
    assert loaded.config.slots == 4
    assert loaded.config.enabled
    assert loaded.projector.kv(torch.zeros(1, 4, 16))[5][2][0, 0, 0].item() == -1.5
    with pytest.raises(StateMismatch, match="slots is 8, the weights have 4; remove these settings"):
        load(tmp_path / "state", config=WorkspaceConfig(slots=8))


def test_saving_again_replaces_and_leaves_nothing_behind(modules: WorkspaceModules, tmp_path: Path) -> None:
    path = tmp_path / "state"
    modules.save(path, **RECORD)
    with torch.no_grad():
        modules.slots.first.add_(1)
    modules.save(path, **{**RECORD, "step": 13})
    loaded = load(path)
    assert torch.equal(loaded.slots.first, modules.slots.first)
    assert loaded.record is not None
    assert loaded.record.step == 13
    assert sorted(item.name for item in path.iterdir()) == sorted([MANIFEST, read_manifest(path).weights.file])
    assert sorted(item.name for item in tmp_path.iterdir()) == ["state"]


@pytest.mark.parametrize("fatal", [1, 2])
def test_a_crash_while_saving_again_leaves_the_old_state(
    modules: WorkspaceModules, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fatal: int
) -> None:
    """The process dies at the first or second rename: before the weights, or before the manifest, has its name."""
    path = tmp_path / "state"
    modules.save(path, **RECORD)
    old = modules.slots.first.clone()
    with torch.no_grad():
        modules.slots.first.add_(1)
    real, calls = os.replace, []

    def dying(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == fatal:
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", dying)
        with pytest.raises(KeyboardInterrupt):
            modules.save(path, **{**RECORD, "step": 13})
    assert len(calls) == fatal
    assert torch.equal(load(path).slots.first, old)
    modules.save(path, **{**RECORD, "step": 13})  # and the next save cleans up
    assert len(list(path.iterdir())) == 2


def test_what_could_not_be_loaded_again_is_not_saved(modules: WorkspaceModules, tmp_path: Path) -> None:
    with pytest.raises(StateDamaged, match="its metrics do not fit JSON"):
        modules.save(tmp_path / "state", **{**RECORD, "metrics": {"loss": float("inf")}})
    with pytest.raises(ValueError, match="unknown parts kv; known are virtual_kv"):
        modules.save(tmp_path / "state", **{**RECORD, "parts": ["kv"]})
    (tmp_path / "file").write_text("x")
    with pytest.raises(StateError, match="file is a file; trained weights are a directory"):
        modules.save(tmp_path / "file", **RECORD)
    with torch.no_grad():
        modules.projector.offset[0, 0, 0] = float("nan")
    with pytest.raises(StateDamaged, match=r"not saved, projector.offset holds NaN.*lower the learning rate"):
        modules.save(tmp_path / "state", **RECORD)
    assert not (tmp_path / "state").exists()


# Refusals.


def edit_manifest(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        value = json.loads((path / MANIFEST).read_text())
        change(value)
        (path / MANIFEST).write_text(json.dumps(value))

    return edit


def edit_weights(change: Callable[[dict[str, Tensor]], None]) -> Callable[[Path], None]:
    """Change tensors and make the manifest vouch for the result."""

    def edit(path: Path) -> None:
        source = path / read_manifest(path).weights.file
        tensors = safetensors.torch.load_file(source)
        change(tensors)
        data = safetensors.torch.save(tensors)
        source.write_bytes(data)
        edit_manifest(lambda value: value["weights"].update(sha256=files.sha256_file(source), bytes=len(data)))(path)

    return edit


def flip_a_bit(path: Path) -> None:
    source = path / read_manifest(path).weights.file
    data = bytearray(source.read_bytes())
    data[-100] ^= 1
    source.write_bytes(data)


def garbage(path: Path) -> None:
    source = path / read_manifest(path).weights.file
    source.write_bytes(b"not safetensors at all")
    edit_manifest(lambda value: value["weights"].update(sha256=files.sha256_file(source), bytes=22))(path)


DAMAGE: dict[str, tuple[Callable[[Path], Any], type[StateError], str]] = {
    "no manifest": (lambda path: (path / MANIFEST).unlink(), StateDamaged, "manifest.json is missing"),
    "no weights": (
        lambda path: (path / read_manifest(path).weights.file).unlink(),
        StateDamaged,
        r"weights-[0-9a-f]{16}.safetensors cannot be read \(No such file",
    ),
    "manifest cut short": (
        lambda path: (path / MANIFEST).write_text((path / MANIFEST).read_text()[:200]),
        StateDamaged,
        "manifest.json cannot be read",
    ),
    "manifest of bytes": (lambda path: (path / MANIFEST).write_bytes(b"\xff\xfe"), StateDamaged, "cannot be read"),
    "manifest is a list": (lambda path: (path / MANIFEST).write_text("[]"), StateDamaged, "manifest.json: the whole"),
    "manifest with NaN": (
        edit_manifest(lambda value: value["training"]["metrics"].update(loss=float("nan"))),
        StateDamaged,
        "it holds NaN, which is not JSON",
    ),
    "manifest without a field": (
        edit_manifest(lambda value: value["training"].pop("data_digest")),
        StateDamaged,
        "manifest.json: training.data_digest: Field required",
    ),
    "manifest with an unknown field": (
        edit_manifest(lambda value: value.update(extra=1)),
        StateDamaged,
        "manifest.json: extra: Extra inputs",
    ),
    "weights outside the directory": (
        edit_manifest(lambda value: value["weights"].update(file="../../etc/passwd")),
        StateDamaged,
        "weights.file: String should match",
    ),
    "another schema": (
        edit_manifest(lambda value: value.update(schema=2)),
        StateMismatch,
        "was written as schema 2, this version reads 1",
    ),
    "unknown config": (
        edit_manifest(lambda value: value["config"].update(depth=3)),
        StateMismatch,
        "manifest.json: its config has unknown keys depth",
    ),
    "missing config": (
        edit_manifest(lambda value: value["config"].pop("slots")),
        StateMismatch,
        "manifest.json: its config lacks slots",
    ),
    "impossible config": (
        edit_manifest(lambda value: value["config"].update(virtual_tokens=9)),
        StateMismatch,
        "does not fit the configuration: .*multiple of the 4 slots",
    ),
    "a flipped bit": (flip_a_bit, StateDamaged, r"safetensors has SHA-256 .*manifest.json says"),
    "garbage": (garbage, StateDamaged, "safetensors is no safetensors file"),
    "NaN": (
        edit_weights(lambda tensors: tensors["slots.first"].view(-1)[3].fill_(float("nan"))),
        StateDamaged,
        r"safetensors: slots.first holds NaN or infinity",
    ),
    "a missing tensor": (
        edit_weights(lambda tensors: tensors.pop("slots.first")),
        StateMismatch,
        r"safetensors: lacks slots.first; use the version",
    ),
    "an unknown tensor": (
        edit_weights(lambda tensors: tensors.update(surprise=torch.ones(1))),
        StateMismatch,
        r"safetensors: has the unknown surprise",
    ),
    "another shape": (
        edit_weights(lambda tensors: tensors.update({"slots.first": torch.ones(4, 15)})),
        StateMismatch,
        r"slots.first is torch.float32 \[4, 15\] instead of torch.float32 \[4, 16\]",
    ),
    "another dtype": (
        edit_weights(lambda tensors: tensors.update({"slots.first": torch.ones(4, 16).bfloat16()})),
        StateMismatch,
        r"slots.first is torch.bfloat16",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda name: name.replace(" ", "-"))
def test_damage_is_refused_naming_the_file(modules: WorkspaceModules, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "state"
    modules.save(path, **RECORD)
    harm, error, message = DAMAGE[damage]
    harm(path)
    with pytest.raises(error, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_nothing_there_is_its_own_error(tmp_path: Path) -> None:
    with pytest.raises(StateNotFound, match=r"nowhere is no directory of trained weights; train some with"):
        load(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(StateNotFound):
        load(tmp_path / "file")


def test_weights_of_another_model_are_refused(modules: WorkspaceModules, tmp_path: Path) -> None:
    modules.save(tmp_path / "state", **RECORD)
    with pytest.raises(StateMismatch, match=r"was trained for tiny .*the loaded model has feed: other weights"):
        load(tmp_path / "state", fingerprint="feed")


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (ModuleShape(24, 2, 8, (1, 3)), r"layers \(1, 5\) instead of \(1, 3\); hook the layers"),
        (ModuleShape(32, 4, 8, (1, 5)), "hidden_size 24 instead of 32, kv_heads 2 instead of 4"),
    ],
)
def test_another_shape_is_refused(modules: WorkspaceModules, tmp_path: Path, shape: ModuleShape, message: str) -> None:
    modules.save(tmp_path / "state", **RECORD)
    with pytest.raises(StateMismatch, match=message):
        load(tmp_path / "state", shape=shape)
