"""Trains a cartridge in this process: rows and an initial prefix in, a prefix that answers like the teacher out.

The model is frozen and shared; what is trained are the keys and values of p slots (``trainable.py``), by the gradient
that ``student.py`` finds of the loss in ``losses.py``, with Adam, a linear warm-up and a cosine. Everything about a run
lies in one folder (``training_checkpoint.py``), beside ``metrics.jsonl`` with a line per step and per evaluation.

Calling ``train_cartridge`` again with the same arguments goes on where the folder says, with the same next losses to
the bit (for the same number of threads). The result is the prefix with the lowest held-out loss, or the last one where
nothing is held out.

Under ``torchrun``, inside ``ranks.joined_ranks()``, the processes share each step's rows. What this does not do: make
rows, choose the initial prefix (``initialisers.py``), decide whether the result may serve (``gate.py``).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from memory.distillation.config import TrainingConfig
from memory.distillation.encoding import Encoder, Example, digest, row_name
from memory.distillation.errors import TrainerDiverged, TrainerError
from memory.distillation.losses import amount
from memory.distillation.ranks import Ranks
from memory.distillation.rows import Row
from memory.distillation.student import Between, RowLosses, Student
from memory.distillation.trainable import TrainablePrefix
from memory.distillation.training_batches import rows_of_step, steps_of
from memory.distillation.training_checkpoint import RunCheckpoints, RunState, collect, disk_errors, restore
from memory.distillation.usage import give_back_memory, torch_threads
from storage import files
from workspace.models import LoadedModel
from workspace.prefix import KVPrefix, fit_prefix

logger = logging.getLogger(__name__)

#: Of the learning rate at the end of its cosine, as upstream has it.
FINAL_SHARE = 0.1
_LEAST_SIZE = 1e-3  #: Adafactor's: a tensor of zeros learns, too
#: What may differ between two calls that go on with one run.
_FREE = {"threads", "time_budget_seconds", "save_every", "keep_last", "trainer"}
EndReason = Literal["steps", "early stop", "time budget", "stopped"]


@dataclass(frozen=True, slots=True)
class Progress:
    """One step, for a progress line."""

    step: int
    steps: int
    loss: float
    learning_rate: float
    rows_per_second: float
    eta_seconds: float  #: until all steps are done, at the pace of this call
    held_out: float | None  #: the newest held-out loss


@dataclass(frozen=True, eq=False)
class TrainingResult:
    """How a run ended. Not ``finished``: it was stopped, and goes on when it is called again."""

    prefix: KVPrefix  #: in the model's dtype
    frozen: int
    step: int  #: steps that were done
    best_step: int  #: the one that ``prefix`` is from
    reason: EndReason
    file: Path | None  #: ``cache-step{best_step}.pt``
    metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """False when it was stopped before its end."""
        return self.reason != "stopped"


class _Stopped(Exception):
    """No error: leaves a pass that nobody wants any more."""


def train_cartridge(
    loaded: LoadedModel,
    train: Sequence[Row],
    evaluation: Sequence[Row],
    config: TrainingConfig,
    init: KVPrefix,
    *,
    folder: Path,
    stop: threading.Event | None = None,
    progress: Callable[[Progress], None] | None = None,
    between: Between | None = None,
) -> TrainingResult:
    """Train in ``folder``, or go on there. One thread; ``stop`` ends it within a layer, with a checkpoint.

    ``between`` is called before every layer of every pass; it may wait, which holds the training. Raises
    ``TrainerError`` (``TrainerDiverged``, ``TrainerDiskFull``, ``CheckpointUnusable``), ``BadRow`` or ``InvalidPrompt``
    for a row that cannot be read, and ``PrefixMismatch`` for an initial prefix of another model.
    """
    ranks = Ranks.current()
    folder.mkdir(parents=True, exist_ok=True)
    lock = files.DataDirLock(folder) if ranks.first else None
    try:
        if lock is not None:
            try:
                lock.acquire()
            except files.DataDirInUse as error:
                raise TrainerError(f"{folder} is being trained in by process {error.owner.get('pid', '?')}") from None
            files.sweep_partials(folder)
        with torch_threads(config.threads), torch.enable_grad():
            run = _Run(loaded, train, evaluation, config, init, folder, ranks, stop, progress, between)
            return run.train()
    finally:
        give_back_memory()
        if lock is not None:
            lock.release()


class _Run:
    """One call of ``train_cartridge``."""

    def __init__(
        self,
        loaded: LoadedModel,
        train: Sequence[Row],
        evaluation: Sequence[Row],
        config: TrainingConfig,
        init: KVPrefix,
        folder: Path,
        ranks: Ranks,
        stop: threading.Event | None,
        progress: Callable[[Progress], None] | None,
        between: Between | None,
    ):
        if init.slots != config.slots:
            raise TrainerError(f"the initial prefix has {init.slots} slots, but training.slots is {config.slots}")
        self._loaded, self._config, self._ranks = loaded, config, ranks
        self._stop, self._progress, self._between = stop, progress, between
        self._waited = 0.0  #: seconds of this call in which others went first
        init = fit_prefix(loaded, init)
        encoder = Encoder(loaded)
        self._examples = self._encode(encoder, train, "train")
        self._held_out = self._encode(encoder, evaluation, "eval")
        if not self._examples:
            raise TrainerError("there are no rows to train on with a weight above 0; make some, or raise gold_weight")
        self._prefix = TrainablePrefix(init, config.frozen)
        self._parameters = self._prefix.parameters()
        self._optimizer = torch.optim.Adam(
            [{"params": [item], "size": _size(item, config.step_size)} for item in self._parameters],
            lr=config.learning_rate,
        )
        self._student = Student(loaded, loss=config.loss, between=self._give_way)
        self._steps = steps_of(len(self._examples), config.rows, config.max_steps, config.epochs)
        self._state = RunState()
        self._best = init
        self._folder, self._log = folder, folder / "metrics.jsonl"
        identity = {
            "model": loaded.fingerprint,
            "init": _prefix_digest(init),
            "train": digest(self._examples),
            "eval": digest(self._held_out),
            "training": config.model_dump(mode="json", exclude=_FREE),
        }
        self._checkpoints = RunCheckpoints(folder, identity, config.keep_last)

    def _encode(self, encoder: Encoder, rows: Sequence[Row], split: str) -> list[Example]:
        config = self._config
        options = {"top_k": config.top_k, "max_tokens": config.max_tokens, "gold_weight": config.gold_weight}
        found = [
            encoder.example(row, name=f"{split} {row_name(index, row)}", **options)  # type: ignore[arg-type]
            for index, row in enumerate(rows)
        ]
        found = [example for example in found if example.weight > 0]
        longest = max((len(example.token_ids) for example in found), default=0)
        if config.slots + longest > self._loaded.context_length:
            raise TrainerError(
                f"{config.slots} slots and a row of {longest} tokens exceed the context of {self._loaded.name} "
                f"({self._loaded.context_length}); lower training.slots or training.max_tokens"
            )
        return found

    # The run.

    def train(self) -> TrainingResult:
        """All remaining steps."""
        self._resume()
        began, first, spent = time.perf_counter(), self._state.step, self._state.seconds
        config, state = self._config, self._state
        try:
            while True:
                if self._held_out and (state.step % config.evaluate_every == 0 or state.step == self._steps):
                    self._evaluate()
                if state.step % config.save_every == 0:
                    self._save()
                reason = self._over()
                if reason is not None:
                    return self._end(reason)
                loss, rate = self._step()
                passed = time.perf_counter() - began
                state.seconds = spent + passed - self._waited
                self._report(loss, rate, passed / (state.step - first))
        except _Stopped:
            return self._end("stopped")

    def _report(self, loss: float, rate: float, pace: float) -> None:
        """A line for the log and a word for the caller; ``pace`` is seconds per step."""
        state = self._state
        self._write_log({"step": state.step, "loss": loss, "learning_rate": rate, "seconds": round(state.seconds, 3)})
        if self._progress is not None and self._ranks.first:
            rows = min(self._config.rows, len(self._examples)) / pace
            held_out = state.held_out if math.isfinite(state.held_out) else None
            self._progress(
                Progress(state.step, self._steps, loss, rate, rows, pace * (self._steps - state.step), held_out)
            )

    def _over(self) -> EndReason | None:
        """Why the run ends now, if it does; the same answer in all processes."""
        state, config = self._state, self._config
        if self._ranks.any(self._stop is not None and self._stop.is_set()):
            return "stopped"
        if state.step >= self._steps:
            return "steps"
        if config.early_stop_patience and state.worse >= config.early_stop_patience:
            return "early stop"
        budget = config.time_budget_seconds
        if self._ranks.any(budget is not None and state.seconds >= budget):
            return "time budget"
        return None

    def _step(self) -> tuple[float, float]:
        """The next batch; its loss and the learning rate. Raises ``TrainerDiverged`` with everything as it was."""
        config, ranks, state = self._config, self._ranks, self._state
        chosen = [
            self._examples[index] for index in rows_of_step(state.step, len(self._examples), config.rows, config.seed)
        ]
        total = sum(amount(example, config.loss) for example in chosen)
        mine = sorted(chosen, key=lambda item: item.fed)[ranks.rank :: ranks.size]
        self._optimizer.zero_grad(set_to_none=True)
        found = self._student.learn(self._prefix.layers(), mine, total) if mine else []
        shared = torch.tensor([sum(item.weighted() for item in found) / total], device=self._loaded.device)
        ranks.sum([shared, *self._gradients()])
        loss = float(shared)
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, config.clip_norm))
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise self._diverged(loss, norm, found, chosen)
        rate = config.learning_rate * learning_share(state.step + 1, self._steps, config.warmup_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group["size"]
        self._optimizer.step()
        state.step += 1
        state.first_loss = loss if state.step == 1 else state.first_loss
        state.loss = loss
        return loss, rate

    def _gradients(self) -> list[Tensor]:
        for parameter in self._parameters:
            if parameter.grad is None:  # a process without rows
                parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in self._parameters if parameter.grad is not None]

    def _diverged(
        self, loss: float, norm: float, found: Sequence[RowLosses], chosen: Sequence[Example]
    ) -> TrainerDiverged:
        bad = [example for item in found for example, losses in item.by_example() if not bool(losses.isfinite().all())]
        names = ", ".join(example.name for example in bad or chosen)
        which = "rows at fault" if bad else "rows of the step"
        return TrainerDiverged(
            f"step {self._state.step + 1}: loss {loss}, gradient norm {norm}; {which}: {names}. The prefix is as it "
            f"was after step {self._state.step}. Look at these rows, or lower training.learning_rate, and start in a "
            "new folder, from the last checkpoint if you like (cache_init.type: pretrained)"
        )

    def _give_way(self) -> None:
        """Before each layer: let others go first, and leave the step when it is not wanted any more."""
        if self._stop is not None and self._stop.is_set() and self._ranks.size == 1:
            raise _Stopped
        if self._between is not None:
            began = time.perf_counter()
            self._between()
            self._waited += time.perf_counter() - began

    # Looking after it.

    def _evaluate(self) -> None:
        """The held-out loss, once for each step; keeps the best prefix."""
        if self._state.evaluated == self._state.step:
            return
        mine = self._held_out[self._ranks.rank :: self._ranks.size]
        with torch.no_grad():
            found = self._student.losses(self._prefix.layers(), mine) if mine else []
        total = sum(amount(example, self._config.loss) for example in self._held_out)
        shared = torch.tensor([sum(item.weighted() for item in found) / total], device=self._loaded.device)
        self._ranks.sum([shared])
        state, loss = self._state, float(shared)
        state.held_out, state.evaluated = loss, state.step
        if state.step == 0:
            state.first_held_out = loss
        if loss < state.best_held_out:  # never true of NaN
            state.best_held_out, state.best_step, state.worse = loss, state.step, 0
            self._best = self._prefix.prefix(self._loaded.dtype)
        else:
            state.worse += 1
        self._write_log(
            {"step": state.step, "held_out": loss if math.isfinite(loss) else None, "best_step": state.best_step}
        )

    def _save(self) -> None:
        state = self._state
        if self._ranks.first and state.step and not self._checkpoints.has(state.step):
            tensors = collect(state, self._prefix, self._optimizer, self._best)
            self._checkpoints.write(state.step, tensors, self._prefix.prefix(self._loaded.dtype), self._config.frozen)

    def _resume(self) -> None:
        found = self._checkpoints.newest()
        if found is not None:
            self._state, self._best = restore(found[1], self._prefix, self._optimizer)
            logger.info("%s: going on after step %d", self._folder, self._state.step)
        if self._ranks.first:  # without a checkpoint, nothing counts that a log says
            lines = _lines(self._log) if found is not None else []
            told = [(line, json.loads(line)) for line in lines]
            kept = [line for line, item in told if item["step"] <= self._state.step and "ended" not in item]
            with disk_errors(self._folder):
                files.write_bytes(self._log, "".join(line + "\n" for line in kept).encode())
        self._ranks.wait()

    def _end(self, reason: EndReason) -> TrainingResult:
        state = self._state
        if reason == "time budget" and self._held_out:
            self._evaluate()
        self._save()
        if not self._held_out:
            state.best_step, self._best = state.step, self._prefix.prefix(self._loaded.dtype)
        file = None
        if self._ranks.first and reason != "stopped":
            file = self._checkpoints.choose(state.best_step, self._best, self._config.frozen)
            self._write_log({"step": state.step, "ended": reason, **state.numbers()})
        self._ranks.wait()
        metrics = {
            **state.numbers(),
            "reason": reason,
            "steps": state.step,
            "rows": len(self._examples),
            "held_out_rows": len(self._held_out),
        }
        return TrainingResult(self._best, self._config.frozen, state.step, state.best_step, reason, file, metrics)

    def _write_log(self, line: dict[str, Any]) -> None:
        if self._ranks.first:
            with disk_errors(self._folder):
                files.append_line(self._log, json.dumps(line))


def _size(parameter: Tensor, how: Literal["relative", "absolute"]) -> float:
    """What a learning rate of 1 moves a number of ``parameter`` by.

    Root mean square, as Adafactor's relative step (arXiv 1804.04235, algorithm 4): keys are some hundred times larger
    than the first layer's values, and a step that moves the one moves nothing, or tears the other apart.
    """
    if how == "absolute":
        return 1.0
    return max(_LEAST_SIZE, float(parameter.detach().double().square().mean().sqrt()))


def learning_share(step: int, steps: int, warmup: int) -> float:
    """Share of the learning rate in ``step`` (from 1): linear warm-up, then a cosine down to ``FINAL_SHARE``."""
    warmup = min(warmup, steps - 1)
    if step <= warmup:
        return step / warmup
    way = (step - warmup) / max(1, steps - warmup)
    return FINAL_SHARE + (1 - FINAL_SHARE) * (1 + math.cos(math.pi * way)) / 2


def _prefix_digest(prefix: KVPrefix) -> str:
    found = hashlib.sha256()
    for tensor in (*prefix.keys, *prefix.values):
        found.update(np.ascontiguousarray(tensor.detach().float().cpu().numpy()).tobytes())
    return found.hexdigest()


def _lines(path: Path) -> list[str]:
    """Whole lines of a log; a torn last one is left out."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return text[: text.rfind("\n") + 1].splitlines()
