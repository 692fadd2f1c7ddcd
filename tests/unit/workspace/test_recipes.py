"""Every committed recipe can be used."""

from __future__ import annotations

from pathlib import Path

import pytest

from workspace.capture import CaptureOptions
from workspace.training_config import make_config, read_recipe

RECIPES = sorted((Path(__file__).resolve().parents[3] / "configs" / "workspace").glob("*.yaml"))


def test_there_are_recipes() -> None:
    assert "train_smollm2" in {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_valid(path: Path) -> None:
    sections = read_recipe(path)
    CaptureOptions.model_validate(sections.get("capture", {}))
    make_config(sections.get("training", {}), str(path))
