"""The one place where the parts are put together, started and stopped.

``Runtime(settings)`` only wires objects: no thread, no lock, no file, no model. ``start()`` does all of that, in
the process that serves; ``shutdown()`` undoes it within a deadline. The language model loads on its own thread, so
that the port answers at once and ``/readyz`` tells how far it is.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import structlog

from memory.cartridges.registry import CartridgeRegistry
from memory.cartridges.shelf import CartridgeShelf
from memory.episodic import EpisodicMemory
from memory.history import History, Record
from olympus.access import KeyStore
from olympus.admission import Admission
from olympus.audit import AuditLog
from olympus.cartridge_desk import CartridgeDesk
from olympus.chat import ChatService
from olympus.chat_cartridges import ChatCartridges
from olympus.chat_memory import ChatMemory
from olympus.distillery import Distillery
from olympus.embeddings import Embeddings
from olympus.errors import ModelNotReady
from olympus.forgetting import Forgetting
from olympus.kernel_desk import KernelDesk
from olympus.remembering import MemoryDisabled, make_memory
from olympus.timetable import COVERAGE, Timetable, coverage_job
from olympus.vitals import Vitals
from olympus.workbench import Workbench, correct_experience, forget_experiences, make_workbench
from olympus.zeus import Zeus
from settings import LOOPBACK_HOSTS, Settings, SettingsError
from storage import files, migrate
from storage.database import Database
from storage.errors import StorageError
from telemetry import logs
from telemetry.hub import EventHub

if TYPE_CHECKING:  # torch and transformers are imported by the loader thread, not at start-up
    from workspace.engine import Engine

log = structlog.get_logger(__name__)

Stage = Literal["disabled", "loading", "ready", "failed"]


@dataclass(frozen=True, slots=True)
class ModelState:
    """Where the language model stands. ``fraction`` is the share done of the current step, if known."""

    stage: Stage
    name: str
    detail: str = ""
    fraction: float | None = None


class Runtime:
    """Everything a request can reach. Make one per process; ``create_app`` keeps it in ``app.extensions``."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.stop_event = threading.Event()
        self.started_at: float | None = None
        self.cookie_secret = b""
        self.listening: list[Any] = []
        self.hub = EventHub(settings.telemetry.ring_events)
        self.database = Database(settings.database_url, busy_timeout_ms=settings.database.busy_timeout_ms)
        self.history = History(self.database)
        self.keys = KeyStore(self.database, settings.server.api_key)
        self.audit = AuditLog(self.database)
        self.admission = Admission(settings.server.max_chats, settings.server.max_streams)
        self.zeus = Zeus(
            settings, self.database, self.history, self.hub, self.stop_event, serving_busy=self._engine_is_busy
        )
        self.kernel_desk = KernelDesk(self.zeus, self.audit)
        self.timetable = Timetable()
        self.timetable.add(coverage_job(self.zeus.governor.watch, settings.kernels))
        self.zeus.governor.watch.perform = lambda: self.timetable.perform(COVERAGE)
        self.cartridges = CartridgeRegistry(self.database, settings.cartridge_dir)
        self.shelf = CartridgeShelf(self.cartridges, settings.cartridges.memory_bytes)
        self.cartridge_desk = CartridgeDesk(
            self.cartridges,
            self.shelf,
            self.hub,
            lambda: self.engine.loaded,
            settings.cartridges.import_max_bytes,
        )
        self.chat = ChatService(
            settings,
            lambda: self.engine,
            self.history,
            self.hub,
            lambda: self.workbench,
            ChatCartridges(self.shelf, settings.cartridges.most_per_request),
            ChatMemory(self.history, self.cartridges, self.shelf, settings.memory.chat),
        )
        self._lock = files.DataDirLock(settings.data_dir)
        self._engine: Engine | None = None
        self.distillery = Distillery(
            settings.distillation,
            self.database,
            self.history,
            self.hub,
            settings.data_dir / "distillation",
            is_stale=self.cartridge_desk.is_stale,
            timetable=self.timetable,
        )
        self.forgetting = Forgetting(self.database, self.history)
        self.vitals = Vitals(self.hub, settings.data_dir, self._counts)
        self._memory = make_memory(settings, self.database, self.history, self._somebody_waits)
        self.embeddings = Embeddings(settings.memory.episodic.embedding, settings.model.cache_dir, lambda: self.engine)
        self.workbench = Workbench(None, "no model is loaded")
        self._model_state = ModelState("loading" if settings.model.load else "disabled", settings.model.name)
        self._loader: threading.Thread | None = None

    # -- life -------------------------------------------------------------------------------------------------

    def start(
        self,
        *,
        heartbeat: Callable[[], None] = lambda: None,
        listening: Sequence[Any] = (),
        wait_for_model: bool = False,
    ) -> None:
        """Take the data directory, migrate, clean up, resume the kernels, begin to load the model.

        ``heartbeat`` is called while it waits for a predecessor to let go of the directory. Raises
        ``DataDirInUse``, ``SettingsError`` or ``StorageError``; nothing runs then.
        """
        logs.configure(self.settings.telemetry)
        self._take_data_directory(heartbeat)
        try:
            backup = migrate.upgrade(self.database)
            if backup is not None:
                log.info("database migrated", backup=backup.name, schema=migrate.head())
            self._refuse_open_door(listening)
            for leftover in files.sweep_partials(self.settings.data_dir):  # Zeus sweeps his own folder
                log.info("removed what an interrupted write left", name=leftover.name)
            self.cookie_secret = self._load_cookie_secret()
            self.cartridge_desk.recover()
            self.history.subscribe(self._announce_history)
            if self._memory is not None:
                self._memory.start()
            self.zeus.start()
            self.vitals.start()
        except BaseException:
            if self._memory is not None:
                self._memory.stop()
            self._lock.release()
            raise
        self.listening = list(listening)
        self.started_at = time.time()
        if self.settings.model.load:
            self._loader = threading.Thread(target=self._load_model, name="model-loader", daemon=True)
            self._loader.start()
            if wait_for_model:
                self._loader.join()
        log.info("started", urls=self.urls, data_dir=str(self.settings.data_dir))

    @property
    def urls(self) -> list[str]:
        """Where the server answers, as a person would type it."""
        pairs = [address[:2] for address in self.listening if isinstance(address, tuple)]
        return [f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}" for host, port in pairs]

    def shutdown(self, deadline: float = 20.0) -> None:
        """Stop everything within ``deadline`` seconds; safe to call twice and after a failed start."""
        self.stop_event.set()
        if self.started_at is None:
            return
        begun = time.monotonic()
        self.vitals.stop()
        self.distillery.shutdown(deadline / 4)
        if self._engine is not None:
            self._engine.stop(timeout=min(5.0, deadline / 4))
        self._close_workbench()
        if self._memory is not None:
            self._memory.stop(deadline / 4)
        self.zeus.shutdown(max(1.0, deadline - (time.monotonic() - begun) - 1.0))
        self.database.close()
        self._lock.release()
        self.started_at = None
        log.info("stopped", seconds=round(time.monotonic() - begun, 2))

    def _close_workbench(self) -> None:
        try:
            self.workbench.close()
        except Exception:  # what was acknowledged is saved already; the rest of the shutdown must go on
            log.exception("the virtual tokens of some sessions could not be saved")

    @property
    def memory(self) -> EpisodicMemory:
        """The episodic memory; raises ``MemoryDisabled``."""
        if self._memory is None:
            raise MemoryDisabled
        return self._memory

    def correct(self, experience_id: int, *, actor: str, **fields: Any) -> Record | None:
        """Put a corrected experience in another one's place; ``History.correct`` says what ``fields`` may be."""
        corrected = correct_experience(self.history, self.workbench, experience_id, actor=actor, **fields)
        self._forgotten(actor)
        return corrected

    def forget(self, *, actor: str, **which: Any) -> int:
        """Delete experiences and what sessions keep of them; ``History.delete`` says what ``which`` may be."""
        count = forget_experiences(self.history, self.workbench, actor=actor, **which)
        self._forgotten(actor)
        return count

    def _forgotten(self, actor: str) -> None:
        """What was learned from the history knows of it now."""
        self.cartridge_desk.refresh_stale(actor)
        self.distillery.forget()

    def _take_data_directory(self, heartbeat: Callable[[], None]) -> None:
        """A predecessor of the same arbiter (a reload) may still drain: wait for it; anybody else is an error."""
        give_up = time.monotonic() + self.settings.server.grace_seconds
        while True:
            try:
                self._lock.acquire()
                return
            except files.DataDirInUse as error:
                if error.owner.get("ppid") != os.getppid() or time.monotonic() > give_up:
                    raise
            heartbeat()
            self.stop_event.wait(0.2)

    def _refuse_open_door(self, listening: Sequence[Any]) -> None:
        hosts = {str(address[0]) for address in listening if isinstance(address, tuple)} or {self.settings.server.host}
        open_hosts = sorted(host for host in hosts if host not in LOOPBACK_HOSTS)
        if open_hosts and not self.keys.any_active():
            raise SettingsError(
                f"refusing to listen on {', '.join(open_hosts)} without an API key: anybody on the network could use "
                "this server. Create one with `python -m cli.main keys create NAME`, or set OLYMPUS_SERVER__API_KEY, "
                "or listen on 127.0.0.1"
            )

    def _load_cookie_secret(self) -> bytes:
        path = self.settings.data_dir / "secret.key"
        if not path.exists():
            files.write_bytes(path, secrets.token_bytes(32), mode=0o600)
        return path.read_bytes()

    def _announce_history(self, records: list[Record]) -> None:
        newest = records[-1]
        self.hub.publish(
            "history", {"newest_id": newest.id, "domain": newest.domain, "source": newest.source}, key="history"
        )

    # -- the language model -----------------------------------------------------------------------------------

    @property
    def model_state(self) -> ModelState:
        """Where loading stands; a consistent snapshot."""
        return self._model_state

    @property
    def engine(self) -> Engine:
        """The engine, or ``ModelNotReady`` with what to do."""
        if self._engine is None:
            state = self._model_state
            reasons = {
                "disabled": "this server runs without a language model (model.load is false)",
                "loading": f"the model {state.name} is still loading ({state.detail or 'starting'}); try again shortly",
                "failed": f"the model {state.name} could not be loaded: {state.detail}",
            }
            error = ModelNotReady(reasons.get(state.stage, "the model is not ready"))
            if state.stage != "loading":
                error.retry_after = None  # waiting will not help
            raise error
        return self._engine

    def _engine_is_busy(self) -> bool:
        return self._engine is not None and self._engine.is_busy

    def _counts(self) -> dict[str, int]:
        """What ``Vitals`` notes beside CPU and memory."""
        engine = None if self._engine is None else self._engine.stats()
        admitted = self.admission.counts()
        return {
            "generating": 0 if engine is None else engine.active,
            "waiting": 0 if engine is None else engine.waiting,
            "chats": admitted["chats"],
            "streams": admitted["streams"],
            "training": self.zeus.trainer.at_work(),
        }

    def _somebody_waits(self) -> bool:
        return self._engine_is_busy() or not self.zeus.gate.is_empty

    def _tell(self, stage: Stage, detail: str, fraction: float | None = None) -> None:
        self._model_state = replace(self._model_state, stage=stage, detail=detail, fraction=fraction)
        data = {"stage": stage, "name": self._model_state.name, "detail": detail, "fraction": fraction}
        self.hub.publish("model", data, key="model")

    def _load_model(self) -> None:
        begun = time.monotonic()
        try:
            self._engine = self._make_engine()
        except Exception as error:  # the thread's last line of defence: the state carries the reason to the user
            from workspace.errors import WorkspaceError

            known = isinstance(error, WorkspaceError)
            self._tell("failed", str(error) if known else "an unexpected error; see the server's log")
            log.error("model failed to load", model=self.settings.model.name, exc_info=not known, reason=str(error))
            return
        self._start_distillation(self._engine)  # before anybody hears that all is ready
        self._tell("ready", f"loaded in {time.monotonic() - begun:.1f} s")
        log.info("model ready", model=self.settings.model.name, seconds=round(time.monotonic() - begun, 2))

    def _start_distillation(self, engine: Engine) -> None:
        from olympus.distilling import make_pipeline, token_counter

        folder = self.distillery.folder
        made = make_pipeline(self.settings, self.history, self.cartridge_desk, self.shelf, engine, folder)
        self.distillery.start(made, token_counter(engine))

    def _make_engine(self) -> Engine:
        from workspace.heavy import import_models

        import_models()
        from workspace.engine import Engine
        from workspace.models import load_model

        model, engine, workspace = self.settings.model, self.settings.engine, self.settings.workspace
        loaded = load_model(
            model.name,
            cache_dir=model.cache_dir,
            dtype=model.dtype,
            weights=model.weights,
            device=model.device,
            revision=model.revision,
            progress=lambda detail, fraction: self._tell("loading", detail, fraction),
        )
        if self._memory is not None:
            self._memory.adopt_engine(loaded)
        self.workbench = make_workbench(loaded, self.settings, self.database, self.history, self._memory)
        self._tell("loading", "warming up")
        made = Engine(
            loaded,
            max_active=engine.max_active,
            max_waiting=engine.max_waiting,
            threads=workspace.inference_threads or model.threads,
            prefill_chunk=engine.prefill_chunk,
            compiled={"mode": workspace.torch_compile_mode} if workspace.enable_torch_compile else None,
            batching=engine.batching,
            prefix_cache_bytes=engine.prefix_cache_bytes,
        )
        made.start()
        made.warm_up()
        return made

    # -- health -----------------------------------------------------------------------------------------------

    def readiness(self) -> tuple[bool, dict[str, str]]:
        """Whether requests can be served, and each check with ``ok`` or the reason why not."""
        checks = {
            "started": "ok" if self.started_at else "not started",
            "data_directory": "ok" if self._lock.held else "not locked",
            "database": self._database_check(),
            "model": "ok" if self._model_state.stage in ("ready", "disabled") else self._model_line(),
            "stopping": "the server is stopping" if self.stop_event.is_set() else "ok",
        }
        return all(value == "ok" for value in checks.values()), checks

    def _database_check(self) -> str:
        try:
            self.database.check()
        except StorageError as error:
            return str(error)
        return "ok"

    def _model_line(self) -> str:
        state = self._model_state
        share = "" if state.fraction is None else f" {state.fraction:.0%}"
        return f"{state.stage}: {state.detail}{share}".strip()
