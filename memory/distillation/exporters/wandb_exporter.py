"""A run's metrics and artifacts as a Weights & Biases run. Optional: ``wandb`` is imported only when it is used."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from memory.distillation.config import DistillConfig
from memory.distillation.errors import ExporterMissing, ExportError
from memory.distillation.exporters.local import artifacts


def export_wandb(folder: Path, config: DistillConfig, wandb: Any = None) -> str:
    """Log ``metrics.jsonl`` line by line and the artifacts as one; returns the run's address.

    ``wandb`` is the library or behaves like it. Raises ``ExportError``; the run's folder is not changed.
    """
    if config.wandb_project is None:
        raise ExportError("no project is configured; set wandb_project")
    items, metrics = artifacts(folder), _metrics(folder / "metrics.jsonl")
    library = _default_library() if wandb is None else wandb
    try:
        run = library.init(project=config.wandb_project, name=folder.name, config=config.model_dump(mode="json"))
        for line in metrics:
            run.log(line)
        artifact = library.Artifact(folder.name, type="distillation")
        for item in items:
            artifact.add_file(str(item.path), name=item.name)
        run.log_artifact(artifact)
        run.finish()
    except Exception as error:  # whatever the library and its transport raise: nothing of ours has changed
        raise ExportError(
            f"W&B did not take {folder.name}: {type(error).__name__}: {error}; check the login and export again"
        ) from error
    return str(run.url)


def _metrics(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except ValueError as error:
        raise ExportError(f"{path} is not JSON lines ({error})") from None
    return [line for line in lines if isinstance(line, dict)]


def _default_library() -> Any:
    try:
        return importlib.import_module("wandb")
    except ImportError:
        raise ExporterMissing(
            "exporting to W&B needs the package wandb; install it and log in, or export to a folder instead"
        ) from None
