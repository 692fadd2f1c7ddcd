"""Trained weights that come with the program: which of them fit the loaded model.

They lie in ``weights/<model>/``, were made by the recipe that is named after the model in ``configs/workspace/``, and
have passed the fluency guard. They count for exactly the weights that they were trained on, by fingerprint.
"""

from __future__ import annotations

import logging
from pathlib import Path

from workspace.errors import StateError
from workspace.models import LoadedModel
from workspace.state_files import read_manifest
from workspace.workspace_config import WorkspaceConfig

logger = logging.getLogger(__name__)

SHIPPED = Path(__file__).resolve().parent / "weights"


def with_shipped_weights(loaded: LoadedModel, config: WorkspaceConfig) -> WorkspaceConfig:
    """``config`` with the ``state_path`` of weights that come for ``loaded``, where it wants them and names no others.

    Where settings say something that contradicts those weights (other layers, another number of slots), the settings
    win, and there are none.
    """
    if config.state_path is not None or not config.shipped_weights:
        return config
    for path in sorted(SHIPPED.glob("*/manifest.json")):
        try:
            manifest = read_manifest(path.parent)
            if loaded.fingerprint not in manifest.model.fingerprints:
                continue
            if config.hooked_layers not in (None, manifest.shape.layers):
                raise ValueError(f"they are for the layers {manifest.shape.layers}")
            config.for_weights(manifest.config)
        except (StateError, ValueError) as error:
            logger.info("the weights in %s are not used: %s", path.parent.name, error)
            continue
        return config.model_copy(update={"state_path": path.parent})
    return config
