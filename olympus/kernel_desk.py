"""What people decide about kernels: Zeus carries it out, and the audit log says who wanted it.

Spawning, importing and deleting write their line in the transaction of the kernel's row (``kernel_rows.py``); here are
the decisions that have none. What Zeus refuses is not noted: it changed nothing.
"""

from __future__ import annotations

from typing import Any

from olympus.audit import AuditLog
from olympus.zeus import Zeus


class KernelDesk:
    """One per process; every method is one request. What can be raised is said in ``Zeus``."""

    def __init__(self, zeus: Zeus, audit: AuditLog):
        self._zeus = zeus
        self._audit = audit

    def pause(self, kernel_id: str, *, actor: str) -> dict[str, Any]:
        """Stop training until ``resume``."""
        told = self._zeus.pause(kernel_id)
        self._audit.note(actor, "kernel.pause", kernel_id)
        return told

    def resume(self, kernel_id: str, *, actor: str) -> dict[str, Any]:
        """Train on."""
        told = self._zeus.resume(kernel_id)
        self._audit.note(actor, "kernel.resume", kernel_id)
        return told

    def stop(self, kernel_id: str, *, actor: str) -> dict[str, Any]:
        """End training."""
        told = self._zeus.stop(kernel_id)
        self._audit.note(actor, "kernel.stop", kernel_id)
        return told

    def checkpoint_now(self, kernel_id: str, *, actor: str) -> dict[str, Any]:
        """Save a training kernel, pinned."""
        told = self._zeus.checkpoint_now(kernel_id)
        self._audit.note(actor, "kernel.checkpoint", kernel_id, {"checkpoint": told["name"]})
        return told

    def restore(self, kernel_id: str, name: str, *, actor: str) -> dict[str, Any]:
        """Go back to a checkpoint's weights."""
        told = self._zeus.restore(kernel_id, name)
        self._audit.note(actor, "kernel.restore", kernel_id, {"checkpoint": name, "published_as": told["name"]})
        return told

    def pin(self, kernel_id: str, name: str, pinned: bool, *, actor: str) -> dict[str, Any]:
        """Keep a checkpoint for ever, or no longer."""
        told = self._zeus.pin(kernel_id, name, pinned)
        self._audit.note(actor, "kernel.pin" if pinned else "kernel.unpin", kernel_id, {"checkpoint": name})
        return told

    def delete_checkpoint(self, kernel_id: str, name: str, *, actor: str) -> dict[str, Any]:
        """Remove a checkpoint that nothing needs."""
        told = self._zeus.delete_checkpoint(kernel_id, name)
        self._audit.note(actor, "kernel.checkpoint.delete", kernel_id, {"checkpoint": name})
        return told
