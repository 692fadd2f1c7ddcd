"""Virtual KV without trained weights: what the model's own projections make of pooled residuals.

A random projection is not an option: 16 random virtual tokens in 6 layers cost SmolLM2-135M 1.5 nats. The layer's own
``k_proj`` and ``v_proj`` (with its key norm, where it has one) at least speak the layer's language, and so does its
input norm. It is an approximation: the probe sees the residual after attention, the projections are used to the one
before.

Shapes: R rows, T tokens, M virtual tokens, H kv heads, D head_dim. Nothing is trained and nothing is random.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from workspace.errors import UnsupportedModel


def pool_residuals(residuals: Tensor, tokens: int) -> Tensor:
    """[R, T, hidden] -> [R, min(tokens, T), hidden]: means of consecutive stretches, as equally long as they can be.

    Each residual counts by its direction (divided by its root mean square): a sink's is hundreds of times longer.
    """
    if tokens < 1 or residuals.shape[1] < 1:
        raise ValueError(f"cannot pool {residuals.shape[1]} residuals into {tokens} tokens; both must be at least 1")
    unit = functional.rms_norm(residuals.float(), residuals.shape[-1:])
    stretches = unit.tensor_split(min(tokens, residuals.shape[1]), dim=1)
    return torch.stack([stretch.mean(dim=1) for stretch in stretches], dim=1)


@torch.no_grad()
def heuristic_kv(residuals: Mapping[int, Tensor], layers: Mapping[int, nn.Module]) -> dict[int, tuple[Tensor, Tensor]]:
    """``residuals[layer]`` [R, M, hidden] (pooled) -> content keys and values [R, H, M, D] of each layer.

    ``layers[layer]`` is the model's decoder layer: its ``input_layernorm``, if it has one, and its ``self_attn`` are
    used. Keys are before RoPE and before the model's attention scaling. Results have the layer's dtype and device.
    Raises ``UnsupportedModel`` for a layer without separate key and value projections.
    """
    return {layer: _project(layer, residuals[layer], layers[layer]) for layer in residuals}


def _project(number: int, residual: Tensor, layer: nn.Module) -> tuple[Tensor, Tensor]:
    attention: Any = getattr(layer, "self_attn", None)
    if not all(hasattr(attention, name) for name in ("k_proj", "v_proj", "head_dim")):
        raise UnsupportedModel(
            f"layer {number} ({type(layer).__name__}) has no self_attn with k_proj and v_proj, so nothing can be "
            "broadcast without trained weights; set workspace.state_path, or workspace.virtual_kv to false"
        )
    hidden = functional.rms_norm(residual.float(), residual.shape[-1:])
    hidden = hidden.to(device=attention.k_proj.weight.device, dtype=_working_dtype(layer))
    if (input_norm := getattr(layer, "input_layernorm", None)) is not None:  # post-norm models have none
        hidden = input_norm(hidden)
    keys, values = attention.k_proj(hidden), attention.v_proj(hidden)  # [R, M, H * D]
    shape = (*hidden.shape[:2], -1, attention.head_dim)
    key_norm: Any = getattr(attention, "k_norm", None)
    if key_norm is None:
        keys = keys.view(shape)
    elif key_norm.weight.shape[-1] == attention.head_dim:
        keys = key_norm(keys.view(shape))
    else:  # OLMo 2 normalises over all heads together
        keys = key_norm(keys).view(shape)
    return keys.transpose(1, 2), values.view(shape).transpose(1, 2)  # [R, H, M, D]


def _working_dtype(layer: nn.Module) -> torch.dtype:
    """The dtype of activations; weights may be quantised to integers, norms never are."""
    return next(parameter.dtype for parameter in layer.parameters() if parameter.is_floating_point())
