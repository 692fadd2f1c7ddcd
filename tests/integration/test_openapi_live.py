"""Schemathesis against the real server with a tiny model: whatever fits the OpenAPI document, and what does not.

All its checks: no 5xx, no answer that violates its schema, no status or media type that is not documented, nothing
invalid accepted, no route without its key. What is left out, and why, stands in ``tests/support/schemathesis.toml``.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.server import ROOT, Server, running
from tests.support.tiny_model import save_tiny_model

KEY = "a-bootstrap-key-for-tests"
SEED = "20261127"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Answers are short, little is trained."""
    environ = {
        "OLYMPUS_MODEL__NAME": str(save_tiny_model(tmp_path_factory.mktemp("model") / "tiny-llama")),
        "OLYMPUS_MODEL__THREADS": "1",
        "OLYMPUS_SERVER__API_KEY": KEY,
        "OLYMPUS_ENGINE__MAX_TOKENS": "16",
        "OLYMPUS_ENGINE__DEFAULT_MAX_TOKENS": "4",
        "OLYMPUS_KERNELS__SPAWN_DEFAULT": "false",
        "OLYMPUS_KERNELS__MAX_KERNELS": "2",
        "OLYMPUS_MEMORY__EPISODIC__EMBEDDING": "none",
    }
    with running(tmp_path_factory.mktemp("data"), environ) as server:
        yield server


def test_the_server_keeps_its_document(server: Server, tmp_path: Path) -> None:
    """Every bound of every field, valid and not: some 5,000 cases, as far as they come in the time that CI has."""
    told = examine(server, tmp_path, "--phases", "coverage", "--max-time", "75")
    tested = re.search(r"Tested: (\d+)", told)
    assert tested is not None, told[-2000:]
    assert int(tested.group(1)) >= 40


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_server_keeps_its_document_whatever_comes(server: Server, tmp_path: Path) -> None:
    """All bounds, random cases, and chains of calls that use each other's answers."""
    examine(
        server,
        tmp_path,
        *("--phases", "coverage,fuzzing,stateful", "--max-examples", "30", "--max-time", "1200"),
        *("--suppress-health-check", "filter_too_much"),  # of the bytes that it makes up, few are a file's
    )


def examine(server: Server, folder: Path, *options: str) -> str:
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(ROOT / "tests/support/schemathesis.toml")),
        *("run", str(ROOT / "docs/openapi.json"), "--url", server.url, "--header", f"Authorization: Bearer {KEY}"),
        *("--header", "X-Forwarded-For: 192.0.2.7"),  # as through a proxy, so that nothing goes without the key
        *("--checks", "all", "--seed", SEED, "--no-color", "--request-timeout", "30", "--warnings", "off", *options),
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:] + server.log[-2000:]
    assert "Traceback" not in server.log
    assert server.json("GET", "/readyz")["status"] == "ready"
    return done.stdout
