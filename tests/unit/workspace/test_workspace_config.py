"""The workspace's configuration: valid when it exists, and messages that say what to do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from workspace.virtual_kv_limits import StoreLimits
from workspace.workspace_config import DIALS, STRUCTURE, ControllerConfig, RetentionConfig, WorkspaceConfig

ROOT = Path(__file__).resolve().parents[3]


def test_defaults_are_valid_and_off() -> None:
    config = WorkspaceConfig()
    assert not config.enabled
    assert config.kv_plan_bias == -16
    assert config.tokens_per_slot == 2
    assert WorkspaceConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize("section", [WorkspaceConfig, ControllerConfig, RetentionConfig])
def test_every_knob_is_described(section: type[BaseModel]) -> None:
    for name, field in section.model_fields.items():
        nested = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        assert nested or field.description, f"{section.__name__}.{name} has no description"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"slotz": 8}, "Extra inputs are not permitted"),
        ({"retention": {"max_token": 1}}, "Extra inputs are not permitted"),
        ({"slots": 1}, "greater than or equal to 2"),
        ({"kv_plan_bias": float("nan")}, "finite"),
        ({"virtual_tokens": 20}, "must be a multiple of the 8 slots.*use 16 or 24"),
        ({"virtual_tokens": 4}, "must be a multiple of the 8 slots.*use 8"),
        ({"slots": 4, "write_slots": 5}, "5 of 4 slots cannot win; use at most 4"),
        ({"hooked_layers": []}, "names no layer; leave it out"),
        ({"hooked_layers": [3, 1, 3]}, r"once and in rising order: \[1, 3\]"),
        ({"hooked_layers": [-1, 2]}, "numbered from 0, -1"),
        ({"chunk_size": 19}, "must hold the 4 sinks and 16 recent tokens; use at least 20, or 0"),
        ({"virtual_tokens": 264}, r"max_tokens_per_layer \(256\) cannot hold one broadcast.*raise it to 264"),
        ({"virtual_tokens": 240, "static_tokens": 17}, "raise it to 257"),
        ({"retention": {"ttl_steps": 8}}, r"ttl_steps \(8\) is below update_every \(16\)"),
        ({"retention": {"spill_bytes": 5000}}, r"spill_bytes \(5000\) must be at least max_bytes"),
        ({"thresholds": {"smoothing": 0.02}}, "lower trend_smoothing"),
        ({"thresholds": {"halt_run": 20}}, "raise halt_run or lower longest_cycle"),
        ({"torch_compile_mode": "fast"}, "'default', 'reduce-overhead'"),
    ],
)
def test_what_cannot_be_says_what_to_do(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        WorkspaceConfig(**values)


def test_it_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        WorkspaceConfig().slots = 4


def test_paths_know_the_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    assert WorkspaceConfig(state_path=Path("~/weights")).state_path == Path("/home/ada/weights")


def test_it_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, workspace.workspace_config; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_retention_has_the_stores_own_limits() -> None:
    limits = StoreLimits(**RetentionConfig().model_dump())
    assert limits.max_tokens_per_layer == RetentionConfig().max_tokens_per_layer


def test_weights_bring_their_structure_and_dials_unless_these_were_set() -> None:
    trained = WorkspaceConfig(slots=16, virtual_tokens=32, kv_plan_bias=-1.0, delta_cap=0.5).trained_part()
    assert set(trained) == {*STRUCTURE, *DIALS}
    served = WorkspaceConfig(enabled=True, kv_plan_bias=-4.0, retention=RetentionConfig(max_segments=3))
    merged = served.for_weights(trained)
    assert (merged.slots, merged.virtual_tokens, merged.delta_cap) == (16, 32, 0.5)
    assert merged.kv_plan_bias == -4.0, "a dial that was set wins over the weights' own"
    assert merged.enabled
    assert merged.retention.max_segments == 3
    # A value that equals the default counts as set, when it was.
    assert WorkspaceConfig(kv_plan_bias=-16.0).for_weights(trained).kv_plan_bias == -16.0


def test_weights_cannot_be_reshaped_by_the_configuration() -> None:
    trained = WorkspaceConfig(slots=16, virtual_tokens=32).trained_part()
    with pytest.raises(ValueError, match="slots is 8, the weights have 16; remove these settings"):
        WorkspaceConfig(slots=8).for_weights(trained)
    assert WorkspaceConfig(slots=16).for_weights(trained).slots == 16
