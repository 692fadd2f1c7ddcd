"""What of a run's folder is for others, and a copy of it in another folder.

Given away are the dataset, its report, the configuration, the metrics and the cartridge. The journal and checkpoints
in between are not. ``files.json`` lists what is there with sizes and SHA-256.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from memory.distillation.errors import ExportError
from storage import files

#: Name in the run's folder -> name in the export. The dataset goes where hub loaders look for it.
_FILES = {
    "dataset.parquet": "data/dataset.parquet",
    "data_report.json": "data_report.json",
    "config.yaml": "config.yaml",
    "config.json": "config.json",
    "metrics.jsonl": "metrics.jsonl",
    "metrics.json": "metrics.json",
    "gate.json": "gate.json",
    "cache_last.pt": "cache_last.pt",
}
_CARTRIDGE = "cartridge"
LISTING = "files.json"


@dataclass(frozen=True, slots=True)
class Artifact:
    """A file of a run, and its path in an export, with ``/``."""

    path: Path
    name: str


def artifacts(folder: Path) -> list[Artifact]:
    """What is there to give away. Raises ``ExportError`` when the run has no dataset yet.

    Symbolic links are followed only to files of the run itself (``cache_last.pt`` is one).
    """
    found = list(_found(folder))
    if not any(item.name == _FILES["dataset.parquet"] for item in found):
        raise ExportError(f"{folder} holds no dataset.parquet; let the run finish making its dataset first")
    return found


def _found(folder: Path) -> Iterator[Artifact]:
    inside = folder.resolve()
    for name, exported in _FILES.items():
        path = (folder / name).resolve()
        if path.is_file() and path.is_relative_to(inside):
            yield Artifact(path, exported)
    for path in sorted((folder / _CARTRIDGE).rglob("*")):
        if path.is_file() and not path.is_symlink() and not path.name.startswith(files.PARTIAL_PREFIX):
            yield Artifact(path, f"{_CARTRIDGE}/{path.relative_to(folder / _CARTRIDGE).as_posix()}")


def export_local(folder: Path, target: Path) -> list[str]:
    """Copy a run's artifacts to the new folder ``target``, which appears whole or not at all; returns their names.

    Raises ``ExportError`` when there is nothing to copy, or ``target`` exists.
    """
    items = artifacts(folder)
    try:
        with files.publish_directory(target) as partial:
            listing = []
            for item in items:
                path = partial / item.name
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(item.path, path)
                listing.append({"name": item.name, "bytes": path.stat().st_size, "sha256": files.sha256_file(path)})
            files.write_json(partial / LISTING, listing)
    except FileExistsError:
        raise ExportError(f"{target} exists already; choose another folder, or remove it") from None
    except OSError as error:
        raise ExportError(f"copying to {target} failed ({error.strerror or error}); nothing was left there") from error
    return [item.name for item in items]
