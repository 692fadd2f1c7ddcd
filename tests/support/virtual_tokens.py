"""Small virtual tokens for tests of the store: three layers, two heads of size four."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from workspace.context import Segment
from workspace.virtual_kv_limits import StoreShape

LAYERS = (1, 3, 5)
HEADS, SIZE = 2, 4


def make_shape(dtype: torch.dtype = torch.float32, fingerprint: str = "model-a") -> StoreShape:
    """A store's shape on the CPU."""
    return StoreShape(fingerprint, LAYERS, HEADS, SIZE, dtype, torch.device("cpu"))


def make_layers(counts: Mapping[int, int], seed: int = 0) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """Random keys, values and biases with ``counts[layer]`` tokens in each layer."""
    random = torch.Generator().manual_seed(seed)
    return {
        layer: (
            torch.randn(1, HEADS, count, SIZE, generator=random),
            torch.randn(1, HEADS, count, SIZE, generator=random),
            torch.randn(1, HEADS, count, generator=random),
        )
        for layer, count in counts.items()
    }


def same_view(one: Mapping[int, Segment], other: Mapping[int, Segment]) -> bool:
    """Whether two views show the same layers with the same bits."""
    return list(one) == list(other) and all(
        torch.equal(getattr(one[layer], part), getattr(other[layer], part))
        for layer in one
        for part in ("keys", "values", "bias", "birth")
    )


class FakeClock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Shelf:
    """Persistence in a dict, which remembers what was asked of it."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.loads: list[str] = []
        self.saves: list[str] = []

    def load(self, session: str) -> bytes | None:
        """What was saved, as the store asks for it."""
        self.loads.append(session)
        return self.blobs.get(session)

    def save(self, session: str, blob: bytes | None) -> None:
        """Keep or delete, as the store says."""
        self.saves.append(session)
        if blob is None:
            self.blobs.pop(session, None)
        else:
            self.blobs[session] = blob
