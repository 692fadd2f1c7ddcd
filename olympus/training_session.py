"""One kernel's training from checkpoint to rest: the steps and the decisions, without threads.

A step: draw a batch, deeply supervised loss, DiagonalFisher, EMA. Every ``evaluate_every`` steps the EMA sits the
examination (and every ``RAW_EVERY``-th time the trained weights do, for comparison). The EMA with the lowest held-out
loss so far is ``best``, and that is what queries get unless they ask for ``latest``. When the held-out part changes,
the best weights sit the new examination too, so that old and new are never compared on different questions.

The rules of rest and waking are in ``resting``. A kernel that wakes gets a fresh Phi window and fresh patience.

Phi is measured every ``phi_every`` steps or less often, so that its cost stays within 10 % of the training time. It is
never part of the loss, so its schedule does not touch the weights: a restored kernel repeats its losses bit by bit.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from typing import Any

import torch

from olympus import resting
from olympus.checkpoints import CheckpointStore
from olympus.errors import CheckpointInvalid, OlympusError
from olympus.examination import Examiner
from olympus.experience_buffer import Example, ExperienceBuffer
from olympus.experience_source import ExperienceSource
from olympus.kernel_rows import KernelRecord
from olympus.kernel_state import KernelPlan, KernelState
from olympus.metrics_store import StepMetrics
from olympus.resting import Rest
from olympus.snapshot import Snapshot, best_snapshot, latest_snapshot
from qig_core.geometry import fisher_rao_distance
from qig_core.integration import kernel_states, measure_integration
from qig_core.learning import collate, supervised_loss
from qig_core.regime import Convergence, Regime, convergence, regime
from qig_core.vocabulary import EncodedPair, encode_pair
from settings import KernelSettings

#: The trained weights sit every so many of the EMA's examinations: they are shown for comparison only.
RAW_EVERY = 4
PHI_COST_SHARE = 0.10
LOSS_EMA_DECAY = 0.95
SYNC_SECONDS = 2.0


class TrainingDiverged(OlympusError):
    """The loss or a weight is not a finite number; training goes back to the last good checkpoint, more carefully."""

    code = "training_diverged"


class TrainingSession:
    """Used by one thread. Make it with ``open``."""

    def __init__(self, live: KernelState, settings: KernelSettings, source: ExperienceSource):
        self.live = live
        self.progress = live.progress
        self.saved_step = 0
        self.just_evaluated = False
        self.overhead_seconds = 0.0
        self._settings = settings
        self._source = source
        self._buffer = ExperienceBuffer(settings.buffer_capacity, settings.holdout_percent, live.seed)
        self._encoded: dict[int, EncodedPair] = {}
        self._examiner = Examiner(self._buffer, self._encode)
        self._reference_basin: torch.Tensor | None = None
        self._synced = float("-inf")
        self._fresh_snapshots: list[Snapshot] = []
        self._best_shown: tuple[int | None, float | None] = (None, None)
        self._regime: Regime = "linear"
        self._last_step_ms = 0.0
        self._opened_at_step = live.progress.step
        self._opened = time.monotonic()

    @classmethod
    def open(
        cls,
        kernel: KernelRecord,
        settings: KernelSettings,
        source: ExperienceSource,
        checkpoints: CheckpointStore,
        *,
        lr_scale: float = 1.0,
    ) -> tuple[TrainingSession, tuple[str, ...]]:
        """From the newest valid checkpoint, or from the beginning; also the names of damaged ones passed over."""
        recovery = checkpoints.newest(kernel.id)
        if recovery.loaded is None:
            session = cls(KernelState(KernelPlan.from_json(kernel.config), kernel.seed), settings, source)
        else:
            session = cls(KernelState.restore(recovery.loaded), settings, source)
            saved = recovery.loaded.state.get("buffer")
            if not isinstance(saved, dict):
                raise CheckpointInvalid(f"{recovery.loaded.name}: it holds no buffer")
            source.restore(session._buffer, saved)
            session.saved_step = session.step
        session.progress.lr_scale = min(session.progress.lr_scale, lr_scale)
        session._publish_snapshots()
        return session, recovery.damaged

    # -- experience -------------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Steps this kernel has been trained for."""
        return self.progress.step

    @property
    def sync_due(self) -> bool:
        """True when it is time to look for judgements and deletions again."""
        return time.monotonic() - self._synced > SYNC_SECONDS

    def sync(self) -> None:
        """Bring the buffer up to date with the history."""
        self._source.sync(self._buffer)
        self._synced = time.monotonic()
        if len(self._encoded) > 2 * self._buffer.capacity:
            self._encoded.clear()

    @property
    def has_enough(self) -> bool:
        """Enough experience to train on."""
        return len(self._buffer) >= self._settings.min_experiences and bool(self._buffer.training())

    @property
    def waiting_reason(self) -> str:
        """What is missing, for people."""
        return f"{len(self._buffer)} experiences; training begins at {self._settings.min_experiences}"

    # -- a step -----------------------------------------------------------------------------------------------

    def advance(self) -> StepMetrics:
        """Train one step and measure what is due. Raises ``TrainingDiverged``."""
        begun = time.perf_counter()
        training, live = self.live.plan.training, self.live
        batch = self._buffer.sample(training.batch_size, self.step)
        encoded = collate([self._encode(item) for item in batch])
        for group in live.optimizer.param_groups:
            group["lr"] = training.lr_at(self.step) * self.progress.lr_scale
        live.optimizer.zero_grad(set_to_none=True)
        loss = supervised_loss(
            live.kernel,
            encoded.ids,
            encoded.loss_mask,
            supervision_steps=training.passes_at(self.step, live.plan.network.supervision_steps),
            observation_weight=training.observation_weight,
            halt_weight=training.halt_weight,
        )
        loss.total.backward()  # type: ignore[no-untyped-call]
        live.optimizer.step()
        grad_norm = live.optimizer.statistics["grad_norm"]
        if not (math.isfinite(loss.action_nats_per_byte) and math.isfinite(grad_norm)):
            raise TrainingDiverged(f"the loss or its gradient is not finite at step {self.step + 1}")
        live.ema.update(live.kernel)
        self._count(loss.action_nats_per_byte, int(encoded.loss_mask.sum()))
        seconds = time.perf_counter() - begun
        self.progress.train_seconds += seconds
        self._last_step_ms = seconds * 1000
        self.just_evaluated = self.step % self._settings.evaluate_every == 0
        if self.just_evaluated:
            self._evaluate()
        phi = self._measure_phi() if self.step >= self.progress.next_phi else None
        return self._metrics(loss.action_nats_per_byte, grad_norm, phi)

    def _encode(self, item: Example) -> EncodedPair:
        pair = self._encoded.get(item.id)
        if pair is None:
            pair = encode_pair(item.observation, item.action, self.live.plan.network.context)
            self._encoded[item.id] = pair
        return pair

    def _count(self, loss: float, symbols: int) -> None:
        progress = self.progress
        progress.step += 1
        progress.bytes_seen += symbols
        before = progress.loss_ema
        progress.loss_ema = loss if before is None else LOSS_EMA_DECAY * before + (1 - LOSS_EMA_DECAY) * loss

    # -- measuring --------------------------------------------------------------------------------------------

    def _evaluate(self) -> None:
        begun = time.perf_counter()
        progress, live, examiner = self.progress, self.live, self._examiner
        examiner.refresh()
        self._reexamine_best()
        exam = examiner.examine(live.ema.shadow)
        progress.baseline_loss, progress.uniform_loss = examiner.baseline_loss, examiner.uniform_loss
        progress.holdout_loss = None if exam is None else _finite(exam.loss)
        if progress.evaluations % RAW_EVERY == 0:
            raw = examiner.examine(live.kernel)
            progress.raw_holdout_loss = None if raw is None else _finite(raw.loss)
        progress.evaluations += 1
        if exam is None or progress.holdout_loss is None:
            reason = "there is no held-out experience yet" if exam is None else "the held-out loss is not finite"
            progress.loss_ok, progress.gate_reason = None, reason
            progress.unimproved += 1
        else:
            gate = examiner.gate(exam)
            progress.loss_ok, progress.gate_reason = gate.ok, gate.reason
            self._judge_progress(exam.loss)
        progress.evaluation_seconds += time.perf_counter() - begun
        self._publish_snapshots()

    def _judge_progress(self, loss: float) -> None:
        """Best, patience, and drift: the Fisher-Rao distance of today's mean basin to that of the best weights."""
        progress = self.progress
        basin = self._examiner.basin(self.live.ema.shadow)
        if progress.best_loss is None or loss < progress.best_loss:
            progress.best_loss, progress.best_step = loss, self.step
            self.live.remember_best()
            self._reference_basin = basin
        if basin is not None and self._reference_basin is not None:
            progress.basin = [round(value, 6) for value in basin.tolist()]
            progress.drift = float(fisher_rao_distance(basin, self._reference_basin))
        if resting.improves(loss, progress.patience_from):
            progress.patience_from, progress.unimproved = loss, 0
        else:
            progress.unimproved += 1

    def _reexamine_best(self) -> None:
        """Other questions: what the best weights score on them is the mark to beat now."""
        progress, examiner = self.progress, self._examiner
        same = progress.examination == examiner.fingerprint
        progress.examination = examiner.fingerprint
        if same and self._reference_basin is not None:
            return
        best = self.live.best_kernel()
        if best is None:
            return
        self._reference_basin = examiner.basin(best)
        exam = examiner.examine(best)
        if not same and exam is not None:
            progress.best_loss = progress.patience_from = exam.loss

    def _measure_phi(self) -> float | None:
        begun = time.perf_counter()
        progress = self.progress
        self._examiner.refresh()
        probe = self._examiner.probe
        if probe is None:
            progress.integration = {"phi": None, "reason": "there is no held-out experience to measure on yet"}
        else:
            report = measure_integration(*kernel_states(self.live.ema.shadow, probe))
            progress.integration = asdict(report)
            if report.phi is not None:
                self.live.phi_window.add(report.phi)
        cost = time.perf_counter() - begun
        progress.phi_seconds += cost
        affordable = cost * 1000 / PHI_COST_SHARE / max(self._last_step_ms, 1e-3)
        progress.next_phi = self.step + max(self._settings.phi_every, math.ceil(affordable))
        phi: float | None = progress.integration["phi"]
        return phi

    def _metrics(self, loss: float, grad_norm: float, phi: float | None) -> StepMetrics:
        progress, fresh = self.progress, self.just_evaluated
        diverging = progress.loss_ema is not None and progress.loss_ema > math.log(257)
        self._regime = regime(progress.integration.get("phi"), progress.loss_ok, diverging)
        return StepMetrics(
            step=self.step,
            loss=loss,
            holdout_loss=progress.holdout_loss if fresh else None,
            baseline_loss=progress.baseline_loss if fresh else None,
            phi=phi,
            kappa=progress.integration.get("kappa") if phi is not None else None,
            regime=self._regime,
            grad_norm=grad_norm,
            basin_drift=progress.drift if fresh else None,
            step_ms=self._last_step_ms,
        )

    # -- rest and waking --------------------------------------------------------------------------------------

    def convergence(self) -> Convergence:
        """Each condition with its number."""
        settings = self._settings
        return convergence(
            self.live.phi_window,
            settings.phi_threshold,
            settings.phi_std,
            self.progress.loss_ok,
            gate=settings.learning_gate,
        )

    def verdict(self) -> Rest | None:
        """Converged, settled, or None to go on."""
        return resting.verdict(self.convergence(), self.progress.unimproved, self._settings.patience_evaluations)

    def remember_rest(self, state: str, reason: str) -> None:
        """Note what the waking rule compares with; nothing to note for a kernel that was only interrupted."""
        if state in ("converged", "settled"):
            self.progress.rest = {
                "state": state,
                "reason": reason,
                "seen": self._seen,
                "size": len(self._buffer),
                "loss": self.progress.best_loss,
            }

    def still_rests(self) -> Rest | None:
        """After ``sync``: the rest that goes on, or None when the kernel should train."""
        if not self.has_enough:
            return Rest("waiting", self.waiting_reason)
        rest = self.progress.rest
        if not rest:
            return None
        if resting.has_grown(rest, self._seen):
            return None
        self._examiner.refresh()
        best = self.live.best_kernel()
        exam = None if best is None else self._examiner.examine(best)
        if resting.does_worse(rest, None if exam is None else exam.loss):
            return None
        return Rest(rest["state"], rest["reason"])

    def wake(self) -> None:
        """Begin to train: a kernel that had come to rest gets a fresh window and fresh patience."""
        if self.progress.rest:
            self.live.phi_window.clear()
            self.progress.unimproved = 0
            self.progress.rest = {}

    @property
    def _seen(self) -> int:
        return self._buffer.seen_training + self._buffer.seen_holdout

    # -- saving and showing -----------------------------------------------------------------------------------

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """Tensor files of a checkpoint."""
        return self.live.tensors()

    def state(self) -> dict[str, Any]:
        """The JSON part of a checkpoint."""
        return {**self.live.state(), "buffer": self._buffer.state_dict()}

    def checkpoint_metrics(self, converged: bool) -> dict[str, Any]:
        """What the checkpoint's row shows and retention compares."""
        return {
            "holdout_loss": self.progress.holdout_loss,
            "phi": self.progress.integration.get("phi"),
            "converged": converged,
            "regime": self._regime,
        }

    def new_snapshots(self) -> list[Snapshot]:
        """Copies of the weights for queries, since the last call."""
        fresh, self._fresh_snapshots = self._fresh_snapshots, []
        return fresh

    def _publish_snapshots(self) -> None:
        self._fresh_snapshots.append(latest_snapshot(self.live, self._regime))
        mark = (self.progress.best_step, self.progress.best_loss)
        if mark == self._best_shown:
            return
        self._best_shown = mark
        best = best_snapshot(self.live, self._regime)
        if best is not None:
            self._fresh_snapshots.append(best)

    def report(self) -> dict[str, Any]:
        """Everything the status shows, as JSON types."""
        optimizer = self.live.optimizer
        steps, seconds = self.step - self._opened_at_step, time.monotonic() - self._opened
        return {
            "progress": {**asdict(self.progress), "rest": dict(self.progress.rest)},
            "regime": self._regime,
            "convergence": asdict(self.convergence()),
            "buffer": self._buffer.counts(),
            "holdout_items": self._examiner.items,
            "optimizer": {
                "lr": optimizer.param_groups[0]["lr"],
                **{name: _finite(value) for name, value in optimizer.statistics.items()},
            },
            "throughput": {
                "steps_per_second": round(steps / seconds, 3) if steps and seconds > 0 else None,
                "step_ms": round(self._last_step_ms, 3) if steps else None,
            },
            "overhead_seconds": round(self.overhead_seconds, 4),
            "parameters": self.live.kernel.parameter_count(),
            "last_saved_step": self.saved_step,
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
