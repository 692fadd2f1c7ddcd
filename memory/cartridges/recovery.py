"""After a crash: folders without a row, rows without a folder.

A folder is published whole before its row is written, so a whole folder without a row is a cartridge that was finished:
it becomes a candidate. A row is marked deleted before its folder goes, so the folder of a deleted row goes now. What
cannot be read, and rows without a folder, are told and left alone: somebody may have a copy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import sqlalchemy as sa

from memory.cartridges.errors import CartridgeError
from memory.cartridges.ids import make_id
from storage import files
from storage.database import Database
from storage.models import Cartridge as Row

if TYPE_CHECKING:
    from memory.cartridges.registry import CartridgeRegistry


def recover(registry: CartridgeRegistry, database: Database) -> dict[str, str]:
    """Bring both together; returns what was done or found, by id. Call it while nobody writes."""
    root = registry.folder
    on_disk = {item.name for item in root.iterdir() if item.is_dir()} if root.is_dir() else set()
    on_disk = {name for name in on_disk if not name.startswith(files.PARTIAL_PREFIX)}
    with database.read() as session:
        states: dict[str, str] = {key: state for key, state in session.execute(sa.select(Row.id, Row.state))}
    told: dict[str, str] = {}
    for name in sorted(on_disk):
        if name not in states:
            told[name] = _adopt(registry, name)
        elif states[name] == "deleted":
            files.remove_directory(root / name)
            told[name] = "removed: it was deleted"
    for name, state in states.items():
        if state != "deleted" and name not in on_disk:
            told[name] = f"its folder {root / name} is missing; restore it from a copy, or delete it"
    return told


def _adopt(registry: CartridgeRegistry, name: str) -> str:
    from memory.cartridges.files import load_cartridge  # it brings torch

    try:
        cartridge = load_cartridge(registry.folder / name)
    except CartridgeError as error:
        return f"left alone: {error}"
    manifest = cartridge.manifest
    if manifest.id != name or manifest.version < 1 or make_id(manifest.domain, manifest.version) != name:
        return f"left alone: its manifest calls it {manifest.id or 'nothing'}, so it is not one of ours"
    registry.adopt(manifest, cartridge.experience_ids)
    return "adopted as a candidate: the process ended before it was registered"
