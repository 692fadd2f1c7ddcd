"""How a kernel comes into being: its name, its id, its seed and its row.

``Registrar.register`` checks what can be refused (the name, the number of kernels, room on the disk, the network's
options, the parents) and writes the row; it starts nothing. A spawn on a user's request is not voted on unless it asks
for that: then ``vote_result`` holds what was measured, and no ballots.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from typing import Any

from olympus import pantheon
from olympus.checkpoints import CheckpointStore
from olympus.errors import DuplicateKernel, InvalidRequest, KernelLimitReached, StorageFull
from olympus.kernel_rows import KernelRecord, KernelRows
from olympus.kernel_state import KernelPlan
from olympus.lineage import generation, inherited_plan, parent_ids
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

    def register(
        self, request: SpawnRequest, actor: str, *, proposal_id: str | None = None
    ) -> tuple[KernelRecord, bool]:
        """The new kernel and True, or the one that an equal ``idempotency_key`` made before and False.

        ``proposal_id`` is that of the vote that it passed. Raises ``DuplicateKernel``, ``KernelLimitReached``,
        ``InvalidRequest`` or ``StorageFull``.
        """
        with self._lock:
            earlier = self.earlier(request)
            if earlier is not None:
                return earlier, False
            shortage = self._checkpoints.shortage()
            if shortage is not None:
                raise StorageFull(shortage)
            name = self._free_name(request)
            options = {"batch_size": self._settings.batch_size, **request.config}
            plan = KernelPlan.make(request.preset or self._settings.preset, options)
            parents = [self._rows.get(parent) for parent in parent_ids(request.parent_gods, self._rows.all())]
            if request.inherit:
                plan = self._inherited(request, plan, parents)
            return self._create(request, name, plan, parents, proposal_id, actor), True

    def _inherited(self, request: SpawnRequest, plan: KernelPlan, parents: Sequence[KernelRecord]) -> KernelPlan:
        if not parents:
            raise InvalidRequest("inherit: name the parent in parent_gods")
        untouched = KernelPlan.make(self._settings.preset, {}).network
        return inherited_plan(plan, parents[0], chosen=request.preset is not None or plan.network != untouched)

    def earlier(self, request: SpawnRequest) -> KernelRecord | None:
        """The kernel that an equal ``idempotency_key`` made before."""
        return None if request.idempotency_key is None else self._rows.by_idempotency_key(request.idempotency_key)

    def _free_name(self, request: SpawnRequest) -> str:
        existing = self._rows.all()
        if len(existing) >= self._settings.max_kernels:
            raise KernelLimitReached(
                f"{len(existing)} kernels exist and kernels.max_kernels allows {self._settings.max_kernels}; delete one"
            )
        taken = {kernel.god_name for kernel in existing}
        if request.name is not None and request.name in taken and not request.force:
            raise DuplicateKernel(f"a kernel named {request.name} exists; choose another name, or pass force")
        return request.name or pantheon.choose_name(taken, request.domain or "")

    def _create(
        self,
        request: SpawnRequest,
        name: str,
        plan: KernelPlan,
        parents: Sequence[KernelRecord],
        proposal_id: str | None,
        actor: str,
    ) -> KernelRecord:
        kernel_id = pantheon.kernel_id(name)
        origin = {
            "generation": generation(parents),
            "inherited_from": parents[0].id if request.inherit else None,
            "proposal_id": proposal_id,
        }
        values: dict[str, Any] = {
            "id": kernel_id,
            "god_name": name,
            "domain": request.domain or self._settings.default_domain,
            "state": "queued" if request.train else "paused",
            "state_reason": "" if request.train else "spawned without training; resume it to begin",
            "wanted": "train" if request.train else "pause",
            "config": {**plan.to_json(), "element": request.element, "role": request.role, **origin},
            "seed": request.seed if request.seed is not None else seed_of(kernel_id),
            "parents": [parent.id for parent in parents],
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
    voted: dict[str, Any] | None,
) -> dict[str, Any]:
    """The body of ``POST /olympus/kernels/spawn``. ``line`` and ``incumbents`` are lines of the list of kernels.

    ``voted`` is the answer of ``Council.propose``, or None.
    """
    proposal = {} if voted is None else {"proposal_id": voted["proposal"]["proposal_id"]}
    return {
        "success": True,
        "phase": "spawned",
        "created": created,
        "kernel": {**line, "checkpoint": None, "parents": list(kernel.parents), "seed": kernel.seed},
        "proposal": {
            **proposal,
            "proposed_name": kernel.god_name,
            "proposed_domain": kernel.domain,
            "proposed_element": kernel.config.get("element", ""),
            "proposed_role": kernel.config.get("role", ""),
            "reason": kernel.reason,
            "parent_gods": list(kernel.parents),
            "status": "spawned",
            "proposed_at": kernel.created_at,
        },
        "vote_result": voted["vote_result"] if voted else _unvoted(incumbents, experiences_in_domain),
        "training": {"state": kernel.state, "queue_position": line["queue_position"], "step": kernel.step},
        "links": links(kernel.id),
    }


def _unvoted(incumbents: Sequence[dict[str, Any]], experiences_in_domain: int) -> dict[str, Any]:
    shown = ("kernel_id", "state", "step", "holdout_loss", "baseline_loss")
    return {
        "passed": True,
        "consensus_type": "user_request",
        "votes": {},
        "evidence": {
            "experiences_in_domain": experiences_in_domain,
            "incumbents": [{key: other[key] for key in shown} for other in incumbents],
        },
        "note": "asked for by a user, so nobody voted; the evidence is what was measured",
    }
