"""The prefix as parameters: some frozen slots, then trained ones, in float32 whatever the model's dtype.

The first slots stay as they are, bit for bit: the attention of nearly every head rests on the first position when it
has nothing to look for, and a model whose first slot was trained forgets other skills (arXiv 2506.06266, ablations).

Shapes: H key-value heads, p slots of which f are frozen, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from workspace.prefix import KVPrefix


class TrainablePrefix:
    """Keys and values of all layers. ``prefix`` gives the initial ones and is left alone."""

    def __init__(self, prefix: KVPrefix, frozen: int):
        self.frozen = frozen
        parts = [
            (keys.detach().clone(), values.detach().clone())
            for keys, values in zip(prefix.keys, prefix.values, strict=True)
        ]
        #: Exactly as they came, [1, H, f, D].
        self.frozen_layers = [(keys[:, :, :frozen], values[:, :, :frozen]) for keys, values in parts]
        #: [1, H, p - f, D] each.
        self.trained = [
            (
                nn.Parameter(keys[:, :, frozen:].float().contiguous()),
                nn.Parameter(values[:, :, frozen:].float().contiguous()),
            )
            for keys, values in parts
        ]

    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [1, H, p, D] in float32, differentiable."""
        return [
            (torch.cat((frozen_keys.float(), keys), dim=2), torch.cat((frozen_values.float(), values), dim=2))
            for (frozen_keys, frozen_values), (keys, values) in zip(self.frozen_layers, self.trained, strict=True)
        ]

    def parameters(self) -> list[nn.Parameter]:
        """In a fixed order: keys and values of each layer."""
        return [parameter for layer in self.trained for parameter in layer]

    def named(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters by name, as checkpoints keep them."""
        for number, (keys, values) in enumerate(self.trained):
            yield f"keys.{number}", keys
            yield f"values.{number}", values

    @torch.no_grad()
    def prefix(self, dtype: torch.dtype) -> KVPrefix:
        """A copy to serve, in ``dtype``; the frozen slots are bit-equal to the initial ones if they were in it."""
        joined = [
            tuple(
                torch.cat((frozen.to(dtype), trained.to(dtype)), dim=2) for frozen, trained in zip(*layer, strict=True)
            )
            for layer in zip(self.frozen_layers, self.trained, strict=True)
        ]
        return KVPrefix(tuple(keys for keys, _ in joined), tuple(values for _, values in joined))
