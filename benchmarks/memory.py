"""What the episodic memory finds, and how long that takes beside bare FAISS.

    python benchmarks/memory.py [--parts latency,quality] [--seeds 1,2,3] [--quick] [--write]

``latency``: p50 and p95 at 10,000 and 100,000 entries, the ratio to a bare FAISS index, recall@10 against exact search,
and the forms of index at growing sizes. ``quality``: same-intent precision@10 on banking77 by words, by meaning and by
both. Without banking77 or MiniLM it says what is missing. ``--write`` puts the text into benchmarks/results/memory.md.
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

import faiss  # noqa: E402
import torch  # noqa: E402

from benchmarks.kernel_parts.common import SWEEP_SEED, MissingData, Options, data_folder  # noqa: E402
from benchmarks.memory_parts.common import embedded, minilm  # noqa: E402

PARTS = ("latency", "quality")


def main() -> int:
    arguments = _arguments()
    options = Options(arguments.seeds, arguments.quick, data_folder())
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    begun = time.perf_counter()
    try:
        model = minilm(options)
        known = embedded(options, model, "train", 1_000 if options.quick else 10_000)
        asked = embedded(options, model, "test", 200 if options.quick else 1_000)
        sections = []
        for name in arguments.parts:
            part = importlib.import_module(f"benchmarks.memory_parts.{name}")
            sections.append(f"## {name}\n\n{part.run(options, model, known, asked)}")
            print(sections[-1] + "\n", flush=True)
    except MissingData as missing:
        print(f"skipped: {missing}", flush=True)
        return 0
    quick = "; QUICK, not a result" if options.quick else ""
    head = (
        f"FAISS {faiss.__version__}, torch {torch.__version__}, {os.cpu_count()} cores ({platform.machine()}), "
        f"1 thread; seeds {', '.join(map(str, options.seeds))} (sweeps: {SWEEP_SEED}); "
        f"{time.perf_counter() - begun:.0f} s{quick}"
    )
    if arguments.write:
        page = "\n\n".join(["# memory", head, *sections]) + "\n"
        (ROOT / "benchmarks" / "results" / "memory.md").write_text(page, encoding="utf-8")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=lambda text: tuple(text.split(",")), default=PARTS)
    parser.add_argument("--seeds", type=lambda text: tuple(int(seed) for seed in text.split(",")), default=(1, 2, 3))
    parser.add_argument("--quick", action="store_true", help="shorten everything; to see that it runs")
    parser.add_argument("--write", action="store_true", help="keep the results in benchmarks/results/memory.md")
    arguments = parser.parse_args()
    unknown = set(arguments.parts) - set(PARTS)
    if unknown:
        parser.error(f"unknown parts {', '.join(sorted(unknown))}; known are {', '.join(PARTS)}")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
