"""What the episodic memory finds, and how long that takes beside bare FAISS.

    python benchmarks/memory.py [--parts latency,quality] [--seeds 1,2,3] [--quick] [--write]

``latency``: p50 and p95 at 10,000 and 100,000 entries, the ratio to a bare FAISS index, recall@10 against exact search,
and the forms of index at growing sizes. ``quality``: same-intent precision@10 on banking77 by words, by meaning and by
both. Without banking77 or MiniLM it says what is missing. ``--write`` puts the text into benchmarks/results/memory.md.
"""

from __future__ import annotations

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

from benchmarks.command import read_arguments  # noqa: E402
from benchmarks.kernel_parts.common import SWEEP_SEED, MissingData, Options, data_folder  # noqa: E402
from benchmarks.memory_parts.common import embedded, minilm  # noqa: E402

PARTS = ("latency", "quality")


def main() -> int:
    arguments = read_arguments(
        __doc__, PARTS, "benchmarks/results/memory.md", quick="shorten everything; to see that it runs"
    )
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


if __name__ == "__main__":
    sys.exit(main())
