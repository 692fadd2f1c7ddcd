"""What a cartridge is worth beside everything that people use instead, on the same questions, in one run.

    python benchmarks/distillation.py [--parts parity,feedback,latency,stream,recall] [--seeds 1,2,3] [--quick]
                                       [--write]

``parity``: labels that say what they mean, pure distillation from the long prompt; may the cartridge replace it?
``feedback``: arbitrary codes, corrected answers as targets; does it learn what the long prompt cannot show a model of
this size? ``latency``: time to the first token and per token of a long prompt, of the same prompt with its keys and
values cached, and of a cartridge. ``stream``: a life in three phases that is distilled while it goes on, on one seed.
``recall``: how many arbitrary pairs a cartridge holds, on a small gpt-oss that recalls them from its prompt. Else real
messages (banking77) and SmolLM2-135M-Instruct; a part whose data is absent is skipped with the reason. ``--write``
puts each part into benchmarks/results/distillation/<part>.md.
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

PARTS = ("parity", "feedback", "latency", "stream", "recall")


def main() -> int:
    return run_parts(__doc__, PARTS, "distillation", "distillation_parts", _circumstances)


def _circumstances(options: Options, seconds: float) -> str:
    quick = "; QUICK, not a result" if options.quick else ""
    return (
        f"SmolLM2-135M-Instruct in bfloat16, torch {torch.__version__}, {os.cpu_count()} cores ({platform.machine()}), "
        f"1 thread; seeds {', '.join(map(str, options.seeds))}; {seconds:.0f} s{quick}"
    )


if __name__ == "__main__":
    sys.exit(main())
