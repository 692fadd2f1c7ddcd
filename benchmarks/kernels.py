"""What M8 kernels can do, measured side by side against what people would use instead.

    python benchmarks/kernels.py [--parts optimizer,language,...] [--seeds 1,2,3] [--quick] [--write]

Parts, in this order: ``optimizer`` (DiagonalFisher against fused AdamW), ``language`` (a kernel against a plain GPT of
equal parameters and CPU time), ``stream`` (10,003 messages, test then train, against online logistic regression),
``forgetting`` (a change of domain, with and without replay), ``routing`` (three domains, against a byte hash),
``integration`` (the ablation of architectures that integrate) and ``service`` (throughput, latency, overhead of a
running server). A part whose data is absent is skipped with the reason. ``--write`` puts the text of each part into
benchmarks/results/kernels/<part>.md.
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
from benchmarks.kernel_parts.common import SWEEP_SEED, Options  # noqa: E402

PARTS = ("optimizer", "language", "stream", "forgetting", "routing", "integration", "service")


def main() -> int:
    return run_parts(__doc__, PARTS, "kernels", "kernel_parts", _circumstances)


def _circumstances(options: Options, seconds: float) -> str:
    quick = "; QUICK, not a result" if options.quick else ""
    return (
        f"torch {torch.__version__}, {os.cpu_count()} cores ({platform.machine()}), 1 thread; "
        f"seeds {', '.join(map(str, options.seeds))} (sweeps: {SWEEP_SEED}); {seconds:.0f} s{quick}"
    )


if __name__ == "__main__":
    sys.exit(main())
