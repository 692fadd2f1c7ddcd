"""Zeus: the one door to the kernels. Spawn them, feed them, ask them, see how they are, and end them.

Every public method is one request of the API and may be called from any thread. Zeus puts the parts together and
decides what is allowed in which state; the work is done by the trainer, the stores and the snapshots.

Votes on new kernels, routing, polls, lineage and the watch over badly served domains are his governor's (``governor``).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import structlog

from memory.history import History, NewExperience, content_hash
from olympus import checkpoint_diff
from olympus.checkpoint_files import Loaded
from olympus.checkpoint_mirror import CheckpointMirror
from olympus.checkpoints import CheckpointStore
from olympus.continuous_trainer import ContinuousKernelTrainer
from olympus.errors import InvalidAction, InvalidRequest, NotReady, StorageFull
from olympus.example import QUERY_SOURCE
from olympus.experience_source import ExperienceSource
from olympus.governor import Governor, Realm
from olympus.kernel_query import answer, choose_snapshot
from olympus.kernel_rows import KernelRecord, KernelRows, State, Wanted
from olympus.kernel_state import KernelState
from olympus.kernel_thread import KernelServices
from olympus.kernel_transfer import KernelFile, KernelTransfer
from olympus.metrics_store import COLUMNS, MetricsStore
from olympus.query_gate import QueryGate
from olympus.requests import ALL_DOMAINS, ExperienceIn, ImportRequest, QueryRequest, SpawnRequest
from olympus.snapshot import SnapshotShelf
from olympus.spawning import Registrar, spawn_answer
from olympus.status import full_status, summary_line
from settings import Settings, is_replit
from storage import files
from storage.database import Database
from telemetry.hub import EventHub

log = structlog.get_logger(__name__)

REPLIT_CHECKPOINTS = Path("/tmp/m8_checkpoints")
MAX_METRIC_POINTS = 10_000


class Zeus:
    """See the module docstring. Make one per process; nothing runs before ``start``."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        history: History,
        hub: EventHub,
        stop_event: threading.Event,
        *,
        serving_busy: Callable[[], bool] = lambda: False,
    ):
        self._settings = settings.kernels
        self._history = history
        self._on_replit = is_replit()
        self.checkpoint_root = checkpoint_root(settings, on_replit=self._on_replit)
        self.limit = settings.kernels.max_concurrent or (1 if self._on_replit else 3)
        self.rows = KernelRows(database, hub)
        self.checkpoint_store = CheckpointStore(
            self.checkpoint_root, database, settings.kernels.retention, settings.kernels.checkpoint_every
        )
        self._mirror = CheckpointMirror(database, self.checkpoint_store) if self._on_replit else None
        self._metrics = MetricsStore(database)
        self.snapshots = SnapshotShelf()
        self.gate = QueryGate(settings.kernels.max_queries)
        self._registrar = Registrar(settings.kernels, self.rows, self.checkpoint_store)
        self._transfer = KernelTransfer(
            settings.kernels, self.rows, self._registrar, self.checkpoint_store, self._mirror
        )
        self._started = False
        services = KernelServices(
            settings=settings.kernels,
            rows=self.rows,
            checkpoints=self.checkpoint_store,
            mirror=self._mirror,
            metrics=self._metrics,
            snapshots=self.snapshots,
            hub=hub,
            open_source=lambda domain: ExperienceSource(history, domain),
            serving_busy=serving_busy,
            gate=self.gate,
            stopping=stop_event,
        )
        self.trainer = ContinuousKernelTrainer(services, self.limit)
        self.governor = Governor(
            Realm(
                settings=settings.kernels,
                database=database,
                history=history,
                hub=hub,
                rows=self.rows,
                snapshots=self.snapshots,
                checkpoints=self.checkpoint_store,
                mirror=self._mirror,
                lines=self.kernels,
                report=self._report,
                query=self.query,
                spawn=self.spawn,
                stopping=stop_event,
            )
        )

    # -- life -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Repair what a crash left, take up every kernel where it was, and spawn the first one if there is none.

        Call it while holding the data directory's lock.
        """
        self.checkpoint_root.mkdir(parents=True, exist_ok=True)
        files.sweep_partials(self.checkpoint_root)
        if self._mirror is not None:
            for name in self._mirror.restore_missing():
                log.info("checkpoint restored from the database", checkpoint=name)
        report = self.checkpoint_store.reconcile()
        if any(report.values()):
            log.warning("checkpoints and their index were reconciled", **report)
        self._history.subscribe(self.trainer.notice)
        self._history.subscribe(self.governor.notice)
        self.trainer.start(self.rows.all())
        self._started = True
        if self._settings.spawn_default and not self.rows.all() and not self.rows.ever_spawned():
            self.spawn(SpawnRequest(), actor="system")
        self.governor.watch.start()

    def shutdown(self, deadline_s: float) -> None:
        """Stop every trainer with a last checkpoint, within ``deadline_s`` seconds."""
        if self._started:
            self._started = False
            self.governor.watch.stop(min(2.0, deadline_s / 4))
            self.trainer.shutdown(deadline_s)

    # -- spawn and end ----------------------------------------------------------------------------------------

    def spawn(self, request: SpawnRequest, *, actor: str = "user") -> dict[str, Any]:
        """Make a kernel and put it in line. The same ``idempotency_key`` gives the same kernel again.

        Raises ``VoteLost``, ``DuplicateKernel``, ``KernelLimitReached``, ``InvalidRequest``, ``StorageFull`` or
        ``NotReady``.
        """
        self._require_started()
        voted = None if self._registrar.earlier(request) else self.governor.vote_on(request, actor)
        proposal_id = None if voted is None else str(voted["proposal"]["proposal_id"])
        record, created = self._registrar.register(request, actor, proposal_id=proposal_id)
        if created:
            self.governor.bless(record, actor)
        if created and request.experiences:
            self.feed(record.id, request.experiences)
        if created and request.train:
            self.trainer.enqueue(record.id)
        kernel = self.rows.get(record.id)
        others = [self._line(other) for other in self.rows.all() if other.domain == kernel.domain and other != kernel]
        lived = self._history.count(domain=None if kernel.domain == ALL_DOMAINS else kernel.domain)
        return spawn_answer(kernel, self._line(kernel), others, lived, created=created, voted=voted)

    def route(self, text: str) -> dict[str, Any]:
        """Which kernel a text belongs to; see ``Router.route``."""
        return self.governor.route([text])[0]

    def delete(self, kernel_id: str, *, actor: str = "user") -> dict[str, Any]:
        """End a kernel for good: its thread, checkpoints, metrics and row. The history keeps what was lived."""
        self.rows.get(kernel_id)
        if not self.trainer.halt(kernel_id, "stopped", "being deleted"):
            raise InvalidAction(f"kernel {kernel_id} is still busy; try again in a moment")
        self._metrics.discard(kernel_id)
        self.rows.delete(kernel_id, actor)
        self.checkpoint_store.delete_kernel(kernel_id)
        self.snapshots.forget(kernel_id)
        return {"success": True, "kernel_id": kernel_id, "deleted": True}

    def export(self, kernel_id: str, checkpoint: str = "best", *, training: bool = False) -> KernelFile:
        """A kernel as one file; see ``KernelTransfer.export``."""
        return self._transfer.export(kernel_id, checkpoint, training=training)

    def import_kernel(self, data: bytes, request: ImportRequest, *, actor: str = "user") -> dict[str, Any]:
        """Make a kernel from such a file; see ``KernelTransfer.admit``. It answers at once. Returns its status."""
        self._require_started()
        kernel = self._transfer.admit(data, request, actor)
        return self.resume(kernel.id) if request.train else self.status(kernel.id)

    # -- look -------------------------------------------------------------------------------------------------

    def kernels(self) -> list[dict[str, Any]]:
        """One line per kernel, oldest first."""
        return [self._line(kernel) for kernel in self.rows.all()]

    def status(self, kernel_id: str) -> dict[str, Any]:
        """Everything about one kernel. Raises ``KernelNotFound``."""
        kernel = self.rows.get(kernel_id)
        described = self.checkpoint_store.describe(kernel_id)["checkpoints"]
        extra = {**self._extra(kernel_id), "last_checkpoint": described[0] if described else None}
        return full_status(kernel, self._report(kernel), extra)

    def checkpoints(self, kernel_id: str) -> dict[str, Any]:
        """The kernel's checkpoints, what keeps each, and which go next."""
        self.rows.get(kernel_id)
        return self.checkpoint_store.describe(kernel_id)

    def compare_checkpoints(self, kernel_id: str, base: str, other: str) -> dict[str, Any]:
        """What changed from ``base`` to ``other``: measurements, basin, weights."""
        self.rows.get(kernel_id)
        return checkpoint_diff.compare(self.checkpoint_store, kernel_id, base, other)

    def metrics(
        self,
        kernel_id: str,
        since: int | None = None,
        max_points: int = 2000,
        *,
        columns: Sequence[str] | None = None,
        spread: bool = False,
    ) -> dict[str, Any]:
        """Steps after ``since`` as ``columns`` (None: all) of at most ``max_points``; see ``MetricsStore.read``."""
        self.rows.get(kernel_id)
        if not 1 <= max_points <= MAX_METRIC_POINTS:
            raise InvalidRequest(f"max_points must be 1 to {MAX_METRIC_POINTS}, got {max_points}")
        return self._metrics.read(kernel_id, since, max_points, columns=columns or COLUMNS, spread=spread)

    def query(self, kernel_id: str, request: QueryRequest) -> dict[str, Any]:
        """Ask a kernel; never waits for a training step. Raises ``KernelNotFound`` or ``TooManyQueries``."""
        begun = time.perf_counter()
        with self.gate.question():
            kernel = self.rows.get(kernel_id)
            snapshot = choose_snapshot(kernel, request.checkpoint, self.snapshots, self.checkpoint_store)
            told = answer(request, snapshot, self.snapshots.phrases(kernel_id))
        learned_as = self._remember(kernel, request, told["output"]) if request.learn else None
        latency = round((time.perf_counter() - begun) * 1000, 3)
        ready = kernel.state == "converged"
        return {"kernel_id": kernel_id, **told, "ready": ready, "experience_id": learned_as, "latency_ms": latency}

    def _remember(self, kernel: KernelRecord, request: QueryRequest, output: str) -> int | None:
        domain = self._write_domain(kernel)
        stored = self._history.append(
            [NewExperience(request.input, output.replace("\x00", ""), domain=domain, source=QUERY_SOURCE)]
        )
        return stored[0].id

    # -- feed and steer ---------------------------------------------------------------------------------------

    def feed(self, kernel_id: str, items: Sequence[ExperienceIn]) -> dict[str, Any]:
        """Write experiences into the history for the kernel's domain; its buffer picks them up from there.

        What the domain holds already (same observation and action, or the same ``request_id``) is not written
        twice; a score given with it becomes the judgement of the stored one.
        """
        self._require_started()
        domain = self._write_domain(self.rows.get(kernel_id))
        hashes = [content_hash(item.observation, item.action) for item in items]
        known = self._history.known_contents(domain, hashes)
        fresh: dict[str, ExperienceIn] = {}
        for digest, item in zip(hashes, items, strict=True):
            if digest in known and item.score is not None:
                self._history.give_feedback(known[digest], item.feedback, item.score)
            elif digest not in known:
                fresh.setdefault(digest, item)
        newest = max((record.id for record in self._history.page(limit=1, include_deleted=True)), default=0)
        stored = self._history.append([_experience(item, domain) for item in fresh.values()])
        ids = {digest: record.id for digest, record in zip(fresh, stored, strict=True)}
        accepted = sum(record.id > newest for record in stored)
        return {
            "kernel_id": kernel_id,
            "domain": domain,
            "accepted": accepted,
            "duplicates": len(items) - accepted,
            "ids": [ids.get(digest, known.get(digest)) for digest in hashes],
        }

    def pause(self, kernel_id: str) -> dict[str, Any]:
        """Stop training with a checkpoint until ``resume``."""
        return self._halt(kernel_id, "pause", "paused on request")

    def stop(self, kernel_id: str) -> dict[str, Any]:
        """End training with a checkpoint; it stays ended over restarts, and ``resume`` begins again."""
        return self._halt(kernel_id, "stop", "stopped on request")

    def resume(self, kernel_id: str) -> dict[str, Any]:
        """Train on. Raises ``InvalidAction`` for a kernel that trains or stands in line."""
        self._require_started()
        kernel = self.rows.get(kernel_id)
        if self.trainer.is_busy(kernel_id) or self.trainer.queue_position(kernel_id) is not None:
            raise InvalidAction(f"kernel {kernel_id} is {kernel.state} already; there is nothing to resume")
        self.trainer.forget_failures(kernel_id)
        self.rows.set_state(kernel_id, "queued", "resumed on request", wanted="train")
        self.trainer.enqueue(kernel_id)
        return self.status(kernel_id)

    def checkpoint_now(self, kernel_id: str) -> dict[str, Any]:
        """Save a training kernel now, pinned, so that no rule removes it before somebody unpins it.

        Raises ``InvalidAction`` when nothing trains, ``StorageFull`` without room.
        """
        self.rows.get(kernel_id)
        saved = self.trainer.save_now(kernel_id)
        if saved is None:
            raise StorageFull(
                self.checkpoint_store.shortage() or "the checkpoint was not written; see the server's log"
            )
        return {"success": True, **saved}

    def restore(self, kernel_id: str, name: str) -> dict[str, Any]:
        """Go back to a checkpoint's weights. Its content is published again as the newest step.

        Like a revert: nothing is removed, the step count goes on, and the newest checkpoint is what counts.
        """
        self.rows.get(kernel_id)
        if self.trainer.is_busy(kernel_id):
            raise InvalidAction(f"kernel {kernel_id} is training; pause it first, then restore")
        loaded = self.checkpoint_store.load(kernel_id, name)
        step = self.checkpoint_store.last_step(kernel_id) + 1
        saved = self._publish_restored(kernel_id, loaded, step)
        self.snapshots.forget(kernel_id)
        kernel = self.rows.get(kernel_id)
        self.rows.set_state(kernel_id, kernel.state, f"restored from {name}", step=step)
        return {"success": True, "restored_from": name, **saved}

    def _publish_restored(self, kernel_id: str, loaded: Loaded, step: int) -> dict[str, Any]:
        state = KernelState.restore(loaded)
        state.progress.step, state.progress.restored_from = step, loaded.name
        state.progress.next_phi, state.progress.unimproved, state.progress.rest = step, 0, {}
        content = {**state.state(), "buffer": loaded.state["buffer"]}
        metrics = {**loaded.manifest.metrics, "converged": False}
        saved = self.checkpoint_store.publish(kernel_id, step, state.tensors(), content, metrics)
        if self._mirror is not None:
            self._mirror.copy(kernel_id, saved["name"], urgent=True)
        return saved

    def pin(self, kernel_id: str, name: str, pinned: bool = True) -> dict[str, Any]:
        """Keep a checkpoint for ever, or no longer."""
        self.rows.get(kernel_id)
        self.checkpoint_store.pin(kernel_id, name, pinned)
        return self.checkpoint_store.describe(kernel_id)

    def delete_checkpoint(self, kernel_id: str, name: str) -> dict[str, Any]:
        """Remove one that is neither the newest, nor pinned, nor in use. Raises ``InvalidAction`` for those."""
        self.rows.get(kernel_id)
        self.checkpoint_store.delete(kernel_id, name)
        return self.checkpoint_store.describe(kernel_id)

    # -- inside -----------------------------------------------------------------------------------------------

    def _halt(self, kernel_id: str, wanted: Wanted, reason: str) -> dict[str, Any]:
        self._require_started()
        kernel = self.rows.get(kernel_id)
        state: State = "paused" if wanted == "pause" else "stopped"
        if kernel.state == state and kernel.wanted == wanted:
            raise InvalidAction(f"kernel {kernel_id} is {state} already; resume it to go on")
        self.rows.set_state(kernel_id, kernel.state, kernel.state_reason, wanted=wanted)
        self.trainer.halt(kernel_id, state, reason)
        return self.status(kernel_id)

    def _line(self, kernel: KernelRecord) -> dict[str, Any]:
        return summary_line(kernel, self._report(kernel), self._extra(kernel.id))

    def _report(self, kernel: KernelRecord) -> dict[str, Any]:
        thread = self.trainer.thread_of(kernel.id)
        return (thread.report if thread is not None else None) or kernel.summary

    def _extra(self, kernel_id: str) -> dict[str, Any]:
        thread = self.trainer.thread_of(kernel_id)
        return {
            "queue_position": self.trainer.queue_position(kernel_id),
            "started_at": None if thread is None else thread.started_at,
            "heartbeat_age_s": None if thread is None else round(thread.heartbeat_age(), 3),
        }

    def _write_domain(self, kernel: KernelRecord) -> str:
        return self._settings.default_domain if kernel.domain == ALL_DOMAINS else kernel.domain

    def _require_started(self) -> None:
        if not self._started:
            raise NotReady("the kernels are starting or stopping; try again shortly")


def checkpoint_root(settings: Settings, *, on_replit: bool) -> Path:
    """Where checkpoints live: as set, else under ``/tmp`` on Replit, else in the data directory."""
    if settings.kernels.checkpoint_dir is None and on_replit:
        return REPLIT_CHECKPOINTS
    return settings.kernel_dir


def _experience(item: ExperienceIn, domain: str) -> NewExperience:
    return NewExperience(
        item.observation,
        item.action,
        domain=domain,
        source="api",
        feedback=item.feedback,
        score=item.score,
        session_id=item.session_id,
        request_id=item.request_id,
    )
