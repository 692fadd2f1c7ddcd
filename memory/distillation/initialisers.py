"""What the slots of a cartridge hold before training: text, noise of the right size, or the previous cartridge.

``text`` prefills p tokens and takes their keys and values: the first p of a given text (one system message, as the
library's ``KVFromText``), or of the domain's history in turns. A shorter text is repeated. Reported for the same
budget (arXiv 2506.06266, LongHealth): first p tokens of the corpus 55 %, unrelated text 51 %, random vectors 30 %.

``random`` is for comparison. Plain N(0, 1) vectors, as the library and PEFT draw them, are no keys at all: real keys of
a head share a direction which decides how much attention the text gets beside them, and their length differs between
heads by an order of magnitude. So each key and value is drawn from a normal distribution with the mean and the
deviation, channel by channel, of the real ones of its layer and head, and brought to their mean length.

``pretrained`` goes on from another cartridge. Fewer slots: its first p, which keep their positions. More: all of it,
then slots of the text at the positions that are left, so that no key has to be turned.

Frozen slots are never noise: they hold the beginning of a real text, where the attention of most heads rests.

All layers get all p slots, also those with a sliding window (``prefix_of_tokens``); there a slot beyond the window has
no effect and no gradient. Shapes: [1, H, p, D] per layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from memory.distillation.config import CacheInit
from memory.distillation.encoding import Encoder
from memory.distillation.errors import TrainerError
from workspace.errors import InvalidPrompt
from workspace.models import LoadedModel
from workspace.prefix import KVPrefix, check_prefix, fit_prefix, prefix_of_tokens

#: What is prefilled where neither a text nor a history is given.
NEUTRAL = (
    "You have worked with this user before. You remember what was asked, what you answered, and what turned out to be "
    "right. You answer new questions in the same way, briefly and in the form that was wanted."
)


def initial_prefix(
    loaded: LoadedModel,
    init: CacheInit,
    slots: int,
    *,
    frozen: int = 1,
    history: Sequence[Mapping[str, Any]] = (),
    previous: KVPrefix | None = None,
    seed: int = 0,
) -> KVPrefix:
    """The prefix that training starts from, in the model's dtype.

    ``history``: the domain's, as messages, in the order in which they shall fill the slots. ``previous``: the cartridge
    that ``init.cartridge`` names, or the serving one; without it ``pretrained`` is ``text``. Raises ``TrainerError``,
    ``InvalidPrompt`` and ``PrefixMismatch``.
    """
    if init.type == "pretrained" and init.cartridge is not None and previous is None:
        raise TrainerError(
            f"the cartridge {init.cartridge} was not found; name another one, or use cache_init.type text"
        )
    if init.type == "pretrained" and previous is not None:
        check_prefix(loaded, previous)
        if previous.slots >= slots:
            return resized_prefix(fit_prefix(loaded, previous), slots)
    real = text_prefix(loaded, init.text if init.text is not None else history or NEUTRAL, slots)
    if init.type == "pretrained" and previous is not None:
        return resized_prefix(fit_prefix(loaded, previous), slots, more=real)
    return random_prefix(real, frozen=frozen, seed=seed) if init.type == "random" else real


def text_prefix(loaded: LoadedModel, text: str | Sequence[Mapping[str, Any]], slots: int) -> KVPrefix:
    """Keys and values of the first ``slots`` tokens of a text or a conversation, repeated where it is shorter."""
    ids = _rendered(Encoder(loaded), text)
    if not ids:
        raise TrainerError("the text for cache_init has no tokens; give some text")
    return prefix_of_tokens(loaded, (ids * -(-slots // len(ids)))[:slots])


def random_prefix(real: KVPrefix, *, frozen: int, seed: int) -> KVPrefix:
    """Noise in the place of ``real``'s trained slots, with its statistics for each layer and head."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = [], []
    for layer_keys, layer_values in zip(real.keys, real.values, strict=True):
        keys.append(_noise(layer_keys, frozen, generator))
        values.append(_noise(layer_values, frozen, generator))
    return KVPrefix(tuple(keys), tuple(values))


def resized_prefix(previous: KVPrefix, slots: int, *, more: KVPrefix | None = None) -> KVPrefix:
    """The first ``slots`` of ``previous``; where it has fewer, the others are those of ``more`` at their positions."""
    if slots <= previous.slots:
        return _joined(previous, slots, None)
    if more is None or more.slots < slots:
        raise TrainerError(f"{slots} slots cannot be filled from a cartridge of {previous.slots} alone; give a text")
    return _joined(previous, slots, more)


def _joined(previous: KVPrefix, slots: int, more: KVPrefix | None) -> KVPrefix:
    def fill(tensors: Sequence[Tensor], others: Sequence[Tensor] | None) -> tuple[Tensor, ...]:
        if others is None:
            return tuple(tensor[:, :, :slots].clone() for tensor in tensors)
        return tuple(
            torch.cat((tensor, other[:, :, tensor.shape[2] : slots]), dim=2)
            for tensor, other in zip(tensors, others, strict=True)
        )

    if more is None:
        return KVPrefix(fill(previous.keys, None), fill(previous.values, None))
    return KVPrefix(fill(previous.keys, more.keys), fill(previous.values, more.values))


def _noise(real: Tensor, frozen: int, generator: torch.Generator) -> Tensor:
    """[1, H, p, D] like ``real``, whose first ``frozen`` slots stay."""
    free = real[:, :, frozen:].float().cpu()  # the first token's vectors are outliers, so they do not count
    deviation, mean = torch.std_mean(free, dim=2, keepdim=True, unbiased=False)  # [1, H, 1, D]
    drawn = mean + deviation * torch.randn(free.shape, generator=generator)
    wanted = free.norm(dim=-1).mean(dim=2)[..., None, None]  # [1, H, 1, 1]
    drawn = drawn * (wanted / drawn.norm(dim=-1, keepdim=True).clamp_min(1e-12))
    return torch.cat((real[:, :, :frozen], drawn.to(real)), dim=2)


def _rendered(encoder: Encoder, text: str | Sequence[Mapping[str, Any]]) -> list[int]:
    if not isinstance(text, str):
        return encoder.conversation(text)
    if not text.strip():
        return []
    try:
        return encoder.conversation([{"role": "system", "content": text}])
    except InvalidPrompt:  # templates without a system role, or which want a user's turn
        return encoder.conversation([{"role": "user", "content": text}])
