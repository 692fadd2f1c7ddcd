"""Weights that come with the program: used for exactly their model, unless settings say otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_model import save_tiny_model
from workspace import shipped
from workspace.hooking import HookedModel, default_layers
from workspace.models import LoadedModel, load_model
from workspace.modules import WorkspaceModules
from workspace.projector import ModuleShape
from workspace.shipped import with_shipped_weights
from workspace.steering import Steering
from workspace.workspace_config import WorkspaceConfig

STRUCTURE: dict[str, Any] = {"slots": 4, "slot_width": 16, "write_slots": 4, "virtual_tokens": 4, "kv_plan_bias": -1.0}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")
    return load_model(str(folder), cache_dir=folder, dtype="float32", device="cpu")


@pytest.fixture
def place(tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of shipped weights, with some for the tiny model."""
    layers = default_layers(tiny.model.config)
    hooked = HookedModel(tiny, list(layers))
    shape = ModuleShape(hooked.hidden_size, hooked.kv_heads, hooked.head_dim, layers)
    hooked.remove()
    WorkspaceModules(shape, WorkspaceConfig(**STRUCTURE)).save(
        tmp_path / "tiny",
        model_name="tiny",
        fingerprints=[tiny.fingerprint],
        step=3,
        parts=("virtual_kv",),
        data_digest="0" * 64,
        metrics={},
    )
    monkeypatch.setattr(shipped, "SHIPPED", tmp_path)
    return tmp_path / "tiny"


def test_they_serve_without_being_asked_for(tiny: LoadedModel, place: Path) -> None:
    steering = Steering(tiny, WorkspaceConfig())
    try:
        assert steering.config.state_path == place
        assert steering.config.virtual_tokens == 4
        assert steering.modules.trained("virtual_kv")
    finally:
        steering.close()


@pytest.mark.parametrize(
    "settings", [{"shipped_weights": False}, {"virtual_tokens": 8}, {"hooked_layers": (1,)}, {"slots": 16}]
)
def test_settings_win(tiny: LoadedModel, place: Path, settings: dict[str, Any]) -> None:
    config = WorkspaceConfig(**settings)
    assert with_shipped_weights(tiny, config) == config
    steering = Steering(tiny, config)
    try:
        assert steering.config.state_path is None
        assert not steering.modules.trained("virtual_kv")
    finally:
        steering.close()


def test_a_dial_alone_is_no_contradiction(tiny: LoadedModel, place: Path) -> None:
    chosen = with_shipped_weights(tiny, WorkspaceConfig(kv_plan_bias=-3.0))
    assert chosen.state_path == place
    assert chosen.kv_plan_bias == -3.0


def test_another_model_has_none(tiny: LoadedModel, place: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = save_tiny_model(tmp_path_factory.mktemp("other") / "tiny")
    other = load_model(str(folder), cache_dir=folder, dtype="bfloat16", device="cpu")
    assert other.fingerprint != tiny.fingerprint
    assert with_shipped_weights(other, WorkspaceConfig()) == WorkspaceConfig()


def test_damaged_ones_are_passed_over(tiny: LoadedModel, place: Path) -> None:
    (place / "manifest.json").write_text("{")
    assert with_shipped_weights(tiny, WorkspaceConfig()) == WorkspaceConfig()
