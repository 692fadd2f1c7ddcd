"""Attention over real and virtual keys: three back ends with equal numbers.

``merge``  (the default) runs the stock attention on the real keys, with no further copy of the cache, and lets its
           result compete with the virtual keys by its log-sum-exp. Where no virtual key has weight, the result is the
           stock result to the bit. Without a log-sum-exp (fused kernels on a GPU or under autograd) it is ``eager``.
``eager``  one softmax over the scores of real and virtual keys and the sink: the reference. The only one with dropout.
``fused``  torch's fused kernel: each virtual key and the sink is a column with a zero key, whose mask entry is its
           score; the sink's value is zero. It copies the cache, and gives gpt-oss, which is eager in transformers, a
           fused path on a CPU.

A virtual key is content k, a query arrives rotated to its position: s R(p) q. Its score with a key that stands
``distance`` before it is s^2 <q, R(-distance) k>. So the query is turned back by its own cosine and sine (which leaves
s^2 q) and the keys are turned once for all queries and all positions (``placed``): nothing depends on the position.
The virtual part is computed in float32 at least.

Measured, one thread of a busy EPYC, as ratios within one run. One step of SmolLM2-135M with 32 virtual tokens on 6 of
its 30 layers, against the same step without a context, after 256 | 2048 tokens: bfloat16 (stock is eager) merge
1.03 | 1.04, eager 1.02 | 1.00, fused 1.02 | 1.00; float32 (stock is sdpa) merge 1.03 | 1.03, eager 1.02 | 1.03, fused
1.03 | 1.04. Hooks without a context, against none: 1.00.
Attention of one layer of gpt-oss-20b alone in bfloat16, against stock: merge 1.4 | 0.9, eager 0.36 | 0.09, fused
0.32 | 0.10, because stock copies the cache for its 64 query heads. So ``merge`` is not the fastest; it is the default
because what is carried then changes the answer only as far as it has weight, and rounding does not: in bfloat16 two
kernels differ by up to a logit.

Shapes: R rows or 1, H key-value heads, G query heads for each of them, T queries, N real keys, M virtual keys, D head
size. Scores are [R, H, G, T, N|M].
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from workspace.context import Segment
from workspace.packed import packed_lse
from workspace.rope import LayerRope

Base = Literal["eager", "sdpa"]

HIDDEN = -1e30  # score of an invisible virtual key; finite, so that a row without visible keys gives no NaN
_NEVER = torch.iinfo(torch.int64).max
_TINY = 1e-38


class Placed(NamedTuple):
    """A segment made ready for scores: everything about it that no query changes."""

    keys: Tensor  # [R|1, H, D, M], turned by their distance and multiplied by the attention's scaling
    values: Tensor  # [R|1, H, M, D]
    bias: Tensor  # [R|1, H|1, 1, 1, M]
    birth: Tensor  # [R|1, 1, 1, 1, M], the largest integer where the row mask hides a key


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One call of an attention function on a hooked layer."""

    module: Any
    base: Base  #: what the un-hooked model would run
    query: Tensor  #: [R, H*G, T, D], rotated
    key: Tensor  #: [R, H, N, D], rotated, as it comes from the cache
    value: Tensor  #: [R, H, N, D]
    mask: Tensor | None  #: [R, 1|H*G, T, N]: bool or additive; None is causal
    position_ids: Tensor  #: [R|1, T]
    rope: LayerRope
    back: tuple[Tensor, Tensor]  #: factors that turn the queries back, ``LayerRope.back`` for ``position_ids``
    scaling: float
    rest: dict[str, Any]  #: further arguments for the stock function, among them ``dropout``, ``softcap``, ``s_aux``
    packed: bool = False  #: whether that is ``packed.packed_attention``

    @property
    def heads(self) -> int:
        """Number of key-value heads, H."""
        return int(self.key.shape[1])

    @property
    def dropout(self) -> float:
        """Probability with which attention weights are dropped: 0 except in training."""
        return float(self.rest.get("dropout", 0.0)) if self.module.training else 0.0

    def capped(self, scores: Tensor) -> Tensor:
        """The soft cap of models that have one (Gemma 2)."""
        softcap = self.rest.get("softcap")
        return scores if softcap is None else torch.tanh(scores / softcap) * softcap

    def grouped(self, x: Tensor) -> Tensor:
        """[R, H*G, T, X] with the query heads of one key-value head in one axis: [R, H, G*T, X]."""
        return x.reshape(x.shape[0], self.heads, -1, x.shape[-1])

    def split(self, x: Tensor) -> Tensor:
        """[R, H, G*T, X] or [R, H*G, T, X] as [R, H, G, T, X]."""
        return x.reshape(x.shape[0], self.heads, -1, self.query.shape[2], x.shape[-1])

    def content_query(self) -> Tensor:
        """The queries in content space, [R, H*G, T, D]."""
        return self.rope.content(self.query, self.back)


def placed(segment: Segment, rope: LayerRope, scaling: float, dtype: torch.dtype, device: torch.device) -> Placed:
    """What scores need of ``segment``; kept with it while no gradient and no compiler has to see how it came about."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _place(segment, rope, scaling, dtype, device)
    where = (rope, scaling, dtype, device)
    found: Placed | None = segment.placed.get(where)
    if found is None:
        found = segment.placed[where] = _place(segment, rope, scaling, dtype, device)
    return found


def _place(segment: Segment, rope: LayerRope, scaling: float, dtype: torch.dtype, device: torch.device) -> Placed:
    keys = segment.keys.to(device=device, dtype=dtype)
    if not (isinstance(segment.distance, int) and segment.distance == 0):
        keys = rope.shift(keys, -segment.distance)
    birth = segment.birth.to(device)
    if segment.mask is not None:
        birth = torch.where(segment.mask.to(device), birth, _NEVER)
    return Placed(
        keys=(keys * scaling).transpose(2, 3).contiguous(),
        values=segment.values.to(device=device, dtype=dtype),
        bias=segment.bias.to(device=device, dtype=dtype)[:, :, None, None],
        birth=birth[:, None, None, None],
    )


def virtual_scores(call: Call, ready: Placed) -> Tensor:
    """Scores of the virtual keys, bias included, ``HIDDEN`` where they are invisible: [R, H, G, T, M]."""
    query = call.rope.turn(call.query.to(ready.keys.dtype), call.back)  # s^2 q
    scores = call.capped(call.split(call.grouped(query) @ ready.keys))
    visible = call.position_ids[:, None, None, :, None] >= ready.birth
    return torch.where(visible, scores + ready.bias, HIDDEN)


# The back ends. Each returns the output [R, T, H*G, D], and the attention that real keys got [R, H*G, T, N] or None.


def merge(call: Call, ready: Placed) -> tuple[Tensor, Tensor | None]:
    """Stock attention for the real keys; its result then competes as one more value with the virtual ones."""
    if call.dropout or (call.base == "sdpa" and not _kernel_tells(call)):
        return eager(call, ready)  # dropped weights, or no log-sum-exp but from all the scores, which then suffice
    real, weights, lse = _real_eager(call) if call.base == "eager" else _real_sdpa(call)
    scores = torch.cat((virtual_scores(call, ready), lse), dim=-1)
    shares = torch.softmax(scores, dim=-1).flatten(1, 2)  # [R, H*G, T, M+1]
    virtual = call.grouped(shares[..., :-1]) @ ready.values  # [R, H, G*T, D]
    virtual = call.split(virtual).flatten(1, 2).transpose(1, 2)  # [R, T, H*G, D], as the stock function lays out
    of_real = shares[..., -1:]
    # A share of 1 leaves the real part as it is, to the bit.
    output = torch.addcmul(virtual, real.to(virtual.dtype), of_real.transpose(1, 2)).to(real.dtype)
    if weights is None or not wants_weights(call):
        return output, None
    return output, weights * of_real.to(weights.dtype)


def eager(call: Call, ready: Placed) -> tuple[Tensor, Tensor | None]:
    """One softmax over everything."""
    weights, value = _weights(call, ready)
    if call.dropout:
        weights = F.dropout(weights, p=call.dropout)
    real = weights[..., : value.shape[2]].flatten(1, 2)  # [R, H*G, T, N]
    virtual = weights[..., value.shape[2] :][..., : ready.values.shape[2]].flatten(1, 2)
    output = call.grouped(real.to(value.dtype)) @ value
    output = (output + call.grouped(virtual) @ ready.values).to(value.dtype)
    return _laid_out(call, output), real.to(value.dtype) if wants_weights(call) else None


def attention_mass(call: Call, ready: Placed | None) -> Tensor:
    """Attention on each real key, summed over queries and over the query heads of its head: [R, H, N]."""
    weights, value = _weights(call, ready)
    return weights[..., : value.shape[2]].sum(dim=(2, 3))


def _weights(call: Call, ready: Placed | None) -> tuple[Tensor, Tensor]:
    """Attention on real keys, virtual keys and sink, in this order [R, H, G, T, N+M+1], and the real values."""
    key, value, mask = _visible(call, torch.promote_types(call.query.dtype, torch.float32))
    columns = [_real_scores(call, key, mask)]
    if ready is not None:
        columns.append(virtual_scores(call, ready))
    sink = call.rest.get("s_aux")
    if sink is not None:  # one logit for each query head
        columns.append(sink.to(mask.dtype).reshape(1, call.heads, -1, 1, 1).expand(*columns[0].shape[:4], 1))
    return torch.softmax(torch.cat(columns, dim=-1), dim=-1), value


def fused(call: Call, ready: Placed) -> tuple[Tensor, Tensor | None]:
    """Scaled dot product attention with zero keys, whose scores are in the mask."""
    key, value, mask = _visible(call, ready.keys.dtype)
    rows, heads, _, head_dim = key.shape
    scores = virtual_scores(call, ready)
    columns = [mask.expand(rows, *scores.shape[1:4], key.shape[2]), scores]
    values = [value, ready.values.to(value.dtype).expand(rows, -1, -1, -1)]
    sink = call.rest.get("s_aux")
    if sink is not None:
        columns.append(sink.to(mask.dtype).reshape(1, heads, -1, 1, 1).expand(*scores.shape[:4], 1))
        values.append(value.new_zeros(rows, heads, 1, head_dim))
    extra = sum(column.shape[-1] for column in columns) - key.shape[2]
    output = F.scaled_dot_product_attention(
        call.query,
        torch.cat((key, key.new_zeros(rows, heads, extra, head_dim)), dim=2),
        torch.cat(values, dim=2),
        attn_mask=torch.cat(columns, dim=-1).flatten(1, 2).to(call.query.dtype),
        scale=call.scaling,
        enable_gqa=call.query.shape[1] != heads,
    )
    return output.transpose(1, 2).contiguous(), None


def wants_weights(call: Call) -> bool:
    """True when the caller of the model asked for attention weights."""
    return bool(call.rest.get("output_attentions", getattr(call.module.config, "output_attentions", False)))


# The real part, with its log-sum-exp [R, H, G, T, 1]; sinks, where there are any, are in it.


def stock_eager(module: Any) -> Any:
    """The eager attention function of the file that defines the attention class: what stock would run."""
    return sys.modules[type(module).__module__].eager_attention_forward


def _real_eager(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Stock eager attention. Its log-sum-exp follows from its weights: log p_j = s_j - lse, for the largest p_j.

    That needs one score for each query instead of all of them again, and is differentiable to the exact gradient.
    """
    output, weights = stock_eager(call.module)(
        call.module, call.query, call.key, call.value, call.mask, scaling=call.scaling, **call.rest
    )
    largest, index = weights.detach().max(dim=-1, keepdim=True)  # [R, H*G, T, 1]
    if weights.requires_grad:
        largest = weights.gather(-1, index)
    at = call.grouped(index).expand(-1, -1, -1, call.key.shape[-1])
    chosen = call.key.gather(2, at)  # [R, H, G*T, D]
    work = torch.promote_types(call.query.dtype, torch.float32)
    # Rounded where the stock function rounds, since its weights come from the rounded score.
    score = (call.grouped(call.query).to(work) * chosen.to(work)).sum(-1, keepdim=True).to(call.query.dtype)
    score = call.capped(score * call.scaling)
    return output, weights, call.split(score.to(work)) - call.split(largest.to(work).clamp_min(_TINY).log())


def _kernel_tells(call: Call) -> bool:
    """True where torch's fused kernel gives out its log-sum-exp: on a CPU, and outside of autograd."""
    return call.query.device.type == "cpu" and not torch.is_grad_enabled()


def _real_sdpa(call: Call) -> tuple[Tensor, None, Tensor]:
    """Stock fused attention: the kernel that torch takes on a CPU, called by its own name for the log-sum-exp."""
    query, key, value, mask = call.query, call.key, call.value, call.mask
    if call.packed:
        output, lse = packed_lse(call.grouped(query), key, value, call.scaling)
        return _laid_out(call, output), None, call.split(lse[..., None])
    causal = mask is None and query.shape[2] > 1
    if causal:
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, -torch.inf).to(query.dtype)
    # As the stock function does; the kernel rounds differently otherwise.
    if mask is not None and query.shape[2] == 1:
        query = call.grouped(query)
        mask = mask if mask.shape[1] == 1 else call.grouped(mask)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output, lse = kernel(query, key, value, 0.0, causal, attn_mask=mask, scale=call.scaling)
    return _laid_out(call, output), None, call.split(lse[..., None])


def _real_scores(call: Call, key: Tensor, mask: Tensor) -> Tensor:
    """Scores of the real keys in the dtype of ``mask``, mask included: [R, H, G, T, N]."""
    scores = call.split(call.grouped(call.query) @ key.transpose(2, 3)).to(mask.dtype) * call.scaling
    return call.capped(scores) + mask


def _visible(call: Call, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Real keys and values that any query may see, and an additive mask in ``dtype`` [R|1, 1|H, 1|G, T|1, N].

    transformers leaves the mask out where a query sees everything, or where queries and keys start together and are
    causal; in the latter case a static cache has empty places at its end.
    """
    key, value, mask, queries = call.key, call.value, call.mask, call.query.shape[2]
    if mask is None and queries == 1:
        return key, value, torch.zeros((1, 1, 1, 1, 1), dtype=dtype, device=key.device)
    if mask is None:
        key, value = key[:, :, :queries], value[:, :, :queries]
        mask = torch.ones((1, 1, queries, queries), dtype=torch.bool, device=key.device).tril()
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    heads = (call.heads, -1) if mask.shape[1] > 1 else (1, 1)
    return key, value, mask.to(dtype).reshape(mask.shape[0], *heads, *mask.shape[2:])


def _laid_out(call: Call, output: Tensor) -> Tensor:
    """[R, H, G*T, D] as attention functions return it: [R, T, H*G, D]."""
    return call.split(output).flatten(1, 2).transpose(1, 2).contiguous()
