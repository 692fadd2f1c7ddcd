"""Two processes train what one would: their gradients add up to the step's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from memory.cartridges.torch_format import read_torch_file
from memory.distillation.initialisers import text_prefix
from memory.distillation.ranks import Ranks, joined_ranks
from memory.distillation.trainer import train_cartridge
from tests.support.server import ROOT, free_port
from tests.support.tiny_cartridges import TRAINING, gold_rows, tiny_loaded

PROGRAM = """
import sys, torch
from pathlib import Path
from memory.distillation.initialisers import text_prefix
from memory.distillation.ranks import joined_ranks
from memory.distillation.trainer import train_cartridge
from tests.support.tiny_cartridges import TRAINING, gold_rows, tiny_loaded

folder = Path(sys.argv[1])
with joined_ranks() as ranks:
    assert ranks.size == 2
    loaded = tiny_loaded(folder / f"model-{ranks.rank}", num_hidden_layers=2)
    init = text_prefix(loaded, "The quick brown fox", TRAINING.slots)
    rows = gold_rows(7)
    for changes in ({"max_steps": 8}, {"rows": 1, "max_steps": 2}):
        config = TRAINING.model_copy(update=changes)
        out = folder / f"run-{config.rows}"
        result = train_cartridge(loaded, rows, rows[:3], config, init, folder=out)
        torch.save([*result.prefix.keys, *result.prefix.values], folder / f"prefix-{config.rows}-{ranks.rank}.pt")
        assert (result.file is not None) == ranks.first
"""


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Also with a row less than processes, where one of them has nothing to do in a step."""
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tmp_path)],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        for rank in (0, 1)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-3000:]
    loaded = tiny_loaded(tmp_path / "model", num_hidden_layers=2)
    init = text_prefix(loaded, "The quick brown fox", TRAINING.slots)
    rows = gold_rows(7)
    for changes in ({"max_steps": 8}, {"rows": 1, "max_steps": 2}):
        config = TRAINING.model_copy(update=changes)
        alone = train_cartridge(loaded, rows, rows[:3], config, init, folder=tmp_path / f"alone-{config.rows}")
        zero, one = (torch.load(tmp_path / f"prefix-{config.rows}-{r}.pt", weights_only=True) for r in (0, 1))
        for mine, other, single in zip(zero, one, (*alone.prefix.keys, *alone.prefix.values), strict=True):
            assert torch.equal(mine, other)
            torch.testing.assert_close(mine, single, rtol=1e-3, atol=1e-4)
        together, single_log = (
            [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]
            for folder in (f"run-{config.rows}", f"alone-{config.rows}")
        )
        assert len(together) == len(single_log)
        for line, other_line in zip(together, single_log, strict=True):
            for key in {"loss", "held_out"} & line.keys():
                torch.testing.assert_close(line[key], other_line[key], rtol=1e-4, atol=1e-5)
        keys, _, frozen = read_torch_file(tmp_path / f"run-{config.rows}" / "cache_last.pt")
        assert frozen == 1
        assert torch.equal(keys[0], zero[0])


def test_alone_nothing_is_exchanged() -> None:
    with joined_ranks() as ranks:
        assert ranks == Ranks(0, 1)
    tensor = torch.ones(3)
    ranks.sum([tensor])
    assert tensor.tolist() == [1, 1, 1]
    assert ranks.any(True)
    assert not ranks.any(False)
    assert ranks.first
