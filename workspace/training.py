"""Training of the workspace: captured texts and a recipe in, weights for ``workspace.state_path`` out.

The language model is frozen; gradients pass through it into virtual tokens and deltas, and on into slots, projector and
probes. Everything about a run lies in one folder:

    progress.jsonl   one line per step, one per evaluation
    checkpoints/     enough to go on after ``kill -9`` with the same next losses, to the bit
    state/           the weights, written at the end (``WorkspaceModules.save``)

Calling ``train`` again with the same arguments goes on where the folder says; a finished run is only saved again.
What is minimised is in ``training_losses.py``, what a step sees in ``training_data.py``, one pass of the student in
``training_forward.py``, the recipe in ``training_config.py``, checkpoints in ``training_checkpoint.py``.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from storage import files
from workspace.calibration import observe_text
from workspace.capture_blob import Blob
from workspace.capture_folder import Capture, CaptureEntry
from workspace.errors import TrainingConfigError, TrainingDiverged, TrainingError
from workspace.held_out import ArmLoss, held_out_blobs, measure, steered
from workspace.hooking import HookedModel
from workspace.models import LoadedModel
from workspace.modules import WorkspaceModules
from workspace.projector import ModuleShape
from workspace.training_checkpoint import Checkpoints, Place, collect, restore
from workspace.training_config import TrainingConfig
from workspace.training_data import Batch, assemble, check_layers, check_model, draw_rows, epoch_batches, of_split
from workspace.training_forward import DeltaMaker, Student, slots_after
from workspace.training_losses import Losses, losses_of

logger = logging.getLogger(__name__)

#: Texts whose real keys and values give the projector its lengths.
_OBSERVED = 8
_SLOTS_AND_PROBES = ("features.weight", "features.offset", "slots.", "projector.norm.")
#: Parameters of each part, by the beginnings of their names.
_PARAMETERS: dict[str, tuple[str, ...]] = {
    "virtual_kv": (
        *_SLOTS_AND_PROBES,
        "projector.weight",
        "projector.offset",
        "projector.gain",
        "projector.bias",
    ),
    "static_tokens": ("projector.static_",),
    "residual_delta": (
        *_SLOTS_AND_PROBES,
        "projector.basis",
        "projector.read",
        "projector.gate",
    ),
    "controller": ("controller.",),
}


@dataclass(frozen=True, slots=True)
class StepReport:
    """One step, for a progress line."""

    step: int
    steps: int
    epoch: int
    losses: dict[str, float]
    seconds: float  #: of this step
    tokens: int  #: predicted in it
    left: float  #: seconds until the end, at the pace so far


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """How a run ended. ``finished`` False: it was stopped, and goes on when it is called again."""

    finished: bool
    step: int
    state: Path | None
    metrics: dict[str, Any]


Progress = Callable[[StepReport], None]


def train(
    loaded: LoadedModel,
    capture: Capture,
    output: Path,
    config: TrainingConfig,
    *,
    fingerprints: Sequence[str] = (),
    begin: Path | None = None,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> TrainingResult:
    """Train in the folder ``output``, or go on there. Everything is one thread; ``stop`` ends it after a step.

    ``fingerprints``: of the same model in other dtypes, for which the weights shall count as well. ``begin``: weights
    to start from. Raises ``TrainingError``, ``CaptureError``, ``StateError`` and ``InvalidWorkspace``.
    """
    prints = tuple(dict.fromkeys((loaded.fingerprint, *fingerprints)))
    check_model(capture, prints)
    layers = config.workspace.hooked_layers or (capture.header.layers if capture.header else None)
    hooked = HookedModel(loaded, layers)
    output.mkdir(parents=True, exist_ok=True)
    lock = files.DataDirLock(output)
    try:
        try:
            lock.acquire()
        except files.DataDirInUse as error:
            raise TrainingError(f"{output} is being trained in by process {error.owner.get('pid', '?')}") from None
        files.sweep_partials(output)
        check_layers(capture, ModuleShape.of(hooked))
        return _Run(hooked, capture, output, config, prints, begin, progress).train(stop)
    finally:
        lock.release()
        hooked.remove()


class _Run:
    """One call of ``train``."""

    def __init__(
        self,
        hooked: HookedModel,
        capture: Capture,
        output: Path,
        config: TrainingConfig,
        fingerprints: tuple[str, ...],
        begin: Path | None,
        progress: Progress | None,
    ):
        self._hooked, self._capture, self._output, self._config = hooked, capture, output, config
        self._fingerprints, self._progress = fingerprints, progress
        self._student = Student(hooked)
        self._entries = of_split(capture, "train")
        if not self._entries:
            raise TrainingConfigError(f"{capture.manifest} lists no texts of the split train; capture some")
        self._held_out = held_out_blobs(capture, config.held_out_rows)
        self._per_epoch = len(epoch_batches(self._entries, config.rows, config.seed, 0))
        wanted = config.epochs * self._per_epoch
        self._steps = min(wanted, config.most_steps or wanted)
        self._modules = self._begin(begin)
        self._optimizer = _optimizer(self._modules, config)
        self._generator = torch.Generator().manual_seed(config.seed)
        self._place = Place()
        identity = {
            "model": hooked.loaded.fingerprint,
            "layers": hooked.layers,
            "texts": capture.digest,
            "begin": None if begin is None else str(begin),
            "recipe": config.model_dump(mode="json"),
        }
        self._checkpoints = Checkpoints(output / "checkpoints", identity, config.keep_checkpoints)
        self._log = output / "progress.jsonl"
        self._bare: dict[tuple[str, int | None], ArmLoss] = {}

    def train(self, stop: threading.Event | None) -> TrainingResult:
        """All remaining steps."""
        self._resume()
        started, before = time.perf_counter(), self._place.step
        while self._place.step < self._steps:
            if stop is not None and stop.is_set():
                self._save_checkpoint()
                return TrainingResult(False, self._place.step, None, {})
            begun = time.perf_counter()
            losses, tokens = self._step()
            taken = time.perf_counter() - begun
            place, done = self._place, self._place.step - before
            pace = (time.perf_counter() - started) / done
            report = StepReport(
                place.step, self._steps, place.epoch, losses, taken, tokens, pace * (self._steps - place.step)
            )
            self._write_log({"step": place.step, **losses, "seconds": round(taken, 3)})
            if self._progress is not None:
                self._progress(report)
            if place.step % self._config.evaluate_every == 0 and place.step < self._steps:
                self._write_log({"step": place.step, "held_out": self._evaluate()})
            if place.step % self._config.checkpoint_every == 0:
                self._save_checkpoint()
        self._save_checkpoint()
        return self._finish()

    # Beginning.

    def _begin(self, begin: Path | None) -> WorkspaceModules:
        """Modules to start from: loaded, or new ones that know how long real keys and values are."""
        shape, loaded = ModuleShape.of(self._hooked), self._hooked.loaded
        if begin is not None:
            modules = WorkspaceModules.load(
                begin, fingerprint=loaded.fingerprint, shape=shape, config=self._config.workspace
            )
            return modules.to(loaded.device)
        modules = WorkspaceModules(shape, self._config.workspace, seed=self._config.seed).to(loaded.device)
        with torch.no_grad():  # nobody trains it, and a random projection of memories would only disturb the slots
            modules.features.memory.weight.zero_()
            modules.features.memory.bias.zero_()
        for number, entry in enumerate(self._entries[:_OBSERVED]):
            self._observe(modules, self._capture.read(entry), first=number == 0)
        return modules

    def _observe(self, modules: WorkspaceModules, blob: Blob, *, first: bool) -> None:
        """Take a text's real keys and values into the running norms; static tokens start as those of the first."""
        real = observe_text(self._hooked, modules.projector, blob.input_ids)
        wanted = self._config.workspace.static_tokens
        if first and wanted:
            if wanted > blob.tokens:
                raise TrainingConfigError(f"workspace.static_tokens ({wanted}) exceeds the tokens of a text; lower it")
            modules.projector.begin_static(
                {layer: (keys[0, :, :wanted], values[0, :, :wanted]) for layer, (keys, values) in real.items()}
            )

    def _resume(self) -> None:
        found = self._checkpoints.newest()
        if found is not None:
            self._place, tensors = found
            restore(tensors, self._modules, self._optimizer, self._generator)
            logger.info("going on after step %d", self._place.step)
        kept = [line for line in _lines(self._log) if json.loads(line)["step"] <= self._place.step]
        files.write_bytes(self._log, "".join(line + "\n" for line in kept).encode())

    # One step.

    def _step(self) -> tuple[dict[str, float], int]:
        """The next batch; returns its losses and how many tokens it predicted."""
        config, place = self._config, self._place
        batches = epoch_batches(self._entries, config.rows, config.seed, place.epoch)
        chosen = batches[place.batch]
        blobs = [self._capture.read(entry) for entry in chosen]
        draws, _ = draw_rows(blobs, config, self._generator)
        batch = assemble(blobs, draws, config)
        rate = learning_share(place.step + 1, self._steps, config)
        for group in self._optimizer.param_groups:
            group["lr"] = group["full_rate"] * rate
        losses = self._losses(batch)
        self._optimizer.zero_grad(set_to_none=True)
        losses.total.backward()  # type: ignore[no-untyped-call]
        parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm))
        numbers = losses.numbers()
        if not all(math.isfinite(value) for value in (*numbers.values(), norm)):
            raise TrainingDiverged(
                f"step {place.step + 1}: losses {numbers}, gradient norm {norm} are not all finite; texts "
                f"{', '.join(self._path(entry) for entry in chosen)}; lower learning_rate and go on from the last "
                "checkpoint in a new folder"
            )
        self._optimizer.step()
        following = place.batch + 1
        ended = following == len(batches)
        self._place = Place(place.step + 1, place.epoch + ended, 0 if ended else following)
        return {**numbers, "gradient_norm": norm}, int(batch.target_mask.sum())

    def _losses(self, batch: Batch) -> Losses:
        config, modules = self._config, self._modules
        modules.train()
        slots = slots_after(modules, batch.updates)
        logits = controller = None
        if config.steers:
            dtype = self._hooked.loaded.dtype
            broadcast, static = steered(modules, slots, batch.births, dtype, config.parts)
            deltas = DeltaMaker(modules, slots, config.delta_rounds) if "residual_delta" in config.parts else None
            logits = self._student.logits(batch, broadcast, static, deltas)
        if batch.controller_inputs is not None:
            controller = self._controller(batch, slots.detach())
        return losses_of(batch, logits, controller, config.losses)

    def _controller(self, batch: Batch, slots: Tensor) -> Tensor:
        """Logits [R, F, 4] of the network for every token; the slots are what they were at the birth."""
        assert batch.controller_inputs is not None
        rows, fed, _ = batch.controller_inputs.shape
        inputs = batch.controller_inputs.reshape(rows * fed, -1).to(slots.device)
        logits: Tensor = self._modules.controller(inputs, slots.repeat_interleave(fed, dim=0))
        return logits.view(rows, fed, -1)

    def _path(self, entry: CaptureEntry) -> str:
        return str(self._capture.manifest.parent / entry.file)

    # Looking after it.

    def _evaluate(self) -> dict[str, Any]:
        """Held-out losses by kind and context: without, and what the modules change."""
        if not self._held_out or not self._config.steers:
            return {}
        keeps = (None, *self._config.keep[:1])
        if not self._bare:
            bare = measure(self._student, self._modules, self._held_out, self._config, arms=("none",), keeps=keeps)
            self._bare = {(item.kind, item.keep): item for item in bare}
        found = measure(self._student, self._modules, self._held_out, self._config, arms=("trained",), keeps=keeps)
        told: dict[str, Any] = {}
        for item in found:
            base = self._bare[item.kind, item.keep]
            change, error = item.against(base)
            told.setdefault(item.kind, {})["whole" if item.keep is None else f"last {item.keep}"] = {
                "without": round(base.mean, 4),
                "change": round(change, 4),
                "error": round(error, 4),
            }
        return told

    def _save_checkpoint(self) -> None:
        self._checkpoints.write(self._place, collect(self._modules, self._optimizer, self._generator))

    def _finish(self) -> TrainingResult:
        metrics: dict[str, Any] = {"seed": self._config.seed, "held_out": self._evaluate()}
        self._write_log({"step": self._place.step, "held_out": metrics["held_out"]})
        state = self._output / "state"
        self._modules.eval().save(
            state,
            model_name=self._hooked.loaded.name,
            fingerprints=self._fingerprints,
            step=self._place.step,
            parts=self._config.parts,
            data_digest=self._capture.digest,
            metrics=metrics,
        )
        return TrainingResult(True, self._place.step, state, metrics)

    def _write_log(self, line: dict[str, Any]) -> None:
        files.append_line(self._log, json.dumps(line))


def learning_share(step: int, steps: int, config: TrainingConfig) -> float:
    """Share of the learning rate in ``step`` (from 1): linear warm-up, then a cosine down to ``final_share``."""
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    way = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.final_share + (1 - config.final_share) * (1 + math.cos(math.pi * way)) / 2


def _optimizer(modules: WorkspaceModules, config: TrainingConfig) -> torch.optim.AdamW:
    """Over the parameters of the trained parts; all others are frozen."""
    wanted = tuple(prefix for part in config.parts for prefix in _PARAMETERS[part])
    groups: dict[bool, list[Tensor]] = {False: [], True: []}
    for name, parameter in modules.named_parameters():
        parameter.requires_grad_(name.startswith(wanted))
        if parameter.requires_grad:
            groups[name.startswith("projector.static_")].append(parameter)
    rates = {False: config.learning_rate, True: config.static_learning_rate}
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr": rates[static], "full_rate": rates[static]}
            for static, parameters in groups.items()
            if parameters
        ],
        betas=(0.9, 0.98),
        weight_decay=config.weight_decay,
    )


def _lines(path: Path) -> list[str]:
    """Whole lines of a log; a torn last one is left out."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return text[: text.rfind("\n") + 1].splitlines()
