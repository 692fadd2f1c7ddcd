"""The registered attention functions: stock attention, unless a hooked layer finds virtual tokens in its context.

transformers looks an attention function and a mask function up by name. Two neutral names are registered on import,
because a model keeps what it would run without us: ``workspace`` goes with eager attention and its additive masks,
``workspace_fused`` with torch's fused kernel and its boolean masks. (A name that contains "sdpa", "flash" or "flex"
would trigger checks of transformers; a name without a mask function would lose the causal mask.) ``adopt_attention``
gives a model its name once, when it is loaded; nothing is switched afterwards and nothing of the model is patched.

A layer reads ``workspace=Context(...)`` from its keyword arguments, and what ``residuals.py`` adds to them on a hooked
layer. Without a context, with an empty one, or on a layer that has no segment, the call goes to the very function that
stock would run. The numbers are made in ``attention_backends.py``.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from workspace.attention_backends import Base, Call, Placed, attention_mass, eager, fused, merge, placed, stock_eager
from workspace.context import Backend, Context, Recorder
from workspace.errors import InvalidWorkspace
from workspace.packed import packed_attention
from workspace.rope import LayerRope
from workspace.row_batch import RowBatch
from workspace.traced import Traced, attend

NAMES: dict[Base, str] = {"eager": "workspace", "sdpa": "workspace_fused"}
_BACKENDS: dict[Backend, Callable[[Call, Placed], tuple[Tensor, Tensor | None]]] = {
    "merge": merge,
    "eager": eager,
    "fused": fused,
}


def adopt_attention(model: Any) -> bool:
    """Give ``model`` the registered function that goes with the implementation it has; False if it cannot have one."""
    config = model.config.get_text_config()
    base: Base | None = {"eager": "eager", "sdpa": "sdpa"}.get(config._attn_implementation)  # type: ignore[assignment]
    if base is None:
        return config._attn_implementation in NAMES.values()
    if not model._can_set_attn_implementation():
        return False
    if base == "eager" and not hasattr(sys.modules[type(model).__module__], "eager_attention_forward"):
        return False
    name = NAMES[base]
    model.set_attn_implementation(name if config is model.config else {"text_config": name})
    return True


def base_of(module: Any) -> Base:
    """What the model of this attention ``module`` would run without us."""
    name = module.config._attn_implementation
    return next(base for base, own in NAMES.items() if own == name)


def workspace_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    base: Base,
    workspace: Context | RowBatch | Traced | None = None,
    workspace_rope: LayerRope | None = None,
    workspace_back: tuple[Tensor, Tensor] | None = None,
    workspace_rotation: tuple[Tensor, Tensor] | None = None,
    pack: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer: ``query`` [R, Hq, T, D] and the cache's ``key``, ``value`` [R, H, N, D] to [R, T, Hq, D].

    Query and keys are rotated. ``workspace_rope`` and ``workspace_back`` come from the hook on a hooked layer. With a
    ``RowBatch`` each row [1, Hq, 1, D] attends to the keys and values of its own cache, whatever ``key`` holds.
    ``pack``: the stock function is ``packed_attention``. In a compiled step (``Traced``) ``key`` and ``value`` are the
    token's own, and the hook has left its cosine and sine as ``workspace_rotation``.
    """
    if isinstance(workspace, Traced):
        return attend(module, query, key, value, workspace_rotation, **kwargs), None
    if isinstance(workspace, RowBatch):
        hooked: dict[str, Any] = {"workspace_rope": workspace_rope, "workspace_back": workspace_back}
        return attend_rows(module, query, workspace, base=base, **hooked, **kwargs), None
    stock: Any = stock_eager(module) if base == "eager" else packed_attention if pack else sdpa_attention_forward
    if workspace is None:
        return stock(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]
    layer: int = module.layer_idx  # type: ignore[assignment]
    segment = workspace.segments.get(layer)
    if workspace_rope is None or workspace_back is None:
        if segment is not None:
            raise InvalidWorkspace(f"there are virtual tokens for layer {layer}, which is not hooked")
        return stock(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]
    call = Call(
        module=module,
        base=base,
        query=query,
        key=key,
        value=value,
        mask=attention_mask,
        position_ids=kwargs["position_ids"],
        rope=workspace_rope,
        back=workspace_back,
        scaling=kwargs.pop("scaling", None) or query.shape[-1] ** -0.5,
        rest=kwargs,
        packed=pack,
    )
    ready = None
    if segment is not None:
        work = torch.promote_types(query.dtype, torch.float32)
        ready = placed(segment, workspace_rope, call.scaling, work, query.device)
    if workspace.recorder is not None and layer in workspace.recorder.layers:
        _record(workspace.recorder, layer, call, ready)
    if ready is None:
        return stock(module, query, key, value, attention_mask, scaling=call.scaling, **kwargs)  # type: ignore[no-any-return]
    return _BACKENDS[workspace.backend or "merge"](call, ready)


def attend_rows(
    module: torch.nn.Module,
    query: Tensor,
    batch: RowBatch,
    *,
    base: Base,
    workspace_back: tuple[Tensor, Tensor] | None,
    **kwargs: Any,
) -> Tensor:
    """Each row's token to its own cache, ``query`` [R, Hq, 1, D] to [R, 1, Hq, D].

    Rows that lie beside each other attend as one where that is quicker. The others take the packed kernel, unless the
    architecture has sinks or a soft cap. A row that carries something for this layer is computed alone.
    """
    layer: int = module.layer_idx  # type: ignore[assignment]
    acting = dict(batch.on(layer))
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    scaling = kwargs["scaling"] = kwargs.get("scaling") or query.shape[-1] ** -0.5
    found: dict[int, Tensor] = {}
    group = batch.rows.group(layer) if softcap is None else None
    if group is not None and 2 * sum(row in acting for row in group.rows) <= len(group.rows):
        shared = batch.rows.attend(group, layer, query, scaling, sinks)
        if not group.alone and not acting:
            return shared
        found = dict(zip(group.rows, shared.chunk(len(shared)), strict=True))
    alone = [row for row in range(len(query)) if row in acting or row not in found]
    queries, plain = query.chunk(len(query)), softcap is None and sinks is None
    for row, (key, value) in zip(alone, batch.rows.seen(layer, alone), strict=True):
        if plain and row not in acting:
            found[row] = packed_attention(module, queries[row], key, value, None, scaling=scaling)[0]
            continue
        own = {**kwargs, "position_ids": kwargs["position_ids"][row : row + 1]}
        if workspace_back is not None:
            own["workspace_back"] = tuple(factor[row : row + 1] for factor in workspace_back)
        own |= {"base": "sdpa", "pack": True} if plain else {"base": base}
        found[row] = workspace_attention(module, queries[row], key, value, None, workspace=acting.get(row), **own)[0]
    return torch.cat([found[row] for row in range(len(query))])


def _record(recorder: Recorder, layer: int, call: Call, ready: Placed | None) -> None:
    if recorder.wants_queries:
        recorder.queries[layer] = call.content_query()
    if recorder.wants_mass:
        recorder.attention_mass[layer] = attention_mass(call, ready)


def _register() -> None:
    """Registering a name twice is harmless: it is the same function."""
    masks = {"eager": eager_mask, "sdpa": sdpa_mask}
    for base, name in NAMES.items():
        AttentionInterface.register(name, functools.partial(workspace_attention, base=base))
        AttentionMaskInterface.register(name, masks[base])


_register()
