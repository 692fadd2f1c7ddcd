"""Capture texts for training the workspace; ``--help`` names the options.

    python scripts/capture_workspace_data.py --prompts prompts.txt --output data/capture

The same as ``python -m cli.main capture``.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from settings import prepare_process_environment

prepare_process_environment()  # before torch is imported

import typer  # noqa: E402

from cli.workspace import capture  # noqa: E402

if __name__ == "__main__":
    typer.run(capture)
