"""Options of ``benchmarks/workspace.py``, for all of its parts."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.kernel_parts.common import ROOT, data_folder


def _cache() -> Path:
    return Path(os.environ.get("OLYMPUS_CACHE_DIR") or ROOT / ".cache")


@dataclass(frozen=True)
class Options:
    """``quick`` shortens every arm: for a look whether a part runs, never for a result."""

    seeds: tuple[int, ...] = (1, 2, 3)
    quick: bool = False
    data: Path | None = field(default_factory=data_folder)
    cache: Path = field(default_factory=_cache)
