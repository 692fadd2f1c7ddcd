"""``capture``, ``train-workspace``, ``eval``, ``fluency-guard``, ``profile-workspace`` on a tiny model, one after the
other, as a person would call them; and what they say when something is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from cli.main import app
from tests.support.tiny_model import save_tiny_model
from tests.support.workspace_training import LINES
from workspace.capture_folder import read_capture
from workspace.state_files import read_manifest

RECIPE = {
    "capture": {"window": 48, "context": 32, "max_answer": 8, "batch": 4, "max_tokens": 200, "top_k": 8},
    "training": {
        "parts": ["virtual_kv", "residual_delta"],
        "workspace": {
            "slots": 4,
            "slot_width": 16,
            "write_slots": 4,
            "virtual_tokens": 4,
            "embedding_width": 6,
            "kv_plan_bias": -1.0,
        },
        "losses": {"distillation": 0.5},
        "keep": [4],
        "rows": 3,
        "least_targets": 3,
        "held_out_rows": 2,
    },
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, a configuration, a recipe and prompts."""
    folder = tmp_path_factory.mktemp("place")
    save_tiny_model(folder / "model")
    settings = {
        "model": {"name": str(folder / "model"), "cache_dir": str(folder / "cache"), "dtype": "float32"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "other.yaml").write_text(yaml.safe_dump({**settings, "workspace": {"virtual_tokens": 8}}))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return folder


def run(place: Path, *arguments: str, config: str = "config.yaml") -> tuple[int, str]:
    result = CliRunner().invoke(app, [*arguments, "--config", str(place / config), "--threads", "1"])
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def manifest(place: Path) -> Path:
    """Captured by the command."""
    recipe, output = str(place / "recipe.yaml"), str(place / "capture")
    code, told = run(
        place, "capture", "--prompts", str(place / "prompts.jsonl"), "--output", output, "--recipe", recipe
    )
    assert code == 0, told
    assert "texts captured, 0 were there" in told
    return place / "capture" / "manifest.jsonl"


@pytest.fixture(scope="module")
def state(place: Path, manifest: Path) -> Path:
    """Trained by the command."""
    arguments = ["--manifest", str(manifest), "--output", str(place / "run"), "--recipe", str(place / "recipe.yaml")]
    code, told = run(place, "train-workspace", *arguments, "--epochs", "2", "--device", "cpu")
    assert code == 0, told
    assert "held_out" in told
    return place / "run" / "state"


def test_texts_are_collected(place: Path) -> None:
    path = place / "collected" / "prompts.jsonl"
    result = CliRunner().invoke(app, ["workspace-texts", "--output", str(path), "--each", "3", "--held-out", "2"])
    assert result.exit_code == 0, result.output
    assert "3 docs train" in result.output
    kinds = [json.loads(line)["kind"] for line in path.read_text().splitlines()]
    assert sorted(set(kinds)) == ["chat", "docs"]
    result = CliRunner().invoke(app, ["workspace-texts", "--output", str(path), "--data", str(place / "nowhere")])
    assert result.exit_code == 1
    assert "nowhere" in result.output


def test_captured_again_nothing_is_done(place: Path, manifest: Path) -> None:
    before = len(read_capture(manifest).entries)
    code, told = run(
        place,
        "capture",
        "--prompts",
        str(place / "prompts.jsonl"),
        "--output",
        str(manifest.parent),
        "--recipe",
        str(place / "recipe.yaml"),
    )
    assert code == 0
    assert f"0 texts captured, {before} were there" in told


def test_weights_count_for_both_dtypes(state: Path) -> None:
    found = read_manifest(state)
    assert len(found.model.fingerprints) == 2
    assert found.training.parts == ("virtual_kv", "residual_delta")
    assert found.config["slots"] == 4


def test_evaluation_shows_off_beside_on(place: Path, manifest: Path, state: Path) -> None:
    path = place / "evaluation.json"
    arguments = (
        *("eval", "--manifest", str(manifest), "--questions", "2", "--tokens", "8", "--dialogues", "1"),
        *("--speed-rounds", "1", "--held-out", "2", "--json", str(path), "--workspace-state", str(state)),
    )
    code, told = run(place, *arguments)
    assert code == 0, told
    assert "trained: virtual_kv, residual_delta" in told
    value = json.loads(path.read_text())
    assert {item["arm"] for item in value["losses"]} == {"none", "trained", "other", "stranger", "random", "heuristic"}
    code, told = run(place, *arguments, config="other.yaml")
    assert code == 1
    assert "virtual_tokens is 8, the weights have 4" in told


def test_the_guard_tells_by_its_exit_code(place: Path) -> None:
    path = place / "guard.json"
    few = ("--questions", "3", "--tokens", "8", "--json", str(path))
    code, told = run(place, "fluency-guard", *few)
    assert code == 0, told
    assert "passed" in told
    assert json.loads(path.read_text())["passed"] is True
    code, told = run(place, "fluency-guard", *few, "--control", "random", "--loss", "0", "--distinct", "0")
    assert code == 1, told
    assert "FAILED" in told
    assert run(place, "fluency-guard", "--control", "zero")[0] == 2


def test_the_profile(place: Path, tmp_path: Path) -> None:
    code, told = run(place, "profile-workspace", "--context", "40", "--rounds", "2", "--json", str(tmp_path / "p.json"))
    assert code == 0, told
    assert "virtual values" in told
    assert json.loads((tmp_path / "p.json").read_text())["context"] == 40


def test_what_goes_wrong_is_one_message(place: Path, manifest: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("training: {epoch: 3}\n")
    (tmp_path / "bad.jsonl").write_text('{"promt": "x"}\n')
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "manifest.jsonl").write_text("nonsense\n")
    for arguments, code, message in (
        (("train-workspace", "--manifest", str(tmp_path / "none.jsonl")), 1, "none.jsonl does not exist"),
        (("train-workspace", "--manifest", str(tmp_path / "torn/manifest.jsonl")), 1, "manifest.jsonl, line 1"),
        (("train-workspace", "--recipe", str(tmp_path / "bad.yaml")), 2, "bad.yaml: epoch: Extra inputs"),
        (("train-workspace", "--recipe", str(tmp_path / "none.yaml")), 2, "none.yaml cannot be read"),
        (
            ("capture", "--prompts", str(tmp_path / "bad.jsonl"), "--output", str(tmp_path / "o")),
            1,
            "bad.jsonl, line 1",
        ),
        (("capture", "--prompts", str(tmp_path / "none.txt"), "--output", str(tmp_path / "o")), 1, "none.txt"),
        (("fluency-guard", "--workspace-state", str(tmp_path / "none")), 1, "none is no directory of trained weights"),
        (("eval", "--dtype", "float7"), 2, "unknown dtype float7"),
    ):
        found, told = run(place, *arguments)
        assert (found, message in told) == (code, True), (arguments, told)
        assert "Traceback" not in told


@pytest.mark.parametrize("name", ["capture_workspace_data", "train_workspace", "profile_workspace"])
def test_the_scripts_are_the_commands(name: str) -> None:
    """They are three lines over ``cli/workspace.py``; that they start is enough."""
    import subprocess
    import sys

    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, str(root / "scripts" / f"{name}.py"), "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--config" in done.stdout
