"""The status object of a kernel: one shape, from a live report, or from what was last saved.

Every field is always there; what was not measured is null, with a reason beside it where there is one. Losses are
nats per byte. The shape is part of the API (``GET /olympus/kernels/<id>/status``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from olympus.kernel_rows import KernelRecord
from olympus.kernel_state import Progress

_INTEGRATION = ("surrogate", "snr_db", "samples", "partition", "reason", "read_out")
_PLASTICITY = ("dead_units", "units", "eff_rank", "width", "weight_norm")
_UNMEASURED = asdict(Progress())
_DIAGNOSIS = ("total_correlation", "o_information", "stochastic_interaction", "mutual_information")


def summary_line(kernel: KernelRecord, report: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """The few fields of a list of kernels. ``extra``: what only the trainer knows (queue position, heartbeat)."""
    progress = _progress(report)
    return {
        "kernel_id": kernel.id,
        "god_name": kernel.god_name,
        "domain": kernel.domain,
        "state": kernel.state,
        "state_reason": kernel.state_reason,
        "step": max(kernel.step, progress["step"]),
        "loss": progress["loss_ema"],
        "holdout_loss": progress["holdout_loss"],
        "baseline_loss": progress["baseline_loss"],
        "phi": progress["integration"].get("phi"),
        "regime": report.get("regime", "linear"),
        "ready": kernel.state == "converged",
        "experiences": report.get("buffer", {}).get("size", 0),
        "created_at": kernel.created_at,
        "updated_at": kernel.updated_at,
        "queue_position": extra.get("queue_position"),
        "links": links(kernel.id),
    }


def full_status(kernel: KernelRecord, report: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """Everything about one kernel."""
    progress = _progress(report)
    return {
        **summary_line(kernel, report, extra),
        "wanted": kernel.wanted,
        "parents": list(kernel.parents),
        "seed": kernel.seed,
        "config": kernel.config,
        "parameters": report.get("parameters"),
        "started_at": extra.get("started_at"),
        "heartbeat_age_s": extra.get("heartbeat_age_s"),
        "steps_total": None,  # a continuous trainer has no last step
        "bytes_seen": progress["bytes_seen"],
        "throughput": report.get("throughput", {"steps_per_second": None, "step_ms": None}),
        "loss": _loss(progress),
        "phi": _phi(progress, report),
        "kappa": progress["integration"].get("kappa"),
        "basin": {"coords64": progress["basin"] or None, "distance_ref": progress["drift"], "drift": progress["drift"]},
        "optimizer": dict(report.get("optimizer", {})),
        "convergence": _convergence(report),
        "buffer": report.get("buffer"),
        "prequential": report.get("prequential"),
        "drift": report.get("drift"),
        "plasticity": {name: progress["plasticity"].get(name) for name in _PLASTICITY},
        "cost": _cost(progress, report),
        "last_saved_step": report.get("last_saved_step", 0),
        "last_checkpoint": extra.get("last_checkpoint"),
        "restored_from": progress["restored_from"],
        "error": kernel.state_reason if kernel.state in ("failed", "stalled") else None,
    }


def links(kernel_id: str) -> dict[str, str]:
    """Where to go on."""
    base = f"/olympus/kernels/{kernel_id}"
    return {
        "self": f"{base}/status",
        "status": f"{base}/status",
        "query": f"{base}/query",
        "checkpoints": f"{base}/checkpoints",
        "metrics": f"{base}/metrics",
        "experiences": f"{base}/experiences",
        "events": f"{base}/events",
    }


def _progress(report: Mapping[str, Any]) -> dict[str, Any]:
    return {**_UNMEASURED, **report.get("progress", {})}


def _loss(progress: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "train_ema": progress["loss_ema"],
        "holdout": progress["holdout_loss"],
        "holdout_raw": progress["raw_holdout_loss"],
        "baseline_uniform": progress["uniform_loss"],
        "baseline_context_free": progress["baseline_loss"],
        "best": progress["best_loss"],
        "best_step": progress["best_step"],
        "below_baseline": progress["loss_ok"],
        "gate": progress["gate_reason"] or "not examined yet",
        "evaluations_without_improvement": progress["unimproved"],
    }


def _phi(progress: Mapping[str, Any], report: Mapping[str, Any]) -> dict[str, Any]:
    measured, judged = progress["integration"], report.get("convergence") or {}
    return {
        "value": measured.get("phi"),
        "raw_nats": measured.get("raw_nats"),
        "mean100": judged.get("phi_mean"),
        "std100": judged.get("phi_std"),
        "k_units": measured.get("units"),
        **{name: measured.get(name) for name in _INTEGRATION},
        "diagnosis": {name: measured.get(name) for name in _DIAGNOSIS},
    }


def _convergence(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """Each condition with its number, threshold and reason, and the same as single fields; None before the first step.

    Reports of versions that listed no conditions have an empty list.
    """
    judged = report.get("convergence")
    if judged is None:
        return None
    names = {"phi_mean100": "phi_mean", "phi_std100": "phi_std", "plateau": "plateau_ok"}
    same = ("phi_now", "phi_ok", "stable_ok", "loss_ok", "steps_in_window", "phi_threshold", "std_threshold", "gate")
    return {
        "converged": judged["converged"],
        "reason": judged["reason"],
        **{name: judged.get(name) for name in same},
        **{name: judged.get(saved) for name, saved in names.items()},
        "conditions": [dict(condition) for condition in judged.get("conditions", ())],
    }


def _cost(progress: Mapping[str, Any], report: Mapping[str, Any]) -> dict[str, Any]:
    training = progress["train_seconds"]
    saving = report.get("overhead_seconds", 0.0)
    # the look at plasticity is part of an evaluation
    measuring = progress["phi_seconds"] + progress["evaluation_seconds"] + progress["prequential_seconds"] + saving
    return {
        "train_seconds": round(training, 3),
        "phi_seconds": round(progress["phi_seconds"], 3),
        "evaluation_seconds": round(progress["evaluation_seconds"], 3),
        "prequential_seconds": round(progress["prequential_seconds"], 3),
        "plasticity_seconds": round(progress["plasticity_seconds"], 3),
        "checkpoint_seconds": saving,
        "phi_share": round(progress["phi_seconds"] / training, 4) if training > 0 else None,
        "overhead_share": round(measuring / (training + measuring), 4) if training > 0 else None,
    }
