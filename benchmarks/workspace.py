"""What the workspace costs and what it gives, measured side by side.

    python benchmarks/workspace.py [--parts overhead,long_context,...] [--seeds 1,2,3] [--quick] [--write]

Parts, in this order: ``overhead`` (hooks off and on against our own loop without hooks; memory; prefill),
``long_context`` (what virtual tokens recover of text that left a capped cache) and ``session`` (facts that were told
long ago). A part whose data is absent is skipped with the reason. ``--write`` puts the text of each part into
benchmarks/results/workspace/<part>.md.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in place of this folder, where this file has the name of the package that it measures

from settings import prepare_process_environment  # noqa: E402

prepare_process_environment()  # before torch is imported

import torch  # noqa: E402

from benchmarks.kernel_parts.common import MissingData  # noqa: E402
from benchmarks.workspace_parts.options import Options  # noqa: E402

PARTS = ("overhead", "long_context", "session")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=lambda text: tuple(text.split(",")), default=PARTS)
    parser.add_argument("--seeds", type=lambda text: tuple(int(seed) for seed in text.split(",")), default=(1, 2, 3))
    parser.add_argument("--quick", action="store_true", help="shorten every arm; to see that it runs")
    parser.add_argument("--write", action="store_true", help="keep the results in benchmarks/results/workspace")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"unknown parts {', '.join(sorted(unknown))}; known are {', '.join(PARTS)}")
    options = Options(arguments.seeds, arguments.quick)
    torch.set_num_threads(1)
    for name in arguments.parts:
        part = importlib.import_module(f"benchmarks.workspace_parts.{name}")
        begun = time.perf_counter()
        try:
            body = part.run(options)
        except MissingData as missing:
            print(f"## {name}\n\nskipped: {missing}\n", flush=True)
            continue
        text = f"# workspace: {name}\n\n{_circumstances(options, time.perf_counter() - begun)}\n\n{body}\n"
        print(text, flush=True)
        if arguments.write:
            target = ROOT / "benchmarks" / "results" / "workspace" / f"{name}.md"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
    return 0


def _circumstances(options: Options, seconds: float) -> str:
    quick = "; QUICK, not a result" if options.quick else ""
    seeds = ", ".join(map(str, options.seeds))
    return (
        f"torch {torch.__version__}, {os.cpu_count()} cores ({platform.machine()}), 1 thread; seeds {seeds}; "
        f"{seconds:.0f} s{quick}"
    )


if __name__ == "__main__":
    sys.exit(main())
