"""docs/agents.md: its first program runs, and it names every agent, environment and kind of client."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import lm.factory
from agents.environments.registry import ENVIRONMENTS
from agents.registry import AGENTS
from lm.engine_client import EngineClient

PAGE = (Path(__file__).parents[3] / "docs" / "agents.md").read_text(encoding="utf-8")


def test_names_are_documented() -> None:
    for name in (*AGENTS, *ENVIRONMENTS):
        assert f"| `{name}` |" in PAGE
    for kind in lm.factory.KINDS:
        assert f"`{kind}:" in PAGE


def test_programs_are_python() -> None:
    programs = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(programs) == 3
    for program in programs:
        compile(program, "docs/agents.md", "exec")


def test_the_first_program_runs(
    tmp_path: Path, client: EngineClient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it stands, but for the model, which is a tiny one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lm.factory, "lm_factory", lambda *_, **__: client)
    program = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0]
    exec(compile(program, "docs/agents.md", "exec"), {})
    assert "{10:" in capsys.readouterr().out
    assert len((tmp_path / "life" / "scores.jsonl").read_text().splitlines()) == 20 + 2 * 12
