"""What a cartridge is worth beside everything that people use instead, on the same questions, in one run.

    python benchmarks/distillation.py [--parts parity,feedback,latency] [--seeds 1,2,3] [--quick] [--write]

``parity``: labels that say what they mean, pure distillation from the long prompt; may the cartridge replace it?
``feedback``: arbitrary codes, corrected answers as targets; does it learn what the long prompt cannot show a model of
this size? ``latency``: time to the first token and per token of a long prompt, of the same prompt with its keys and
values cached, and of a cartridge. Real messages (banking77) and SmolLM2-135M-Instruct; a part whose data is absent is
skipped with the reason. ``--write`` puts each part into benchmarks/results/distillation/<part>.md.
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
sys.path[0] = str(ROOT)  # in place of this folder: workspace.py here has the name of a package

from settings import prepare_process_environment  # noqa: E402

prepare_process_environment()  # before torch is imported

import torch  # noqa: E402

from benchmarks.kernel_parts.common import MissingData, Options, data_folder  # noqa: E402

PARTS = ("parity", "feedback", "latency")


def main() -> int:
    arguments = _arguments()
    options = Options(arguments.seeds, arguments.quick, data_folder())
    torch.set_num_threads(1)
    for name in arguments.parts:
        part = importlib.import_module(f"benchmarks.distillation_parts.{name}")
        begun = time.perf_counter()
        try:
            body = part.run(options)
        except MissingData as missing:
            print(f"## {name}\n\nskipped: {missing}\n", flush=True)
            continue
        text = f"# distillation: {name}\n\n{_circumstances(options, time.perf_counter() - begun)}\n\n{body}\n"
        print(text, flush=True)
        if arguments.write:
            target = ROOT / "benchmarks" / "results" / "distillation" / f"{name}.md"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
    return 0


def _circumstances(options: Options, seconds: float) -> str:
    quick = "; QUICK, not a result" if options.quick else ""
    return (
        f"SmolLM2-135M-Instruct in bfloat16, torch {torch.__version__}, {os.cpu_count()} cores ({platform.machine()}), "
        f"1 thread; seeds {', '.join(map(str, options.seeds))}; {seconds:.0f} s{quick}"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=lambda text: tuple(text.split(",")), default=PARTS)
    parser.add_argument("--seeds", type=lambda text: tuple(int(seed) for seed in text.split(",")), default=(1, 2, 3))
    parser.add_argument("--quick", action="store_true", help="shorten every arm; to see that it runs")
    parser.add_argument("--write", action="store_true", help="keep the results in benchmarks/results/distillation")
    arguments = parser.parse_args()
    unknown = set(arguments.parts) - set(PARTS)
    if unknown:
        parser.error(f"unknown parts {', '.join(sorted(unknown))}; known are {', '.join(PARTS)}")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
