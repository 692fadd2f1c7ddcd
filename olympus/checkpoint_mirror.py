"""A copy of each kernel's newest checkpoint in the database, for hosts whose disk is lost at every restart.

On Replit checkpoints live under ``/tmp``, which a redeployment empties, while the database stays. The copy is a zip
(stored, not compressed: weights do not compress) of the checkpoint's files with its own SHA-256; restoring publishes
them again through the ordinary protocol, so that what comes back is verified like any checkpoint.

Not here: which checkpoint is worth keeping; this keeps exactly one per kernel, the newest that was handed in.
"""

from __future__ import annotations

import hashlib
import io
import threading
import time
import zipfile
from collections.abc import Callable, Mapping

import sqlalchemy as sa
import structlog

from olympus.checkpoint_files import publish_copy, read_contents
from olympus.checkpoints import CheckpointStore
from olympus.errors import CheckpointInvalid, CheckpointNotFound
from storage.database import Database
from storage.models import CheckpointBlob

log = structlog.get_logger(__name__)

#: A copy costs one large row, so periodic checkpoints are copied at most this often per kernel.
MIN_SECONDS_BETWEEN = 60.0


class CheckpointMirror:
    """Copies checkpoints into the table ``checkpoint_blobs`` and back. Safe to use from all threads."""

    def __init__(self, database: Database, store: CheckpointStore, clock: Callable[[], float] = time.monotonic):
        self._database = database
        self._store = store
        self._clock = clock
        self._lock = threading.Lock()
        self._copied_at: dict[str, float] = {}

    def copy(self, kernel_id: str, name: str, *, urgent: bool) -> bool:
        """Copy a published checkpoint, unless a copy was made just now and this one is not ``urgent``."""
        now = self._clock()
        with self._lock:
            recent = now - self._copied_at.get(kernel_id, float("-inf")) < MIN_SECONDS_BETWEEN
            if recent and not urgent:
                return False
            self._copied_at[kernel_id] = now
        with self._store.using(kernel_id, name) as path:
            data = _pack(read_contents(path))
        with self._database.write() as session:
            row = session.get(CheckpointBlob, kernel_id) or CheckpointBlob(kernel_id=kernel_id)
            row.name, row.data, row.sha256 = name, data, hashlib.sha256(data).hexdigest()
            row.created_at = time.time()
            session.add(row)
        return True

    def restore_missing(self) -> list[str]:
        """Publish the copy of every kernel that has no checkpoint on disk; returns ``kernel/checkpoint`` names."""
        with self._database.read() as session:
            columns = sa.select(CheckpointBlob.kernel_id, CheckpointBlob.name)
            names = {row.kernel_id: row.name for row in session.execute(columns)}
        restored: list[str] = []
        for kernel_id, name in sorted(names.items()):
            if self._store.last_step(kernel_id) > 0 or self._store.path(kernel_id, name).exists():
                continue
            try:
                self._publish(kernel_id, name)
            except (CheckpointInvalid, CheckpointNotFound) as error:
                log.error("the mirrored checkpoint cannot be used", kernel=kernel_id, reason=str(error))
                continue
            restored.append(f"{kernel_id}/{name}")
        return restored

    def _publish(self, kernel_id: str, name: str) -> None:
        with self._database.read() as session:
            row = session.get(CheckpointBlob, kernel_id)
            if row is None:
                raise CheckpointNotFound(f"kernel {kernel_id} has no mirrored checkpoint")
            data, expected = row.data, row.sha256
        if hashlib.sha256(data).hexdigest() != expected:
            raise CheckpointInvalid(f"{name}: the mirrored copy does not match its SHA-256")
        publish_copy(self._store.path(kernel_id, name), _unpack(data, name))


def _pack(contents: Mapping[str, bytes]) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    return target.getvalue()


def _unpack(data: bytes, name: str) -> dict[str, bytes]:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return {item: archive.read(item) for item in archive.namelist()}
    except zipfile.BadZipFile:
        raise CheckpointInvalid(f"{name}: the mirrored copy is not a zip archive") from None
