"""Colours of the dashboard: every pair of text and ground keeps WCAG's 4.5:1, controls and lines of charts 3:1."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TOKENS_CSS = (Path(__file__).resolve().parents[2] / "static" / "css" / "tokens.css").read_text()
SCHEMES = ("light", "dark")
PAIR = re.compile(r"--([a-z-]+): light-dark\((#[0-9a-f]{6}), (#[0-9a-f]{6})\);")
TOKENS = {name: dict(zip(SCHEMES, values, strict=True)) for name, *values in PAIR.findall(TOKENS_CSS)}

GROUNDS = ("ground", "surface", "sunken")
TEXT_PAIRS = [
    *((ink, ground) for ink in ("ink", "ink-soft", "sea", "gold", "olive", "clay") for ground in GROUNDS),
    *(("ink", wash) for wash in ("sea-wash", "gold-wash", "olive-wash", "clay-wash")),
    *(("ink-soft", wash) for wash in ("sea-wash", "gold-wash")),
    ("gold", "gold-wash"),
    ("on-sea", "sea"),
    ("on-sea", "sea-deep"),
    ("on-clay", "clay"),
    ("ground", "ink"),
]
GRAPHIC_PAIRS = [
    (line, ground) for line in ("line-strong", "chart-train", "violet") for ground in ("ground", "surface")
]


def luminance(colour: str) -> float:
    """Relative luminance of ``#rrggbb`` (WCAG 2.2)."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_the_formula_knows_black_on_white():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("text", "ground"), TEXT_PAIRS)
def test_text_contrast(text, ground, scheme):
    assert contrast(TOKENS[text][scheme], TOKENS[ground][scheme]) >= 4.5


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("line", "ground"), GRAPHIC_PAIRS)
def test_graphics_contrast(line, ground, scheme):
    assert contrast(TOKENS[line][scheme], TOKENS[ground][scheme]) >= 3.0
