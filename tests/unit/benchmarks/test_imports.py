"""Every part of every benchmark can be imported: what it names of the product is still there."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3] / "benchmarks"
PARTS = sorted(f"benchmarks.{path.parent.name}.{path.stem}" for path in ROOT.glob("*_parts/[!_]*.py"))


@pytest.mark.parametrize("name", PARTS)
def test_a_part_finds_what_it_names(name: str) -> None:
    importlib.import_module(name)


def test_there_are_parts() -> None:
    assert len(PARTS) > 30
