"""One forward pass, of one sequence or of one token of each of several: the only place that calls the model.

Position ids are always passed explicitly, because a cache that drops entries (sliding windows, later a capped one)
no longer knows them. Whatever a request wants to carry into the attention function travels as plain keyword
arguments, produced by its ``StepContext``; nothing of the model is patched and nothing is global.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import Cache

from workspace.attention import NAMES
from workspace.compiled_step import CompiledStep, CompileOptions
from workspace.context import Context
from workspace.models import LoadedModel
from workspace.row_batch import RowBatch
from workspace.row_cache import RowCache, Rows
from workspace.row_slab import Slabs

logger = logging.getLogger(__name__)


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


_ROOM = 512  # tokens, where nothing is said
#: How far logits of a shared pass may be from those of single passes, relative to what is between two sequences.
_ROUNDING = 0.25


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence's part in a pass of several: ``token_id`` at ``position``, after what ``cache`` holds."""

    token_id: int
    position: int
    cache: RowCache
    context: Context | None = None


class Forward:
    """Runs the model; holds nothing besides it but the memory of its caches, so it may be shared.

    ``rows``: how many sequences have caches at a time whose attention can be computed as one (``row_slab.py``).
    """

    def __init__(self, loaded: LoadedModel, compiled: CompileOptions | None = None, *, rows: int = 1):
        self._model = loaded.model
        self._device = loaded.device
        self._slabs = Slabs(rows) if rows > 1 and loaded.device.type == "cpu" else None
        parameters = inspect.signature(loaded.model.forward).parameters
        self._takes_positions = "position_ids" in parameters  # models with ALiBi have none
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        #: Takes passes of one row; prompts come in all lengths, and several rows share what the interpreter costs.
        self._compiled = None if compiled is None else CompiledStep(loaded.model, compiled, self._last_only)

    def new_cache(self, tokens: int = _ROOM, *, soon: int | None = None) -> RowCache:
        """An empty cache for ``tokens``, with the layers (full, sliding, ...) that the model's configuration asks for.

        It grows by itself, from room for ``soon`` tokens on.
        """
        return RowCache(self._model.config, tokens if soon is None else min(tokens, soon), self._slabs)

    def __call__(self, token_ids: Sequence[int], cache: Cache, start: int, extra: Mapping[str, Any]) -> torch.Tensor:
        """Append ``token_ids`` at positions from ``start`` to ``cache``; logits of the last one, [V] in float32."""
        ids = torch.tensor([token_ids], dtype=torch.long, device=self._device)  # [1, T]
        kwargs: dict[str, Any] = {"past_key_values": cache, "use_cache": True, **self._last_only, **extra}
        if self._takes_positions:
            kwargs["position_ids"] = torch.arange(start, start + len(token_ids), device=self._device)[None]  # [1, T]
        if len(token_ids) > 1 and self._last_only:
            # By its index: a slice of several rows is not contiguous, and for that torch copies the whole output matrix
            # (70 ms in bfloat16 for SmolLM2, a quarter of a pass of 256 tokens).
            kwargs["logits_to_keep"] = torch.tensor([len(token_ids) - 1], device=self._device)
        logits: torch.Tensor = self._model(input_ids=ids, **kwargs).logits  # [1, 1, V]
        return logits[0, -1].float()

    def together(self, rows: Sequence[Row]) -> torch.Tensor:
        """Append each row's token to its own cache in one pass; logits [R, V] in float32.

        Rows may be of any lengths and see nothing of each other: each attends to its own cache. What is computed of
        several at once, linear layers and attention, may round differently than alone. If the pass fails, no cache has
        changed.
        """
        caches = Rows([row.cache for row in rows])
        batch = RowBatch(caches, tuple(row.context for row in rows))
        ids = torch.tensor([[row.token_id] for row in rows], device=self._device)  # [R, 1]
        positions = torch.tensor([[row.position] for row in rows], device=self._device)
        if self._compiled is not None and len(rows) == 1:
            logits = self._compiled(ids, positions, batch)
        else:
            logits = self._plain(ids, positions, batch)
        caches.commit()
        return logits

    def _plain(self, ids: torch.Tensor, positions: torch.Tensor, batch: RowBatch) -> torch.Tensor:
        output = self._model(
            input_ids=ids,
            position_ids=positions,
            past_key_values=batch.rows,
            use_cache=True,
            workspace=batch,
            **self._last_only,
        )
        logits: torch.Tensor = output.logits[:, -1].float()
        return logits

    @property
    def has_rows(self) -> bool:
        """Whether ``together`` can be tried: our attention function, explicit positions."""
        attention = self._model.config.get_text_config()._attn_implementation
        return self._takes_positions and attention in NAMES.values()

    @torch.inference_mode()
    def rows_agree(self) -> bool:
        """Whether ``together`` gives what single passes give: tried on two short sequences, instead of trusting names.

        False for a model whose attention is not ours or has layers of other kinds. Compiles the step of one row, where
        that was asked for, and does without where it fails or says something else.
        """
        if not self.has_rows:
            return False
        prompts = [number % 29 for number in range(12)], [(5 * number + 3) % 29 for number in range(21)]
        slabs = None if self._slabs is None else Slabs(len(prompts), forced=True)
        pairs = [[RowCache(self._model.config, slabs=which) for which in (None, slabs)] for _ in prompts]
        if not all(cache.batchable for pair in pairs for cache in pair):
            return False
        compiled, self._compiled = self._compiled, None
        try:
            for prompt, pair in zip(prompts, pairs, strict=True):
                for cache in pair:
                    self(prompt, cache, 0, {})
            alone = [self([1], pair[0], len(prompt), {}) for prompt, pair in zip(prompts, pairs, strict=True)]
            rows = [Row(1, len(prompt), pair[1]) for prompt, pair in zip(prompts, pairs, strict=True)]
            found = self.together(rows)
        except Exception:  # whatever an unknown architecture does with arguments that it does not know
            logger.warning("several sequences in one pass fail for this model; each is computed alone", exc_info=True)
            return False
        wanted = torch.stack(alone)
        if not _agree(found, wanted):
            logger.warning("sequences in one pass do not give what each gives alone; each is computed alone")
            return False
        if compiled is not None and self._compiled_agrees(compiled, prompts, wanted):
            self._compiled = compiled
        return True

    def _compiled_agrees(self, compiled: CompiledStep, prompts: Sequence[Sequence[int]], wanted: torch.Tensor) -> bool:
        """Whether ``compiled`` gives the ``wanted`` logits [2, V] of a 1 after each of the ``prompts``."""
        logger.info("compiling the step of one token")
        begun = time.perf_counter()
        found = []
        try:
            for prompt in prompts:
                cache = self.new_cache()
                self(prompt, cache, 0, {})
                ids, positions = (torch.tensor([[number]], device=self._device) for number in (1, len(prompt)))
                found.append(compiled(ids, positions, RowBatch(Rows([cache]), (None,)))[0])
        except Exception:  # no compiler on this machine, or a model that cannot be traced
            logger.warning("the step of one token cannot be compiled; it stays as it is", exc_info=True)
            return False
        if not _agree(torch.stack(found), wanted):
            logger.warning("the compiled step does not give what the plain one gives; it stays as it is")
            return False
        logger.info("compiled in %.0f s", time.perf_counter() - begun)
        return True


def _agree(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Of logits [2, V]: rounding moves them by less than a tenth of what is between the rows, a mix-up by all of it."""
    wanted, found = wanted - wanted.mean(-1, keepdim=True), found - found.mean(-1, keepdim=True)
    return bool((found - wanted).norm() <= _ROUNDING * (wanted - wanted.flip(0)).norm())
