"""The texts that runs leave behind, and how they go when something in them is forgotten.

A run's folder holds what was lived through: in its journal and its dataset, and in the teacher's answers, which may say
anything that stood in the teacher's prompt. So when one experience of a run is forgotten, these files go as a whole.
``experiences.json`` says of which experiences they are. Folders of open runs are left alone: what such a run wrote goes
when it has ended.

The cartridge is the registry's, which marks it stale; metrics and reports hold no texts. A run that ended long ago
keeps its reports alone (``prune``): datasets and checkpoints of every night's run would fill the disk.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection, Sequence
from pathlib import Path

from memory.history import History
from storage import files

logger = logging.getLogger(__name__)

JOURNAL, DATASET, EXPERIENCES = "journal.jsonl", "dataset.parquet", "experiences.json"
_BEGUN = "config.json"  #: written when a run begins, or goes on
_REPORTS = (_BEGUN, "metrics.jsonl", "gate.json", EXPERIENCES)
#: The last two are the dataset once more, for the Cartridges library (``cartridges_backend.py``).
_TEXTS = (JOURNAL, DATASET, "library_train.parquet", "library_eval.parquet")


def note_experiences(folder: Path, ids: Sequence[int]) -> None:
    """Write down of which experiences the texts in ``folder`` will be; those of others, by now forgotten, go."""
    if set(_ids(folder)) - set(ids):
        remove_texts(folder)
    files.write_json(folder / EXPERIENCES, sorted(ids))


def remove_texts(folder: Path) -> bool:
    """Remove journal and dataset; False where there was neither."""
    found = [folder / name for name in _TEXTS if (folder / name).exists()]
    for path in found:
        path.unlink(missing_ok=True)
    return bool(found)


def remove_forgotten(root: Path, history: History, open_runs: Collection[str]) -> list[str]:
    """Remove the texts of ended runs that learned from something that was forgotten since; returns their ids."""
    told = []
    for folder in sorted(root.glob("run-*")):
        if folder.name in open_runs or not any((folder / name).exists() for name in _TEXTS):
            continue
        if any(deleted for _, _, deleted in history.verdicts(_ids(folder))) and remove_texts(folder):
            logger.info("run %s: its texts are removed, something in them was forgotten", folder.name)
            told.append(folder.name)
    return told


def prune(root: Path, keep: int, open_runs: Collection[str]) -> list[str]:
    """Of ended runs, all but the ``keep`` that began last lose everything but their reports; returns their ids."""
    ended = [folder for folder in root.glob("run-*") if folder.name not in open_runs and (folder / _BEGUN).exists()]
    ended.sort(key=lambda folder: (folder / _BEGUN).stat().st_mtime, reverse=True)
    told = []
    for folder in ended[keep:]:
        heavy = [path for path in folder.iterdir() if path.name not in _REPORTS]
        for path in heavy:
            if path.is_dir() and not path.is_symlink():
                files.remove_directory(path)
            else:
                os.unlink(path)
        if heavy:
            told.append(folder.name)
    return told


def _ids(folder: Path) -> list[int]:
    try:
        found = json.loads((folder / EXPERIENCES).read_bytes())
    except (OSError, ValueError):  # of a snapshot, which is no part of the history
        return []
    return [item for item in found if type(item) is int] if isinstance(found, list) else []
