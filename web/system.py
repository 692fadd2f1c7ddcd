"""The process and its machine over HTTP: what it uses, what waits, what lies on the disk."""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
from flask import Blueprint, jsonify
from flask.typing import ResponseReturnValue

from olympus import vitals
from olympus.errors import ModelNotReady
from storage import migrate
from web.admin_schemas import SystemShown
from web.auth import requires
from web.context import runtime
from web.ops import application_version, library_versions

blueprint = Blueprint("system", __name__, url_prefix="/olympus")

_LIBRARIES = ("flask", "gunicorn", "torch", "transformers", "sqlalchemy", "apscheduler")


@blueprint.get("/system")
@requires("kernels:read")
def system() -> ResponseReturnValue:
    """All of it at once; ``GET /olympus/stream?topics=system`` tells what changes."""
    serving = runtime()
    shown = SystemShown(
        version=application_version(),
        versions=library_versions(_LIBRARIES),
        pid=os.getpid(),
        started_at=serving.started_at,
        now=time.time(),
        machine=vitals.machine(),
        process=_process(),
        threads=tuple(vitals.threads()),
        queues=_queues(),
        disk=_disk(),
        database={"kind": serving.database.url.get_backend_name(), "schema": migrate.head()},
        model=_model(),
        engine=_engine(),
        workspace=serving.workbench.status(),
        series=serving.vitals.series(),
    )
    return jsonify(shown.model_dump(mode="json"))


def _process() -> dict[str, Any]:
    process = psutil.Process()
    with process.oneshot():
        return {
            "rss_bytes": process.memory_info().rss,
            "cpu_seconds": round(sum(process.cpu_times()[:2]), 1),
            "open_files": process.num_fds() if hasattr(process, "num_fds") else None,
            "niceness": process.nice(),
        }


def _queues() -> dict[str, Any]:
    serving = runtime()
    kernels = serving.zeus.rows.states()
    runs = serving.distillery.runs.open_ids()
    return {
        **serving.admission.counts(),
        "max_generating": serving.settings.engine.max_active,
        "max_waiting": serving.settings.engine.max_waiting,
        "kernels_training": kernels.get("training", 0),
        "kernels_queued": kernels.get("queued", 0),
        "max_training": serving.zeus.limit,
        "distillations_open": len(runs),
        "watchers": serving.hub.subscribers,
        "request_threads": serving.settings.server.threads,
    }


def _disk() -> dict[str, Any]:
    """Of a database elsewhere no file lies here."""
    serving = runtime()
    folder = serving.settings.data_dir
    parts = {
        "kernels": serving.zeus.checkpoint_root,
        "cartridges": serving.settings.cartridge_dir,
        "distillation": serving.distillery.folder,
    }
    if serving.database.is_sqlite and serving.database.url.database:
        parts["database"] = Path(serving.database.url.database)
    told = vitals.disk(parts, folder)
    quota = serving.settings.kernels.retention
    return {**told, "kernels_max_bytes": quota.max_bytes, "min_free_bytes": quota.min_free_bytes, "folder": str(folder)}


def _model() -> dict[str, Any]:
    """Where loading stands, and of a loaded one what it is."""
    serving = runtime()
    told = asdict(serving.model_state)
    try:
        loaded = serving.engine.loaded
    except ModelNotReady:
        return told
    return {
        **told,
        "parameters": sum(tensor.numel() for tensor in loaded.model.parameters()),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "device": str(loaded.device),
        "context_length": loaded.context_length,
        "vocabulary": loaded.vocabulary_size,
        "fingerprint": loaded.fingerprint,
    }


def _engine() -> dict[str, Any] | None:
    """The engine's queue and totals, or None while there is none."""
    try:
        return asdict(runtime().engine.stats())
    except ModelNotReady:
        return None
