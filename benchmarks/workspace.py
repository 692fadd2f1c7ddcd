"""What the workspace costs and what it gives, measured side by side.

    python benchmarks/workspace.py [--parts overhead,long_context,...] [--seeds 1,2,3] [--quick] [--write]

Parts, in this order: ``overhead`` (hooks off and on against our own loop without hooks; memory; prefill),
``long_context`` (what virtual tokens recover of text that left a capped cache) and ``session`` (facts that were told
long ago). A part whose data is absent is skipped with the reason. ``--write`` puts the text of each part into
benchmarks/results/workspace/<part>.md.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in place of this folder, where this file has the name of the package that it measures

from settings import prepare_process_environment  # noqa: E402

prepare_process_environment()  # before torch is imported

import torch  # noqa: E402

from benchmarks.command import run_parts  # noqa: E402
from benchmarks.kernel_parts.common import Options  # noqa: E402

PARTS = ("overhead", "long_context", "session")


def main() -> int:
    return run_parts(__doc__, PARTS, "workspace", "workspace_parts", _circumstances)


def _circumstances(options: Options, seconds: float) -> str:
    quick = "; QUICK, not a result" if options.quick else ""
    seeds = ", ".join(map(str, options.seeds))
    return (
        f"torch {torch.__version__}, {os.cpu_count()} cores ({platform.machine()}), 1 thread; seeds {seeds}; "
        f"{seconds:.0f} s{quick}"
    )


if __name__ == "__main__":
    sys.exit(main())
