"""One forward pass of one sequence over its own cache: the only place that calls the model.

Position ids are always passed explicitly, because a cache that drops entries (sliding windows, later a capped one)
no longer knows them. Whatever a request wants to carry into the attention function travels as plain keyword
arguments, produced by its ``StepContext``; nothing of the model is patched and nothing is global.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypedDict

import torch
from transformers import Cache, DynamicCache, StaticCache

from workspace.models import LoadedModel


class StepContext(Protocol):
    """What a request carries through its generation. Everything is called on the engine's thread, in this order.

    ``PassiveContext`` has all of it with no effect; derive from it and change what is needed.
    """

    def begin(self, cache: Cache, prompt_ids: Sequence[int]) -> None:
        """The cache was made. It is empty or holds the slots of a prefix: its length is where the text starts."""

    #: The most tokens that one forward pass may feed, from ``begin`` on; None: as many as the engine likes.
    most_tokens: int | None

    def forward_kwargs(self, start: int, count: int) -> Mapping[str, Any]:
        """Before a pass over positions ``start .. start + count - 1``: keyword arguments for the model; often empty.

        Values must be plain objects: accelerate calls ``.to()`` on anything that has one.
        """

    def fed(self, start: int, count: int) -> None:
        """After that pass."""

    def chosen(self, logits: torch.Tensor, token: int) -> bool:
        """``token`` was sampled from the model's ``logits`` [V], float32; True ends the answer with it."""

    def ended(self) -> None:
        """The generation has ended, in whatever way; also when it never began. May come from another thread."""


class PassiveContext:
    """A ``StepContext`` that does nothing."""

    most_tokens: int | None = None

    def begin(self, cache: Cache, prompt_ids: Sequence[int]) -> None:
        """Nothing to prepare."""

    def forward_kwargs(self, start: int, count: int) -> Mapping[str, Any]:
        """Nothing to carry."""
        return {}

    def fed(self, start: int, count: int) -> None:
        """Nothing to note."""

    def chosen(self, logits: torch.Tensor, token: int) -> bool:
        """Never an end."""
        return False

    def ended(self) -> None:
        """Nothing to give back."""


#: Static caches come in multiples of this many tokens: few sizes, few compilations.
_STATIC_STEP = 512


class CompileOptions(TypedDict, total=False):
    """How ``torch.compile`` makes the step of one token: its ``mode``, or another ``backend`` (in tests)."""

    mode: str
    backend: str


class Forward:
    """Runs the model for one sequence at a time; holds no state besides the model, so it may be shared."""

    def __init__(self, loaded: LoadedModel, compiled: CompileOptions | None = None):
        self._model = loaded.model
        #: What runs passes of one token; passes of a prompt's chunk come in all lengths and stay as they are.
        self._step = loaded.model if compiled is None else torch.compile(loaded.model, **compiled)
        self._static = compiled is not None
        self._device = loaded.device
        parameters = inspect.signature(loaded.model.forward).parameters
        self._takes_positions = "position_ids" in parameters  # models with ALiBi have none
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}

    def new_cache(self, tokens: int = _STATIC_STEP) -> Cache:
        """An empty cache for ``tokens``, with the layers (full, sliding, ...) that the model's configuration asks for.

        It grows by itself, but for compiled steps, which would be compiled anew whenever a shape changes: those get
        one of a fixed size.
        """
        if not self._static:
            return DynamicCache(config=self._model.config)
        return StaticCache(config=self._model.config, max_cache_len=-(-tokens // _STATIC_STEP) * _STATIC_STEP)

    def __call__(self, token_ids: Sequence[int], cache: Cache, start: int, extra: Mapping[str, Any]) -> torch.Tensor:
        """Append ``token_ids`` at positions from ``start`` to ``cache``; logits of the last one, [V] in float32."""
        ids = torch.tensor([token_ids], dtype=torch.long, device=self._device)  # [1, T]
        kwargs: dict[str, Any] = {"past_key_values": cache, "use_cache": True, **self._last_only, **extra}
        if self._takes_positions:
            kwargs["position_ids"] = torch.arange(start, start + len(token_ids), device=self._device)[None]  # [1, T]
        model = self._step if len(token_ids) == 1 else self._model
        logits: torch.Tensor = model(input_ids=ids, **kwargs).logits  # [1, 1, V]
        return logits[0, -1].float()
