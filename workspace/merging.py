"""Several sources of virtual tokens as one segment per layer, which is what a forward pass carries.

A generation may see what its session holds, what was trained, what the workspace broadcast, and what stands in for
evicted tokens. Each keeps its own births, biases and distances. Pure functions; nothing is copied where one source is
all there is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from workspace.context import Segment


def merge_segments(sources: Sequence[Mapping[int, Segment]]) -> dict[int, Segment]:
    """One segment per layer that any source has, in the order of the sources. All are of one row and one dtype."""
    found: dict[int, list[Segment]] = {}
    for source in sources:
        for layer, segment in source.items():
            found.setdefault(layer, []).append(segment)
    return {layer: parts[0] if len(parts) == 1 else _concatenate(parts) for layer, parts in found.items()}


def _concatenate(parts: Sequence[Segment]) -> Segment:
    keys = torch.cat([part.keys for part in parts], dim=2)
    heads = keys.shape[1]
    return Segment(
        keys,
        torch.cat([part.values for part in parts], dim=2),
        torch.cat([part.bias.float().expand(-1, heads, -1) for part in parts], dim=2),
        torch.cat([part.birth for part in parts], dim=1),
        mask=_masks(parts),
        distance=_distances(parts),
    )


def _masks(parts: Sequence[Segment]) -> Tensor | None:
    if all(part.mask is None for part in parts):
        return None
    whole = [torch.ones_like(part.birth, dtype=torch.bool) if part.mask is None else part.mask for part in parts]
    return torch.cat(whole, dim=1)


def _distances(parts: Sequence[Segment]) -> Tensor | int:
    first = parts[0].distance
    if isinstance(first, int) and all(isinstance(part.distance, int) and part.distance == first for part in parts):
        return first
    return torch.cat(
        [
            part.distance
            if isinstance(part.distance, Tensor)
            else torch.full((part.tokens,), part.distance, dtype=torch.int64, device=part.keys.device)
            for part in parts
        ]
    )
