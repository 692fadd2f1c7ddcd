"""One token's attention over all that its row sees, on the way that is quickest for how much that is; and of several
rows at once, where their keys lie in one tensor (``row_slab.py``).

The query heads of a key-value head stand in the place of queries, so that no key is repeated or read G times. Measured
on one thread of a busy EPYC with SmolLM2's heads in bfloat16, microseconds after 64 | 512 | 2000 tokens that are in the
processor's cache: 12 | 49 | 183; by torch's grouped-query option 46 | 382 | 1586; stock eager 46 | 97 | 251.

torch's fused kernel copies keys and values into the layout of its products, which costs most of its time when there are
many and few queries. A product with the keys on its left side, and one with the values on its right, need no copy.
With the caches of all layers in turn, as in a step, 512 | 768 | 1024 | 2000 tokens: fused 56 | 105 | 162 | 325, two
products and a softmax 74 | 92 | 110 | 181; with 8 key-value heads of 8 queries 178 | 313 | 490 | 966 and 141 | 205 |
270 | 504. Their scores are rounded to bfloat16, as those of the stock eager attention are: the result is then off by
0.4 % (norm, relative) instead of 0.2 %.

Shapes: S rows, H key-value heads, G query heads for each of them, N cached tokens, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

#: Tokens from which on two products are quicker than the fused kernel, for at most so many query heads of a group.
_LONG = 640
_FEW = 16


def packed(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """``query`` [1, H, G, D] over ``key`` and ``value`` [1, H, N, D], all of which it sees: [1, H, G, D]."""
    if _is_long(query, key):
        return _attended(_scores(query, key, scaling), value)
    return F.scaled_dot_product_attention(query, key, value, scale=scaling)


def packed_lse(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """``packed`` to the bit, and the log-sum-exp of its scores [1, H, G] in float32. On a CPU, without gradients."""
    if _is_long(query, key):
        scores = _scores(query, key, scaling)
        return _attended(scores, value), torch.logsumexp(scores, dim=-1)[None]
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output, lse = kernel(query, key, value, 0.0, False, attn_mask=None, scale=scaling)
    return output, lse


def packed_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, *, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """``packed`` in the form of the stock functions: ``query`` [1, H * G, 1, D] to [1, 1, H * G, D]."""
    seen = packed(query.reshape(1, key.shape[1], -1, query.shape[-1]), key, value, scaling)
    return seen.reshape(1, 1, -1, value.shape[-1]), None


def packed_rows(
    query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, scaling: float, sinks: Tensor | None = None
) -> Tensor:
    """Several rows at once: ``query`` [S, H, G, D] over ``key`` and ``value`` [S, H, N, D], to [S, H, G, D].

    ``hidden`` [S, 1, 1, N] in float32 is added to the scores: 0, or minus infinity for what a row does not see.
    ``sinks`` [H * G]: logits that take their share and give nothing (gpt-oss).
    """
    rows, heads, group, width = query.shape
    scores = torch.bmm(key.flatten(0, 1), query.reshape(rows * heads, group, width).transpose(1, 2))  # [S * H, N, G]
    scores = torch.add(hidden, scores.view(rows, heads, -1, group).transpose(2, 3), alpha=scaling)  # in float32
    if sinks is not None:
        apart = sinks.view(heads, group, 1).to(scores.dtype).expand(rows, -1, -1, 1)
        scores = torch.cat((scores, apart), dim=-1)
    weights = torch.softmax(scores, dim=-1).to(value.dtype)  # [S, H, G, N]
    if sinks is not None:
        weights = weights[..., :-1]
    return torch.bmm(weights.flatten(0, 1), value.flatten(0, 1)).view(rows, heads, group, -1)


def _is_long(query: Tensor, key: Tensor) -> bool:
    few = query.shape[2] <= _FEW
    return key.shape[2] >= _LONG and few and query.dtype == torch.bfloat16 and query.device.type == "cpu"


def _scores(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """[H, G, N] in float32."""
    scores = torch.bmm(key[0], query[0].transpose(1, 2))  # [H, N, G]
    return scores.transpose(1, 2).float().mul_(scaling)


def _attended(scores: Tensor, value: Tensor) -> Tensor:
    """The values [1, H, N, D] by the softmax of ``scores`` [H, G, N]: [1, H, G, D]."""
    return torch.bmm(torch.softmax(scores, dim=-1).to(value.dtype), value[0])[None]
