"""docs/distillation.md knows every key, preset, column and strategy, and its example runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from memory.distillation.config import ROOT, SEED_TYPES, StrategyName, config_paths, presets
from memory.distillation.dataset import METADATA, SCHEMA, TOP_LOGPROBS
from tests.support.experiences import tagged

PATH = ROOT / "docs" / "distillation.md"
PAGE = PATH.read_text(encoding="utf-8") if PATH.exists() else ""


def row(path: str, description: str, default: Any) -> str:
    """The line of a key in the table."""
    shown = json.dumps(default, default=str, ensure_ascii=False)
    return f"| `{path}` | `{shown}` | {description.replace('|', chr(92) + '|')} |"


def test_every_key_stands_in_the_table_with_its_default() -> None:
    lines = set(PAGE.splitlines())
    assert [line for item in config_paths() if (line := row(*item)) not in lines] == []


def test_presets_columns_and_names_are_documented() -> None:
    columns = [field.name for schema in (SCHEMA, METADATA, TOP_LOGPROBS) for field in schema]
    for name in [*presets(), *columns, *get_args(StrategyName), *SEED_TYPES]:
        assert re.search(rf"`(?:messages\.|\.\.\. \.)?{name}`", PAGE), name


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    lived = [entry for item in tagged(20) for entry in item.entries()]
    lines = [json.dumps({"type": entry.type, "content": entry.content}) for entry in lived]
    (tmp_path / "memory_1.jsonl").write_text("\n".join(lines) + "\n")
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(example, str(PATH), "exec"), {})
    assert "OPS-" in capsys.readouterr().out
