"""How the engine serves: several streams beside one, and a conversation's second turn beside its first.

    python benchmarks/serving.py [--parts batching,turns,decoding,training] [--seeds 1,2,3] [--quick] [--write]

``batching``: tokens per second of 8 streams against 1, with shared passes and without. ``turns``: time to the first
token of the second turn of a 2,000-token conversation against its first. ``decoding``: one stream beside
transformers' ``generate`` and llama.cpp, exact and quantised, with perplexity. ``training``: time between tokens beside
three kernels that train. SmolLM2-135M-Instruct with one thread, the arms alternating in one run. ``--write`` puts each
part into benchmarks/results/serving/<part>.md.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in place of this folder: workspace.py here has the name of a package

from settings import prepare_process_environment  # noqa: E402

prepare_process_environment()  # before torch is imported

import torch  # noqa: E402

from benchmarks.command import run_parts  # noqa: E402
from benchmarks.kernel_parts.common import Options  # noqa: E402

PARTS = ("batching", "turns", "decoding", "training")


def main() -> int:
    return run_parts(__doc__, PARTS, "serving", "serving_parts", _circumstances)


def _circumstances(options: Options, seconds: float) -> str:
    quick = "; QUICK, not a result" if options.quick else ""
    return (
        f"SmolLM2-135M-Instruct, torch {torch.__version__}, {os.cpu_count()} cores ({platform.machine()}), 1 thread, "
        f"load {os.getloadavg()[0]:.1f}; seeds {', '.join(map(str, options.seeds))}; {seconds:.0f} s{quick}"
    )


if __name__ == "__main__":
    sys.exit(main())
