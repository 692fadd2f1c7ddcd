"""Who descends from whom: parents, generations, inherited weights, and distances where they mean something.

A kernel names up to eight parents among those that exist; its generation is one more than the oldest line's. With
``inherit`` it begins with the first parent's best weights, if the networks have one shape. Two distances, both
Fisher-Rao: ``domain_distance`` of the Fréchet means of two domains' texts (``route_reference``), and on an edge along
which weights were inherited also ``basin_distance`` of the two kernels' mean basins on their own held-out texts. Only
there do they share the fixed read-out; between unrelated kernels that distance would be noise, so it is null.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from olympus.checkpoint_mirror import CheckpointMirror
from olympus.checkpoints import CheckpointStore
from olympus.errors import InvalidRequest
from olympus.experience_buffer import ExperienceBuffer
from olympus.kernel_query import choose_snapshot
from olympus.kernel_rows import KernelRecord, KernelRows
from olympus.kernel_state import KernelPlan, KernelState
from olympus.snapshot import SnapshotShelf
from qig_core.geometry import fisher_rao_distance
from settings import KernelSettings


def parent_ids(named: Sequence[str], kernels: Sequence[KernelRecord]) -> list[str]:
    """Ids of the kernels that are meant by ids or names, in order, once each.

    Raises ``InvalidRequest`` for one that is none, and for a name that several bear.
    """
    found: dict[str, None] = {}
    for name in named:
        matches = [kernel.id for kernel in kernels if kernel.id == name]
        matches = matches or [kernel.id for kernel in kernels if kernel.god_name == name]
        if not matches:
            raise InvalidRequest(f"parent_gods: there is no kernel {name}; GET /olympus/kernels lists them")
        if len(matches) > 1:
            raise InvalidRequest(
                f"parent_gods: {len(matches)} kernels are named {name}; give one of {', '.join(matches)}"
            )
        found[matches[0]] = None
    return list(found)


def generation(parents: Sequence[KernelRecord]) -> int:
    """1 for a kernel without parents."""
    return 1 + max((int(parent.config.get("generation", 1)) for parent in parents), default=0)


def inherited_plan(plan: KernelPlan, parent: KernelRecord, *, chosen: bool) -> KernelPlan:
    """``plan`` with the parent's network. Raises ``InvalidRequest`` when a shape was ``chosen`` and differs."""
    network = KernelPlan.from_json(parent.config).network
    if chosen and plan.network != network:
        mine, theirs = plan.network.to_dict(), network.to_dict()
        differ = ", ".join(f"{key} {mine[key]} and {theirs[key]}" for key in mine if mine[key] != theirs[key])
        raise InvalidRequest(
            f"inherit: the network differs from that of {parent.id} ({differ}); leave out preset and config to take it"
        )
    return KernelPlan(network, plan.training)


class Inheritance:
    """Gives a new kernel its first checkpoint, made of the parent's best weights."""

    def __init__(
        self,
        settings: KernelSettings,
        rows: KernelRows,
        checkpoints: CheckpointStore,
        snapshots: SnapshotShelf,
        mirror: CheckpointMirror | None,
    ):
        self._settings = settings
        self._rows = rows
        self._checkpoints = checkpoints
        self._snapshots = snapshots
        self._mirror = mirror

    def pass_on(self, child: KernelRecord, actor: str) -> None:
        """Publish the parent's weights as the child's step 0; without success there is no child."""
        try:
            self._publish(child)
        except BaseException:
            self._rows.delete(child.id, actor)
            self._checkpoints.delete_kernel(child.id)
            raise

    def _publish(self, child: KernelRecord) -> None:
        parent = self._rows.get(child.parents[0])
        snapshot = choose_snapshot(parent, "best", self._snapshots, self._checkpoints)
        if snapshot.step == 0:
            raise InvalidRequest(f"inherit: {parent.id} has not been trained yet; there is nothing to inherit")
        state = KernelState(KernelPlan.from_json(child.config), child.seed)
        state.kernel.load_state_dict(snapshot.kernel.state_dict())
        state.ema.shadow.load_state_dict(snapshot.kernel.state_dict())
        state.progress.restored_from = f"{parent.id} {snapshot.label}, inherited"
        settings = self._settings
        nothing = ExperienceBuffer(settings.buffer_capacity, settings.holdout_percent, child.seed).state_dict()
        metrics: dict[str, Any] = {"holdout_loss": None, "phi": None, "converged": False, "regime": "linear"}
        content = {**state.state(), "buffer": nothing}
        saved = self._checkpoints.publish(child.id, 0, state.tensors(), content, metrics)
        if self._mirror is not None:
            self._mirror.copy(child.id, saved["name"], urgent=True)


def family(
    kernels: Sequence[KernelRecord],
    reports: Mapping[str, Mapping[str, Any]],
    between: Mapping[tuple[str, str], float],
) -> dict[str, Any]:
    """Nodes and edges, as JSON types. ``between``: distance of two domains, in either order of their names."""
    by_id = {kernel.id: kernel for kernel in kernels}
    edges = []
    for child in kernels:
        for parent_id in child.parents:
            parent = by_id.get(parent_id)
            inherited = child.config.get("inherited_from") == parent_id
            edges.append(
                {
                    "parent": parent_id,
                    "child": child.id,
                    "parent_exists": parent is not None,
                    "inherited": inherited,
                    "basin_distance": _basin_distance(reports, parent_id, child.id) if inherited else None,
                    "domain_distance": None if parent is None else _between(between, parent.domain, child.domain),
                }
            )
    domains = [{"domains": list(pair), "distance": round(value, 6)} for pair, value in sorted(between.items())]
    return {"nodes": [_node(kernel) for kernel in kernels], "edges": edges, "domain_distances": domains}


def _node(kernel: KernelRecord) -> dict[str, Any]:
    return {
        "kernel_id": kernel.id,
        "god_name": kernel.god_name,
        "domain": kernel.domain,
        "state": kernel.state,
        "generation": int(kernel.config.get("generation", 1)),
        "reason": kernel.reason,
        "parents": list(kernel.parents),
        "inherited_from": kernel.config.get("inherited_from"),
        "proposal_id": kernel.config.get("proposal_id"),
        "created_at": kernel.created_at,
    }


def _between(between: Mapping[tuple[str, str], float], one: str, other: str) -> float | None:
    if one == other:
        return 0.0
    value = between.get((one, other), between.get((other, one)))
    return None if value is None else round(value, 6)


def _basin_distance(reports: Mapping[str, Mapping[str, Any]], parent: str, child: str) -> float | None:
    basins = [reports.get(kernel, {}).get("progress", {}).get("basin") for kernel in (parent, child)]
    if not all(basins):
        return None
    one, other = (torch.tensor(basin, dtype=torch.float64) for basin in basins)
    return round(float(fisher_rao_distance(one, other)), 6)
