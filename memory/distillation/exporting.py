"""After a run: what its configuration wants exported, exported; a failure is told and changes nothing of the run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from memory.distillation.config import DistillConfig
from memory.distillation.errors import ExportError
from memory.distillation.exporters.hf_uploader import HubUploader
from memory.distillation.exporters.local import export_local
from memory.distillation.exporters.wandb_exporter import export_wandb

logger = logging.getLogger(__name__)


def export_run(folder: Path, config: DistillConfig) -> dict[str, str]:
    """Export the run in ``folder`` wherever ``config`` says; where to, or what went wrong, by exporter."""
    wanted: dict[str, Callable[[], str]] = {}
    if config.output_path is not None:
        target = config.output_path / folder.name
        wanted["local"] = lambda: f"{target}: {', '.join(export_local(folder, target))}"
    if config.hf_repo_id is not None:
        wanted["hub"] = lambda: HubUploader().upload_run(folder, config)
    if config.wandb_project is not None:
        wanted["wandb"] = lambda: export_wandb(folder, config)
    told = {}
    for name, export in wanted.items():
        try:
            told[name] = export()
        except ExportError as error:
            logger.warning("the export of %s to %s failed: %s", folder.name, name, error)
            told[name] = f"failed: {error}"
    return told
