"""The folder that Tokasaurus serves a cartridge from, written and proved.

``<cartridge_dir>/<sanitized id>/cartridge.pt`` and ``config.yaml`` with ``kv_cache_initializer.max_tokens``. Its loader
cuts slots off that do not fill a page of 16, counts its pages from ``max_tokens``, and indexes the first frozen tensor:
so p must be a multiple of 16, ``max_tokens`` must be p, and at least one slot must be frozen. Source: branch
``geoff/cartridges`` of ScalingIntelligence/tokasaurus, ``manager/cartridge_downloader.py`` and ``model/types.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from memory.cartridges.cartridge import Cartridge
from memory.cartridges.errors import CartridgeFileInvalid, CartridgeNotExportable
from memory.cartridges.ids import sanitize
from memory.cartridges.manifest import DtypeName
from memory.cartridges.torch_format import Slots, read_torch_file, write_torch_file
from storage import files

PAGE = 16
TENSORS = "cartridge.pt"
CONFIG = "config.yaml"
_MOST_CONFIG = 64 << 10


@dataclass(frozen=True, eq=False)
class TokasaurusFolder:
    """A folder that Tokasaurus will load, with what is in it. ``model`` is what it claims to be for, if it says so."""

    id: str
    slots: Slots
    model: str | None


def export_tokasaurus(folder: Path, cartridge: Cartridge) -> Path:
    """Write ``cartridge`` below ``folder``, which is Tokasaurus' ``cartridge_dir``; returns its own folder there.

    Raises ``CartridgeNotExportable`` when that server could not serve it, ``FileExistsError``, ``OSError``.
    """
    manifest = cartridge.manifest
    if manifest.slots % PAGE or cartridge.frozen < 1:
        raise CartridgeNotExportable(
            f"Tokasaurus serves pages of {PAGE} slots of which the first is frozen; {manifest.id or 'this cartridge'} "
            f"has {manifest.slots} slots and {cartridge.frozen} frozen ones. Distil one with training.slots a multiple "
            f"of {PAGE} and training.frozen at least 1"
        )
    name = sanitize(manifest.id or manifest.domain)
    config = {
        "kv_cache_initializer": {"max_tokens": manifest.slots},
        "model": {"pretrained_model_name_or_path": manifest.model},
    }
    dtype: DtypeName = "float32" if manifest.dtype == "float32" else "bfloat16"
    with files.publish_directory(folder / name) as partial:
        write_torch_file(partial / TENSORS, cartridge.prefix.keys, cartridge.prefix.values, cartridge.frozen, dtype)
        (partial / CONFIG).write_text(yaml.safe_dump(config, sort_keys=True), encoding="utf-8")
    return folder / name


def validate_tokasaurus_folder(path: Path) -> TokasaurusFolder:
    """Prove what that server's loader needs, before it meets it. Raises ``CartridgeFileInvalid``."""
    if sanitize(path.name) != path.name:
        raise CartridgeFileInvalid(str(path), f"the server looks for {sanitize(path.name)!r}; rename the folder")
    missing = [name for name in (TENSORS, CONFIG) if not (path / name).is_file()]
    if missing:
        raise CartridgeFileInvalid(str(path), f"{' and '.join(missing)} missing")
    most, model = _config(path / CONFIG)
    slots = read_torch_file(path / TENSORS)
    source, count = str(path / TENSORS), int(slots.keys[0].shape[2])
    if slots.frozen < 1:
        raise CartridgeFileInvalid(source, "nothing is frozen; the loader needs at least one frozen slot")
    if count % PAGE:
        raise CartridgeFileInvalid(source, f"{count} slots do not fill pages of {PAGE}; the loader cuts the last off")
    if most != count:
        raise CartridgeFileInvalid(
            str(path / CONFIG), f"kv_cache_initializer.max_tokens is {most}, but {TENSORS} has {count} slots"
        )
    return TokasaurusFolder(path.name, slots, model)


def _config(path: Path) -> tuple[int, str | None]:
    """``max_tokens`` and the model's name, in either of the two forms that occur (W&B puts values under ``value``)."""
    source = str(path)
    if path.stat().st_size > _MOST_CONFIG:
        raise CartridgeFileInvalid(source, f"larger than {_MOST_CONFIG:,} bytes")
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise CartridgeFileInvalid(source, f"no plain YAML: {error}") from None
    most = _inside(_inside(value, "kv_cache_initializer"), "max_tokens")
    if type(most) is not int or most < 1:
        raise CartridgeFileInvalid(source, "kv_cache_initializer.max_tokens is missing, or no number of slots")
    name = _inside(_inside(value, "model"), "pretrained_model_name_or_path")
    return most, name if isinstance(name, str) else None


def _inside(value: Any, key: str) -> Any:
    found = value.get(key) if isinstance(value, dict) else None
    return found["value"] if isinstance(found, dict) and set(found) <= {"value", "desc"} and "value" in found else found
