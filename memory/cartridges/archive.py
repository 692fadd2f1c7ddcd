"""Cartridges as one file for downloads and uploads: a zip of a folder, or a bare ``.pt``.

What is uploaded is recognised by what lies in it: ``manifest.json`` (ours), ``adapter_config.json`` (PEFT),
``config.yaml`` beside ``cartridge.pt`` (Tokasaurus), or a torch file by itself. Names and sizes of a zip's entries are
checked before one is read; entries are read by name and written nowhere but into a folder of our choice, under names of
our choice. What the tensors must look like is each format's business.
"""

from __future__ import annotations

import io
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from memory.cartridges import files as native
from memory.cartridges import peft_format, tokasaurus_folder
from memory.cartridges.cartridge import Cartridge
from memory.cartridges.errors import CartridgeFileInvalid
from memory.cartridges.ids import sanitize
from memory.cartridges.manifest import Manifest
from memory.cartridges.torch_format import Slots, read_torch_file
from workspace.prefix import KVPrefix

Format = Literal["native", "tokasaurus", "peft"]
FORMATS: tuple[Format, ...] = ("native", "tokasaurus", "peft")
#: Everything that any of the formats consists of; other files (a README) are passed over.
_KNOWN = frozenset(
    {
        native.MANIFEST,
        native.TENSORS,
        native.EXPERIENCES,
        peft_format.CONFIG,
        peft_format.TENSORS,
        tokasaurus_folder.CONFIG,
        tokasaurus_folder.TENSORS,
    }
)
_MOST_ENTRIES = 64
_UPLOAD = "the upload"


@dataclass(frozen=True, eq=False)
class Uploaded:
    """What somebody brought, proved but for the model that it is for. ``manifest`` is there for our own format."""

    format: Literal["native", "tokasaurus", "peft", "torch"]
    prefix: KVPrefix
    frozen: int
    manifest: Manifest | None = None


def pack(cartridge: Cartridge, how: Format) -> bytes:
    """``cartridge`` as a zip with one folder, named by its id. Raises ``CartridgeNotExportable``."""
    name = sanitize(cartridge.manifest.id or cartridge.manifest.domain)
    with tempfile.TemporaryDirectory(prefix="olympus-export-") as place:
        root = Path(place)
        if how == "tokasaurus":
            folder = tokasaurus_folder.export_tokasaurus(root, cartridge)
        elif how == "peft":
            folder = peft_format.to_peft(root / name, cartridge)
        else:
            folder = root / name
            native.save_cartridge(folder, _for_others(cartridge))
        target = io.BytesIO()
        with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:  # floats do not compress
            for path in sorted(folder.iterdir()):
                archive.write(path, f"{folder.name}/{path.name}")
        return target.getvalue()


def _for_others(cartridge: Cartridge) -> Cartridge:
    """Without the ids of our experiences and of our run, which mean nothing elsewhere."""
    manifest = cartridge.manifest.model_copy(update={"experience_ids_sha256": None, "run_id": None})
    return Cartridge(cartridge.prefix, cartridge.frozen, manifest)


def unpack(data: bytes, max_bytes: int) -> Uploaded:
    """What ``data`` is, proved. Its files together may have ``max_bytes``. Raises ``CartridgeFileInvalid``."""
    with _opened(data) as archive:
        entries = archive.infolist()
        if any(entry.filename.endswith("data.pkl") for entry in entries):  # a torch file is a zip itself
            return _torch(data)
        found = _read(archive, entries, max_bytes)
    if native.MANIFEST in found:
        cartridge = native.read_native(found, _UPLOAD)
        return Uploaded("native", cartridge.prefix, cartridge.frozen, cartridge.manifest)
    with _laid_out(found) as folder:
        if peft_format.CONFIG in found:
            return _of("peft", peft_format.from_peft(folder))
        if tokasaurus_folder.TENSORS in found:
            return _of("tokasaurus", tokasaurus_folder.validate_tokasaurus_folder(folder).slots)
    raise CartridgeFileInvalid(
        _UPLOAD,
        f"it holds none of {native.MANIFEST} (ours), {peft_format.CONFIG} (PEFT) and {tokasaurus_folder.TENSORS} "
        "(Tokasaurus), and is no torch file",
    )


def _torch(data: bytes) -> Uploaded:
    with _laid_out({tokasaurus_folder.TENSORS: data}) as folder:
        return _of("torch", read_torch_file(folder / tokasaurus_folder.TENSORS))


def _of(how: Literal["tokasaurus", "peft", "torch"], slots: Slots) -> Uploaded:
    return Uploaded(how, KVPrefix(slots.keys, slots.values), slots.frozen)


@contextmanager
def _opened(data: bytes) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, OverflowError, NotImplementedError) as error:
        raise CartridgeFileInvalid(_UPLOAD, f"not a whole zip or torch file: {error or type(error).__name__}") from None


def _read(archive: zipfile.ZipFile, entries: list[zipfile.ZipInfo], max_bytes: int) -> dict[str, bytes]:
    """The known files by their last names, none twice, all within the limit."""
    if len(entries) > _MOST_ENTRIES:
        raise CartridgeFileInvalid(_UPLOAD, f"it has {len(entries)} entries; a cartridge has a handful")
    wanted = [entry for entry in entries if Path(entry.filename).name in _KNOWN and not entry.is_dir()]
    names = [Path(entry.filename).name for entry in wanted]
    if len(set(names)) != len(names):
        raise CartridgeFileInvalid(_UPLOAD, "a file stands in it twice; upload one cartridge at a time")
    total = sum(entry.file_size for entry in wanted)
    if total > max_bytes:
        raise CartridgeFileInvalid(
            _UPLOAD, f"its files have {total:,} bytes; cartridges.import_max_bytes allows {max_bytes:,}"
        )
    found = {}
    for name, entry in zip(names, wanted, strict=True):
        if entry.flag_bits & 1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise CartridgeFileInvalid(_UPLOAD, f"{name} is encrypted, or compressed in an unusual way")
        with archive.open(entry) as handle:
            data = handle.read(entry.file_size + 1)  # never more than was announced
        if len(data) != entry.file_size:
            raise CartridgeFileInvalid(_UPLOAD, f"{name} has another size than the archive says")
        found[name] = data
    return found


@contextmanager
def _laid_out(found: Mapping[str, bytes]) -> Iterator[Path]:
    """The files in a folder; errors about them name the upload, not a place on this machine."""
    with tempfile.TemporaryDirectory(prefix="olympus-import-") as place:
        folder = Path(place) / "cartridge"
        folder.mkdir()
        for name, data in found.items():
            (folder / name).write_bytes(data)
        try:
            yield folder
        except CartridgeFileInvalid as error:
            named = str(Path(error.source)).replace(str(folder), _UPLOAD)
            raise CartridgeFileInvalid(named, error.problem.replace(str(folder), _UPLOAD)) from None
