"""A prefix of keys and values: what a cartridge is to the model. Computed once, copied into the cache of each request.

The prefix owns positions 0 .. p-1, and the text after it starts at p. It is handed over as plain cache contents: keys
after RoPE (and after the key norm of models that have one), so that a prefix made of tokens gives the very numbers of
a prompt with these tokens. All layers have all p slots. A sliding layer keeps those that lie within its window and
forgets them as the text goes on, as it would forget tokens.

A prefix is never changed: every generation fills its own cache with a copy. Prefixes that are joined keep their keys
as they are, each as if it stood at position 0; nothing is turned again (as Tokasaurus and PEFT do it).

Not here: files, names and versions of cartridges (``memory/cartridges``), and training.

Shapes: p slots, H key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from workspace.errors import PrefixMismatch
from workspace.models import LoadedModel


@dataclass(frozen=True, eq=False)
class KVPrefix:
    """Keys and values of p slots, one tensor [1, H, p, D] per layer. Raises ``PrefixMismatch`` for other shapes."""

    keys: tuple[Tensor, ...]  #: after RoPE at positions 0 .. p-1
    values: tuple[Tensor, ...]
    id: str = ""  #: the cartridge's, for reports

    def __post_init__(self) -> None:
        if not self.keys or len(self.keys) != len(self.values):
            raise PrefixMismatch(
                f"a prefix has keys and values for each layer, got {len(self.keys)} and {len(self.values)}"
            )
        slots = self.keys[0].shape[2] if self.keys[0].ndim == 4 else 0
        for layer, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            fits = keys.ndim == values.ndim == 4 and keys.shape[:3] == values.shape[:3]
            if not fits or keys.shape[0] != 1 or keys.shape[2] != slots or slots < 1:
                raise PrefixMismatch(
                    f"layer {layer}: keys and values must both be [1, heads, slots, head size] with the same slots in "
                    f"all layers, at least one, got {list(keys.shape)} and {list(values.shape)}"
                )

    @property
    def slots(self) -> int:
        """Number of slots, p."""
        return int(self.keys[0].shape[2])

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def fill(self, cache: Cache) -> None:
        """Copy into an empty ``DynamicCache`` (with or without a configuration) or ``StaticCache``.

        Dtype and device must be the model's (``fit_prefix``). Raises ``PrefixMismatch`` when the cache holds something.
        """
        if int(cache.get_seq_length()) != 0:
            raise PrefixMismatch(f"a prefix starts an empty cache, but this one holds {int(cache.get_seq_length())}")
        for layer, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            cache.update(keys, values, layer)


def prefix_of_tokens(loaded: LoadedModel, token_ids: Sequence[int]) -> KVPrefix:
    """The prefix that ``token_ids`` are, in the model's dtype: one pass without gradients.

    With a bare ``DynamicCache``, whose layers all keep everything; one made from the configuration would keep only the
    window of sliding layers. Raises ``PrefixMismatch`` for no tokens, or more than the context holds.
    """
    if not 0 < len(token_ids) < loaded.context_length:
        raise PrefixMismatch(
            f"a prefix needs 1 to {loaded.context_length - 1} tokens of this model's context, got {len(token_ids)}"
        )
    cache = DynamicCache()
    ids = torch.tensor([list(token_ids)], dtype=torch.long, device=loaded.device)
    with torch.no_grad():
        loaded.model(ids, past_key_values=cache, use_cache=True)
    layers: Any = cache.layers
    return KVPrefix(tuple(layer.keys for layer in layers), tuple(layer.values for layer in layers))


def join_prefixes(prefixes: Sequence[KVPrefix]) -> KVPrefix:
    """All slots in the given order, unchanged; the id joins theirs with "+". Raises ``PrefixMismatch``."""
    if not prefixes:
        raise PrefixMismatch("there are no prefixes to join")
    if len(prefixes) == 1:
        return prefixes[0]
    shapes = [[(*keys.shape[:2], *keys.shape[3:]) for keys in prefix.keys] for prefix in prefixes]
    for prefix, shape in zip(prefixes, shapes, strict=True):
        if shape != shapes[0]:
            raise PrefixMismatch(
                f"prefixes of different models cannot be joined: {prefixes[0].id or 'the first'} has "
                f"{_layout(prefixes[0])}, {prefix.id or 'another'} has {_layout(prefix)}"
            )
    return KVPrefix(
        tuple(torch.cat(layers, dim=2) for layers in zip(*(prefix.keys for prefix in prefixes), strict=True)),
        tuple(torch.cat(layers, dim=2) for layers in zip(*(prefix.values for prefix in prefixes), strict=True)),
        id="+".join(prefix.id for prefix in prefixes),
    )


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What the cache of a model looks like, by its configuration."""

    layers: int
    kv_heads: int
    head_dim: int


def cache_shape(model: Any) -> CacheShape:
    """The shape of ``model``'s cache; of models whose layers differ, that of their first."""
    config = model.config.get_text_config()
    heads = int(config.num_attention_heads)
    return CacheShape(
        layers=int(config.num_hidden_layers),
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
    )


def check_prefix(loaded: LoadedModel, prefix: KVPrefix) -> None:
    """Raise ``PrefixMismatch`` unless ``prefix`` has this model's shape and leaves room in its context."""
    wanted = cache_shape(loaded.model)
    shape = (1, wanted.kv_heads, prefix.slots, wanted.head_dim)
    name = f"cartridge {prefix.id}" if prefix.id else "the prefix"
    fits = all(tuple(tensor.shape) == shape for tensor in (*prefix.keys, *prefix.values))
    if len(prefix.keys) != wanted.layers or not fits:
        raise PrefixMismatch(
            f"{name} does not fit the model {loaded.name}: it has {_layout(prefix)}, the model has {wanted.layers} "
            f"layers of {wanted.kv_heads} key-value heads of {wanted.head_dim}; use one that was made for this model"
        )
    if prefix.slots >= loaded.context_length:
        raise PrefixMismatch(
            f"{name} has {prefix.slots} slots, but the context of {loaded.name} holds {loaded.context_length} in all"
        )


def fit_prefix(loaded: LoadedModel, prefix: KVPrefix) -> KVPrefix:
    """``prefix`` in the dtype of the model and on the devices of its layers; itself where nothing changes.

    Raises ``PrefixMismatch`` as ``check_prefix`` does.
    """
    check_prefix(loaded, prefix)
    places = _layer_devices(loaded)
    devices = [places.get(layer, loaded.device) for layer in range(len(prefix.keys))]
    keys = tuple(_moved(tensor, device, loaded.dtype) for tensor, device in zip(prefix.keys, devices, strict=True))
    values = tuple(_moved(tensor, device, loaded.dtype) for tensor, device in zip(prefix.values, devices, strict=True))
    before, after = (*prefix.keys, *prefix.values), (*keys, *values)
    if all(old is new for old, new in zip(before, after, strict=True)):
        return prefix
    return KVPrefix(keys, values, prefix.id)


def _moved(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(device=device, dtype=dtype) if tensor.requires_grad else tensor.to(device, dtype)


def _layer_devices(loaded: LoadedModel) -> dict[int, torch.device]:
    """Where the attention of each layer runs, for models spread over several devices."""
    found: dict[int, torch.device] = {}
    for module in loaded.model.modules():
        layer = getattr(module, "layer_idx", None)
        parameter = next(module.parameters(recurse=True), None) if isinstance(layer, int) else None
        if parameter is not None and parameter.device.type != "meta":  # offloaded weights run at the entrance
            found[int(layer)] = parameter.device  # type: ignore[arg-type]
    return found


def _layout(prefix: KVPrefix) -> str:
    keys = prefix.keys[0]
    return f"{len(prefix.keys)} layers of {keys.shape[1]} key-value heads of {keys.shape[3]}"
