"""docs/cartridge-tutorial.md: its commands, as they stand there, in order, against the real server."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from settings import ROOT
from tests.support.server import running
from tests.support.tiny_model import save_tiny_model

PAGE = (ROOT / "docs" / "cartridge-tutorial.md").read_text(encoding="utf-8")


@pytest.mark.timeout(900)
def test_every_command_of_the_tutorial(tmp_path: Path) -> None:
    blocks = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) > 8
    model = save_tiny_model(tmp_path / "tiny-llama", context_length=4096)
    environ = {
        "OLYMPUS_MODEL__NAME": str(model),
        "OLYMPUS_KERNELS__SPAWN_DEFAULT": "false",
        "OLYMPUS_KERNELS__AUTO_SPAWN": "false",
        "OLYMPUS_DISTILLATION__AUTOMATIC": "false",
        "OLYMPUS_MEMORY__EPISODIC__ENABLED": "false",
    }
    folder = tmp_path / "here"
    folder.mkdir()
    for name in ("cli", "docs", "configs"):  # the page is read in a checkout; what it writes stays out of ours
        (folder / name).symlink_to(ROOT / name)
    with running(tmp_path / "data", environ) as server:
        script = "\n".join(["set -e -o pipefail", *blocks])
        own = {
            **os.environ,
            "URL": server.url,
            "STEPS": "30",
            "MARGIN": "1.0",  # a random model is right about nothing; that it learned is asked all the same
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        }
        done = subprocess.run(
            ["bash", "-c", script], cwd=folder, env=own, capture_output=True, text=True, timeout=600, check=False
        )
    told = f"{done.stdout}\n{done.stderr}\n{server.log}"
    assert done.returncode == 0, told
    assert '"imported":72' in done.stdout.replace(" ", ""), told
    assert ": promoted. passed on" in done.stdout, told
    assert re.search(r"cartridge +right .* nats", done.stdout), told
    assert done.stdout.count("chat.completion") == 2, told
    assert (folder / "house_peft.zip").stat().st_size > 1000
    assert "fires  stale" in done.stdout, told
    assert '"state":"retired"' in done.stdout.replace(" ", ""), told
