"""The student: the frozen model reading rows after a prefix that is being trained.

One pass of a step, of which only the prefix changes:

    1. base    the prefix, and after it what all rows begin with, read once (``training_batches.common_length``)
    2. rows    micro-batch by micro-batch after the base, each with its own backward pass into the base's cache
    3. back    from the base's cache into the trained slots

which gives the gradient of reading every row whole, for the price of the common text once. Logits are made only where
there are targets, a few hundred at a time, and differentiated at once, so that a vocabulary of 200,000 costs no memory.

The model is shared with an engine that answers requests in other threads. Nothing of it is changed or patched, not even
for a moment: gradients are asked for by the prefix, and the cache is ours. It tells ``between`` about every layer, in
the forward pass as a layer writes to it, in the backward pass by a hook on what that layer wrote, so that a server can
hold the trainer at the next layer (some ten milliseconds away) for as long as a request runs.

Positions: slots 0 .. p-1, text from p, as in service (``workspace/prefix.py``). All layers keep all slots, which gives
the numbers of the engine's sliding caches as well: the mask hides what lies outside the window.

Shapes: R rows, H key-value heads, p slots, C common tokens, T tokens of a row after them, N targets, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from memory.distillation.encoding import Example
from memory.distillation.errors import TrainerError
from memory.distillation.losses import LossName, target_losses
from memory.distillation.training_batches import MicroBatch, common_length, micro_batches
from workspace.models import LoadedModel

Between = Callable[[], None]
Layers = Sequence[tuple[Tensor, Tensor]]

#: Tokens of a micro-batch, padding included. On a CPU larger ones are no faster; 256 of SmolLM2 hold 300 MB.
MOST_TOKENS = {"cpu": 256}
_MOST_TOKENS_GPU = 8192
#: Logits that are held at once.
_MOST_LOGITS = 1 << 23


@dataclass(frozen=True, slots=True, eq=False)
class RowLosses:
    """Losses of a micro-batch: l_t [N] detached, and whose they are."""

    losses: Tensor
    batch: MicroBatch

    def weighted(self) -> float:
        """sum_t w_t l_t."""
        return float((self.losses.double() * self.batch.weights.to(self.losses.device)).sum())

    def by_example(self) -> list[tuple[Example, Tensor]]:
        """The losses of each row."""
        counts = [len(example.targets.offsets) for example in self.batch.examples]
        return list(zip(self.batch.examples, torch.split(self.losses, counts), strict=True))


class PassingCache(DynamicCache):  # type: ignore[misc]
    """A cache with every layer at full length, which tells ``between`` whenever a layer has written to it."""

    def __init__(self, layers: Layers, between: Between | None = None):
        super().__init__(layers)
        self._between = between

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Append, as transformers asks for it."""
        between = self._between
        if between is not None:
            between()
            if key_states.requires_grad:  # of the first layer they do not: nothing before it was trained
                # Not a method of ours: the graph would hold the cache and the cache the graph, until a collection.
                key_states.register_hook(lambda _gradient: between())  # type: ignore[no-untyped-call]
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


class Student:
    """Reads examples after a prefix. Holds nothing between calls."""

    def __init__(self, loaded: LoadedModel, *, loss: LossName = "kl", between: Between | None = None):
        self._loaded = loaded
        self._body = loaded.model.base_model
        self._head = loaded.model.get_output_embeddings()
        self._softcap = getattr(loaded.model.config.get_text_config(), "final_logit_softcapping", None)
        self._loss: LossName = loss
        self._between = between
        self._most_tokens = MOST_TOKENS.get(loaded.device.type, _MOST_TOKENS_GPU)
        self._check_head()

    def learn(self, prefix: Layers, examples: Sequence[Example], total: float) -> list[RowLosses]:
        """Add the gradient of sum_t w_t l_t / ``total`` over ``examples`` to the leaves that ``prefix`` is made of.

        ``prefix``: keys and values [1, H, p, D] per layer, in any floating dtype.
        """
        common = common_length(examples)
        base = self.base(prefix, examples[0].token_ids[:common])
        # Float32, so that what the micro-batches add up is not rounded to the model's dtype every time.
        leaves = [tuple(tensor.detach().float().requires_grad_() for tensor in layer) for layer in base]
        found = []
        for batch in micro_batches(examples, common, self._most_tokens):
            found.append(self._learn_batch(leaves, batch, total))  # type: ignore[arg-type]
        with_grad = [
            (tensor, leaf.grad.to(tensor.dtype))
            for layer, leaf_layer in zip(base, leaves, strict=True)
            for tensor, leaf in zip(layer, leaf_layer, strict=True)
            if tensor.requires_grad and leaf.grad is not None
        ]
        torch.autograd.backward([item for item, _ in with_grad], [grad for _, grad in with_grad])
        return found

    @torch.no_grad()
    def losses(self, prefix: Layers | None, examples: Sequence[Example]) -> list[RowLosses]:
        """Losses without gradients; without a prefix the text starts at position 0."""
        common = common_length(examples)
        base = self.base(prefix, examples[0].token_ids[:common])
        found = []
        for batch in micro_batches(examples, common, 2 * self._most_tokens):
            hidden = self._hidden(base, batch)
            parts = [self._part(part, batch, span) for part, span in self._parts(hidden)]
            found.append(RowLosses(torch.cat(parts), batch))
        return found

    # One pass.

    def base(self, prefix: Layers | None, common: Sequence[int]) -> Layers:
        """The prefix in the model's dtype, and ``common`` text after it: keys and values [1, H, p + C, D] per layer.

        Nothing for neither of them.
        """
        dtype = self._loaded.dtype
        layers = [(keys.to(dtype), values.to(dtype)) for keys, values in prefix or ()]
        if not common:
            return layers
        cache = PassingCache(layers, self._between)
        slots = layers[0][0].shape[2] if layers else 0
        ids = torch.tensor([list(common)], device=self._loaded.device)
        self.read(cache, ids, torch.ones((1, slots + len(common)), dtype=torch.bool), _from(slots, ids))
        return [(layer.keys, layer.values) for layer in cache.layers]

    def _learn_batch(self, leaves: Layers, batch: MicroBatch, total: float) -> RowLosses:
        hidden = self._hidden(leaves, batch)
        losses, gradients = [], []
        for part, span in self._parts(hidden):
            leaf = part.detach().requires_grad_()
            found = self._part(leaf, batch, span)
            weights = batch.weights[span].to(found.device)
            (found * weights).sum().div(total).backward()  # type: ignore[no-untyped-call]
            losses.append(found.detach())
            gradients.append(leaf.grad)
        hidden.backward(torch.cat(gradients))  # type: ignore[arg-type, no-untyped-call]
        return RowLosses(torch.cat(losses), batch)

    def _hidden(self, base: Layers, batch: MicroBatch) -> Tensor:
        """The last layer's output [N, hidden] where targets are predicted."""
        rows = batch.ids.shape[0]
        dtype = self._loaded.dtype
        layers = [
            (keys.to(dtype).expand(rows, -1, -1, -1), values.to(dtype).expand(rows, -1, -1, -1))
            for keys, values in base
        ]
        past = layers[0][0].shape[2] if layers else 0
        mask = torch.cat((torch.ones((rows, past), dtype=torch.bool), batch.mask), dim=1)  # [R, p + C + T]
        output = self.read(PassingCache(layers, self._between), batch.ids, mask, _from(past, batch.ids))
        return output[batch.rows.to(output.device), batch.places.to(output.device)]

    def read(self, cache: Cache, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """Append ``ids`` [R, T] at ``positions`` [R, T] to ``cache``; the last layer's output [R, T, hidden].

        ``mask`` [R, N + T] bool: False for what is padding, in the cache or in ``ids``.
        """
        device = self._loaded.device
        output = self._body(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            position_ids=positions.to(device),
            past_key_values=cache,
            use_cache=True,
        )
        return output.last_hidden_state  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's logits [..., V] of its last layer's output [..., hidden]."""
        logits: Tensor = self._head(hidden)
        return logits if self._softcap is None else torch.tanh(logits / self._softcap) * self._softcap

    def _parts(self, hidden: Tensor) -> list[tuple[Tensor, slice]]:
        """``hidden`` in pieces whose logits fit into memory."""
        size = max(1, _MOST_LOGITS // self._loaded.vocabulary_size)
        return [(hidden[start : start + size], slice(start, start + size)) for start in range(0, len(hidden), size)]

    def _part(self, hidden: Tensor, batch: MicroBatch, span: slice) -> Tensor:
        logits = self.logits(hidden)
        top_ids, top_logprobs = batch.top_ids[span].to(logits.device), batch.top_logprobs[span].to(logits.device)
        return target_losses(logits, top_ids, top_logprobs, self._loss)

    @torch.no_grad()
    def _check_head(self) -> None:
        """The model's own logits must be those that are made here of its last layer."""
        ids = torch.tensor([[1, 0]], device=self._loaded.device)
        own = self._loaded.model(ids, use_cache=False).logits.float()
        here = self.logits(self._body(input_ids=ids, use_cache=False).last_hidden_state).float()
        if own.shape != here.shape or not torch.allclose(own, here, rtol=1e-2, atol=1e-2):
            raise TrainerError(
                f"{self._loaded.name}: {type(self._loaded.model).__name__} does more to its logits than the trainer "
                "knows (an output matrix and final_logit_softcapping), so it would learn something else"
            )


def _from(start: int, ids: Tensor) -> Tensor:
    """Positions from ``start`` on for ``ids`` [R, T]."""
    return torch.arange(start, start + ids.shape[1]).expand(ids.shape[0], -1)
