"""Train the workspace on captured texts; ``--help`` names the options.

    python scripts/train_workspace.py --manifest data/capture/manifest.jsonl --epochs 3 --device cpu

The same as ``python -m cli.main train-workspace``.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from settings import prepare_process_environment

prepare_process_environment()  # before torch is imported

import typer  # noqa: E402

from cli.workspace import train  # noqa: E402

if __name__ == "__main__":
    typer.run(train)
