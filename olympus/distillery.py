"""Distillation as the server runs it: asked for by a person or by a trigger, worked on by one thread, told to watchers.

Runs are rows (``memory.distillation.runs``), triggers are pure functions of what was lived through, and what a run does
is the pipeline's business, which is given when the language model is ready. Here they are put together: which
configuration a domain has, when the schedule looks, what starts and stops with the server.

The timetable only calls ``look`` every ``check_seconds``. Whatever it would lose with the process stands in the rows.
"""

from __future__ import annotations

import json
import operator
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import structlog

from memory.distillation.config import DistillConfig, load_distill_config, make_distill_config, presets
from memory.distillation.errors import DistillationError, DistillConfigError
from memory.distillation.leftovers import prune, remove_forgotten
from memory.distillation.runs import Run, RunInProgress, RunNotFound, RunStore
from memory.distillation.tally import Tally
from memory.distillation.triggers import Situation, decide, judge
from memory.distillation.worker import DistillationWorker, Outcome, Pipeline, Report
from memory.history import History
from olympus.errors import InvalidAction, InvalidRequest, NotReady, OlympusError
from olympus.query_gate import be_nice
from olympus.timetable import Job, Timetable
from settings import DistillationSettings
from storage import files
from storage.database import Database
from telemetry.hub import EventHub

log = structlog.get_logger(__name__)

LOOK = "distillation"  # the name of the job
_NOT_YET = "distillation begins when the language model is loaded; see GET /readyz"
#: Lines of a run's log that are told at once.
_LINES = 2000


#: What only the owner's files may say: which folders are read, who is sent the history, and with which key.
OWNERS = (
    "checkpoint_dir",
    "output_path",
    "hf_repo_id",
    "wandb_project",
    "teacher.model",
    "teacher.api_key_env",
    "data.redact",
)


class UnknownRun(OlympusError):
    """No run has that id; ``GET /olympus/distillation/runs`` lists them."""

    status = 404
    code = "run_not_found"


class RunUnderWay(InvalidAction):
    """The domain is being distilled already; wait for that run, or cancel it."""

    code = "run_in_progress"


class Distillery:
    """One per process; safe to use from all threads."""

    def __init__(
        self,
        settings: DistillationSettings,
        database: Database,
        history: History,
        hub: EventHub,
        folder: Path,
        *,
        is_stale: Callable[[str], bool] = lambda domain: False,
        timetable: Timetable | None = None,
    ):
        """``folder`` holds the runs' folders. ``timetable``: where the looks are noted; by default one of its own.

        ``is_stale``: whether what a domain's serving cartridge learned from was deleted or corrected since.
        """
        self.runs = RunStore(database)
        self.folder = folder
        self._settings = settings
        self._history = history
        self._hub = hub
        self._is_stale = is_stale
        self._tally = Tally(history)
        self._pipeline: Pipeline | None = None
        self._worker: DistillationWorker | None = None
        self._timetable = timetable or Timetable()
        self._timetable.add(self._job())
        self._looking = threading.Lock()
        self._life = threading.Lock()
        self._stopped = False

    # -- life -------------------------------------------------------------------------------------------------

    def start(self, pipeline: Pipeline, count_tokens: Callable[[str], int] | None = None) -> None:
        """Begin to work on what waits, and to look at the triggers. Called when the language model is ready.

        Nothing begins after ``shutdown``: the model may be ready only then.
        """
        with self._life:
            if not self._stopped:
                self._start(pipeline, count_tokens)

    def _start(self, pipeline: Pipeline, count_tokens: Callable[[str], int] | None) -> None:
        if count_tokens is not None:
            self._tally = Tally(self._history, count_tokens)
        self._pipeline = pipeline
        self._worker = DistillationWorker(
            self.runs,
            self._run,
            lambda _, data: self._told(data),
            prepare_thread=lambda: self._prepare_thread(),
        )
        self._worker.start()
        if self._settings.automatic:
            self._timetable.begin(LOOK)

    def shutdown(self, deadline: float) -> None:
        """Stop within ``deadline`` seconds; what runs goes on at the next start."""
        with self._life:
            self._stopped = True
        self._timetable.shutdown()
        if self._worker is not None and not self._worker.stop(deadline):
            log.warning("a distillation is still in a step; its run goes on at the next start")

    # -- asking -----------------------------------------------------------------------------------------------

    def config(
        self, domain: str, preset: str | None = None, overrides: Mapping[str, Any] | None = None
    ) -> DistillConfig:
        """What a run of ``domain`` would use. ``overrides`` may be anything. Raises ``InvalidRequest``."""
        name = preset or self._settings.domains.get(domain) or self._settings.preset
        if preset is not None and preset not in presets():  # a path on this machine is for its owner's settings only
            raise InvalidRequest(f"preset: there is no {preset!r}; one of: {', '.join(presets())}")
        try:
            return load_distill_config(name, overrides)
        except DistillConfigError as error:
            raise InvalidRequest(str(error)) from None

    def begin(
        self,
        domain: str,
        *,
        preset: str | None = None,
        overrides: Mapping[str, Any] | None = None,
        trigger: str = "manual",
        actor: str = "local",
        owner: bool = False,
    ) -> dict[str, Any]:
        """A new run, queued. Raises ``InvalidRequest``, ``RunUnderWay`` or ``NotReady``.

        ``overrides`` change what ``OWNERS`` names only for the ``owner`` of this machine, not for a request.
        """
        config = self.config(domain, preset, overrides)
        if overrides and not owner:
            self._check_reserved(config, self.config(domain, preset))
        if self._worker is None:
            raise NotReady(_NOT_YET)
        known = self._history.domains().get(domain)
        if known is None and config.checkpoint_dir is None:
            raise InvalidRequest(
                f"domain: nothing was lived through in {domain!r}; GET /olympus/history shows what was"
            )
        try:
            run = self.runs.create(
                domain,
                trigger=trigger,
                config=config.model_dump(mode="json"),
                cursor=0 if known is None else known[1],
                actor=actor,
            )
        except RunInProgress as error:
            raise RunUnderWay(str(error)) from None
        self._publish(run.to_json())
        self._worker.wake()
        return run.to_json()

    def run(self, run_id: str) -> dict[str, Any]:
        """One run. Raises ``UnknownRun``."""
        try:
            return self.runs.get(run_id).to_json()
        except RunNotFound as error:
            raise UnknownRun(str(error)) from None

    def page(self, domain: str | None, limit: int) -> list[dict[str, Any]]:
        """The newest runs."""
        return [run.to_json() for run in self.runs.page(domain=domain, limit=limit)]

    def metrics(self, run_id: str, since: int) -> dict[str, Any]:
        """Lines of the run's ``metrics.jsonl`` after the first ``since``. Raises ``UnknownRun``."""
        self.run(run_id)
        path = self.folder / run_id / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        told = [json.loads(line) for line in lines[since : since + _LINES] if line.endswith("}")]
        return {"metrics": told, "next": since + len(told)}

    def cancel(self, run_id: str, actor: str = "local") -> dict[str, Any]:
        """Ask a run to end. Raises ``UnknownRun`` or ``InvalidAction``."""
        try:
            run = self.runs.cancel(run_id, actor)
        except RunNotFound as error:
            raise UnknownRun(str(error)) from None
        except DistillationError as error:
            raise InvalidAction(str(error)) from None
        if self._worker is not None:
            self._worker.wake()
        self._publish(run.to_json())
        return run.to_json()

    def forget(self) -> list[str]:
        """After something was forgotten: remove what ended runs wrote of it; the ids of those runs."""
        return remove_forgotten(self.folder, self._history, self.runs.open_ids())

    def outlook(self, domain: str) -> dict[str, Any]:
        """Where every trigger of a domain stands, and what the schedule would do now; nothing is started."""
        config = self.config(domain)
        situation, cursor = self._situation(domain)
        name, reason = decide(config.schedule.thresholds(), situation)
        if name is not None and not config.schedule.enabled:
            reason = f"{name} fires, but the configuration of this domain does not start runs by itself"
            name = None
        return {
            "domain": domain,
            "would_start": name,
            "reason": reason,
            "triggers": [report.to_json() for report in judge(config.schedule.thresholds(), situation)],
            "situation": {**asdict(situation), "scores": len(situation.scores)},
            "since_experience": cursor,
            "config": config.model_dump(mode="json"),
        }

    def schedule(self) -> dict[str, Any]:
        """The schedule and the outlook of every domain."""
        domains = [self._outlook_or_problem(domain) for domain in sorted(self._history.domains())]
        return {
            "automatic": self._settings.automatic,
            "working": self._worker is not None,
            "next_look": self._timetable.next_at(LOOK),
            "presets": presets(),
            "domains": domains,
        }

    def _outlook_or_problem(self, domain: str) -> dict[str, Any]:
        """One domain whose preset cannot be read must not hide the others."""
        try:
            told = self.outlook(domain)
            del told["config"]
        except InvalidRequest as error:
            told = {"domain": domain, "would_start": None, "reason": str(error), "triggers": []}
            told |= {"situation": None, "since_experience": None}
        return told

    def look(self) -> list[str]:
        """Start what a trigger asks for; the ids of the new runs. Called by the schedule, harmless at any time."""
        started = []
        with self._looking:
            for domain in sorted(self._history.domains()):
                try:
                    told = self.outlook(domain)
                    if told["would_start"] is not None:
                        started.append(self.begin(domain, trigger=told["would_start"], actor="schedule")["id"])
                        log.info(
                            "a distillation begins", domain=domain, trigger=told["would_start"], why=told["reason"]
                        )
                except RunUnderWay:  # somebody was quicker
                    continue
                except OlympusError as error:
                    log.warning("the schedule could not look at a domain", domain=domain, reason=str(error))
        return started

    @staticmethod
    def _check_reserved(wanted: DistillConfig, configured: DistillConfig) -> None:
        for path in OWNERS:
            one, other = (operator.attrgetter(path)(config) for config in (wanted, configured))
            if one != other:
                raise InvalidRequest(
                    f"{path}: a request cannot change it, because it says which files, servers and secrets of this "
                    "machine are used; write a preset, and name it in the settings (distillation.domains)"
                )

    # -- inside -----------------------------------------------------------------------------------------------

    def _situation(self, domain: str) -> tuple[Situation, int]:
        """What the triggers look at, and the newest experience that the last run saw."""
        learned = self.runs.newest(domain, "promoted", "rejected", "skipped")
        ended = self.runs.newest(domain, "promoted", "rejected", "skipped", "failed", "cancelled")
        under_way = self.runs.newest(domain, "queued", "running", "cancelling")
        cursor = 0 if learned is None else learned.cursor
        count = self._tally.look(domain, cursor)
        since = None if ended is None or ended.finished_at is None else max(0.0, time.time() - ended.finished_at)
        situation = Situation(
            tokens=count.tokens,
            experiences=count.experiences,
            episodes=count.episodes,
            seconds_since_run=since,
            scores=self._tally.scores(count),
            stale=self._is_stale(domain),
            open_run=None if under_way is None else under_way.id,
            stale_tried=(
                learned is not None
                and learned.trigger == "stale"
                and learned.state != "promoted"
                and not count.experiences
            ),
        )
        return situation, cursor

    def _run(self, run: Run, report: Report, stop: threading.Event) -> Outcome:
        assert self._pipeline is not None, "the worker starts after the pipeline was given"
        make_distill_config(run.config)  # of an older version, maybe: said before anything is done
        return self._pipeline(run, report, stop)

    def _job(self) -> Job:
        return Job(
            LOOK,
            "Look at the triggers of distillation",
            "Starts a run for each domain that has lived through enough since its last one.",
            self._settings.check_seconds,
            "cartridges:write",
            self._look_in_words,
            off="" if self._settings.automatic else "distillation.automatic is false",
        )

    def _look_in_words(self) -> str:
        if self._worker is None:
            raise NotReady(_NOT_YET)
        return ", ".join(f"{self.run(run_id)['domain']}: {run_id} begins" for run_id in self.look())

    def _prepare_thread(self) -> None:
        be_nice(self._settings.niceness)
        try:
            self.forget()  # what a crash, or a run that was open, left
        except Exception:  # a database that is away for a moment; the runs must be worked on all the same
            log.exception("what ended runs wrote of forgotten experiences could not be looked for")

    def _told(self, data: dict[str, Any]) -> None:
        """The worker's news."""
        self._publish(data)
        if data["finished_at"] is not None:
            self.forget()  # something may have been forgotten while it was open
            state = self.folder / data["id"] / "state"  # moments of the optimizer: nobody goes on with an ended run
            if state.is_dir():
                files.remove_directory(state)
            prune(self.folder, self._settings.keep_runs, self.runs.open_ids())

    def _publish(self, data: dict[str, Any]) -> None:
        where = f"{data['id']}:{data['state']}:{data['progress'].get('stage')}"  # each state and stage is told
        self._hub.publish("distillation", data, key=f"distillation:{where}")
