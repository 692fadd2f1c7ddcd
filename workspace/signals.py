"""What the controller looks at: a few numbers per generated token.

From the model's own distribution (before sampling changes it): entropy, probability of the best token and its lead,
surprise of the token that was chosen. From the text: how long it has been repeating itself. Nothing is random, nothing
is trained, nothing is decided here. Shapes: V vocabulary; ``...`` any leading sizes.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from workspace.workspace_config import ControllerConfig

#: Where a surprise ends, in nats: masked or underflowed tokens have none that is finite.
MOST_NATS = 50.0
_LOWEST = -1e4  # stands for log 0 where it is multiplied by 0


class TokenStatistics(NamedTuple):
    """Of one distribution and the token that was chosen from it; tensors of the leading shape."""

    entropy: Tensor  #: nats
    top1: Tensor  #: probability of the best token
    margin: Tensor  #: its lead over the second, in probability
    surprise: Tensor  #: -log probability of the chosen token, nats


@dataclass(frozen=True, slots=True)
class Signals:
    """What one token looked like. Smoothed values are exponential means that begin with the first token."""

    entropy: float  #: nats
    top1: float
    margin: float
    surprise: float  #: nats
    repetition: int  #: tokens in a row that equal those one cycle before
    cycle: int  #: length of that cycle; 0 without one
    smoothed_entropy: float
    smoothed_surprise: float
    trend: float  #: smoothed entropy above its slow level, nats


def token_statistics(logits: Tensor, chosen: Tensor) -> TokenStatistics:
    """``logits`` [..., V] and ``chosen`` [...] token ids; computed in float32, finite for finite or -inf logits."""
    logs = logits.float().log_softmax(dim=-1)
    probabilities = logs.exp()
    entropy = -(probabilities * logs.clamp_min(_LOWEST)).sum(dim=-1)  # 0 log 0 = 0
    # Two maxima: half the time of topk(2), and a sixth of torch.special.entr for the sum above, at 49k tokens.
    best, where = logs.max(dim=-1, keepdim=True)
    second = logs.scatter(-1, where, -torch.inf).amax(dim=-1)
    top1 = best[..., 0].exp()
    surprise = -logs.gather(-1, chosen[..., None])[..., 0]
    return TokenStatistics(entropy.clamp_min(0.0), top1, top1 - second.exp(), surprise.clamp(0.0, MOST_NATS))


class SignalTracker:
    """Follows one generation, token by token."""

    def __init__(self, config: ControllerConfig):
        self._config = config
        self._recent: deque[int] = deque(maxlen=config.longest_cycle)
        self._runs = [0] * (config.longest_cycle + 1)  # by cycle length; 0 is not used
        self._entropy = self._level = self._surprise = 0.0
        self.steps = 0

    def observe(self, logits: Tensor, chosen: int) -> Signals:
        """``logits`` [V] gave the token ``chosen``."""
        statistics = token_statistics(logits, torch.tensor(chosen, device=logits.device))
        entropy, top1, margin, surprise = (_finite(value) for value in torch.stack(statistics).tolist())
        return self.take(entropy, top1, margin, surprise, chosen)

    def take(self, entropy: float, top1: float, margin: float, surprise: float, chosen: int) -> Signals:
        """The same for statistics that are known already (training computes them for a whole text at once)."""
        fast, slow = (self._config.smoothing, self._config.trend_smoothing) if self.steps else (1.0, 1.0)
        self._entropy += fast * (entropy - self._entropy)
        self._level += slow * (entropy - self._level)
        self._surprise += fast * (surprise - self._surprise)
        self.steps += 1
        run, cycle = self._follow_cycles(chosen)
        return Signals(
            entropy=entropy,
            top1=top1,
            margin=margin,
            surprise=surprise,
            repetition=run,
            cycle=cycle,
            smoothed_entropy=self._entropy,
            smoothed_surprise=self._surprise,
            trend=self._entropy - self._level,
        )

    def _follow_cycles(self, token: int) -> tuple[int, int]:
        """The longest run of tokens that each equal the one ``cycle`` tokens before, and the shortest such cycle."""
        runs = self._runs
        for cycle, earlier in enumerate(reversed(self._recent), start=1):
            runs[cycle] = runs[cycle] + 1 if earlier == token else 0
        self._recent.append(token)
        longest = max(runs)
        return longest, runs.index(longest) if longest else 0

    def check_invariants(self) -> None:
        """Raise ``AssertionError`` if the state contradicts itself."""
        assert len(self._recent) == min(self.steps, self._config.longest_cycle)
        assert all(0 <= run <= max(0, self.steps - cycle) for cycle, run in enumerate(self._runs)), self._runs
        assert 0 <= self._entropy < math.inf, self._entropy
        assert 0 <= self._surprise <= MOST_NATS, self._surprise


def _finite(value: float) -> float:
    """NaN (a broken distribution) becomes 0: no signal. The sampler is the one to complain."""
    return value if math.isfinite(value) else 0.0
