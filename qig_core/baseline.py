"""The context-free baseline, and the gate that asks whether a kernel has learned more than it.

p(a) = lambda * c(a) / N + (1 - lambda) * prod_b u(b): a mixture of the relative frequency of the *whole* action among
the training actions and a byte-unigram model (with EOS) for actions never seen. lambda and nothing else is fitted, by
leaving each training action out of its own counts (deleted interpolation, Jelinek and Mercer 1980). Labels are so
predicted by their frequency and free text by its bytes: a kernel that has learned only the marginal of the actions,
which is all that shuffled labels have to teach, cannot beat it.

The baseline never sees an observation. Keep held-out actions out of it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qig_core.errors import InvalidInput
from qig_core.vocabulary import encode_text

_SYMBOLS = 257  # 256 bytes and the end of the action
_END = 256
MIN_GATE_ITEMS = 20
_GATE_SHARE = 0.02


def uniform_nats(action: str) -> float:
    """Nats of an action under the uniform distribution over bytes and EOS."""
    return (len(encode_text(action)) + 1) * math.log(_SYMBOLS)


class ContextFreeBaseline:
    """See the module docstring. ``alpha``: pseudo-count of each symbol in the byte unigram."""

    def __init__(self, alpha: float = 0.5):
        if alpha <= 0:
            raise InvalidInput(f"alpha must be positive, got {alpha}")
        self.alpha = alpha
        self._actions: Counter[str] = Counter()
        self._symbols = [0] * _SYMBOLS
        self._weight: float | None = 0.0

    def __len__(self) -> int:
        return self._actions.total()

    @property
    def weight(self) -> float:
        """lambda, the share of the whole-action frequency; fitted when first needed after a change."""
        if self._weight is None:
            self._weight = self._fit_weight()
        return self._weight

    def fit(self, actions: Iterable[str]) -> ContextFreeBaseline:
        """Forget, and learn from these actions."""
        self._actions.clear()
        self._symbols = [0] * _SYMBOLS
        self._weight = 0.0
        for action in actions:
            self.add(action)
        return self

    def add(self, action: str) -> None:
        """Learn one more action."""
        self._actions[action] += 1
        for symbol in [*encode_text(action), _END]:
            self._symbols[symbol] += 1
        self._weight = None

    def nats(self, action: str) -> float:
        """-log p(action, EOS). Before any action was learned: the uniform distribution."""
        count, weight = self._actions[action], self.weight
        unigram = math.log1p(-weight) - self._unigram_nats(action)
        if count == 0 or weight == 0:
            return -unigram
        whole = math.log(weight * count / len(self))
        high, low = max(whole, unigram), min(whole, unigram)
        return -(high + math.log1p(math.exp(low - high)))

    def _unigram_nats(self, action: str) -> float:
        total = sum(self._symbols) + self.alpha * _SYMBOLS
        return sum(-math.log((self._symbols[s] + self.alpha) / total) for s in [*encode_text(action), _END])

    def _fit_weight(self) -> float:
        """Maximise the leave-one-out log-likelihood, a concave function of lambda, by EM."""
        total = len(self)
        if total < 2:
            return 0.0
        actions = list(self._actions)
        counts = torch.tensor([self._actions[a] for a in actions], dtype=torch.float64)  # [A]
        whole = (counts - 1) / (total - 1)
        unigram = torch.exp(torch.cat([self._left_out(actions[i : i + 512]) for i in range(0, len(actions), 512)]))
        # One imaginary action of each kind keeps lambda inside (0, 1), whatever the data.
        weight = 0.5
        for _ in range(200):
            mixed = weight * whole + (1 - weight) * unigram
            share = torch.where(mixed > 0, weight * whole / mixed.clamp_min(1e-300), torch.zeros_like(mixed))
            updated = (float((counts * share).sum()) + 1.0) / (total + 2.0)
            if abs(updated - weight) < 1e-12:
                break
            weight = updated
        return weight

    def _left_out(self, actions: Sequence[str]) -> Tensor:
        """[A] log-probability of each action under the byte unigram without one copy of it."""
        own = torch.zeros(len(actions), _SYMBOLS, dtype=torch.float64)
        for row, action in enumerate(actions):
            own[row] = torch.bincount(torch.tensor([*encode_text(action), _END]), minlength=_SYMBOLS).double()
        rest = torch.tensor(self._symbols, dtype=torch.float64) - own + self.alpha  # [A, 257]
        return (own * (rest / rest.sum(dim=1, keepdim=True)).log()).sum(dim=1)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state."""
        return {"alpha": self.alpha, "actions": dict(self._actions)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.alpha = float(state["alpha"])
        self.fit(action for action, count in state["actions"].items() for _ in range(int(count)))

    def check_invariants(self) -> None:
        """Raises AssertionError when the counts disagree."""
        assert self._symbols[_END] == len(self), (self._symbols[_END], len(self))
        assert self._weight is None or 0 <= self._weight < 1, self._weight


@dataclass(frozen=True, slots=True)
class GateResult:
    """Whether held-out loss is clearly below the baseline. Gains are nats that the kernel saves."""

    ok: bool
    mean_gain_per_byte: float
    mean_gain: float  # nats per item
    standard_error: float  # of mean_gain
    needed: float  # what mean_gain must exceed
    items: int
    reason: str


def learning_gate(
    loss_nats: Sequence[float] | Tensor, baseline_nats: Sequence[float] | Tensor, symbols: Sequence[int] | Tensor
) -> GateResult:
    """Paired comparison over held-out items: all arguments [N], nats per item and symbols judged per item.

    ok: at least 20 items, and a mean gain above both two standard errors and 2 % of the baseline. A loss that is not
    finite never passes.
    """
    loss = torch.as_tensor(loss_nats, dtype=torch.float64).cpu()
    base = torch.as_tensor(baseline_nats, dtype=torch.float64).cpu()
    length = torch.as_tensor(symbols, dtype=torch.float64).cpu()
    if not loss.shape == base.shape == length.shape or loss.dim() != 1:
        raise InvalidInput(f"the gate compares items pairwise; got {loss.shape}, {base.shape} and {length.shape}")
    items = len(loss)
    if items < MIN_GATE_ITEMS:
        return GateResult(False, 0.0, 0.0, 0.0, 0.0, items, f"{items} held-out items, needs {MIN_GATE_ITEMS}")
    if not (bool(loss.isfinite().all()) and bool(base.isfinite().all())):
        return GateResult(False, 0.0, 0.0, 0.0, 0.0, items, "the held-out loss is not finite")
    gain = base - loss
    mean, error = float(gain.mean()), float(gain.std(correction=1)) / math.sqrt(items)
    needed = max(2 * error, _GATE_SHARE * float(base.mean()))
    ok = mean > needed
    verdict = "below" if ok else "not clearly below"
    saving = f"saves {mean:.3f}" if mean >= 0 else f"loses {-mean:.3f}"
    reason = f"held-out loss {verdict} the baseline: {saving} nats per item, must save more than {needed:.3f}"
    return GateResult(ok, mean / max(float(length.mean()), 1e-12), mean, error, needed, items, reason)
