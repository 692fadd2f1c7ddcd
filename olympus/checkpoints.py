"""The checkpoints of all kernels: published, listed, kept by rules, verified when loaded.

The directories are the truth and the rows are their index: a row is written after its directory is durable, a
directory is removed only after its successor was committed, and ``reconcile`` repairs what a crash left between the
two. Loading falls back to the previous valid checkpoint and says so. The byte quota never deletes what a rule keeps:
``shortage`` tells the trainer to pause instead.

Not here: the file format (``checkpoint_files``) and the rules (``retention``).
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import structlog

from olympus import retention
from olympus.checkpoint_files import (
    Loaded,
    Manifest,
    TensorFiles,
    checkpoint_name,
    load_checkpoint,
    read_manifest,
    step_of,
    write_checkpoint,
)
from olympus.errors import CheckpointInvalid, CheckpointNotFound, InvalidAction
from settings import RetentionSettings
from storage import files
from storage.database import Database
from storage.models import Checkpoint, Kernel

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Recovery:
    """The newest usable checkpoint, if any, and what had to be passed over to find it."""

    loaded: Loaded | None
    damaged: tuple[str, ...] = ()


class CheckpointStore:
    """All checkpoints under one directory. Safe to use from all threads."""

    def __init__(self, root: Path, database: Database, policy: RetentionSettings, checkpoint_every: int):
        self.root = root
        self._database = database
        self._policy = policy
        self._checkpoint_every = checkpoint_every
        self._lock = threading.RLock()  # between deciding what goes and removing it
        self._in_use: Counter[tuple[str, str]] = Counter()

    # -- writing ----------------------------------------------------------------------------------------------

    def publish(
        self,
        kernel_id: str,
        step: int,
        tensors: TensorFiles,
        state: Mapping[str, Any],
        metrics: Mapping[str, Any],
        *,
        pinned: bool = False,
    ) -> dict[str, Any]:
        """Write a checkpoint, then its row, then apply retention. Returns the row as a plain dict.

        A step that is published already is not written again (no step was taken since); only its row learns that
        the kernel has converged meanwhile. A damaged directory of the same name is replaced.
        """
        name = checkpoint_name(step)
        path = self.path(kernel_id, name)
        manifest = self._intact(path)
        if manifest is None:
            manifest = write_checkpoint(
                path, kernel_id=kernel_id, step=step, tensors=tensors, state=state, metrics=metrics
            )
        self._upsert(kernel_id, name, manifest, bool(metrics.get("converged")), pinned)
        removed = self.prune(kernel_id)
        return {
            "kernel_id": kernel_id,
            "name": name,
            "step": step,
            "bytes": manifest.bytes,
            "sha256": manifest.sha256,
            "removed": removed,
        }

    def prune(self, kernel_id: str) -> list[str]:
        """Remove what no rule keeps; returns the names."""
        with self._lock:
            reasons = retention.kept_by(self._candidates(kernel_id), self._policy, self._used(kernel_id))
            doomed = [name for name, rules in reasons.items() if not rules]
            for name in doomed:
                self._remove(kernel_id, name)
        return doomed

    def pin(self, kernel_id: str, name: str, pinned: bool) -> None:
        """Keep a checkpoint for ever, or no longer. Raises ``CheckpointNotFound``."""
        with self._database.write() as session:
            row = session.scalar(_rows(kernel_id).where(Checkpoint.name == name))
            if row is None:
                raise CheckpointNotFound(f"kernel {kernel_id} has no checkpoint {name}")
            row.pinned = pinned

    def delete(self, kernel_id: str, name: str) -> None:
        """Remove one checkpoint on request; not the newest, a pinned one, or one in use."""
        with self._lock:
            reasons = retention.kept_by(self._candidates(kernel_id), self._policy, self._used(kernel_id))
            if name not in reasons:
                raise CheckpointNotFound(f"kernel {kernel_id} has no checkpoint {name}")
            blocking = sorted({"latest", "pinned", "in_use"} & set(reasons[name]))
            if blocking:
                raise InvalidAction(f"checkpoint {name} cannot be deleted: it is {', '.join(blocking)}")
            self._remove(kernel_id, name)

    def delete_kernel(self, kernel_id: str) -> None:
        """Remove every checkpoint of a kernel; its rows go with the kernel's row."""
        with self._lock:
            folder = self.root / kernel_id
            if folder.is_dir():
                files.remove_directory(folder)

    # -- reading ----------------------------------------------------------------------------------------------

    def path(self, kernel_id: str, name: str) -> Path:
        """Where a checkpoint lives."""
        return self.root / kernel_id / name

    @contextlib.contextmanager
    def using(self, kernel_id: str, name: str) -> Iterator[Path]:
        """While this is open, retention leaves the checkpoint alone. Raises ``CheckpointNotFound``."""
        with self._lock:
            path = self.path(kernel_id, name)
            if step_of(name) is None or not path.is_dir():
                raise CheckpointNotFound(f"kernel {kernel_id} has no checkpoint {name}")
            self._in_use[kernel_id, name] += 1
        try:
            yield path
        finally:
            with self._lock:
                self._in_use[kernel_id, name] -= 1
                self._in_use += Counter()  # drop what nobody uses any more

    def load(self, kernel_id: str, name: str, only: str | None = None) -> Loaded:
        """Read and verify one checkpoint. Raises ``CheckpointNotFound`` or ``CheckpointInvalid``."""
        with self.using(kernel_id, name) as path:
            return load_checkpoint(path, only)

    def newest(self, kernel_id: str) -> Recovery:
        """The newest checkpoint that verifies, looking past damaged ones, which are reported and left in place."""
        damaged: list[str] = []
        for name in reversed(self._directories(kernel_id)):
            try:
                return Recovery(self.load(kernel_id, name), tuple(damaged))
            except CheckpointInvalid as error:
                log.error("checkpoint cannot be used", kernel=kernel_id, checkpoint=name, reason=str(error))
                damaged.append(name)
        return Recovery(None, tuple(damaged))

    def best_name(self, kernel_id: str) -> str | None:
        """The checkpoint with the lowest held-out loss, or None."""
        best = retention.best_of(self._candidates(kernel_id))
        return None if best is None else best.name

    def last_step(self, kernel_id: str) -> int:
        """The highest step that was ever published and still has a directory; 0 when there is none."""
        return max((step_of(name) or 0 for name in self._directories(kernel_id)), default=0)

    def describe(self, kernel_id: str) -> dict[str, Any]:
        """The answer of ``GET .../checkpoints``, newest first.

        ``valid`` means: the manifest is the one that was committed and every file has its size. Content is
        verified whenever a checkpoint is loaded.
        """
        with self._lock:  # retention removes a directory, then its row: between the two it would look damaged
            with self._database.read() as session:
                rows = list(session.scalars(_rows(kernel_id).order_by(Checkpoint.step.desc())))
            valid = {row.name for row in rows if self._is_as_committed(row)}
            used = self._used(kernel_id)
        candidates = [_candidate(row) for row in rows]
        reasons = retention.kept_by(candidates, self._policy, used)
        next_step = (max((row.step for row in rows), default=0) // self._checkpoint_every + 1) * self._checkpoint_every
        return {
            "kernel_id": kernel_id,
            "policy": retention.policy_json(self._policy),
            "total_bytes": sum(row.bytes for row in rows),
            "checkpoints": [
                _row_json(row, reasons[row.name], valid=row.name in valid, used=row.name in used) for row in rows
            ],
            "next_to_delete": retention.next_to_delete(candidates, self._policy, next_step, used),
        }

    # -- room -------------------------------------------------------------------------------------------------

    def total_bytes(self) -> int:
        """Bytes of all kernels' checkpoints, from the rows."""
        with self._database.read() as session:
            return int(session.scalar(sa.select(sa.func.coalesce(sa.func.sum(Checkpoint.bytes), 0))) or 0)

    def shortage(self) -> str | None:
        """Why training must pause for lack of room, or None."""
        used = self.total_bytes()
        if used >= self._policy.max_bytes:
            return (
                f"checkpoints use {used:,} of the allowed {self._policy.max_bytes:,} bytes; delete kernels or "
                "checkpoints, or raise kernels.retention.max_bytes"
            )
        self.root.mkdir(parents=True, exist_ok=True)
        free = files.free_bytes(self.root)
        if free < self._policy.min_free_bytes:
            return (
                f"the disk has {free:,} bytes left and kernels.retention.min_free_bytes asks for "
                f"{self._policy.min_free_bytes:,}; free some space"
            )
        return None

    # -- repair -----------------------------------------------------------------------------------------------

    def reconcile(self) -> dict[str, list[str]]:
        """Make rows and directories agree after a crash; returns what was added, removed and found damaged."""
        report: dict[str, list[str]] = {"indexed": [], "rows_removed": [], "damaged": [], "orphans_removed": []}
        with self._database.read() as session:
            kernels = set(session.scalars(sa.select(Kernel.id)))
            rows = {(row.kernel_id, row.name): row.sha256 for row in session.scalars(sa.select(Checkpoint))}
        found: set[tuple[str, str]] = set()
        for folder in sorted(self.root.iterdir()) if self.root.is_dir() else []:
            if folder.name not in kernels:
                if any(step_of(item.name) is not None for item in folder.iterdir() if folder.is_dir()):
                    files.remove_directory(folder)
                    report["orphans_removed"].append(folder.name)
                continue
            for name in self._directories(folder.name):
                try:
                    manifest = read_manifest(folder / name)
                except CheckpointInvalid:
                    report["damaged"].append(f"{folder.name}/{name}")
                    continue
                found.add((folder.name, name))
                if rows.get((folder.name, name)) != manifest.sha256:
                    self._upsert(folder.name, name, manifest, bool(manifest.metrics.get("converged")), False)
                    report["indexed"].append(f"{folder.name}/{name}")
        for kernel_id, name in sorted(rows.keys() - found):
            self._delete_row(kernel_id, name)
            report["rows_removed"].append(f"{kernel_id}/{name}")
        return report

    def check_invariants(self) -> None:
        """Every row has a valid directory, and every directory of a known kernel has a row."""
        with self._database.read() as session:
            rows = {(row.kernel_id, row.name): row.sha256 for row in session.scalars(sa.select(Checkpoint))}
            kernels = list(session.scalars(sa.select(Kernel.id)))
        on_disk = {
            (kernel_id, name): read_manifest(self.path(kernel_id, name)).sha256
            for kernel_id in kernels
            for name in self._directories(kernel_id)
        }
        assert rows == on_disk
        assert all(count > 0 for count in self._in_use.values())

    # -- inside -----------------------------------------------------------------------------------------------

    def _intact(self, path: Path) -> Manifest | None:
        if not path.exists():
            return None
        try:
            return load_checkpoint(path).manifest
        except CheckpointInvalid as error:
            log.warning("replacing a damaged checkpoint", path=path.name, reason=str(error))
            files.remove_directory(path)
            return None

    def _directories(self, kernel_id: str) -> list[str]:
        folder = self.root / kernel_id
        if not folder.is_dir():
            return []
        return sorted(item.name for item in folder.iterdir() if step_of(item.name) is not None and item.is_dir())

    def _candidates(self, kernel_id: str) -> list[retention.Candidate]:
        with self._database.read() as session:
            return [_candidate(row) for row in session.scalars(_rows(kernel_id))]

    def _used(self, kernel_id: str) -> set[str]:
        return {name for owner, name in self._in_use if owner == kernel_id}

    def _remove(self, kernel_id: str, name: str) -> None:
        path = self.path(kernel_id, name)
        if path.is_dir():
            files.remove_directory(path)
        self._delete_row(kernel_id, name)

    def _delete_row(self, kernel_id: str, name: str) -> None:
        where = (Checkpoint.kernel_id == kernel_id, Checkpoint.name == name)
        with self._database.write() as session:
            session.execute(sa.delete(Checkpoint).where(*where))

    def _upsert(self, kernel_id: str, name: str, manifest: Manifest, converged: bool, pinned: bool) -> None:
        with self._database.write() as session:
            row = session.scalar(_rows(kernel_id).where(Checkpoint.name == name))
            if row is None:
                row = Checkpoint(kernel_id=kernel_id, name=name, created_at=manifest.created_at)
                session.add(row)
            row.step, row.bytes, row.sha256 = manifest.step, manifest.bytes, manifest.sha256
            row.holdout_loss, row.phi = manifest.metrics.get("holdout_loss"), manifest.metrics.get("phi")
            row.converged, row.pinned = bool(row.converged) or converged, bool(row.pinned) or pinned

    def _is_as_committed(self, row: Checkpoint) -> bool:
        try:
            return read_manifest(self.path(row.kernel_id, row.name)).sha256 == row.sha256
        except CheckpointInvalid:
            return False


def _row_json(row: Checkpoint, reasons: list[str], *, valid: bool, used: bool) -> dict[str, Any]:
    return {
        "id": row.name,
        "step": row.step,
        "created_at": row.created_at,
        "bytes": row.bytes,
        "sha256": row.sha256,
        "kept_by": reasons,
        "metrics": {"holdout": row.holdout_loss, "phi": row.phi},
        "converged": row.converged,
        "valid": valid,
        "in_use": used,
        "pinned": row.pinned,
    }


def _rows(kernel_id: str) -> sa.Select[Checkpoint]:
    return sa.select(Checkpoint).where(Checkpoint.kernel_id == kernel_id)


def _candidate(row: Checkpoint) -> retention.Candidate:
    return retention.Candidate(row.name, row.step, row.holdout_loss, row.converged, row.pinned)
