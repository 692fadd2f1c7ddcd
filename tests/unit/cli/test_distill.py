"""``python -m cli.main distill``: what its options mean."""

from __future__ import annotations

import pytest
import typer

from cli.distill import overrides


def test_values_on_top_are_nested() -> None:
    values = ["training.max_steps=50", "training.epochs=null", "data.redact.kinds=[email]", "seed=3"]
    assert overrides(values) == {
        "training": {"max_steps": 50, "epochs": None},
        "data": {"redact": {"kinds": ["email"]}},
        "seed": 3,
    }
    assert overrides(None) == {}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (["training.max_steps"], "expected section.key=value"),
        (["training=5", "training.max_steps=50"], "training was given a value before"),
        (["data.redact.kinds=[email"], "not a YAML value"),
    ],
)
def test_what_cannot_be_meant_is_said(values: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ended:
        overrides(values)
    assert ended.value.exit_code == 2
    assert said in capsys.readouterr().err
