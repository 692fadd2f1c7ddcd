"""Training-free compression of the long prompt to as many slots as a cartridge has: what one has before any training.

After KVzip (arXiv 2505.23416): the model reads a text, is asked to repeat it, and is fed the text again. A token's
score is the greatest share of attention that any query of this second part gives it; each key-value head keeps the best
of its own. Unlike there all heads keep equally many. Kept keys are turned from where they stood to their slots.

Shapes: n tokens of the text, T of the repetition, H key-value heads, G query heads for each, D head size, p slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from memory.distillation.encoding import Encoder
from workspace.compaction import attention_shares
from workspace.models import LoadedModel
from workspace.prefix import KVPrefix, check_prefix
from workspace.rope import RopeHandle

_REPEAT = "Repeat the conversation so far, word for word."


class _Read(NamedTuple):
    """One layer after both passes."""

    keys: Tensor  #: [H, n + T, D], rotated, of the text and of the repetition
    values: Tensor  #: [H, n + T, D]
    queries: Tensor  #: [H, G, T, D], rotated, of the repetition
    sinks: Tensor | None  #: [H, G]: logits of attention sinks (gpt-oss)
    scaling: float


class Continuing(Encoder):
    """Conversations that begin with ``text``, as what follows it: the prefix stands for the text itself."""

    def __init__(self, loaded: LoadedModel, text: Sequence[int]):
        super().__init__(loaded)
        self._whole, self._text = Encoder(loaded), list(text)

    def prompt(self, messages: Sequence[Mapping[str, Any]], *, after_prefix: bool) -> list[int]:
        """Without the text. Raises ``ValueError`` for a conversation that begins differently."""
        ids = self._whole.prompt(messages, after_prefix=False)
        if ids[: len(self._text)] != self._text:
            raise ValueError("this conversation does not begin with what the prefix was made of")
        return ids[len(self._text) :]

    def answer(self, messages: Sequence[Mapping[str, Any]], content: str, *, after_prefix: bool) -> list[int]:
        """As after the whole conversation."""
        return self._whole.answer(messages, content, after_prefix=False)


def repeated(loaded: LoadedModel, history: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[int]]:
    """``text`` and ``again`` for a conversation."""
    encoder = Encoder(loaded)
    text = encoder.conversation(history)
    asked = encoder.prompt([*history, {"role": "user", "content": _REPEAT}], after_prefix=False)
    assert asked[: len(text)] == text, "the template writes a conversation differently when it goes on"
    return text, [*asked[len(text) :], *text]


@torch.inference_mode()
def evicted(loaded: LoadedModel, text: Sequence[int], again: Sequence[int], slots: int) -> KVPrefix:
    """``slots`` tokens of ``text``, chosen by what ``again`` attends to, which asks for it and repeats it.

    For models without query norms. On a layer with a sliding window all of the text counts as seen.
    """
    rope, keys, values = _rope(loaded), [], []
    for index, layer in enumerate(_read(loaded, text, again)):
        chosen = torch.stack([_attended(layer, head, len(text), slots) for head in range(len(layer.keys))])  # [H, p]
        wide = chosen[..., None].expand(-1, -1, layer.keys.shape[-1])  # [H, p, D]
        content = rope.derotate(layer.keys.gather(1, wide).float()[:, None], chosen, index)  # [H, 1, p, D]
        turned = rope.rotate(content, torch.arange(slots)[None], index)
        keys.append(turned.transpose(0, 1).to(layer.keys.dtype))
        values.append(layer.values.gather(1, wide)[None])
    prefix = KVPrefix(tuple(keys), tuple(values))
    check_prefix(loaded, prefix)
    return prefix


def _attended(layer: _Read, head: int, count: int, slots: int) -> Tensor:
    """Which ``slots`` of the text's ``count`` tokens one head keeps, ascending."""
    queries, others = _seen_by(layer, head, count)
    best = torch.zeros(count)
    for some, rest in zip(queries.split(1024), others.split(1024), strict=True):
        shares = attention_shares(some, layer.keys[head, :count], torch.zeros(count), rest, layer.scaling)
        best = torch.maximum(best, shares.amax(dim=0))
    return best.topk(slots).indices.sort().values


def _seen_by(layer: _Read, head: int, count: int) -> tuple[Tensor, Tensor]:
    """Queries [G * T, D] of one key-value head, and the log-mass [G * T] of what they see besides the text."""
    queries = layer.queries[head].float()  # [G, T, D]
    later = layer.keys[head, count:].float()  # [T, D]
    scores = queries @ later.T * layer.scaling  # [G, T, T]
    steps = torch.arange(later.shape[0])
    others = scores.masked_fill_(steps[None, :] > steps[:, None], -torch.inf).logsumexp(dim=-1)  # [G, T]
    if layer.sinks is not None:
        others = torch.logaddexp(others, layer.sinks[head].float()[:, None])
    return queries.flatten(0, 1), others.flatten()


def _read(loaded: LoadedModel, text: Sequence[int], again: Sequence[int]) -> list[_Read]:
    """Two passes: the text, then what asks for it and repeats it."""
    model, rope = loaded.model, _rope(loaded)
    cache = DynamicCache()  # without a configuration: sliding layers keep everything, too
    attentions = [layer.self_attn for layer in model.get_decoder().layers]
    asked: list[list[Tensor]] = [[] for _ in attentions]

    def noting(index: int) -> Any:
        return lambda module, given, out: asked[index].append(out)

    _pass(loaded, text, cache, 0)
    hooks = [attention.q_proj.register_forward_hook(noting(index)) for index, attention in enumerate(attentions)]
    try:
        _pass(loaded, again, cache, len(text))
    finally:
        for hook in hooks:
            hook.remove()
    positions = torch.arange(len(text), len(text) + len(again))[None]
    found = []
    for index, attention in enumerate(attentions):
        keys, values = cache.layers[index].keys[0], cache.layers[index].values[0]
        heads = torch.cat(asked[index], dim=1).view(1, len(again), -1, keys.shape[-1]).transpose(1, 2)
        queries = rope.rotate(heads, positions, index)[0].unflatten(0, (keys.shape[0], -1))
        sinks = getattr(attention, "sinks", None)
        found.append(
            _Read(keys, values, queries, None if sinks is None else sinks.view(keys.shape[0], -1), attention.scaling)
        )
    return found


def _pass(loaded: LoadedModel, ids: Sequence[int], cache: DynamicCache, start: int) -> None:
    for begin in range(0, len(ids), 512):
        part = list(ids[begin : begin + 512])
        positions = torch.arange(start + begin, start + begin + len(part))[None]
        loaded.model(torch.tensor([part]), position_ids=positions, past_key_values=cache, use_cache=True)


def _rope(loaded: LoadedModel) -> RopeHandle:
    config = loaded.model.config.get_text_config()
    decoder = loaded.model.get_decoder()
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return RopeHandle(decoder.rotary_emb, tuple(kinds), int(decoder.layers[0].self_attn.head_dim))
