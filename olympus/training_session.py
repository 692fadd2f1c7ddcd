"""One kernel's training from checkpoint to rest: the steps and the decisions, without threads.

A step: draw a batch, deeply supervised loss, DiagonalFisher, EMA. Every ``evaluate_every`` steps, or less often where
that would cost more than its share of the time (``measuring``), the EMA sits the examination, and now and then the
trained weights do, for comparison. The EMA with the lowest held-out loss so far is ``best``, and that is what queries
get unless they ask for ``latest``. When the held-out part changes, the best weights sit the new examination too, so
that old and new are never compared on different questions.

The rules of rest and waking are in ``resting``. A kernel that wakes gets a fresh Phi window and fresh patience.

Phi is measured every ``phi_every`` steps or less often, so that its cost stays within its share, too. It is never part
of the loss, so its schedule does not touch the weights: a restored kernel repeats its losses bit by bit.
So are the prequential test of new experience (``prequential``) and the look at plasticity.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from typing import Any

import torch

from olympus import resting
from olympus.checkpoints import CheckpointStore
from olympus.courtesy import Courtesy, within
from olympus.drift import Drift
from olympus.errors import CheckpointInvalid, OlympusError
from olympus.examination import Exam, Examiner
from olympus.experience_buffer import ExperienceBuffer
from olympus.experience_source import ExperienceSource
from olympus.intake import Intake
from olympus.kernel_rows import KernelRecord
from olympus.kernel_state import KernelPlan, KernelState
from olympus.measuring import RAW_EVERY, examination_interval, phi_interval
from olympus.metrics_store import StepMetrics
from olympus.rehearsal import Rehearsal
from olympus.resting import Rest
from olympus.session_report import finite, session_report
from olympus.snapshot import FreshSnapshots, Snapshot
from qig_core.geometry import fisher_rao_distance
from qig_core.integration import kernel_states, measure_integration
from qig_core.learning import supervised_loss
from qig_core.m8_kernel import M8Kernel
from qig_core.plasticity import measure_plasticity
from qig_core.regime import Convergence, Learned, Regime, convergence, regime
from settings import KernelSettings

#: Plasticity changes slowly: it is looked at once in so many examinations.
PLASTICITY_EVERY = 10
LOSS_EMA_DECAY = 0.95


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
        #: Lets more urgent work through in the middle of a step; None: nobody else needs the processor.
        self.courtesy: Courtesy | None = None
        self._settings = settings
        self._buffer = ExperienceBuffer(
            settings.buffer_capacity,
            settings.holdout_percent,
            live.seed,
            priority_share=settings.priority_share,
            source_cap_percent=settings.source_cap_percent,
        )
        self._rehearsal = Rehearsal(self._buffer, live.plan.network.context, settings.der_alpha)
        self._examiner = Examiner(self._buffer, self._rehearsal.encode)
        self._intake = Intake(source, self._buffer, self._rehearsal)
        self._wake_reason = ""
        self._reference_basin: torch.Tensor | None = None
        self._snapshots = FreshSnapshots(live)
        self._regime: Regime = "linear"
        self.last_step_ms = 0.0
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
            if not isinstance(recovery.loaded.state.get("buffer"), dict):
                raise CheckpointInvalid(f"{recovery.loaded.name}: it holds no buffer")
            session._intake.restore(recovery.loaded.state)
            session._rehearsal.load_tensors(recovery.loaded.tensors)
            session.saved_step = session.step
        session.progress.lr_scale = min(session.progress.lr_scale, lr_scale)
        session._snapshots.publish(session._regime)
        return session, recovery.damaged

    # -- experience -------------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Steps this kernel has been trained for."""
        return self.progress.step

    @property
    def sync_due(self) -> bool:
        """True when it is time to look for judgements and deletions again."""
        return self._intake.due

    def sync(self) -> None:
        """Bring the buffer up to date with the history; what is new is tested before it is trained on."""
        drift = self._intake.sync(self._serving, self.step)
        self.progress.prequential_seconds += self._intake.take_seconds()
        if drift is not None:
            self.progress.unimproved = 0  # what comes now is harder: patience begins anew

    def _serving(self) -> M8Kernel:
        """The best weights of a kernel at rest, the averaged ones of one that trains."""
        best = self.live.best_kernel() if self.progress.rest else None
        return best or self.live.ema.shadow

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
        if self.courtesy is not None:
            self.courtesy.renew()
        begun = time.perf_counter()
        training, live = self.live.plan.training, self.live
        lesson = self._rehearsal.lesson(training.batch_size, self.step)
        encoded = lesson.batch
        training.set_lr(live.optimizer, self.step, self.progress.lr_scale)
        live.optimizer.zero_grad(set_to_none=True)
        with within(self.courtesy, live.kernel):
            loss = supervised_loss(
                live.kernel,
                encoded.ids,
                encoded.loss_mask,
                lesson.weights,
                supervision_steps=training.passes_at(self.step, live.plan.network.supervision_steps),
                observation_weight=training.observation_weight,
                halt_weight=training.halt_weight,
                noise=live.noise_of(self.step),
                distillation=lesson.distillation,
            )
            loss.total.backward()  # type: ignore[no-untyped-call]
        live.optimizer.step()
        grad_norm = live.optimizer.grad_norm
        if not (math.isfinite(loss.action_nats_per_byte) and math.isfinite(grad_norm)):
            raise TrainingDiverged(f"the loss or its gradient is not finite at step {self.step + 1}")
        live.ema.update(live.kernel)
        self._rehearsal.learned(lesson, loss.item_nats)
        self._count(loss.action_nats_per_byte, int(encoded.loss_mask.sum()))
        seconds = self._since(begun)
        self.progress.train_seconds += seconds
        self.last_step_ms = seconds * 1000
        self.just_evaluated = self.step >= max(self.progress.next_evaluation, self._settings.evaluate_every)
        if self.just_evaluated:
            self._evaluate()
        phi = self._measure_phi() if self.step >= self.progress.next_phi else None
        return self._metrics(loss.action_nats_per_byte, grad_norm, phi)

    def _since(self, begun: float) -> float:
        """Seconds of work since ``begun``: without those in which others were let through."""
        waited = 0.0 if self.courtesy is None else self.courtesy.take_waited()
        return time.perf_counter() - begun - waited

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
        with within(self.courtesy, live.ema.shadow):
            exam = examiner.examine(live.ema.shadow)
        progress.baseline_loss, progress.uniform_loss = examiner.baseline_loss, examiner.uniform_loss
        progress.holdout_loss = None if exam is None else finite(exam.loss)
        if progress.evaluations % RAW_EVERY == 0:
            raw = examiner.examine(live.kernel)
            progress.raw_holdout_loss = None if raw is None else finite(raw.loss)
        if progress.evaluations % PLASTICITY_EVERY == 0:
            self._measure_plasticity()
        progress.evaluations += 1
        every, share = self._settings.evaluate_every, self._settings.evaluation_share
        progress.next_evaluation = self.step + examination_interval(examiner.items, live.plan, every, share)
        if exam is None or progress.holdout_loss is None:
            reason = "there is no held-out experience yet" if exam is None else "the held-out loss is not finite"
            progress.loss_ok, progress.gate_reason = None, reason
            progress.unimproved += 1
        else:
            gate = examiner.gate(exam)
            progress.loss_ok, progress.gate_reason = gate.ok, gate.reason
            self._judge_progress(exam)
        progress.evaluation_seconds += self._since(begun)
        self._snapshots.publish(self._regime)

    def _judge_progress(self, exam: Exam) -> None:
        """Best, patience, and drift: the Fisher-Rao distance of today's mean basin to that of the best weights."""
        progress, loss, basin = self.progress, exam.loss, exam.basin
        if progress.best_loss is None or loss < progress.best_loss:
            progress.best_loss, progress.best_step = loss, self.step
            self.live.remember_best()
            self._reference_basin = basin
        if self._reference_basin is not None:
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
        exam = examiner.examine(best)
        self._reference_basin = None if exam is None else exam.basin
        if not same and exam is not None:
            progress.best_loss = progress.patience_from = exam.loss

    def _measure_plasticity(self) -> None:
        if self._examiner.probe is not None:
            begun = time.perf_counter()
            self.progress.plasticity = asdict(measure_plasticity(self.live.kernel, self._examiner.probe))
            self.progress.plasticity_seconds += time.perf_counter() - begun

    def _measure_phi(self) -> float | None:
        begun = time.perf_counter()
        progress = self.progress
        self._examiner.refresh()
        probe = self._examiner.probe
        if probe is None:
            progress.integration = {"phi": None, "reason": "there is no held-out experience to measure on yet"}
        else:
            with within(self.courtesy, self.live.ema.shadow):
                states = kernel_states(self.live.ema.shadow, probe)
            report = measure_integration(*states, between=self.courtesy)
            progress.integration = asdict(report)
            if report.phi is not None:
                self.live.phi_window.add(report.phi)
        cost = self._since(begun)
        progress.phi_seconds += cost
        every, share = self._settings.phi_every, self._settings.phi_share
        progress.next_phi = self.step + phi_interval(cost, progress.train_seconds / self.step, every, share)
        phi: float | None = progress.integration["phi"]
        return phi

    def _metrics(self, loss: float, grad_norm: float, phi: float | None) -> StepMetrics:
        progress, fresh = self.progress, self.just_evaluated
        diverging = progress.loss_ema is not None and progress.loss_ema > math.log(257)
        improving = progress.unimproved < self._settings.plateau_evaluations
        self._regime = regime(progress.integration.get("phi"), progress.loss_ok, diverging, improving)
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
            step_ms=self.last_step_ms,
        )

    # -- rest and waking --------------------------------------------------------------------------------------

    def convergence(self) -> Convergence:
        """Each condition with its number."""
        settings, progress = self._settings, self.progress
        learned = Learned(
            loss_ok=progress.loss_ok,
            loss=progress.holdout_loss,
            baseline=progress.baseline_loss,
            loss_reason=progress.gate_reason or "not examined yet",
            unimproved=progress.unimproved,
            plateau=settings.plateau_evaluations,
        )
        window, gate = self.live.phi_window, settings.learning_gate
        return convergence(window, settings.phi_threshold, settings.phi_std, learned, gate=gate)

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
            self._intake.come_to_rest(self.live.best_kernel())

    def still_rests(self) -> Rest | None:
        """After ``sync``: the rest that goes on, or None when the kernel should train."""
        if not self.has_enough:
            return Rest("waiting", self.waiting_reason)
        rest = self.progress.rest
        if not rest:
            return None
        self._wake_reason = self._why_wake(rest)
        return None if self._wake_reason else Rest(rest["state"], rest["reason"])

    def _why_wake(self, rest: dict[str, Any]) -> str:
        """Which rule of ``resting`` wakes the kernel; empty: none does."""
        if self._intake.latest_drift is not None:
            return self._intake.latest_drift.reason
        if resting.has_grown(rest, self._seen):
            return f"{self._seen - rest['seen']} new experiences since it came to rest with {rest['size']}"
        self._examiner.refresh()
        best = self.live.best_kernel()
        exam = None if best is None else self._examiner.examine(best)
        if exam is not None and resting.does_worse(rest, exam.loss):
            return f"the held-out loss rose from {rest['loss']:.3f} to {exam.loss:.3f} nats per byte"
        return ""

    def wake(self) -> str:
        """Begin to train: a kernel that had come to rest gets a fresh window and fresh patience. Returns why."""
        if self.progress.rest:
            self.live.phi_window.clear()
            self.progress.unimproved = 0
            self.progress.rest = {}
        return self._wake_reason

    @property
    def _seen(self) -> int:
        return self._buffer.seen_training + self._buffer.seen_holdout

    # -- saving and showing -----------------------------------------------------------------------------------

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """Tensor files of a checkpoint."""
        return {**self.live.tensors(), **self._rehearsal.tensors()}

    def state(self) -> dict[str, Any]:
        """The JSON part of a checkpoint."""
        return {**self.live.state(), **self._intake.state()}

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
        return self._snapshots.take()

    def new_drifts(self) -> list[Drift]:
        """Drift noticed since the last call."""
        return self._intake.take_drifts()

    def report(self) -> dict[str, Any]:
        """Everything the status shows, as JSON types."""
        parts = {"regime": self._regime, "holdout_items": self._examiner.items, **self._intake.report()}
        return session_report(self, parts, self.step - self._opened_at_step, time.monotonic() - self._opened)
