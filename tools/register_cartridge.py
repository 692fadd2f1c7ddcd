"""Take a trained cartridge (a folder, a .pt file, an exported zip) into the registry; ``--help`` names the options.

    python tools/register_cartridge.py cache_last.pt --domain support --model smollm2-135m-instruct --promote

The same as ``python -m cli.main distill register``.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from settings import prepare_process_environment

prepare_process_environment()  # before torch is imported

import typer  # noqa: E402

from cli.distill import register  # noqa: E402

if __name__ == "__main__":
    typer.run(register)
