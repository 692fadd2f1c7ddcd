"""Dark experience replay: a kernel that is asked to answer old experiences as it once did.

DER++ (Buzzega et al. 2020, arXiv 2004.07211, equation 6): next to the cross-entropy on replayed examples, which the
batch has anyway, the loss holds the mean squared distance between the logits now and those stored when the example
was known,

    L = CE(batch) + alpha * mean_i || z_i - f(x_i) ||^2 / (S_i V)

The logits say more than the answer does: how sure the kernel was, and what came second.

- **Stored** are the logits at the action's symbols, in float16, of at most ``capacity`` examples and the first
  ``MAX_SYMBOLS`` symbols each; who was stored longest ago goes first.
- **Refreshed.** Stored logits go stale (Kobayashi 2025): those of an early, bad kernel would hold a better one back.
  So they are replaced whenever the example is answered with a lower loss than the stored ones had.

They are tensors of the checkpoint, so that a resumed kernel repeats its losses bit by bit. Not here: which examples
are old (``olympus/rehearsal``), and where the logits come from (``learning``).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qig_core.errors import InvalidInput
from qig_core.vocabulary import VOCAB_SIZE

MAX_SYMBOLS = 32
_LARGEST = 60_000.0  # float16 ends at 65,504


@dataclass
class Distillation:
    """What ``supervised_loss`` is to stay close to, and what it found. One entry per row of the batch.

    ``targets``: stored logits [S, V], or None for a row that has none. ``found``: filled with the detached logits
    [S, V] of the first pass, at the same symbols.
    """

    targets: Sequence[Tensor | None]
    alpha: float
    found: dict[int, Tensor] = field(default_factory=dict)


class LogitMemory:
    """Stored logits by key. Used by one thread at a time."""

    def __init__(self, capacity: int):
        if capacity < 1:
            raise InvalidInput(f"a logit memory needs room for at least one example, got {capacity}")
        self.capacity = capacity
        self._logits: OrderedDict[int, Tensor] = OrderedDict()  # oldest first
        self._loss: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self._logits)

    def get(self, key: int) -> Tensor | None:
        """Stored logits [S, V] in float16, or None."""
        return self._logits.get(key)

    def offer(self, key: int, logits: Tensor, loss: float) -> bool:
        """Store logits [S, V] when there are none or the loss is lower than theirs; True when they were stored."""
        if not loss < self._loss.get(key, float("inf")):
            return False
        kept = logits[:MAX_SYMBOLS].detach().clamp(-_LARGEST, _LARGEST).to("cpu", torch.float16)
        self._logits.pop(key, None)
        self._logits[key], self._loss[key] = kept.clone(), loss
        if len(self._logits) > self.capacity:
            oldest, _ = self._logits.popitem(last=False)
            del self._loss[oldest]
        return True

    def keep_only(self, keys: Collection[int]) -> None:
        """Forget all others: what was deleted must not be remembered in this way either."""
        for key in [key for key in self._logits if key not in keys]:
            del self._logits[key], self._loss[key]

    def tensors(self) -> dict[str, Tensor]:
        """Everything as tensors of a checkpoint; empty while nothing is stored."""
        if not self._logits:
            return {}
        return {
            "keys": torch.tensor(list(self._logits), dtype=torch.int64),
            "lengths": torch.tensor([len(item) for item in self._logits.values()], dtype=torch.int64),
            "losses": torch.tensor([self._loss[key] for key in self._logits], dtype=torch.float64),
            "logits": torch.cat(list(self._logits.values())),
        }

    def load_tensors(self, saved: Mapping[str, Tensor]) -> None:
        """Inverse of ``tensors``. Raises InvalidInput when they do not fit together."""
        self._logits.clear()
        self._loss.clear()
        if not saved:
            return
        keys, lengths, losses = (saved[name].tolist() for name in ("keys", "lengths", "losses"))
        logits = saved["logits"]
        if not len(keys) == len(lengths) == len(losses) or tuple(logits.shape) != (sum(lengths), VOCAB_SIZE):
            raise InvalidInput(f"saved logits {list(logits.shape)} do not fit {len(keys)} examples")
        for key, part, loss in zip(keys, torch.split(logits, lengths), losses, strict=True):
            self._logits[key], self._loss[key] = part.clone(), loss

    def check_invariants(self) -> None:
        """Bounded, finite, and with a loss for each."""
        assert len(self._logits) <= self.capacity
        assert self._logits.keys() == self._loss.keys()
        for item in self._logits.values():
            assert item.dtype == torch.float16
            assert item.shape[0] <= MAX_SYMBOLS
            assert bool(item.isfinite().all())
