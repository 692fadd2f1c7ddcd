"""A cartridge as a folder: ``prefix.safetensors``, ``manifest.json``, and which experiences it was trained on.

``<id>/manifest.json`` is written last and names the other files with size and SHA-256; the folder is published whole
(``storage.files``) and never changed. Tensors are ``layers.<n>.keys`` and ``layers.<n>.values``,
[1, kv_heads, slots, head_dim], keys after RoPE. What is parsed is what was hashed. No pickle.

Two kinds of reader: ``load_cartridge`` for our own folders (``CartridgeDamaged``), ``read_native`` for files that
somebody brought (``CartridgeFileInvalid``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Never

import safetensors.torch
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor

from memory.cartridges.cartridge import DTYPES, Cartridge
from memory.cartridges.errors import CartridgeDamaged, CartridgeFileInvalid
from memory.cartridges.manifest import SCHEMA, FileEntry, Manifest
from storage import files
from workspace.prefix import KVPrefix

MANIFEST = "manifest.json"
TENSORS = "prefix.safetensors"
EXPERIENCES = "experiences.json"
_MOST_MANIFEST = 1 << 20


def save_cartridge(folder: Path, cartridge: Cartridge) -> Manifest:
    """Publish ``cartridge`` as ``folder``, which is its id. Returns the manifest as written.

    Raises ``FileExistsError`` (folders never change), ``ValueError`` for numbers that are not finite, ``OSError``.
    """
    contents, manifest = to_files(cartridge)
    with files.publish_directory(folder) as partial:
        for name, data in contents.items():
            (partial / name).write_bytes(data)
    return manifest


def to_files(cartridge: Cartridge) -> tuple[dict[str, bytes], Manifest]:
    """The folder's files, the manifest last, and the manifest with its entries. Raises ``ValueError``."""
    tensors: dict[str, Tensor] = {}
    for layer, (keys, values) in enumerate(zip(cartridge.prefix.keys, cartridge.prefix.values, strict=True)):
        for part, tensor in (("keys", keys), ("values", values)):
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"layer {layer}: the {part} hold NaN or infinity; train it again with a lower rate")
            tensors[f"layers.{layer}.{part}"] = tensor.detach().cpu().contiguous().clone()  # safetensors shares nothing
    contents = {TENSORS: safetensors.torch.save(tensors)}
    if cartridge.experience_ids:
        contents[EXPERIENCES] = (json.dumps(list(cartridge.experience_ids)) + "\n").encode()
    entries = {
        name: FileEntry(bytes=len(data), sha256=hashlib.sha256(data).hexdigest()) for name, data in contents.items()
    }
    manifest = cartridge.manifest.model_copy(update={"files": entries})
    return {**contents, MANIFEST: manifest.to_bytes()}, manifest


def load_cartridge(folder: Path) -> Cartridge:
    """Read one of ours and prove it. Raises ``CartridgeDamaged`` naming the file."""
    try:
        found = {name: (folder / name).read_bytes() for name in (MANIFEST, TENSORS)}
        if (folder / EXPERIENCES).exists():
            found[EXPERIENCES] = (folder / EXPERIENCES).read_bytes()
    except OSError as error:
        raise CartridgeDamaged(
            f"{error.filename or folder}: cannot be read ({error.strerror or error}); restore the folder from a copy, "
            "or delete the cartridge"
        ) from None
    try:
        return read_native(found, str(folder))
    except CartridgeFileInvalid as error:
        raise CartridgeDamaged(f"{error}; restore the folder from a copy, or delete the cartridge") from None


def load_manifest(folder: Path) -> Manifest:
    """The manifest alone; the other files are not looked at. Raises ``CartridgeDamaged``."""
    try:
        return parse_manifest((folder / MANIFEST).read_bytes(), str(folder / MANIFEST))
    except OSError as error:
        raise CartridgeDamaged(f"{folder / MANIFEST}: cannot be read ({error.strerror or error})") from None
    except CartridgeFileInvalid as error:
        raise CartridgeDamaged(str(error)) from None


def read_native(contents: Mapping[str, bytes], source: str) -> Cartridge:
    """A cartridge from the bytes of its files. Raises ``CartridgeFileInvalid`` naming ``source`` and the file."""
    if MANIFEST not in contents:
        raise CartridgeFileInvalid(source, f"{MANIFEST} is missing")
    manifest = parse_manifest(contents[MANIFEST], f"{source}/{MANIFEST}")
    for name, entry in manifest.files.items():
        data = contents.get(name)
        if data is None:
            raise CartridgeFileInvalid(source, f"{name} is missing, which {MANIFEST} vouches for")
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise CartridgeFileInvalid(f"{source}/{name}", f"its SHA-256 is not the one in {MANIFEST}: it was altered")
    if TENSORS not in manifest.files:
        raise CartridgeFileInvalid(f"{source}/{MANIFEST}", f"it does not vouch for {TENSORS}")
    prefix = _prefix(contents[TENSORS], manifest, f"{source}/{TENSORS}")
    ids = _experiences(contents[EXPERIENCES], f"{source}/{EXPERIENCES}") if EXPERIENCES in manifest.files else ()
    try:
        return Cartridge(prefix, manifest.frozen, manifest, ids)
    except ValueError as error:
        raise CartridgeFileInvalid(source, str(error)) from None


def parse_manifest(data: bytes, source: str) -> Manifest:
    """``manifest.json``. Raises ``CartridgeFileInvalid``."""
    if len(data) > _MOST_MANIFEST:
        raise CartridgeFileInvalid(source, f"it has {len(data):,} bytes, at most {_MOST_MANIFEST:,} are possible")
    try:
        value = json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CartridgeFileInvalid(source, f"not JSON: {error}") from None
    if isinstance(value, dict) and value.get("schema", SCHEMA) != SCHEMA:
        raise CartridgeFileInvalid(source, f"it is of schema {value['schema']!r}, this version reads {SCHEMA}")
    try:
        return Manifest.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CartridgeFileInvalid(source, f"{where or 'the whole'}: {first['msg']}") from None


def _prefix(data: bytes, manifest: Manifest, source: str) -> KVPrefix:
    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise CartridgeFileInvalid(source, f"no whole safetensors file: {error}") from None
    shape = (1, manifest.kv_heads, manifest.slots, manifest.head_dim)
    expected = {f"layers.{layer}.{part}" for layer in range(manifest.layers) for part in ("keys", "values")}
    if set(tensors) != expected:
        odd = sorted(set(tensors) ^ expected)
        raise CartridgeFileInvalid(source, f"tensors are missing or superfluous: {', '.join(odd[:4])}")
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shape or tensor.dtype != DTYPES[manifest.dtype]:
            raise CartridgeFileInvalid(
                source,
                f"{name} is {tensor.dtype} {list(tensor.shape)}, the manifest says {manifest.dtype} {list(shape)}",
            )
        if not bool(tensor.isfinite().all()):
            raise CartridgeFileInvalid(source, f"{name} holds NaN or infinity")
    keys, values = ([tensors[f"layers.{n}.{part}"] for n in range(manifest.layers)] for part in ("keys", "values"))
    return KVPrefix(tuple(keys), tuple(values), manifest.id)


def _experiences(data: bytes, source: str) -> tuple[int, ...]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CartridgeFileInvalid(source, f"not JSON: {error}") from None
    if not isinstance(found, list) or not all(type(item) is int for item in found):
        raise CartridgeFileInvalid(source, "it must be a list of whole numbers")
    return tuple(found)


def _refuse_constant(text: str) -> Never:
    raise ValueError(f"it holds {text}")
