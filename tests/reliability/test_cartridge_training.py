"""``kill -9`` of cartridge training, again and again: it ends with the losses and files of a run left alone."""

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

from storage.files import PARTIAL_PREFIX

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
SEED = 20261127
KILLS = 4
PROGRAM = """
import sys
from pathlib import Path
from memory.distillation.initialisers import text_prefix
from memory.distillation.trainer import train_cartridge
from tests.support.tiny_cartridges import TRAINING, gold_rows, tiny_loaded

folder = Path(sys.argv[1])
loaded = tiny_loaded(folder.with_name(folder.name + "-model"), num_hidden_layers=2)
config = TRAINING.model_copy(update={"max_steps": 120, "save_every": 2, "evaluate_every": 3, "early_stop_patience": 0})
init = text_prefix(loaded, "The quick brown fox", config.slots)
train_cartridge(loaded, gold_rows(), gold_rows(4), config, init, folder=folder)
"""


def start(folder: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    quiet = subprocess.DEVNULL
    command = [sys.executable, "-c", PROGRAM, str(folder)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=quiet, stderr=quiet)


def newest(folder: Path) -> int:
    """The step of the newest checkpoint, 0 where there is none."""
    return max((int(path.name.removeprefix("step-")) for path in (folder / "state").glob("step-*")), default=0)


def log(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def test_killed_runs_end_like_others(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert start(whole).wait(300) == 0
    chance, killed = random.Random(SEED), 0
    for _ in range(KILLS):
        process = start(cut)
        wanted = newest(cut) + chance.randrange(2, 24)  # in steps: a fast machine must not come to the end meanwhile
        while process.poll() is None and newest(cut) < wanted:
            time.sleep(0.002)
        time.sleep(chance.uniform(0.0, 0.02))
        killed += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert killed >= 2
    assert start(cut).wait(300) == 0
    assert log(cut) == log(whole)
    assert (cut / "cache_last.pt").read_bytes() == (whole / "cache_last.pt").read_bytes()
    assert os.readlink(cut / "cache_last.pt") == os.readlink(whole / "cache_last.pt")
    assert not list(cut.rglob(f"{PARTIAL_PREFIX}*"))
