"""What the parts of ``benchmarks/kernels.py`` share: the options, the data sets, and tables in Markdown.

A part is a module with ``run(options) -> str``: it measures its arms side by side, alternating, and returns Markdown
with the median over seeds and the value of every seed. Learning rates are swept per arm on ``SWEEP_SEED``, which is
never among the seeds that are reported.
"""

from __future__ import annotations

import csv
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SWEEP_SEED = 7


@dataclass(frozen=True)
class Options:
    """``quick`` shortens every arm: for a look whether a part runs, never for a result."""

    seeds: tuple[int, ...] = (1, 2, 3)
    quick: bool = False
    data: Path | None = None


class MissingData(Exception):
    """A part cannot run here; the message says what is missing."""


def data_folder() -> Path | None:
    """The folder of public data sets, or None."""
    path = Path(os.environ.get("OLYMPUS_SHARED_DATA", ROOT.parent / "shared" / "data"))
    return path if path.is_dir() else None


def cache_folder() -> Path:
    """Where models are fetched to and converted."""
    return Path(os.environ.get("OLYMPUS_CACHE_DIR") or ROOT / ".cache")


def banking77(options: Options, split: str) -> list[tuple[str, str]]:
    """``(message, intent)`` rows of the split ``train`` (10,003) or ``test`` (3,080), in file order."""
    path = _need(options, "banking77", f"{split}.csv")
    with path.open(encoding="utf-8", newline="") as file:
        return [(row["text"].strip(), row["category"].strip()) for row in csv.DictReader(file)]


def tinyshakespeare(options: Options) -> bytes:
    """The text, 1.1 MB."""
    return _need(options, "tinyshakespeare", "input.txt").read_bytes()


def _need(options: Options, *parts: str) -> Path:
    path = options.data.joinpath(*parts) if options.data else None
    if path is None or not path.is_file():
        raise MissingData(
            f"{'/'.join(parts)} is not on this machine; set OLYMPUS_SHARED_DATA to the folder that holds it"
        )
    return path


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def spread(values: Sequence[float], digits: int = 3) -> str:
    """``median (each value)``."""
    each = ", ".join(f"{value:.{digits}f}" for value in values)
    return f"{statistics.median(values):.{digits}f} ({each})"
