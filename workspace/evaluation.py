"""Evaluation: the model with its workspace off and on, side by side, by the server's own decode loop.

    speed      tokens per second while decoding and seconds to the first token, alternating off and on
    fluency    the numbers of the fluency guard (``fluency.py``)
    tools      a format that has to be kept over many turns (``tool_task.py``)
    loss       on held-out texts with all controls (``held_out.py``), where a capture is given

Every random number has a seed that is in the report. Speeds are medians of one run each on whatever else the machine
does; ``benchmarks/`` has the ones that we claim.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from workspace.answering import Answered, Answering
from workspace.calibration import observe_text
from workspace.capture_folder import Capture
from workspace.errors import PromptTooLong
from workspace.fluency import QUESTIONS, FluencyOptions, FluencyReport, guard
from workspace.held_out import ARMS, ArmLoss, held_out_blobs, measure
from workspace.modules import WorkspaceModules
from workspace.sampling import SamplingParams
from workspace.state_files import TrainingRecord
from workspace.steering import Steering
from workspace.steering_types import Toggles
from workspace.tool_task import Request, requests, shares, system_message
from workspace.training_config import TrainingConfig
from workspace.training_data import check_layers, check_model
from workspace.training_forward import Student

_ON = Toggles(memory=False)
_CALL_TOKENS = 32  # more than any call takes


class EvaluationOptions(BaseModel):
    """How much is asked."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    fluency: FluencyOptions = Field(default_factory=FluencyOptions)
    speed_rounds: int = Field(4, ge=0, description="Pairs of timed answers; 0: none.")
    speed_tokens: int = Field(48, ge=2)
    dialogues: int = Field(2, ge=0, description="Conversations of the tool task; 0: none.")
    turns: int = Field(12, ge=1, description="Turns of each.")
    held_out_rows: int = Field(16, ge=1, description="Texts of each kind, where a capture is given.")
    keep: int = Field(16, ge=1, description="Context tokens that a student keeps which has lost the others.")
    seed: int = Field(0, ge=0)


@dataclass(frozen=True, slots=True)
class Speed:
    """Medians over rounds."""

    decode_rate: float  #: tokens per second
    first_token_seconds: float


@dataclass(frozen=True, slots=True)
class Tools:
    """Shares over all turns, and over the second half of each conversation."""

    formed: float
    right: float
    late_formed: float
    late_right: float


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """Everything that was measured; None for what was not."""

    model: str
    trained: tuple[str, ...]
    speed: tuple[Speed, Speed] | None
    fluency: FluencyReport
    tools: tuple[Tools, Tools] | None
    losses: tuple[ArmLoss, ...]
    seed: int

    def to_json(self) -> dict[str, Any]:
        """JSON types."""
        told = asdict(self)
        told["fluency"] = self.fluency.to_json()
        told["losses"] = [
            {"kind": item.kind, "keep": item.keep, "arm": item.arm, "loss": item.mean, "texts": len(item.rows)}
            for item in self.losses
        ]
        return told

    def table(self) -> str:
        """For people: one line per number, off beside on."""
        parts = ", ".join(self.trained) or "nothing, heuristics only"
        lines = [f"{self.model}; trained: {parts}; seed {self.seed}", f"{'':34}{'off':>10}{'on':>10}"]
        fluency = self.fluency
        rows: list[tuple[str, float, float]] = []
        if self.speed is not None:
            off, on = self.speed
            rows.append(("tokens per second", off.decode_rate, on.decode_rate))
            rows.append(("seconds to the first token", off.first_token_seconds, on.first_token_seconds))
        rows.append(("loss under the stock model", fluency.off.loss, fluency.on.loss))
        rows.append(("repeated 4-grams", fluency.off.repetition, fluency.on.repetition))
        rows.append(("distinct-1", fluency.off.distinct_1, fluency.on.distinct_1))
        rows.append(("distinct-2", fluency.off.distinct_2, fluency.on.distinct_2))
        if self.tools is not None:
            before, after = self.tools
            for name in ("formed", "right", "late_formed", "late_right"):
                rows.append((f"tool calls: {name.replace('_', ' ')}", getattr(before, name), getattr(after, name)))
        lines += [f"{name:34}{off:10.3f}{on:10.3f}" for name, off, on in rows]
        return "\n".join(lines + _loss_lines(self.losses))


def evaluate(
    steering: Steering,
    options: EvaluationOptions | None = None,
    *,
    capture: Capture | None = None,
    threads: int = 1,
    progress: Callable[[str], None] | None = None,
) -> EvaluationReport:
    """Measure ``steering`` off and on. ``capture``: held-out texts of the same model. ``progress`` hears what is done.

    Raises ``CaptureMismatch`` for texts of another model.
    """
    options = options or EvaluationOptions()
    told = progress or (lambda _: None)
    speed = tools = None
    losses: list[ArmLoss] = []
    with Answering(steering.loaded, steering, threads=threads) as answering:
        if options.speed_rounds:
            told("speed")
            speed = _speed(answering, options)
        if options.dialogues:
            told("tools")
            tools = _tools(answering, options, None), _tools(answering, options, _ON)
    told("fluency")
    fluency = guard(steering, options.fluency, threads=threads)
    if capture is not None:
        told("loss")
        losses = held_out_losses(steering, capture, rows=options.held_out_rows, keep=options.keep, seed=options.seed)
    record: TrainingRecord | None = steering.modules.record
    return EvaluationReport(
        model=steering.loaded.name,
        trained=() if record is None else record.parts,
        speed=speed,
        fluency=fluency,
        tools=tools,
        losses=tuple(losses),
        seed=options.seed,
    )


def held_out_losses(steering: Steering, capture: Capture, *, rows: int, keep: int, seed: int = 0) -> list[ArmLoss]:
    """All arms on the held-out texts of ``capture``; without trained weights, those that need none."""
    check_model(capture, (steering.loaded.fingerprint,))
    check_layers(capture, steering.modules.shape)
    record = steering.modules.record
    steering_parts = tuple(part for part in (record.parts if record else ()) if part != "controller")
    config = TrainingConfig.model_validate(
        {
            "parts": steering_parts or ("virtual_kv",),
            "workspace": steering.config.model_copy(
                update={} if "static_tokens" in steering_parts else {"static_tokens": 0}
            ),
            "keep": (keep,),
        }
    )
    modules = steering.modules
    blobs = held_out_blobs(capture, rows)
    if record is None:  # the random arm needs to know how long real keys and values are
        modules = WorkspaceModules(modules.shape, steering.config)
        for texts in blobs.values():
            observe_text(steering.hooked, modules.projector, texts[0].input_ids)
    arms = ARMS if steering_parts else tuple(arm for arm in ARMS if arm in ("none", "random", "heuristic"))
    return measure(Student(steering.hooked), modules, blobs, config, arms=arms, keeps=(None, keep), seed=seed)


def _speed(answering: Answering, options: EvaluationOptions) -> tuple[Speed, Speed]:
    """Alternate off and on, the first of a pair by turns."""
    sides: tuple[list[Answered], list[Answered]] = ([], [])
    for number in range(options.speed_rounds):
        question = [{"role": "user", "content": QUESTIONS[number % len(QUESTIONS)]}]
        params = SamplingParams(
            max_tokens=options.speed_tokens, temperature=0.2, top_p=0.9, seed=options.seed + number, ignore_eos=True
        )
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            sides[side].append(answering.answer(question, params, _ON if side else None))
    off, on = (
        Speed(
            statistics.median(answer.decode_rate for answer in side),
            statistics.median(answer.first_token_seconds for answer in side),
        )
        for side in sides
    )
    return off, on


def _tools(answering: Answering, options: EvaluationOptions, toggles: Toggles | None) -> Tools:
    """Greedy answers; the model's own ones stay in the conversation."""
    every: list[tuple[str, Request]] = []
    late: list[tuple[str, Request]] = []
    for dialogue in range(options.dialogues):
        messages = [{"role": "system", "content": system_message()}]
        turns = requests(options.seed + dialogue, options.turns)
        for place, request in enumerate(turns):
            messages.append({"role": "user", "content": request.text})
            try:
                text = answering.answer(messages, SamplingParams(max_tokens=_CALL_TOKENS, temperature=0), toggles).text
            except PromptTooLong:
                text = ""
            every.append((text.strip(), request))
            if place >= len(turns) // 2:
                late.append(every[-1])
            messages.append({"role": "assistant", "content": text})
    return Tools(*shares(every), *shares(late))


def _loss_lines(losses: Sequence[ArmLoss]) -> list[str]:
    """A table of the change against no virtual tokens, with standard errors."""
    if not losses:
        return []
    arms = [arm for arm in dict.fromkeys(item.arm for item in losses) if arm != "none"]
    found = {(item.kind, item.keep, item.arm): item for item in losses}
    lines = ["", f"{'held-out loss, nats per token':34}{'off':>10}" + "".join(f"{arm:>20}" for arm in arms)]
    for kind, keep in dict.fromkeys((item.kind, item.keep) for item in losses):
        base = found[kind, keep, "none"]
        cells = []
        for arm in arms:
            change, error = found[kind, keep, arm].against(base)
            cells.append(f"{change:+.4f} ± {error:.4f}")
        context = "whole context" if keep is None else f"last {keep} tokens"
        lines.append(f"{f'{kind}, {context}':34}{base.mean:10.4f}" + "".join(f"{cell:>20}" for cell in cells))
    return lines
