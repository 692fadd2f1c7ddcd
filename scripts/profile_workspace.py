"""Measure what every part of the workspace costs; ``--help`` names the options.

    python scripts/profile_workspace.py [--context 256] [--workspace-state weights/]

The same as ``python -m cli.main profile-workspace``.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from settings import prepare_process_environment

prepare_process_environment()  # before torch is imported

import typer  # noqa: E402

from cli.workspace import profile  # noqa: E402

if __name__ == "__main__":
    typer.run(profile)
