"""Whether the dashboard stays quick where much is on it, and whether its live stream loses anything.

    python benchmarks/dashboard.py [--parts many,stream] [--seeds 1,2,3] [--quick] [--write]

``many``: 50 kernels with 100,000 measured points each, three of them training; a real Chromium opens the overview and
compares six: bytes of the first load, time until it can be used, the longest task of the main thread while it is
moved and zoomed, points per answer. ``stream``: 50 watchers for ten minutes that are cut off at random and resume:
gaps, duplicates, the memory of the server. Both run the real server (``python app.py``) without a language model.
``--write`` puts the text of each part into benchmarks/results/dashboard/<part>.md.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from settings import prepare_process_environment  # noqa: E402

prepare_process_environment()  # before torch is imported

from benchmarks.command import run_parts  # noqa: E402
from benchmarks.kernel_parts.common import Options  # noqa: E402

PARTS = ("many", "stream")


def circumstances(options: Options, seconds: float) -> str:
    quick = "; QUICK, not a result" if options.quick else ""
    return f"{os.cpu_count()} cores ({platform.machine()}); seed {options.seeds[0]}; {seconds:.0f} s{quick}"


if __name__ == "__main__":
    raise SystemExit(run_parts(__doc__, PARTS, "dashboard", "dashboard_parts", circumstances))
