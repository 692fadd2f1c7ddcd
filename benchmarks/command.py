"""What the programs in this folder share: their options, and parts that run one after the other.

Imported after a program has put the project's root on the path and prepared the process for torch.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable, Sequence

import torch

from benchmarks.kernel_parts.common import ROOT, MissingData, Options, data_folder

#: The line about the machine, for a part that took so many seconds.
Circumstances = Callable[[Options, float], str]


def read_arguments(
    doc: str | None, parts: Sequence[str], results: str, quick: str = "shorten every arm; to see that it runs"
) -> argparse.Namespace:
    """``--parts``, ``--seeds``, ``--quick`` and ``--write``; ``results`` is where the last one writes to."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=lambda text: tuple(text.split(",")), default=tuple(parts))
    parser.add_argument("--seeds", type=lambda text: tuple(int(seed) for seed in text.split(",")), default=(1, 2, 3))
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--write", action="store_true", help=f"keep the results in {results}")
    arguments = parser.parse_args()
    unknown = set(arguments.parts) - set(parts)
    if unknown:
        parser.error(f"unknown parts {', '.join(sorted(unknown))}; known are {', '.join(parts)}")
    return arguments


def run_parts(doc: str | None, parts: Sequence[str], title: str, package: str, circumstances: Circumstances) -> int:
    """Run ``benchmarks.<package>.<part>.run(options)`` for each part; print it, and with ``--write`` keep it.

    A part whose data is absent is skipped with the reason; one with ``circumstances`` describes its own.
    """
    arguments = read_arguments(doc, parts, f"benchmarks/results/{title}")
    options = Options(arguments.seeds, arguments.quick, data_folder())
    torch.set_num_threads(1)
    for name in arguments.parts:
        part = importlib.import_module(f"benchmarks.{package}.{name}")
        begun = time.perf_counter()
        try:
            body = part.run(options)
        except MissingData as missing:
            print(f"## {name}\n\nskipped: {missing}\n", flush=True)
            continue
        described = getattr(part, "circumstances", circumstances)(options, time.perf_counter() - begun)
        text = f"# {title}: {name}\n\n{described}\n\n{body}\n"
        print(text, flush=True)
        if arguments.write:
            target = ROOT / "benchmarks" / "results" / title / f"{name}.md"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
    return 0
