"""What a run does, from the history of a domain to a cartridge that serves, or to the reason why not.

    experiences -> dataset -> initial prefix -> training -> candidate -> gate -> promoted or rejected

Every stage leaves its result in the run's folder or in the registry and finds it there again, so a run that was killed
goes on where it stood: rows in their journal, training at its last checkpoint, the candidate under the run's id. What
is looked at is fixed when the run is asked for (``Run.cursor``): experiences that come later belong to the next run.

Always from the history, never from a distillation (iterated compaction collapses: arXiv 2606.07878); only the initial
values may come from the cartridge before.

The model is the one that serves. Training changes nothing of it and gives way to requests (``between``).
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memory.cartridges.errors import CartridgeConflict
from memory.cartridges.registry import CartridgeRegistry
from memory.cartridges.rows import CartridgeRow
from memory.cartridges.shelf import CartridgeShelf
from memory.distillation.answers import content_key, is_judged
from memory.distillation.config import DistillConfig, make_distill_config
from memory.distillation.data_generation import DataProgress, generate_dataset
from memory.distillation.dataset import read_dataset
from memory.distillation.errors import (
    CheckpointUnusable,
    DistillationError,
    JournalMismatch,
    NothingToDistil,
)
from memory.distillation.exporting import export_run
from memory.distillation.held_out import divide
from memory.distillation.leftovers import note_experiences
from memory.distillation.prompt_builder import teacher_messages
from memory.distillation.questions import gate_questions
from memory.distillation.redaction import Redactor
from memory.distillation.replay_env import split_of
from memory.distillation.rows import Row
from memory.distillation.runs import Run, RunState
from memory.distillation.worker import Interrupted, Outcome, Report
from memory.history import History, Record
from storage import files

if TYPE_CHECKING:  # torch is imported by whoever loads the model
    from lm.types import LanguageModel
    from memory.cartridges.cartridge import Cartridge
    from memory.distillation.gate import Verdict
    from memory.distillation.trainer import Progress, TrainingResult
    from workspace.engine import Engine
    from workspace.models import LoadedModel
    from workspace.prefix import KVPrefix

logger = logging.getLogger(__name__)

#: Where each stage begins on the way from 0 to 1.
_BEGINS = {"dataset": 0.0, "initial prefix": 0.15, "training": 0.16, "gate": 0.85}
_INIT_RECORDS = 256  # enough to fill any prefix


@dataclass(frozen=True)
class Surroundings:
    """What the pipeline works with. ``teacher`` makes the model that a configuration names."""

    history: History
    registry: CartridgeRegistry
    shelf: CartridgeShelf
    folder: Path
    engine: Engine
    teacher: Callable[[DistillConfig, threading.Event], LanguageModel]
    between: Callable[[], None]
    announce: Callable[[CartridgeRow], object] = lambda row: None  #: told of every cartridge whose state changed
    threads: int = 1

    @property
    def loaded(self) -> LoadedModel:
        """The model that learns and serves."""
        return self.engine.loaded


class DistillationPipeline:
    """A ``worker.Pipeline``. One run at a time."""

    def __init__(self, surroundings: Surroundings):
        self._given = surroundings

    def __call__(self, run: Run, report: Report, stop: threading.Event) -> Outcome:
        """Do ``run``, or go on with it."""
        return _Stages(self._given, run, report, stop).all()


class _Stages:
    """One run."""

    def __init__(self, given: Surroundings, run: Run, report: Report, stop: threading.Event):
        self._given, self._run, self._tell, self._stop = given, run, report, stop
        self._config = make_distill_config(run.config)
        self._folder = given.folder / run.id
        self._redactor = Redactor(self._config.data.redact)

    def all(self) -> Outcome:
        """From the beginning, passing over what was done before."""
        self._folder.mkdir(parents=True, exist_ok=True)
        files.write_json(self._folder / "config.json", self._config.model_dump(mode="json"))
        known = self._registered()
        if known is not None and known.state != "candidate":  # an earlier attempt ended after the decision
            return self._decided(known)
        records = self._records()
        if self._config.checkpoint_dir is None:
            note_experiences(self._folder, [record.id for record in records])
        try:
            rows = self._dataset(records)
        except NothingToDistil as reason:
            return Outcome("skipped", {"detail": str(reason), "fraction": 1.0})
        row = self._candidate(records, rows)
        return self._judge(row, records, rows)

    # Stages.

    def _records(self) -> list[Record]:
        """The newest living experiences that existed when the run was asked for, oldest first."""
        config = self._config
        if config.checkpoint_dir is not None:
            from memory.snapshots import load_records, newest_snapshot

            found, bad = load_records(newest_snapshot(config.checkpoint_dir), domain=self._run.domain)
            self._stage("dataset", bad_lines=len(bad))
            found = sorted(found, key=lambda record: record.id)[-config.data.max_records :]
            return [record for record in found if _was_finished(record)]
        newest = self._given.history.page(
            domain=self._run.domain, before=self._run.cursor + 1, limit=config.data.max_records
        )
        return [record for record in newest[::-1] if _was_finished(record)]

    def _dataset(self, records: Sequence[Record]) -> list[Row]:
        self._stage("dataset", experiences=len(records))
        teacher = None
        if self._config.data.targets != "feedback" or self._config.data.self_study.rows:
            teacher = self._given.teacher(self._config, self._stop)
        options: dict[str, Any] = {
            "teacher": teacher,
            "count": self._count,
            "stop": self._stop,
            "progress": self._dataset_progress,
        }
        try:
            made = generate_dataset(records, self._config, self._folder, **options)
        except JournalMismatch:  # something was judged, corrected or forgotten since the attempt before
            made = generate_dataset(records, self._config, self._folder, restart=True, **options)
        self._check_stop()
        counts = ("rows", "train_rows", "eval_rows", "kinds", "targets", "skipped", "redactions", "experiences_dropped")
        self._tell({"data": {name: getattr(made, name) for name in counts} | {"bad": len(made.bad)}})
        return read_dataset(made.path)

    def _candidate(self, records: Sequence[Record], rows: Sequence[Row]) -> CartridgeRow:
        """The candidate of this run: found again, or trained and registered."""
        known = self._registered()
        if known is not None:
            return known
        parent = self._previous()
        init = self._initial(records, parent)
        cartridge = self._train(records, rows, init, parent)
        row = self._given.registry.register(cartridge, actor="distillation")
        self._given.announce(row)
        return row

    def _registered(self) -> CartridgeRow | None:
        """The cartridge that an earlier attempt of this run registered."""
        rows = self._given.registry.list(self._run.domain)
        return next((row for row in rows if row.run_id == self._run.id), None)

    @staticmethod
    def _decided(row: CartridgeRow) -> Outcome:
        state: RunState = "promoted" if row.state in ("serving", "retired") else "rejected"
        return Outcome(state, {"cartridge": row.id, "fraction": 1.0, "detail": row.state_reason})

    def _previous(self) -> Cartridge | None:
        """The cartridge whose values training starts from, where it shall start from one."""
        wanted = self._config.cache_init
        if wanted.type != "pretrained":
            return None
        serving = self._given.registry.serving(self._run.domain)
        name = wanted.cartridge or (None if serving is None else serving.id)
        if name is None:
            return None
        if self._given.registry.get(name).stale:  # what was forgotten must not live on in its successors
            if wanted.cartridge is None:
                return None
            raise DistillationError(
                f"cache_init.cartridge: {name} is stale, it was trained on something that was forgotten since; name "
                "another one, or use cache_init.type text"
            )
        cartridge = self._given.shelf.get(name)
        if cartridge.manifest.model_fingerprint != self._given.loaded.fingerprint:
            if wanted.cartridge is None:  # of the model before: a text is the better beginning
                return None
            from memory.cartridges.cartridge import check_model

            check_model(cartridge.manifest, self._given.loaded)
        return cartridge

    def _initial(self, records: Sequence[Record], parent: Cartridge | None) -> KVPrefix:
        from memory.distillation.initialisers import initial_prefix

        self._stage("initial prefix")
        config = self._config
        clean = [self._redactor.record(record) for record in records if not record.deleted]
        seen = [record for record in clean if not self._kept_out(record)][:_INIT_RECORDS]
        history = teacher_messages("turns", config.system_prompt, "", seen)[:-1]
        return initial_prefix(
            self._given.loaded,
            config.cache_init,
            config.training.slots,
            frozen=config.training.frozen,
            history=history,
            previous=None if parent is None else parent.prefix,
            seed=config.training.seed,
        )

    def _train(
        self, records: Sequence[Record], rows: Sequence[Row], init: KVPrefix, parent: Cartridge | None
    ) -> Cartridge:
        from memory.cartridges.cartridge import make_cartridge
        from memory.distillation.train_adapter import train
        from memory.distillation.training_checkpoint import discard_training

        self._stage("training")
        config = self._config
        training = config.training
        if training.threads == 0:
            training = training.model_copy(update={"threads": self._given.threads})

        def attempt() -> TrainingResult:
            return train(
                self._given.loaded,
                [row for row in rows if row.split == "train"],
                divide(rows, config.gate, training.min_watched)[0],
                training,
                init,
                folder=self._folder,
                stop=self._stop,
                progress=self._training_progress,
                between=self._give_way,
            )

        try:
            result = attempt()
        except CheckpointUnusable as reason:  # rows, model or initial values are others than when it was begun
            logger.warning("run %s: training begins anew: %s", self._run.id, reason)
            discard_training(self._folder)
            result = attempt()
        if not result.finished:
            raise Interrupted
        self._tell({"training": result.metrics})
        lived = {record.id for record in records} if config.checkpoint_dir is None else set()
        return make_cartridge(
            self._given.loaded,
            result.prefix,
            domain=self._run.domain,
            run_id=self._run.id,
            frozen=result.frozen,
            parent=None if parent is None else parent.manifest.id,
            init=config.cache_init.model_dump(mode="json"),
            data_sha256=hashlib.sha256((self._folder / "dataset.parquet").read_bytes()).hexdigest(),
            steps=result.best_step,
            metrics=result.metrics,
            experience_ids=sorted(lived | set(() if parent is None else parent.experience_ids)),
        )

    def _judge(self, row: CartridgeRow, records: Sequence[Record], rows: Sequence[Row]) -> Outcome:
        """Ask the candidate what it has not seen, beside the prompts that it shall replace, and promote it or not."""
        registry, told = self._given.registry, {"cartridge": row.id}
        self._stage("gate", **told)
        self._refuse_forgotten(row)
        numbers, verdict = self._measure(row, records, rows)
        self._check_stop()
        metrics: dict[str, Any] = {"evaluation": numbers, "verdict": verdict.numbers()}
        files.write_json(self._folder / "gate.json", metrics)
        self._refuse_forgotten(row)
        try:
            if verdict.passed:
                row = registry.promote(row.id, actor="distillation", reason=verdict.reason, metrics=metrics)
            else:
                row = registry.reject(row.id, verdict.reason, actor="distillation", metrics=metrics)
        except CartridgeConflict:  # somebody was quicker
            self._refuse_forgotten(row)
            return self._decided(registry.get(row.id))
        self._given.announce(row)
        if exports := export_run(self._folder, self._config):
            metrics["exports"] = exports
        outcome: RunState = "promoted" if verdict.passed else "rejected"
        return Outcome(outcome, {**told, **metrics, "fraction": 1.0, "detail": verdict.reason})

    def _refuse_forgotten(self, row: CartridgeRow) -> None:
        """Fail where something that the candidate learned from was forgotten while the run went on.

        Whoever forgets marks the cartridges that there are; this one may not have been there yet.
        """
        registry = self._given.registry
        for stale in registry.refresh_stale(actor="distillation"):
            self._given.announce(stale)
        now = registry.get(row.id)
        if now.stale and now.state == "candidate":
            reason = "something that it was trained on was forgotten or corrected while it was made"
            self._given.announce(registry.reject(row.id, reason, actor="distillation"))
            raise DistillationError(f"{row.id}: {reason}; start another run, or wait for the schedule to do so")

    def _measure(
        self, row: CartridgeRow, records: Sequence[Record], rows: Sequence[Row]
    ) -> tuple[dict[str, Any], Verdict]:
        from memory.distillation.evaluation import Evaluation, evaluate
        from memory.distillation.gate import judge, nothing_to_rank, too_few

        _, held_out = divide(rows, self._config.gate, self._config.training.min_watched)
        gate = self._config.gate.decided(sum(item.target == "feedback" for item in held_out))
        questions = gate_questions(
            held_out,
            records,
            self._config,
            gate,
            redactor=self._redactor,
            count=self._count,
            context_length=self._given.loaded.context_length,
        )
        if len(questions) < gate.min_rows:  # measuring too few would only cost time
            return {"questions": len(questions)}, too_few(len(questions), gate)
        if gate.chosen == "ranked" and len(questions[0].candidates) < 2:
            return {"questions": len(questions)}, nothing_to_rank(gate)
        serving = self._given.registry.serving(self._run.domain)
        rival = None
        if serving is not None and serving.model_fingerprint == self._given.loaded.fingerprint:
            rival = self._given.shelf.get(serving.id).prefix
        arms = 3 + (rival is not None)
        begun: list[str] = []

        def progress(arm: str) -> None:
            begun.append(arm)
            self._tell({"detail": f"asking with {arm}", "fraction": self._within("gate", (len(begun) - 1) / arms)})
            self._check_stop()

        found: Evaluation = evaluate(
            self._given.loaded,
            questions,
            cartridge=self._given.shelf.get(row.id).prefix,
            serving=rival,
            threads=self._given.threads,
            between=self._give_way,
            progress=progress,
        )
        return found.numbers(), judge(found, gate)

    def _give_way(self) -> None:
        self._check_stop()
        self._given.between()

    # Helpers.

    def _kept_out(self, record: Record) -> bool:
        """Whether the configuration wants a redacted ``record`` in no memory, so not in the initial prefix either."""
        data = self._config.data
        strict = data.strict_hold_out and data.hold_out == "observations"
        return strict and split_of(content_key(record.observation), data.eval_share) == "eval"

    def _dataset_progress(self, now: DataProgress) -> None:
        self._tell(
            {
                "fraction": self._within("dataset", now.done / max(1, now.total)),
                "detail": f"{now.done} of {now.total} samples, {now.rows} rows, {now.bad} bad",
            }
        )

    def _training_progress(self, now: Progress) -> None:
        self._tell(
            {
                "fraction": self._within("training", now.step / max(1, now.steps)),
                "detail": f"step {now.step} of {now.steps}",
                "eta_s": round(now.eta_seconds, 1),
                "step": now.step,
                "loss": now.loss,
                "held_out": now.held_out,
            }
        )

    def _count(self, messages: Sequence[Mapping[str, Any]]) -> int:
        return len(self._given.engine.render(list(messages)))

    def _stage(self, stage: str, **more: Any) -> None:
        self._check_stop()
        self._tell({"stage": stage, "fraction": _BEGINS[stage], "eta_s": None, "detail": "", **more})

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise Interrupted

    def _within(self, stage: str, share: float) -> float:
        """The whole run's fraction at ``share`` of ``stage``."""
        begins = [*_BEGINS.values(), 1.0]
        place = list(_BEGINS).index(stage)
        return round(begins[place] + (begins[place + 1] - begins[place]) * min(1.0, max(0.0, share)), 4)


def _was_finished(record: Record) -> bool:
    """False for an answer that was cut off and that nobody judged: nothing learns from it."""
    return record.meta.get("finish_reason") != "cancelled" or is_judged(record)
