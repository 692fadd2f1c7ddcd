"""The capped cache of one sequence: attention sinks and recent tokens stay, what is evicted becomes virtual tokens.

With ``chunk_size`` 256 and 4 sinks every full-attention layer keeps the first 4 and the last 252 tokens. Whenever a
block of ``block`` tokens is more than that, the oldest block leaves the cache of all full-attention layers at once;
on the hooked layers it is compacted together with the virtual tokens of before into at most ``virtual_tokens`` per
key-value head (``compaction.py``). So the cache holds between ``chunk_size`` and ``chunk_size + block`` tokens, and a
sequence of any length costs constant memory and time per token. Sliding layers forget by themselves and are left alone.

A prefix that the cache holds from the beginning (``prefix.py``) stays as the sinks do, outside of ``chunk_size``.

One sequence, one ``ActiveWindow``, beside its ``DynamicCache``. For every forward pass::

    for first, count in window.pieces(total):                    # a prompt in blocks, or one token
        recorder = window.recorder(count)
        context = Context(segments=window.segments(count), recorder=recorder)
        model(ids[first : first + count], position_ids=first..., past_key_values=cache, workspace=context)
        window.advance(count, recorder)                          # evicts where it is time

Positions must be explicit: after an eviction the length of the cache is not the position any more.

Where the virtual tokens stand: compaction works with keys rotated to the true positions of their tokens, every head
with its own. Their content is kept relative to the position of the last eviction (``frame``), and a segment stands
``position - frame`` before its queries, taken for the middle of a block and in steps of ``stride`` while decoding. So
a key stays where its token was, up to a few tokens.

Reference queries are those of the last ``reference_queries`` tokens, as if they stood where the next ones will: what
the recent past looked for, the near future will look for. They are the only thing kept beside the cache. Whoever
knows better what will be asked passes ``probes`` to ``evict``.

Not done here: the forward pass, the choice of hooked layers (all hookable ones are best), batches of several rows.

Shapes: L hooked layers, H key-value heads, G query heads for each of them, N cached tokens, E evicted ones, M virtual
ones, Q reference queries, D head size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from workspace.compaction import CompactionSettings, compact, log_mass
from workspace.context import Recorder, Segment
from workspace.correction import SummaryCorrection
from workspace.errors import InvalidWorkspace
from workspace.hooking import HookedModel


@dataclass(frozen=True, slots=True)
class WindowSettings:
    """Size of the capped cache and of what stands in for the rest."""

    chunk_size: int = 256  #: tokens kept in the cache, sinks included
    sinks: int = 4  #: first tokens, which stay for ever
    virtual_tokens: int = 16  #: M, per hooked layer; 0 only forgets
    block: int = 128  #: tokens evicted at once, and the most that one forward pass may add
    reference_queries: int = 128  #: tokens whose queries decide what is kept
    stride: int = 16  #: decode steps for which virtual tokens keep their distance; 1: they stand exactly, for more work
    compaction: CompactionSettings = field(default_factory=CompactionSettings)

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.chunk_size <= self.sinks:
            raise InvalidWorkspace(f"chunk_size ({self.chunk_size}) must be above the {self.sinks} sinks it contains")
        if min(self.block, self.reference_queries, self.stride) < 1 or self.virtual_tokens < 0:
            raise InvalidWorkspace(
                f"block ({self.block}), reference_queries ({self.reference_queries}) and stride ({self.stride}) must "
                f"be at least 1, and virtual_tokens ({self.virtual_tokens}) at least 0"
            )


@dataclass(frozen=True, slots=True, eq=False)
class Summary:
    """The virtual tokens of all hooked layers, in place of ``tokens`` evicted ones."""

    keys: Tensor  #: [L, H, M, D] content relative to ``frame``: token at p has its key turned by p - frame
    values: Tensor  #: [L, H, M, D]
    bias: Tensor  #: [L, H, M]
    frame: int  #: position of the first query that saw them
    tokens: int  #: evicted tokens that they stand for


class ActiveWindow:
    """The capped cache of one sequence. Not thread-safe; belongs to its generation as the cache does.

    ``correction`` is applied to the virtual tokens when they are shown, never to what is stored and compacted again.
    """

    def __init__(
        self,
        hooked: HookedModel,
        cache: DynamicCache,
        settings: WindowSettings | None = None,
        *,
        correction: SummaryCorrection | None = None,
        prefix: int = 0,
    ):
        self.settings = settings or WindowSettings()
        self.cache = cache
        self.prefix = prefix  #: slots that the cache holds already and that are never evicted
        self.seen = self.prefix  #: the position of the next token: slots of the prefix and tokens fed so far
        self.held = self.prefix  #: slots and tokens in the cache of every full-attention layer
        self.summary: Summary | None = None
        self.correction = correction
        self._hooked = hooked
        self._layers = hooked.layers
        self._rope = hooked.rope.of(hooked.layers[0])
        if any(hooked.rope.of(layer) is not self._rope for layer in self._layers):
            raise InvalidWorkspace("the hooked layers rotate differently; a window needs them of one kind")
        self._queries: deque[tuple[int, Mapping[int, Tensor]]] = deque()  # (tokens, queries by layer), oldest first
        self._segments: dict[int, dict[int, Segment]] = {}  # by distance
        self._attention = _attention_modules(hooked)
        if correction is not None and correction.layers != hooked.layers:
            raise InvalidWorkspace(
                f"the correction is for layers {', '.join(map(str, correction.layers))}, but hooked are "
                f"{', '.join(map(str, hooked.layers))}"
            )
        if cache.get_seq_length() != prefix:
            raise InvalidWorkspace(
                f"a window must watch its cache from the first token on, but the cache is not empty: it holds "
                f"{cache.get_seq_length()}, the prefix has {prefix} slots"
            )

    def pieces(self, total: int) -> Iterator[tuple[int, int]]:
        """(position of the first, count) of the forward passes that take the sequence from ``seen`` to ``total``."""
        while self.seen < total:
            yield self.seen, min(self.settings.block, total - self.seen)

    def recorder(self, count: int = 1) -> Recorder | None:
        """A recorder for the next pass of ``count`` tokens; None while decoding where an eviction is far."""
        left = self._most - self.held - count  # tokens until the next eviction
        if self.settings.virtual_tokens == 0 or (count == 1 and left >= self.settings.reference_queries):
            return None
        return Recorder(self._layers, queries=True)

    def segments(self, count: int = 1) -> Mapping[int, Segment]:
        """What stands in for the evicted tokens in the next pass of ``count`` tokens, by layer; empty if nothing."""
        if self.summary is None:
            return {}
        distance = self.seen - self.summary.frame
        stride = self.settings.stride
        distance += count // 2 if count > 1 else stride // 2 - distance % stride
        if torch.is_grad_enabled() and self.correction is not None:
            return self._placed(self.summary, distance)  # every pass its own graph
        if distance not in self._segments:
            self._segments = {distance: self._placed(self.summary, distance)}
        return self._segments[distance]

    def advance(self, count: int, recorder: Recorder | None = None) -> int:
        """Note a finished pass of ``count`` tokens and what it recorded; evict if it is time. Returns evicted tokens.

        Raises ``InvalidWorkspace`` if the cache did not grow by ``count``.
        """
        self.seen += count
        self.held += count
        found = {layer.get_seq_length() for layer in self._full_layers()}
        if found != {self.held}:
            raise InvalidWorkspace(f"the cache holds {sorted(found)} tokens where {self.held} were expected")
        if recorder is not None and recorder.queries:
            self._queries.append((count, {layer: recorder.queries[layer].detach() for layer in self._layers}))
            while sum(tokens for tokens, _ in self._queries) - self._queries[0][0] >= self.settings.reference_queries:
                self._queries.popleft()
        return self.evict() if self.held >= self._most else 0

    @torch.no_grad()
    def evict(self, probes: Mapping[int, Tensor] | None = None) -> int:
        """Cut the cache to ``chunk_size`` now. Returns how many tokens left it.

        ``probes[layer]`` [1, H * G, Q, D], in content space, are further reference queries.
        """
        count = self.held - self.prefix - self.settings.chunk_size
        if count <= 0:
            return 0
        sinks = self.prefix + self.settings.sinks
        first_kept = sinks + count
        if self.settings.virtual_tokens:
            self.summary = self._compacted(sinks, first_kept, probes)
            self._segments = {}
        for layer in self._full_layers():
            layer.keys = torch.cat((layer.keys[:, :, :sinks], layer.keys[:, :, first_kept:]), dim=2)
            layer.values = torch.cat((layer.values[:, :, :sinks], layer.values[:, :, first_kept:]), dim=2)
        self.held -= count
        return count

    def fork(self, settings: WindowSettings, *, correction: SummaryCorrection | None = None) -> ActiveWindow:
        """A window over a copy of the cache, which goes on from here with other settings. Layers must not slide.

        Tensors are shared: neither window ever changes them in place.
        """
        if any(layer.is_sliding for layer in self.cache.layers):
            raise InvalidWorkspace("a cache with sliding layers cannot be forked")
        twin = ActiveWindow(self._hooked, DynamicCache(config=self._hooked.loaded.model.config), settings)
        for index, layer in enumerate(self.cache.layers):
            twin.cache.update(layer.keys, layer.values, index)
        twin.seen, twin.held, twin.summary, twin.correction = self.seen, self.held, self.summary, correction
        twin.prefix = self.prefix
        twin._queries = self._queries.copy()
        return twin

    def check_invariants(self) -> None:
        """Raise ``AssertionError`` if cache, positions and summary contradict each other."""
        assert 0 <= self.prefix <= self.held <= self.seen
        assert self.held < self._most
        assert all(layer.get_seq_length() == self.held for layer in self._full_layers() if self.seen)
        gone = self.seen - self.held
        if self.summary is None:
            assert gone == 0 or self.settings.virtual_tokens == 0
            return
        assert self.summary.tokens == gone
        assert self.summary.frame <= self.seen
        assert self.summary.keys.shape[2] == min(gone, self.settings.virtual_tokens)
        assert self.summary.bias.isfinite().all()
        assert self.summary.values.isfinite().all()

    def _compacted(self, start: int, stop: int, probes: Mapping[int, Tensor] | None) -> Summary:
        """The summary of before and the cached tokens ``start`` to ``stop`` as one new summary."""
        layers = [self.cache.layers[index] for index in self._layers]
        keys = torch.cat([layer.keys for layer in layers]).float()  # [L, H, N, D], rotated to their positions
        values = torch.cat([layer.values[:, :, start:stop] for layer in layers]).float()
        old = self.summary
        queries = self._reference_queries(probes)  # [L, H, G * Q, D]
        others = log_mass(queries, torch.cat((keys[:, :, :start], keys[:, :, stop:]), dim=2), self._scaling)
        others = self._with_sinks(others)
        keys = keys[:, :, start:stop]
        bias = keys.new_zeros(keys.shape[:3])
        if old is not None:
            keys = torch.cat((self._at(old.keys, old.frame), keys), dim=2)
            values = torch.cat((old.values, values), dim=2)
            bias = torch.cat((old.bias, bias), dim=2)
        done = compact(
            keys,
            values,
            bias,
            queries,
            self.settings.virtual_tokens,
            scaling=self._scaling,
            others=others,
            settings=self.settings.compaction,
        )
        content = self._rope.derotate(done.keys, torch.tensor([[self.seen]], device=keys.device))
        return Summary(content, done.values, done.bias, self.seen, (old.tokens if old else 0) + stop - start)

    def _reference_queries(self, probes: Mapping[int, Tensor] | None) -> Tensor:
        """The recorded queries as if they were the next ones, and the probes: rotated, [L, H, G * Q, D]."""
        if not self._queries and not probes:
            raise InvalidWorkspace("tokens are evicted, but no queries were recorded: pass recorder() to every pass")
        wanted = self.settings.reference_queries
        parts = []
        if self._queries:
            recorded = [torch.cat([step[layer] for _, step in self._queries], dim=2) for layer in self._layers]
            parts.append(torch.cat(recorded)[:, :, -wanted:])
        if probes:
            parts.append(torch.cat([probes[layer] for layer in self._layers]))
        content = torch.cat(parts, dim=2).float()  # [L, H * G, Q, D]
        places = torch.cat([torch.arange(part.shape[2]) for part in parts]) + self.seen
        rotated = self._rope.rotate(content, places.to(content.device)[None])
        return rotated.reshape(len(self._layers), self._hooked.kv_heads, -1, self._hooked.head_dim)

    def _with_sinks(self, others: Tensor) -> Tensor:
        """Add the learnt sink logits of models that have them (gpt-oss) to ``others`` [L, H, G * Q]."""
        if getattr(self._attention[0], "sinks", None) is None:
            return others
        logits = torch.stack([module.sinks.detach().float() for module in self._attention])  # [L, H * G]
        logits = logits.reshape(*others.shape[:2], -1, 1).to(others.device)
        return torch.logaddexp(others.reshape(*logits.shape[:3], -1), logits).reshape(others.shape)

    def _placed(self, summary: Summary, distance: int) -> dict[int, Segment]:
        device = summary.keys.device
        birth = torch.full((1, summary.keys.shape[2]), summary.frame, dtype=torch.int64, device=device)
        shown = summary.keys, summary.values, summary.bias
        if self.correction is not None:
            shown = self.correction(*shown)
        parts = zip(self._layers, *shown, strict=True)
        return {
            layer: Segment(keys[None], values[None], bias[None], birth, distance=distance)
            for layer, keys, values, bias in parts
        }

    def _at(self, content: Tensor, position: int) -> Tensor:
        return self._rope.rotate(content, torch.tensor([[position]], device=content.device))

    @property
    def _most(self) -> int:
        """Slots and tokens in the cache at which a block is evicted."""
        return self.prefix + self.settings.chunk_size + self.settings.block

    @property
    def _scaling(self) -> float:
        return float(self._attention[0].scaling)

    def _full_layers(self) -> list[Any]:
        return [layer for layer in self.cache.layers if not layer.is_sliding]


def _attention_modules(hooked: HookedModel) -> list[Any]:
    """The attention modules of the hooked layers, in order."""
    wanted = set(hooked.layers)
    found = {
        module.layer_idx: module
        for module in hooked.loaded.model.modules()
        if getattr(module, "layer_idx", None) in wanted and hasattr(module, "scaling")
    }
    return [found[layer] for layer in hooked.layers]
