"""Distil the history of a domain into a cartridge; ``--help`` names the options.

    python tools/distill_memory.py --domain support --preset smollm2_cpu

The same as ``python -m cli.main distill run``.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from settings import prepare_process_environment

prepare_process_environment()  # before torch is imported

import typer  # noqa: E402

from cli.distill import run  # noqa: E402

if __name__ == "__main__":
    typer.run(run)
