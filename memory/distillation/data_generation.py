"""From experiences to the dataset of one run: replay and self-study, journalled, resumable, bounded.

    history -> redaction -> latest judged of equal ones -> strategy -> teacher -> journal.jsonl -> dataset.parquet

In the run's folder lie ``journal.jsonl`` (what became of each sample, the truth while the run goes on),
``dataset.parquet`` (the rows, in the order of the samples) and ``data_report.json`` (counts; never texts of the
history). A run that is killed or stopped goes on where it was; a teacher that is down ends it with
``TeacherUnavailable`` and keeps what it said before.

Not here: which experiences (the pipeline), training, the gate.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lm.types import LanguageModel
from memory.distillation.answers import CORRECTION
from memory.distillation.config import DistillConfig
from memory.distillation.dataset import write_dataset
from memory.distillation.errors import NothingToDistil, TeacherRefused, TeacherUnavailable
from memory.distillation.journal import Journal, Outcome
from memory.distillation.leftovers import DATASET, JOURNAL
from memory.distillation.making import RowMaker, Task
from memory.distillation.prompt_builder import Count, PromptBuilder, estimate_tokens
from memory.distillation.redaction import Redactor
from memory.distillation.replay_env import ReplayEnvironment
from memory.distillation.rows import Row
from memory.distillation.strategies.formation import make_strategy
from memory.distillation.teaching import Refused, Stopped, Teacher
from memory.history import Record
from storage import files

REPORT = "data_report.json"
#: Refusals in a row, with no answer ever, after which the teacher is taken to refuse everything.
_HOPELESS = 3
_BATCH = 100  # outcomes without a teacher that are journalled at once


@dataclass(frozen=True, slots=True)
class DataProgress:
    """Where a run stands, in samples."""

    done: int
    total: int
    rows: int
    bad: int


@dataclass(frozen=True)
class DataReport:
    """What a run made. ``complete`` is False when it was stopped: there is no dataset yet, only the journal."""

    complete: bool
    path: Path
    rows: int
    train_rows: int
    eval_rows: int
    resumed: int  #: samples that an earlier attempt had done
    kinds: dict[str, int]  #: rows by kind
    targets: dict[str, int]  #: rows by target
    skipped: dict[str, int]  #: samples that became no row on purpose, by reason
    bad: list[tuple[str, str]]  #: samples that should have become a row, with the reason
    redactions: dict[str, int]  #: by kind
    teacher_prompt_tokens: int
    experiences_dropped: int  #: left out of prompts for want of room, summed over prompts
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        return {**asdict(self), "path": self.path.name, "bad": [list(item) for item in self.bad]}


def generate_dataset(
    records: Sequence[Record],
    config: DistillConfig,
    folder: Path,
    *,
    teacher: LanguageModel | None = None,
    count: Count = estimate_tokens,
    stop: threading.Event | None = None,
    progress: Callable[[DataProgress], None] | None = None,
    restart: bool = False,
) -> DataReport:
    """Make ``folder/dataset.parquet`` from ``records`` (one domain's), or go on making it.

    ``count`` measures prompts as the teacher's template makes them. ``stop`` ends the run between two samples.
    ``restart`` throws an earlier journal away. Raises ``NothingToDistil``, ``TeacherUnavailable``, ``TeacherRefused``,
    ``JournalMismatch``.
    """
    started = time.monotonic()
    stop = stop or threading.Event()
    redactor = Redactor(config.data.redact)
    newest = sorted(records, key=lambda record: record.id)[-config.data.max_records :]
    clean = [redactor.record(record) for record in newest if not record.deleted]
    replay = replay_environment(clean, config, count)
    asked = None if teacher is None else Teacher(teacher, config.teacher, stop)
    maker = RowMaker(replay, config, asked, _builder(config, count))
    tasks = maker.tasks()
    if not tasks:
        raise NothingToDistil(
            f"of {len(records)} experiences none can become a row with data.targets={config.data.targets}; "
            "live through more of them, give feedback, or choose other targets"
        )
    if restart:
        (folder / JOURNAL).unlink(missing_ok=True)
    journal = Journal(folder / JOURNAL, _identity(newest, config, asked))
    open_tasks = [task for task in tasks if task.name not in journal]
    if asked is None and any(task.needs_teacher for task in open_tasks):
        raise TeacherRefused(
            "these targets need a teacher, and none was given; pass one, or set data.targets: feedback"
        )
    run = _Run(journal, config, stop, progress, tasks, resumed=len(tasks) - len(open_tasks))
    run.work(open_tasks)
    return _finish(run, folder, dict(redactor.counts), started)


def replay_environment(records: Sequence[Record], config: DistillConfig, count: Count) -> ReplayEnvironment:
    """The samples that a dataset of ``records`` is made of, with their prompts; ``records`` are redacted already."""
    strategy = make_strategy(config.strategy, config.seed)
    return ReplayEnvironment(records, strategy, _builder(config, count), config.data, config.seed)


def _builder(config: DistillConfig, count: Count) -> PromptBuilder:
    return PromptBuilder(
        config.data.prompt_style,
        config.system_prompt,
        count,
        config.teacher.max_prompt_tokens,
        apply_corrections=config.data.apply_corrections,
        merge_turns=config.data.merge_turns,
    )


def _identity(records: Sequence[Record], config: DistillConfig, teacher: Teacher | None) -> dict[str, str]:
    """What rows are a function of. Patience and parallelism change none."""
    free = {"attempts", "backoff_seconds", "max_backoff_seconds", "parallel", "api_key_env"}
    settings = {
        "strategy": config.strategy.model_dump(mode="json"),
        "teacher": config.teacher.model_dump(mode="json", exclude=free),
        "data": config.data.model_dump(mode="json"),
        "top": [config.top_logprobs, config.top_mass],
        "system_prompt": config.system_prompt,
        "failure_weight": config.training.failure_weight,
        "seed": config.seed,
    }
    lived = [
        [item.id, item.content_hash, item.feedback, item.score, item.meta.get(CORRECTION), item.deleted]
        for item in records
    ]
    return {
        "settings": _sha256(settings),
        "history": _sha256(lived),
        "teacher": "" if teacher is None else teacher.name,
    }


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class _Run:
    """One attempt: hands tasks to threads, and what comes back to the journal, all from one thread."""

    def __init__(
        self,
        journal: Journal,
        config: DistillConfig,
        stop: threading.Event,
        progress: Callable[[DataProgress], None] | None,
        tasks: Sequence[Task],
        resumed: int,
    ):
        self.journal, self.config, self.stop, self.tasks, self.resumed = journal, config, stop, tasks, resumed
        self._progress = progress
        earlier = journal.outcomes(task.name for task in tasks)
        self._answered = any(item.row is not None and item.row.target == "teacher" for item in earlier)
        self._refused: list[Outcome] = []
        self._rows = self._bad = 0

    def work(self, tasks: Sequence[Task]) -> None:
        """Do ``tasks`` until they are done or the stop event is set."""
        self._tell(self.resumed)
        self._without_teacher([task for task in tasks if not task.needs_teacher])
        self._with_teacher([task for task in tasks if task.needs_teacher])
        if self._refused and not self.stop.is_set():
            raise self._hopeless()

    def _without_teacher(self, tasks: Sequence[Task]) -> None:
        for begin in range(0, len(tasks), _BATCH):
            if self.stop.is_set():
                return
            self._note([task.make() for task in tasks[begin : begin + _BATCH]])

    def _with_teacher(self, tasks: Sequence[Task]) -> None:
        waiting = iter(tasks)
        parallel = self.config.teacher.parallel
        with ThreadPoolExecutor(parallel, thread_name_prefix="distill-teacher") as pool:
            running: dict[Future[Outcome], Task] = {}
            failed: TeacherUnavailable | None = None
            while True:
                while len(running) < parallel and failed is None and not self.stop.is_set():
                    task = next(waiting, None)
                    if task is None:
                        break
                    running[pool.submit(task.make)] = task
                if not running:
                    break
                ready, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in ready:
                    try:
                        self._teacher_said(running.pop(future), future)
                    except TeacherUnavailable as error:
                        failed = failed or error
            if failed is not None:
                raise failed

    def _teacher_said(self, task: Task, future: Future[Outcome]) -> None:
        try:
            outcome = future.result()
        except Stopped:
            return
        except Refused as error:
            outcome = Outcome(task.name, None, str(error), bad=True)
            if not self._answered:  # it may refuse everything: then nothing is settled about this sample
                self._refused.append(outcome)
                if len(self._refused) >= _HOPELESS:
                    raise self._hopeless() from error
                return
        self._answered = self._answered or not outcome.bad
        self._note([outcome])
        if self._answered and self._refused:
            self._note(self._refused)
            self._refused = []

    def _hopeless(self) -> TeacherRefused:
        return TeacherRefused(
            f"the teacher refused the first {len(self._refused)} requests: {self._refused[-1].reason}"
        )

    def _note(self, outcomes: Sequence[Outcome]) -> None:
        self.journal.append(outcomes)
        self._rows += sum(outcome.row is not None for outcome in outcomes)
        self._bad += sum(outcome.bad for outcome in outcomes)
        self._tell(len(self.journal))

    def _tell(self, done: int) -> None:
        if self._progress is not None:
            self._progress(DataProgress(done, len(self.tasks), self._rows, self._bad))


def _finish(run: _Run, folder: Path, redactions: dict[str, int], started: float) -> DataReport:
    names = [task.name for task in run.tasks]
    complete = all(name in run.journal for name in names)
    tally = _Tally()
    path = folder / DATASET
    if complete:
        write_dataset(path, _rows(run.journal, names, tally, run.config))
    else:
        for _ in _rows(run.journal, names, tally, run.config):
            pass
    report = DataReport(
        complete=complete,
        path=path,
        rows=sum(tally.splits.values()),
        train_rows=tally.splits["train"],
        eval_rows=tally.splits["eval"],
        resumed=run.resumed,
        kinds=dict(tally.kinds),
        targets=dict(tally.targets),
        skipped=dict(tally.skipped),
        bad=tally.bad,
        redactions=redactions,
        teacher_prompt_tokens=tally.tokens,
        experiences_dropped=tally.dropped,
        seconds=round(time.monotonic() - started, 3),
    )
    if complete:
        files.write_json(folder / REPORT, report.to_json())
        if not tally.splits["train"]:
            reasons = sorted({reason for _, reason in tally.bad} | set(tally.skipped))
            raise NothingToDistil(f"no sample became a row to train on: {'; '.join(reasons) or 'all are held out'}")
    return report


class _Tally:
    """Counts over the rows of a dataset."""

    def __init__(self) -> None:
        self.splits: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.targets: Counter[str] = Counter()
        self.skipped: Counter[str] = Counter()
        self.bad: list[tuple[str, str]] = []
        self.tokens = self.dropped = 0

    def outcome(self, outcome: Outcome) -> None:
        row = outcome.row
        if row is None:
            if outcome.bad:
                self.bad.append((outcome.sample, outcome.reason))
            else:
                self.skipped[outcome.reason] += 1
            return
        self.kinds[row.type] += 1
        self.targets[row.target] += 1
        self.tokens += int(row.metadata.get("teacher_tokens", 0))
        self.dropped += int(row.metadata.get("dropped", 0))


def _rows(journal: Journal, names: Sequence[str], tally: _Tally, config: DistillConfig) -> Iterator[Row]:
    """The rows in the order of the samples; one that is asked again comes a second time, for evaluation."""
    for outcome in journal.outcomes(names):
        tally.outcome(outcome)
        if outcome.row is None:
            continue
        row = outcome.row
        tally.splits[row.split] += 1
        yield row
        if row.metadata.get("asked_again"):
            tally.splits["eval"] += 1
            yield Row(row.messages, row.system_prompt, {**row.metadata, "split": "eval"}, row.type)
