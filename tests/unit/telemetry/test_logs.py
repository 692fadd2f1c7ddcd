"""What a logged exception shows, and what it must not show."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Literal

import pytest
import structlog

from settings import TelemetrySettings
from telemetry import logs


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def _fail(secret: str) -> None:
    hidden = secret.upper()
    raise ValueError(f"{len(hidden)} characters")


@pytest.mark.parametrize("form", ["console", "json"])
def test_a_traceback_shows_lines_but_no_values(
    form: Literal["console", "json"], capsys: pytest.CaptureFixture[str]
) -> None:
    """Values of local variables are prompts and tensors: not for a log, and slow to draw (minutes for a network)."""
    logs.configure(TelemetrySettings(log_format=form))
    try:
        _fail("".join(("my", " ", "prompt")))
    except ValueError:
        structlog.get_logger("test").exception("it failed", kernel="hermes")
    told = capsys.readouterr().out
    assert "it failed" in told
    assert "_fail" in told
    assert "9 characters" in told
    assert "my prompt" not in told
    assert "MY PROMPT" not in told
    if form == "json":
        line = json.loads(told.strip().splitlines()[-1])
        assert line["kernel"] == "hermes"
        assert line["exception"][0]["exc_type"] == "ValueError"
