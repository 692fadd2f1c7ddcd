"""How a kernel comes into being: its name, its id, its seed and its row.

``Registrar.register`` checks what can be refused (the name, the number of kernels, room on the disk, the network's
options) and writes the row; it starts nothing. The answer's ``proposal`` and ``vote_result`` have the shape of a
decision by vote, but a spawn on a user's request is not voted on: they hold what was asked and what was measured.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from typing import Any

from olympus import pantheon
from olympus.checkpoints import CheckpointStore
from olympus.errors import DuplicateKernel, KernelLimitReached, StorageFull
from olympus.kernel_rows import KernelRecord, KernelRows
from olympus.kernel_state import KernelPlan
from olympus.requests import SpawnRequest
from olympus.status import links
from settings import KernelSettings


class Registrar:
    """Makes kernels' rows, one at a time. Safe to use from all threads."""

    def __init__(self, settings: KernelSettings, rows: KernelRows, checkpoints: CheckpointStore):
        self._settings = settings
        self._rows = rows
        self._checkpoints = checkpoints
        self._lock = threading.Lock()

    def register(self, request: SpawnRequest, actor: str) -> tuple[KernelRecord, bool]:
        """The new kernel and True, or the one that an equal ``idempotency_key`` made before and False.

        Raises ``DuplicateKernel``, ``KernelLimitReached``, ``InvalidRequest`` or ``StorageFull``.
        """
        with self._lock:
            if request.idempotency_key is not None:
                earlier = self._rows.by_idempotency_key(request.idempotency_key)
                if earlier is not None:
                    return earlier, False
            shortage = self._checkpoints.shortage()
            if shortage is not None:
                raise StorageFull(shortage)
            name = self._free_name(request)
            options = {"batch_size": self._settings.batch_size, **request.config}
            plan = KernelPlan.make(request.preset or self._settings.preset, options)
            return self._create(request, name, plan, actor), True

    def _free_name(self, request: SpawnRequest) -> str:
        existing = self._rows.all()
        if len(existing) >= self._settings.max_kernels:
            raise KernelLimitReached(
                f"{len(existing)} kernels exist and kernels.max_kernels allows {self._settings.max_kernels}; delete one"
            )
        taken = {kernel.god_name for kernel in existing}
        if request.name is not None and request.name in taken and not request.force:
            raise DuplicateKernel(f"a kernel named {request.name} exists; choose another name, or pass force")
        return request.name or pantheon.choose_name(taken)

    def _create(self, request: SpawnRequest, name: str, plan: KernelPlan, actor: str) -> KernelRecord:
        kernel_id = pantheon.kernel_id(name)
        values: dict[str, Any] = {
            "id": kernel_id,
            "god_name": name,
            "domain": request.domain or self._settings.default_domain,
            "state": "queued" if request.train else "paused",
            "state_reason": "" if request.train else "spawned without training; resume it to begin",
            "wanted": "train" if request.train else "pause",
            "config": {**plan.to_json(), "element": request.element, "role": request.role},
            "seed": request.seed if request.seed is not None else seed_of(kernel_id),
            "parents": list(request.parent_gods),
            "reason": request.reason,
            "idempotency_key": request.idempotency_key,
        }
        return self._rows.create(values, actor)


def seed_of(kernel_id: str) -> int:
    """A seed that follows from the id, so that a kernel can be made again from its row alone."""
    return int.from_bytes(hashlib.sha256(kernel_id.encode()).digest()[:6], "big")


def spawn_answer(
    kernel: KernelRecord,
    line: dict[str, Any],
    incumbents: Sequence[dict[str, Any]],
    experiences_in_domain: int,
    *,
    created: bool,
) -> dict[str, Any]:
    """The body of ``POST /olympus/kernels/spawn``. ``line`` and ``incumbents`` are lines of the list of kernels."""
    shown = ("kernel_id", "state", "step", "holdout_loss", "baseline_loss")
    return {
        "success": True,
        "created": created,
        "kernel": {**line, "checkpoint": None, "parents": list(kernel.parents), "seed": kernel.seed},
        "proposal": {
            "proposed_name": kernel.god_name,
            "proposed_domain": kernel.domain,
            "proposed_element": kernel.config.get("element", ""),
            "proposed_role": kernel.config.get("role", ""),
            "reason": kernel.reason,
            "parent_gods": list(kernel.parents),
            "status": "spawned",
            "proposed_at": kernel.created_at,
        },
        "vote_result": {
            "passed": True,
            "consensus_type": "user_request",
            "votes": {},
            "evidence": {
                "experiences_in_domain": experiences_in_domain,
                "incumbents": [{key: other[key] for key in shown} for other in incumbents],
            },
            "note": "asked for by a user, so nobody voted; the evidence is what was measured",
        },
        "training": {"state": kernel.state, "queue_position": line["queue_position"], "step": kernel.step},
        "links": links(kernel.id),
    }
