"""When to act during a generation: broadcast the slots, ask the memory, write to the slots, end the answer.

Every action has a *drive*: its signal divided by its threshold. It fires at 1, not before its gap has passed, and not
again before the drive has fallen below ``release`` (a Schmitt trigger): so no action can fire at every token.

Without trained weights the drives are heuristics: uncertainty that is high or rises calls for the workspace, high
uncertainty for the memory, surprise for a write, degenerate repetition for the end. With trained weights
``ControllerNet``, a small network over the same signals and the pooled slots, gives the drives instead; it may end an
answer only where ``learned_halt`` allows it. The global-workspace router of Chateau-Laurent and VanRullen (2025) is the
model for one gate per action.

Not here: carrying a decision out, and the signals themselves (``signals.py``). Nothing is random. Shapes: R rows,
S slots, W slot width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from workspace.signals import Signals, SignalTracker
from workspace.workspace_config import ControllerConfig

ACTIONS = ("broadcast", "retrieve", "write", "halt")
#: Numbers that ``ControllerNet`` sees of a token besides the slots: see ``network_inputs``.
NETWORK_INPUTS = 6


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do after a token, and the numbers that led to it (finite floats, fit for JSON)."""

    broadcast: bool
    retrieve: bool
    write: bool
    halt: bool
    numbers: dict[str, float]

    @property
    def acts(self) -> bool:
        """True when anything is to be done."""
        return self.broadcast or self.retrieve or self.write or self.halt


def heuristic_drives(signals: Signals, config: ControllerConfig) -> tuple[float, float, float, float]:
    """Signal over threshold for each of ``ACTIONS``; 1 is the threshold."""
    broadcast = max(signals.smoothed_entropy / config.broadcast_entropy, signals.trend / config.broadcast_trend, 0.0)
    retrieve = signals.smoothed_entropy / config.retrieve_entropy
    write = signals.smoothed_surprise / config.write_surprise
    halt = 0.0
    if config.halt_on_repetition and signals.cycle:
        needed = max(config.halt_run, config.halt_cycles * signals.cycle)
        halt = signals.repetition / needed
    return broadcast, retrieve, write, halt


def network_inputs(signals: Signals, since_broadcast: int) -> list[float]:
    """The token as ``ControllerNet`` sees it, each number of the order of 1.

    Entropy, best probability, its lead, surprise, repetition, steps since the last broadcast.
    """
    return [
        signals.entropy / 5,
        signals.top1,
        signals.margin,
        signals.surprise / 5,
        min(signals.repetition, 64) / 16,
        math.log1p(since_broadcast) / 4,
    ]


class ControllerNet(nn.Module):
    """Signals and pooled slots -> one logit per action. About 4,700 numbers at slots of width 64.

    Its last layer begins near "no": an untrained one does not act. Train it with the heuristics as teachers
    (``soft_targets``) or with anything that rewards decisions.
    """

    def __init__(self, slot_width: int, hidden: int = 48):
        super().__init__()
        self.norm = nn.LayerNorm(slot_width)
        self.layers = nn.Sequential(
            nn.Linear(NETWORK_INPUTS + slot_width, hidden), nn.GELU(), nn.Linear(hidden, len(ACTIONS))
        )
        last = self.layers[-1]
        assert isinstance(last, nn.Linear)
        nn.init.normal_(last.weight, std=0.02)
        nn.init.constant_(last.bias, -3.0)

    def forward(self, signals: Tensor, slots: Tensor) -> Tensor:
        """``signals`` [R, 6] (``network_inputs``) and ``slots`` [R, S, W] -> logits [R, 4], ordered as ``ACTIONS``."""
        pooled = self.norm(slots.to(self.norm.weight)).mean(dim=1)  # [R, W]
        logits: Tensor = self.layers(torch.cat([signals.to(pooled), pooled], dim=1))
        return logits


def soft_targets(drives: Sequence[float], sharpness: float = 8.0) -> list[float]:
    """Drives as probabilities for training ``ControllerNet``: 0.5 at the threshold, steep around it."""
    return [1 / (1 + math.exp(min(-sharpness * (drive - 1), 60.0))) for drive in drives]


class _Trigger:
    """Fires when its drive reaches 1: armed, and ``gap`` steps after the last time."""

    def __init__(self, gap: int, release: float):
        self._gap, self._release = gap, release
        self._armed = True
        self._last: int | None = None

    def fires(self, drive: float, step: int) -> bool:
        if drive < self._release:
            self._armed = True
        if not self._armed or drive < 1 or (self._last is not None and step - self._last < self._gap):
            return False
        self._armed, self._last = False, step
        return True


class Controller:
    """Decides for one generation; make a new one for each. ``net`` None: heuristics only."""

    def __init__(self, config: ControllerConfig, net: ControllerNet | None = None):
        self._config = config
        self._net = net
        self._tracker = SignalTracker(config)
        gaps = (config.broadcast_gap, config.retrieve_gap, config.write_gap, 1)
        self._triggers = [_Trigger(gap, config.release) for gap in gaps]
        self._since_broadcast = 0

    @torch.inference_mode()
    def step(self, logits: Tensor, chosen: int, slots: Tensor | None = None) -> Decision:
        """After the token ``chosen`` was sampled from ``logits`` [V] (the model's own, before penalties and masks).

        ``slots`` [1, S, W] are needed by a trained controller; without them it decides by its heuristics.
        """
        signals = self._tracker.observe(logits, chosen)
        drives = list(heuristic_drives(signals, self._config))
        learned = self._net is not None and slots is not None
        if self._net is not None and slots is not None:
            drives = self._learned_drives(self._net, signals, slots, repetition_drive=drives[3])
        step = self._tracker.steps
        # All triggers hear every drive, or one of them would miss that its drive has fallen.
        broadcast, retrieve, write, halt = [
            trigger.fires(drive, step) for trigger, drive in zip(self._triggers, drives, strict=True)
        ]
        numbers = {
            "entropy": signals.entropy,
            "top1": signals.top1,
            "margin": signals.margin,
            "surprise": signals.surprise,
            "repetition": float(signals.repetition),
            "cycle": float(signals.cycle),
            "smoothed_entropy": signals.smoothed_entropy,
            "smoothed_surprise": signals.smoothed_surprise,
            "trend": signals.trend,
            "since_broadcast": float(self._since_broadcast),
            "learned": float(learned),
            **{f"{action}_drive": drive for action, drive in zip(ACTIONS, drives, strict=True)},
        }
        self._since_broadcast = 0 if broadcast else self._since_broadcast + 1
        return Decision(broadcast, retrieve, write, halt, numbers)

    def _learned_drives(
        self, net: ControllerNet, signals: Signals, slots: Tensor, repetition_drive: float
    ) -> list[float]:
        """Probability over ``learned_probability``; an answer still ends by repetition only, unless allowed."""
        inputs = torch.tensor([network_inputs(signals, self._since_broadcast)])  # [1, 6]
        probabilities = net(inputs.to(slots.device), slots)[0].sigmoid().tolist()
        drives = [probability / self._config.learned_probability for probability in probabilities]
        drives[3] = max(repetition_drive, drives[3]) if self._config.learned_halt else repetition_drive
        return drives

    def check_invariants(self) -> None:
        """Raise ``AssertionError`` if the state contradicts itself."""
        self._tracker.check_invariants()
        assert 0 <= self._since_broadcast <= self._tracker.steps
        for trigger in self._triggers:
            assert trigger._last is None or 1 <= trigger._last <= self._tracker.steps
            assert trigger._armed or trigger._last is not None, "only firing disarms a trigger"
