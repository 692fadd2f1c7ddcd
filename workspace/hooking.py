"""Which layers of a model can carry virtual tokens, and the model with its hooks installed.

Only full-attention layers with RoPE qualify: a sliding layer forgets by design, and virtual tokens would break that.
What is carried comes with each forward pass (``context.py``); a hooked model without a context is the stock model, to
the bit. Loading is in ``models.py``, which also gives the model the attention function that is used here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from workspace.attention import NAMES
from workspace.context import Context
from workspace.errors import InvalidWorkspace, UnsupportedModel
from workspace.models import LoadedModel
from workspace.residuals import LayerHooks, Turning, hooks_on
from workspace.rope import RopeHandle
from workspace.row_batch import RowBatch
from workspace.traced import Traced

_MOST_DEFAULT_LAYERS = 6


def hookable_layers(config: Any) -> tuple[int, ...]:
    """Indices of the full-attention layers with RoPE, from a transformers configuration."""
    config = config.get_text_config()
    kinds = _layer_types(config)
    rotated = getattr(config, "no_rope_layers", None) or [1] * len(kinds)  # 0 where there is no RoPE
    return tuple(index for index, kind in enumerate(kinds) if kind == "full_attention" and rotated[index])


def default_layers(config: Any) -> tuple[int, ...]:
    """At most six hookable layers, evenly spaced and never two neighbours, from the first on.

    For gpt-oss-20b (24 layers, every second one sliding) that is 1, 5, 9, 13, 17, 21.
    """
    layers = hookable_layers(config)
    return layers[:: max(2, -(-len(layers) // _MOST_DEFAULT_LAYERS))]


class HookedModel:
    """A loaded model whose ``layers`` read virtual tokens and deltas and show their residuals. Any thread may use it.

    ``layers`` None takes the default ones. Raises ``InvalidWorkspace`` for layers that cannot be hooked, and
    ``UnsupportedModel`` for a model whose attention, RoPE or layers are of an unknown form. ``remove`` undoes it.
    """

    def __init__(self, loaded: LoadedModel, layers: Sequence[int] | None = None):
        config = loaded.model.config.get_text_config()
        if config._attn_implementation not in NAMES.values():
            raise UnsupportedModel(
                f"{loaded.name} runs {config._attn_implementation!r} attention, which cannot be extended by virtual "
                "tokens; load it with eager or sdpa attention"
            )
        self.loaded = loaded
        self.layers = _checked(loaded.name, config, layers)
        decoder = _decoder(loaded)
        self.decoder_layers = decoder.layers
        self.kv_heads = int(config.num_key_value_heads)
        self.hidden_size = int(config.hidden_size)
        self.num_layers = int(config.num_hidden_layers)
        self.head_dim = int(decoder.layers[0].self_attn.head_dim)
        try:
            self.rope = RopeHandle(decoder.rotary_emb, _layer_types(config), self.head_dim)
            _refuse_second_hooks(decoder, self.layers)
            turning = Turning(self.rope.of(self.layers[0]))  # of all layers: they are of one type
            self._hooks = [LayerHooks(decoder.layers[index], index, turning) for index in self.layers]
        except UnsupportedModel as error:
            raise UnsupportedModel(f"{loaded.name} cannot be hooked: {error}") from None
        self._check_handle = loaded.model.register_forward_pre_hook(self._check_context, with_kwargs=True)

    def remove(self) -> None:
        """Take all hooks away; the model is what it was. Harmless when done twice."""
        self._check_handle.remove()
        for hooks in self._hooks:
            hooks.remove()
        self._hooks = []

    def check(self, context: Context) -> None:
        """Raise ``InvalidWorkspace`` unless ``context`` fits this model. For new contexts, not for every step."""
        self._check_layers(context)
        for layer, segment in context.segments.items():
            _, heads, _, width = segment.keys.shape
            if (heads, width) != (self.kv_heads, self.head_dim):
                raise InvalidWorkspace(
                    f"the virtual keys of layer {layer} have {heads} heads of {width}, but the model has "
                    f"{self.kv_heads} key-value heads of {self.head_dim}"
                )
        for layer, delta in context.deltas.items():
            if delta.vector.shape[-1] != self.hidden_size:
                raise InvalidWorkspace(
                    f"the delta of layer {layer} has {delta.vector.shape[-1]} dimensions, but the residual stream has "
                    f"{self.hidden_size}"
                )

    def check_invariants(self) -> None:
        """Raise ``AssertionError`` if the hooks contradict the layers."""
        assert len(self._hooks) in (0, len(self.layers)), (len(self._hooks), self.layers)
        assert set(self.layers) <= set(hookable_layers(self.loaded.model.config))

    def _check_context(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before every pass: what is for un-hooked layers would be lost without a word."""
        carried: Context | RowBatch | Traced | None = kwargs.get("workspace")
        if isinstance(carried, Traced):  # a compiled step checks the contexts themselves
            return
        contexts = carried.contexts if isinstance(carried, RowBatch) else (carried,)
        for context in contexts:
            if context is not None:
                self._check_layers(context)

    def _check_layers(self, context: Context) -> None:
        if stray := context.layers - set(self.layers):
            hooked = ", ".join(map(str, self.layers))
            raise InvalidWorkspace(f"layer {min(stray)} is not hooked; hooked are {hooked}")


def _layer_types(config: Any) -> tuple[str, ...]:
    """The kind of each layer; older configurations only say that there is a window."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        windowed = getattr(config, "sliding_window", None) is not None
        kinds = ["sliding_attention" if windowed else "full_attention"] * config.num_hidden_layers
    return tuple(kinds)


def _checked(name: str, config: Any, layers: Sequence[int] | None) -> tuple[int, ...]:
    possible = hookable_layers(config)
    chosen = default_layers(config) if layers is None else tuple(sorted(layers))
    if not chosen:
        what = "has no full-attention layer with RoPE" if layers is None else "was given no layers to hook"
        raise InvalidWorkspace(f"{name} {what}")
    if len(set(chosen)) != len(chosen):
        raise InvalidWorkspace(f"a layer is named twice: {', '.join(map(str, chosen))}")
    kinds = _layer_types(config)
    for layer in chosen:
        if not 0 <= layer < len(kinds):
            raise InvalidWorkspace(f"there is no layer {layer}: {name} has layers 0 to {len(kinds) - 1}")
        if layer not in possible:
            kind = kinds[layer] if kinds[layer] != "full_attention" else "not rotated by RoPE"
            others = ", ".join(map(str, possible)) or "none"
            raise InvalidWorkspace(f"layer {layer} of {name} is {kind}; virtual tokens need one of {others}")
    return chosen


def _decoder(loaded: LoadedModel) -> Any:
    """The module that owns the decoder layers and the rotary embedding."""
    for module in loaded.model.modules():
        if isinstance(getattr(module, "layers", None), nn.ModuleList) and hasattr(module, "rotary_emb"):
            attention = getattr(module.layers[0], "self_attn", None)
            if all(hasattr(attention, name) for name in ("layer_idx", "head_dim", "o_proj")):
                return module
    raise UnsupportedModel(
        f"{loaded.name}: {type(loaded.model).__name__} has no decoder with layers, self_attn and one rotary_emb"
    )


def _refuse_second_hooks(decoder: Any, layers: tuple[int, ...]) -> None:
    """Two sets of hooks on one layer would add every delta twice."""
    for layer in layers:
        if hooks_on(decoder.layers[layer].self_attn) is not None:
            raise InvalidWorkspace(f"layer {layer} is hooked already; share that HookedModel or remove() it")
