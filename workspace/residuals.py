"""The hooks of one hooked layer: hand the rotation to its attention, add a residual delta, show the residual stream.

Forward hooks of torch on modules that exist; no forward method is replaced. Where a layer normalises the output of its
attention before adding it (Gemma), the delta is added after that norm, so that it means the same everywhere: a vector
added to the residual stream between attention and feed-forward.

A norm sees no keyword arguments. So the hook on ``self_attn``, which does, leaves a note for the hooks on the norms of
the same layer; they run in the same thread right after it, eager, compiled, or replayed by gradient checkpointing.
What a context carries for attention itself is read in ``attention.py``.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from workspace.context import Context, Delta, Recorder
from workspace.errors import UnsupportedModel
from workspace.rope import LayerRope
from workspace.row_batch import RowBatch
from workspace.traced import Traced, show, steer


class Turning:
    """Turns the queries of the hooked layers back; they share one rotary embedding, so it is worked out once a pass."""

    def __init__(self, rope: LayerRope):
        self.rope = rope
        self._last = threading.local()

    def back(self, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """``LayerRope.back`` of what the model passes to its layers, which is one object for all of them."""
        if torch.compiler.is_compiling():  # the compiler does the sharing, and must not keep tensors of its graph
            return self.rope.back(*rotation)
        if getattr(self._last, "rotation", None) is not rotation:
            self._last.back = self.rope.back(*rotation)
            self._last.rotation = rotation
        found: tuple[Tensor, Tensor] = self._last.back
        return found


class LayerHooks:
    """The hooks on one decoder layer, installed when made. ``remove`` takes them away again."""

    def __init__(self, layer: nn.Module, index: int, turning: Turning):
        self._index = index
        self.turning = turning
        self._note = threading.local()
        self._sandwich = hasattr(layer, "post_feedforward_layernorm")  # norms after attention and feed-forward
        attention, before_feedforward, after_attention = _places(layer)
        self._handles = [
            attention.register_forward_pre_hook(self.before_attention, with_kwargs=True),
            attention.register_forward_hook(self.after_attention, with_kwargs=True),
            before_feedforward.register_forward_pre_hook(self.before_feedforward),
        ]
        if after_attention is not None:
            self._handles.append(after_attention.register_forward_hook(self.after_norm))

    def remove(self) -> None:
        """Take the hooks away. Harmless when done twice."""
        for handle in self._handles:
            handle.remove()

    def before_attention(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Pass on cosine and sine, which ``self_attn`` consumes, where the attention function has a use for them."""
        context: Context | RowBatch | Traced | None = kwargs.get("workspace")
        if isinstance(context, Traced):
            return args, {**kwargs, "workspace_rotation": kwargs["position_embeddings"]}
        if isinstance(context, RowBatch):
            if not context.on(self._index):
                return None
        elif context is None or not (self._index in context.segments or _recorder(context, self._index) is not None):
            return None
        back = self.turning.back(kwargs["position_embeddings"])
        return args, {**kwargs, "workspace_rope": self.turning.rope, "workspace_back": back}

    def after_attention(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Any, ...]
    ) -> tuple[Any, ...] | None:
        """Add the delta, or leave it for ``after_norm``; leave the recorder for ``before_feedforward``."""
        context: Context | RowBatch | Traced | None = kwargs.get("workspace")
        self._note.recorder = self._note.addend = self._note.rows = None
        self._note.traced = traced = isinstance(context, Traced)
        if traced and not self._sandwich:
            return (steer(output[0], self._index), *output[1:])
        if context is None or isinstance(context, Traced):
            return None
        if isinstance(context, RowBatch):
            self._note.rows = rows = context.on(self._index)
            addend = row_addends(rows, self._index, kwargs["position_ids"], output[0])
        else:
            self._note.recorder = _recorder(context, self._index)
            delta = context.deltas.get(self._index)
            addend = None if delta is None else _addend(delta, kwargs["position_ids"], output[0])
        if addend is None:
            return None
        if self._sandwich:
            self._note.addend = addend
            return None
        return (output[0] + addend, *output[1:])

    def after_norm(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Add the delta behind the norm of a layer that has one after its attention."""
        if self._note.traced:
            return steer(output, self._index)
        addend, self._note.addend = self._note.addend, None
        return None if addend is None else output + addend

    def before_feedforward(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor] | None:
        """Show the residual stream [R, T, hidden], the input of this norm, to the recorder, or to that of each row."""
        if self._note.traced:
            return (show(args[0], self._index),)
        recorder, self._note.recorder = self._note.recorder, None
        rows, self._note.rows = self._note.rows, None
        residual: Tensor = args[0]
        if recorder is not None:
            _show(recorder, self._index, residual)
        show_rows(rows or (), self._index, residual)
        return None


def hooks_on(attention: nn.Module) -> LayerHooks | None:
    """The hooks of the layer that ``attention`` belongs to."""
    for hook in attention._forward_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, LayerHooks):
            return owner
    return None


def show_rows(rows: Iterable[tuple[int, Context]], layer: int, residual: Tensor) -> None:
    """Show each row of ``residual`` [R, T, hidden] to that row's recorder."""
    for row, context in rows:
        if (recorder := _recorder(context, layer)) is not None:
            _show(recorder, layer, residual[row : row + 1])


def _recorder(context: Context, layer: int) -> Recorder | None:
    recorder = context.recorder
    return recorder if recorder is not None and layer in recorder.layers else None


def _show(recorder: Recorder, layer: int, residual: Tensor) -> None:
    recorder.residuals[layer] = residual if recorder.whole else residual[:, -1]


def _addend(delta: Delta, position_ids: Tensor, like: Tensor) -> Tensor:
    """[R|1, T, hidden]: the vector at positions from ``first`` on, zero before."""
    reached = position_ids >= delta.first.to(like.device)[:, None]  # [R, T]
    vector = delta.vector.to(device=like.device, dtype=like.dtype)
    return torch.where(reached[..., None], vector if vector.ndim == 3 else vector[:, None], 0.0)


def row_addends(rows: list[tuple[int, Context]], layer: int, position_ids: Tensor, like: Tensor) -> Tensor | None:
    """[R, 1, hidden]: each row's own addend, zero for rows without; None where no row has one."""
    found = [(row, context.deltas[layer]) for row, context in rows if layer in context.deltas]
    if not found:
        return None
    addends = torch.zeros_like(like)
    for row, delta in found:
        addends[row : row + 1] = _addend(delta, position_ids[row : row + 1], like[row : row + 1])
    return addends


def _places(layer: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module | None]:
    """Attention, the module that gets the residual stream after it, and the norm of its output if there is one.

    Known are pre-norm layers (Llama, Qwen, Mistral, gpt-oss) and sandwiches (Gemma 2 and 3).
    """
    attention = getattr(layer, "self_attn", None)
    before = getattr(layer, "pre_feedforward_layernorm", None)
    after = getattr(layer, "post_attention_layernorm", None)
    if isinstance(attention, nn.Module) and isinstance(after, nn.Module):
        if isinstance(before, nn.Module):
            return attention, before, after
        if hasattr(layer, "input_layernorm") and not hasattr(layer, "post_feedforward_layernorm"):
            return attention, after, None
    raise UnsupportedModel(
        f"{type(layer).__name__} is neither a pre-norm layer (input_layernorm, self_attn, post_attention_layernorm) "
        "nor one with norms around both halves, so it is not known where its residual stream passes"
    )
