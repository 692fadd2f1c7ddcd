"""A folder of captured texts: one header, one manifest, one file per text.

    capture.json      what all texts have in common: model, layers, options
    manifest.jsonl    one line per text, in the order of capture: file, size, SHA-256, tokens, kind, split
    blobs/            the texts (``capture_blob.py``)

A blob is written whole (``storage.files``), then its line; so whatever a line names was there. After ``kill -9`` a
torn last line is ignored, a blob without a line is written again, and capturing goes on where it was. A reader may
begin while the folder grows. ``.pt`` files of other programs can be listed as well.

Not here: what is captured (``capture.py``) and in which order it is trained on (``training_data.py``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from storage import files
from workspace.capture_blob import Blob, decode_blob
from workspace.errors import BlobDamaged, CaptureError, CaptureMismatch, ManifestDamaged

HEADER, MANIFEST, BLOBS = "capture.json", "manifest.jsonl", "blobs"
_NAMED = 4  # missing files that an error names

Split = Literal["train", "held_out"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class CaptureHeader(_Record):
    """What all texts of a folder have in common."""

    version: Literal[1] = Field(1, alias="schema")
    model: str
    fingerprint: str
    layers: tuple[int, ...] = Field(min_length=1)
    hidden_size: int
    prompts_sha256: str = Field(description="Of the file of prompts: another file is another capture.")
    options: dict[str, Any]


class CaptureEntry(_Record):
    """One line of the manifest."""

    index: int = Field(ge=0)
    file: str = Field(description="Relative to the manifest.")
    bytes: int = Field(ge=1)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    tokens: int = Field(ge=2)
    prompt_tokens: int = Field(ge=1)
    kind: str = "text"
    split: Split = "train"
    seed: int | None = None

    @field_validator("file")
    @classmethod
    def _inside(cls, value: str) -> str:
        path = Path(value)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError("must lie below the manifest")
        return value


@dataclass(frozen=True, slots=True)
class Capture:
    """A folder that can be trained on: the header (None: written by another program) and its texts."""

    manifest: Path
    header: CaptureHeader | None
    entries: tuple[CaptureEntry, ...]

    @property
    def digest(self) -> str:
        """SHA-256 over what the texts are: equal for equal data, wherever it lies."""
        digest = hashlib.sha256()
        for entry in self.entries:
            digest.update(f"{entry.sha256}:{entry.split}:{entry.kind}\n".encode())
        return digest.hexdigest()

    def read(self, entry: CaptureEntry) -> Blob:
        """One text. What is read is what the manifest vouches for. Raises ``BlobDamaged`` naming the file."""
        path = self.manifest.parent / entry.file
        try:
            data = path.read_bytes()
        except OSError as error:
            raise BlobDamaged(f"{path} cannot be read ({error.strerror or error}); capture it again") from None
        found = hashlib.sha256(data).hexdigest()
        if found != entry.sha256:
            raise BlobDamaged(
                f"{path} has SHA-256 {found[:16]}..., {self.manifest} says {entry.sha256[:16]}...; capture it again"
            )
        blob = decode_blob(data, str(path), pickled=path.suffix == ".pt")
        if (blob.tokens, blob.prompt_tokens) != (entry.tokens, entry.prompt_tokens):
            raise BlobDamaged(
                f"{path} has {blob.tokens} tokens, {blob.prompt_tokens} of them its prompt; {self.manifest} says "
                f"{entry.tokens} and {entry.prompt_tokens}; capture it again"
            )
        return blob


def read_capture(manifest: Path) -> Capture:
    """The folder of ``manifest``, every file of which is there in its size. Raises ``ManifestDamaged``."""
    entries = _read_lines(manifest)
    if not entries:
        raise ManifestDamaged(f"{manifest} lists no texts; capture some with scripts/capture_workspace_data.py")
    problems = [problem for entry in entries if (problem := _problem(manifest.parent, entry))]
    if problems:
        more = f" and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        raise ManifestDamaged(
            f"{manifest} names files that cannot be used: {', '.join(problems[:_NAMED])}{more}; restore them, or "
            "capture again: what is there stays"
        )
    header = manifest.parent / HEADER
    return Capture(manifest, _read_header(header) if header.exists() else None, entries)


class CaptureFolder:
    """A folder that is being captured into, by one process. ``close`` it, or use it as a context manager.

    Raises ``CaptureMismatch`` where other texts lie there already, ``CaptureError`` where somebody captures into it.
    """

    def __init__(self, path: Path, header: CaptureHeader):
        self.path, self.header = path, header
        self._lock = files.DataDirLock(path)
        try:
            self._lock.acquire()
        except files.DataDirInUse as error:
            raise CaptureError(f"another capture writes to {path} (process {error.owner.get('pid', '?')})") from None
        try:
            self.entries = {entry.index: entry for entry in self._open()}
        except BaseException:
            self.close()
            raise

    def _open(self) -> Sequence[CaptureEntry]:
        files.sweep_partials(self.path)
        (self.path / BLOBS).mkdir(exist_ok=True)
        source = self.path / HEADER
        if source.exists():
            _require_equal(source, _read_header(source), self.header)
        else:
            if (self.path / MANIFEST).exists():
                raise CaptureMismatch(f"{self.path} has a {MANIFEST} but no {HEADER}; capture into a new folder")
            files.write_json(source, self.header.model_dump(mode="json", by_alias=True))
        entries = _read_lines(self.path / MANIFEST) if (self.path / MANIFEST).exists() else ()
        return [entry for entry in entries if _problem(self.path, entry) is None]

    def has(self, index: int) -> bool:
        """True when text number ``index`` is captured."""
        return index in self.entries

    def add(self, index: int, data: bytes, described: Mapping[str, Any]) -> CaptureEntry:
        """Write a text and then its line. ``described``: the remaining fields of a ``CaptureEntry``."""
        name = f"{BLOBS}/{index:06}.safetensors"
        entry = CaptureEntry(
            index=index, file=name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), **described
        )
        files.write_bytes(self.path / name, data)
        files.append_line(self.path / MANIFEST, entry.model_dump_json())
        self.entries[index] = entry
        return entry

    def close(self) -> None:
        """Let others capture into it. Harmless when done twice."""
        self._lock.release()

    def check_invariants(self) -> None:
        """Raise ``AssertionError`` unless what is listed is there and whole."""
        capture = Capture(self.path / MANIFEST, self.header, tuple(self.entries.values()))
        for entry in capture.entries:
            capture.read(entry)
        assert list(self.path.rglob(f"{files.PARTIAL_PREFIX}*")) == []

    def __enter__(self) -> CaptureFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read_lines(manifest: Path) -> tuple[CaptureEntry, ...]:
    try:
        text = manifest.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ManifestDamaged(
            f"{manifest} does not exist; capture texts with scripts/capture_workspace_data.py"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestDamaged(f"{manifest} cannot be read: {error}") from None
    whole = text[: text.rfind("\n") + 1]  # behind it is at most a line that a crash tore
    found: dict[int, CaptureEntry] = {}
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            entry = CaptureEntry.model_validate_json(line)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "the line"
            raise ManifestDamaged(f"{manifest}, line {number}: {where}: {first['msg']}; capture again") from None
        found[entry.index] = entry  # a text that was captured again counts as it is now
    return tuple(found.values())


def _read_header(source: Path) -> CaptureHeader:
    try:
        return CaptureHeader.model_validate_json(source.read_bytes())
    except (OSError, ValidationError) as error:
        problem = error.errors(include_url=False)[0]["msg"] if isinstance(error, ValidationError) else error
        raise ManifestDamaged(f"{source} cannot be used: {problem}; capture into a new folder") from None


def _problem(folder: Path, entry: CaptureEntry) -> str | None:
    try:
        size = (folder / entry.file).stat().st_size
    except OSError:
        return f"{entry.file} is missing"
    return None if size == entry.bytes else f"{entry.file} has {size} bytes instead of {entry.bytes}"


def _require_equal(source: Path, found: CaptureHeader, wanted: CaptureHeader) -> None:
    differ = [
        f"{name} is {json.dumps(was)}, now {json.dumps(now)}"
        for name, was, now in _pairs(found.model_dump(mode="json"), wanted.model_dump(mode="json"))
        if was != now
    ]
    if differ:
        raise CaptureMismatch(
            f"{source} describes another capture: {'; '.join(differ[:_NAMED])}; capture into a new folder, or use the "
            "same model, prompts and options to go on"
        )


def _pairs(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Field by field, options one by one."""
    plain = [(name, found[name], wanted[name]) for name in wanted if name != "options"]
    was, now = found["options"], wanted["options"]
    return plain + [(name, was.get(name), now.get(name)) for name in sorted({*was, *now})]
