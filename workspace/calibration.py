"""What a model's own keys and values look like: their lengths for the projector, themselves as a beginning.

One pass over a text without a workspace; nothing is trained. Shapes: H key-value heads, T tokens, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from workspace.context import Context
from workspace.hooking import HookedModel
from workspace.projector import Projector


@torch.no_grad()
def real_kv(hooked: HookedModel, ids: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """Content keys and values [1, H, T, D] of the hooked layers for the text ``ids`` [T], in float32."""
    loaded = hooked.loaded
    cache = DynamicCache(config=loaded.model.config)
    positions = torch.arange(ids.shape[0], device=loaded.device)[None]
    loaded.model(
        ids[None].to(loaded.device),
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=torch.zeros(1, dtype=torch.long, device=loaded.device),
        workspace=Context(),
    )
    found = {}
    for layer in hooked.layers:
        held: Any = cache.layers[layer]
        found[layer] = hooked.rope.derotate(held.keys.float(), positions, layer), held.values.float()
    return found


def observe_text(hooked: HookedModel, projector: Projector, ids: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """Take a text's keys and values into the projector's running norms, and return them."""
    found = real_kv(hooked, ids)
    for layer, (keys, values) in found.items():
        if layer in projector.shape.layers:
            projector.observe(layer, keys, values)
    return found
