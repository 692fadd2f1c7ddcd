"""The step of one token, compiled with ``torch.compile``: one graph for caches of any length and for any context.

What the interpreter costs between the products of a step is what compiling can save on a CPU. Three things kept it
from that, measured on SmolLM2 (docs/decoding.md): attention over a cache of a fixed size, most of it empty; guards,
which compare every module before every token; and a graph for each kind of context. So attention to the cache is an
operator that the graph only calls by name, as in vLLM, and so is what the hooks add and see. The graph then depends on
nothing but the frozen weights and on which modules have hooks, so it needs no guards: that the hooks are those it was
traced with is checked here, and otherwise it is traced anew.

The operators run in the thread of the step and find the row by it.

Shapes: H key-value heads, G query heads for each of them, D head size, V vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch import _inductor as inductor

from workspace.attention import attend_rows, base_of
from workspace.errors import InvalidWorkspace
from workspace.packed import packed
from workspace.residuals import hooks_on, row_addends, show_rows
from workspace.row_batch import RowBatch
from workspace.traced import TRACED


class CompileOptions(TypedDict, total=False):
    """How ``torch.compile`` makes the step: its ``mode``, or another ``backend`` (in tests)."""

    mode: str
    backend: str


@dataclass(slots=True)
class _Running:
    """The pass that a thread is in."""

    batch: RowBatch
    position_ids: Tensor  # [1, 1]
    attentions: Mapping[int, Any]  # by layer
    carries: bool  # whether the row has a context


class _Thread(threading.local):
    running: _Running


_thread = _Thread()


class CompiledStep:
    """``model`` for one token of one sequence; compiled when first called. ``extra``: more arguments for the model."""

    def __init__(self, model: Any, options: CompileOptions, extra: Mapping[str, Any]):
        self._model = model
        self._extra = dict(extra)
        self._backend = options.get("backend", "inductor")
        self._mode = options.get("mode", "default")
        self._attentions = {
            module.layer_idx: module
            for name, module in model.named_modules()
            if name.endswith("self_attn") and hasattr(module, "layer_idx")
        }
        self._hooks = [
            hooks for module in model.modules() for hooks in (module._forward_pre_hooks, module._forward_hooks)
        ]
        self._traced_with: list[int] = []
        self._compiled: Any = None

    def __call__(self, ids: Tensor, position_ids: Tensor, batch: RowBatch) -> Tensor:
        """Logits [1, V] in float32 of ``ids`` [1, 1] at ``position_ids`` [1, 1], after the one row of ``batch``."""
        hooks = list(map(len, self._hooks))
        if hooks != self._traced_with:
            self._compiled, self._traced_with = self._compile(), hooks
        carries = any(context is not None for context in batch.contexts)
        if carries:
            self._check(batch)
        _thread.running = _Running(batch, position_ids, self._attentions, carries)
        try:
            logits: Tensor = self._compiled(ids, position_ids)
        finally:
            del _thread.running  # it holds a cache
        return logits

    def _check(self, batch: RowBatch) -> None:
        """As hooked models do it in a plain pass: what is for layers without hooks would be lost without a word."""
        for context in batch.contexts:
            for layer in () if context is None else context.layers:
                if layer not in self._attentions or hooks_on(self._attentions[layer]) is None:
                    raise InvalidWorkspace(f"layer {layer} is not hooked")

    def _compile(self) -> Any:
        model, extra = self._model, self._extra

        def step(ids: Tensor, position_ids: Tensor) -> Tensor:
            output = model(input_ids=ids, position_ids=position_ids, use_cache=False, workspace=TRACED, **extra)
            logits: Tensor = output.logits[:, -1].float()
            return logits

        options: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
        if self._backend == "inductor":
            # Calls in C++ instead of Python take 0.25 ms less of SmolLM2's 9. The generated code would check 579 shapes
            # before every token, which takes 0.3.
            ours = {"cpp_wrapper": True, "size_asserts": False, "alignment_asserts": False}
            options |= ours | inductor.list_mode_options(self._mode)
        compile: Any = torch.compile  # whose overloads leave out ``isolate_recompiles``
        return compile(
            step,
            backend=self._backend,
            dynamic=False,
            fullgraph=True,
            options=options,
            isolate_recompiles=True,  # graphs are kept by source code, and without guards another model's would fit
        )


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    sinks: Tensor | None,
    layer: int,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    """[1, H * G, 1, D] to [1, 1, H * G, D]; see ``traced.attend``."""
    running = _thread.running
    batch = running.batch
    keys, values = batch.rows.update_one(key, value, layer)
    if sinks is None and softcap is None and not (running.carries and batch.on(layer)):
        grouped = query.reshape(1, key.shape[1], -1, query.shape[-1])
        return packed(grouped, keys, values, scaling).reshape(1, 1, -1, value.shape[-1])
    module = running.attentions[layer]
    hooks = hooks_on(module)
    rope = back = None
    if hooks is not None and cos is not None and sin is not None:
        rope, back = hooks.turning.rope, hooks.turning.rope.back(cos, sin)
    more = {name: given for name, given in (("s_aux", sinks), ("softcap", softcap)) if given is not None}
    return attend_rows(
        module,
        query,
        batch,
        base=base_of(module),
        workspace_rope=rope,
        workspace_back=back,
        position_ids=running.position_ids,
        scaling=scaling,
        **more,
    )


def _steer(output: Tensor, layer: int) -> Tensor:
    """[1, 1, hidden]; see ``traced.steer``."""
    running = _thread.running
    rows = running.batch.on(layer) if running.carries else []
    addend = row_addends(rows, layer, running.position_ids, output)
    return output.clone() if addend is None else output + addend


def _show(residual: Tensor, layer: int) -> Tensor:
    """[1, 1, hidden]; see ``traced.show``. The graph reuses its memory, so what is kept is a copy."""
    running = _thread.running
    if running.carries and (rows := running.batch.on(layer)):
        show_rows(rows, layer, residual.clone())
    return residual.clone()


def _register() -> Any:
    """Define the operators, for tensors of any device, and what their results look like to the compiler."""
    library: Any = torch.library.Library("olympus", "DEF")  # type: ignore[no-untyped-call]
    # They read what is not among their arguments, so a recorded graph of a GPU must not replay them.
    tags = (torch.Tag.cudagraph_unsafe,)
    library.define(
        "attend(Tensor query, Tensor key, Tensor value, Tensor? cos, Tensor? sin, Tensor? sinks, int layer, "
        "float scaling, float? softcap) -> Tensor",
        tags=tags,
    )
    library.define("steer(Tensor output, int layer) -> Tensor", tags=tags)
    library.define("show(Tensor residual, int layer) -> Tensor", tags=tags)
    for name, function in (("attend", _attend), ("steer", _steer), ("show", _show)):
        library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake("olympus::attend", _like_attention, lib=library)
    torch.library.register_fake("olympus::steer", _like_first, lib=library)
    torch.library.register_fake("olympus::show", _like_first, lib=library)
    return library


def _like_attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    return query.new_empty(query.shape[0], 1, query.shape[1], value.shape[-1])


def _like_first(first: Tensor, layer: int) -> Tensor:
    return torch.empty_like(first)


_library = _register()
