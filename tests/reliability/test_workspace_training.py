"""``kill -9`` of capturing and training, again and again: both end with the files of a run that was left alone."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from storage.files import PARTIAL_PREFIX
from tests.support.tiny_model import save_tiny_model
from tests.support.workspace_training import LINES, OPTIONS, RECIPE
from workspace.capture_folder import read_capture
from workspace.state_files import read_manifest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
SEED = 20261127
KILLS = 6


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    save_tiny_model(folder / "model")
    model = {"name": str(folder / "model"), "cache_dir": str(folder / "cache"), "dtype": "float32"}
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": model}))
    training = RECIPE.model_copy(update={"epochs": 12}).model_dump(mode="json")
    (folder / "recipe.yaml").write_text(
        yaml.safe_dump({"capture": OPTIONS.model_dump(mode="json"), "training": training})
    )
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES * 3))
    return folder


def command(place: Path, script: str, *arguments: str) -> list[str]:
    common = ["--recipe", str(place / "recipe.yaml"), "--config", str(place / "config.yaml"), "--threads", "1"]
    return [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *arguments, *common]


def finish(arguments: list[str]) -> None:
    subprocess.run(arguments, check=True, capture_output=True, env=_environment())


def kill_often(arguments: list[str], begun: Path, chance: random.Random) -> int:
    """Start and kill ``KILLS`` times, at random moments after ``begun`` appeared; how many were still running."""
    killed = 0
    for _ in range(KILLS):
        process = subprocess.Popen(arguments, env=_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not begun.exists():
            time.sleep(0.01)
        time.sleep(chance.uniform(0.0, 0.4) if killed == 0 else 2.5 + chance.uniform(0.0, 1.5))
        killed += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    return killed


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def lines(path: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in found]


def test_killed_captures_and_runs_end_like_others(place: Path) -> None:
    chance = random.Random(SEED)
    prompts = ("--prompts", str(place / "prompts.jsonl"))
    whole, cut = place / "whole", place / "cut"
    finish(command(place, "capture_workspace_data", *prompts, "--output", str(whole)))
    killed = kill_often(
        command(place, "capture_workspace_data", *prompts, "--output", str(cut)), cut / "manifest.jsonl", chance
    )
    assert killed >= 1
    finish(command(place, "capture_workspace_data", *prompts, "--output", str(cut)))
    one, two = read_capture(whole / "manifest.jsonl"), read_capture(cut / "manifest.jsonl")
    assert one.entries == two.entries
    for entry in two.entries:
        two.read(entry)

    manifest = ("--manifest", str(whole / "manifest.jsonl"))
    finish(command(place, "train_workspace", *manifest, "--output", str(place / "run")))
    again = command(place, "train_workspace", *manifest, "--output", str(place / "killed"))
    assert kill_often(again, place / "killed" / "progress.jsonl", chance) >= 1
    finish(again)
    assert lines(place / "killed" / "progress.jsonl") == lines(place / "run" / "progress.jsonl")
    states = [read_manifest(place / name / "state").weights.sha256 for name in ("run", "killed")]
    assert states[0] == states[1]
    assert list(place.rglob(f"{PARTIAL_PREFIX}*")) == []
