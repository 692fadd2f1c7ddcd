"""Many prompts at once: greedy answers, and how likely given answers are. For evaluation, not for service.

What all prompts begin with (a long history, an instruction) is read once; the rest in groups of rows, padded in front.
A sliding window counts places in the cache, not positions, so models with one get groups of equal length, which need no
padding. Numbers are those of one request at a time, up to rounding.

A group's cache is allocated once, with room for what is appended: growing it by ``torch.cat``, as transformers does,
would copy all of a long history for every token, and left 6 GB behind where this needs 0.4 (SmolLM2, 1,400 tokens).

Without gradients. Shapes: R rows, N places in the cache, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from memory.distillation.student import Between, Layers, Student
from workspace.models import LoadedModel
from workspace.prefix import KVPrefix, cache_shape, fit_prefix

#: Places in the caches of one group together; 8,192 of SmolLM2 in bfloat16 are 190 MB.
MOST_PLACES = 8192
#: Tokens that are read in one pass.
CHUNK = 512


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Prompts that were read, until the next group is. ``indices`` says which of those that were given."""

    indices: list[int]
    cache: RoomyCache
    mask: Tensor  #: [R, N] bool
    lengths: Tensor  #: [R] positions that are taken
    logits: Tensor  #: [R, V] float32, of what comes next


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """One layer of a fixed size, [R, H, N + room, D]; ``keys`` and ``values`` show what of it is filled."""

    def __init__(self, start: tuple[Tensor, Tensor] | None, rows: int, size: int):
        super().__init__()
        self._rows, self._size = rows, size
        self._buffers: tuple[Tensor, Tensor] | None = None
        if start is not None:
            self.update(*start)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write behind what is there; one row is written for all."""
        if self._buffers is None:
            self.lazy_initialization(key_states, value_states)
            heads, width = key_states.shape[1], (key_states.shape[3], value_states.shape[3])
            keys, values = (key_states.new_empty((self._rows, heads, self._size, each)) for each in width)
            self._buffers = (keys, values)
            self.rewind(0)
        begin = self.keys.shape[2]
        end = begin + key_states.shape[2]
        self._buffers[0][:, :, begin:end] = key_states
        self._buffers[1][:, :, begin:end] = value_states
        self.rewind(end)
        return self.keys, self.values

    def rewind(self, places: int) -> None:
        """Forget all but the first ``places``."""
        assert self._buffers is not None
        self.keys, self.values = self._buffers[0][:, :, :places], self._buffers[1][:, :, :places]


class RoomyCache(Cache):  # type: ignore[misc]
    """Layers with room, and ``between`` before each of them."""

    def __init__(self, base: Layers, count: int, rows: int, size: int, between: Between | None):
        super().__init__(layers=[RoomyLayer(base[layer] if base else None, rows, size) for layer in range(count)])
        self._between = between

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """As transformers asks for it."""
        if self._between is not None:
            self._between()
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def rewind(self, places: int) -> None:
        """Forget all but the first ``places``."""
        for layer in self.layers:
            layer.rewind(places)


class Reader:
    """Reads prompts after ``prefix``, or from position 0 without one."""

    def __init__(self, loaded: LoadedModel, prefix: KVPrefix | None = None, *, between: Between | None = None):
        self._loaded = loaded
        self._between = between
        self._student = Student(loaded, between=between)
        self._layers: Layers = ()
        if prefix is not None:
            fitted = fit_prefix(loaded, prefix)
            self._layers = list(zip(fitted.keys, fitted.values, strict=True))
        self._count = cache_shape(loaded.model).layers
        self._windows = getattr(loaded.model.config.get_text_config(), "sliding_window", None) is not None

    @torch.no_grad()
    def groups(self, prompts: Sequence[Sequence[int]], room: int = 0) -> Iterator[Group]:
        """Read all prompts, group by group; ``room`` tokens of each will be appended."""
        common = _common(prompts)
        base = self._layers
        for start in range(0, common, CHUNK):
            base = self._student.base(base, prompts[0][start : min(start + CHUNK, common)])
        past = base[0][0].shape[2] if base else 0
        for indices in self._grouped([len(prompt) - common for prompt in prompts], past + room):
            yield self._read(base, past, [prompts[index][common:] for index in indices], indices, room)

    @torch.no_grad()
    def greedy(self, group: Group, most: int) -> list[list[int]]:
        """The likeliest continuation of each prompt, up to and with an end token, of at most ``most`` tokens.

        ``most`` at most what ``groups`` was told to leave room for.
        """
        cache, mask, logits = group.cache, group.mask, group.logits
        cache.rewind(mask.shape[1])
        said: list[list[int]] = [[] for _ in group.indices]
        open_rows = set(range(len(said)))
        for step in range(most):
            chosen = logits.argmax(dim=-1)
            for row in list(open_rows):
                said[row].append(int(chosen[row]))
                if said[row][-1] in self._loaded.eos_ids:
                    open_rows.remove(row)
            if not open_rows or step == most - 1:
                break
            mask = torch.cat((mask, torch.ones((len(said), 1), dtype=torch.bool)), dim=1)
            hidden = self._student.read(cache, chosen[:, None], mask, (group.lengths + step)[:, None])
            logits = self._student.logits(hidden[:, -1]).float()
        return said

    @torch.no_grad()
    def scores(self, group: Group, answers: Sequence[Sequence[Sequence[int]]]) -> list[list[float]]:
        """The log-probability of each of a row's ``answers`` (token ids, at least one), in nats."""
        found: list[list[float]] = [[] for _ in group.indices]
        first = group.logits.log_softmax(dim=-1)
        for number in range(max(len(of_row) for of_row in answers)):
            chosen = [of_row[min(number, len(of_row) - 1)] for of_row in answers]  # of rows with fewer, one is repeated
            sums = self._score(group, first, chosen)
            for row, of_row in enumerate(answers):
                if number < len(of_row):
                    found[row].append(sums[row])
        return found

    def _score(self, group: Group, first: Tensor, chosen: Sequence[Sequence[int]]) -> list[float]:
        rows, longest = len(chosen), max(len(ids) for ids in chosen) - 1
        sums = [float(first[row, ids[0]]) for row, ids in enumerate(chosen)]
        if not longest:
            return sums
        ids = torch.zeros((rows, longest), dtype=torch.long)
        fed = torch.zeros((rows, longest), dtype=torch.bool)
        for row, answer in enumerate(chosen):
            ids[row, : len(answer) - 1] = torch.tensor(answer[:-1])
            fed[row, : len(answer) - 1] = True
        positions = group.lengths[:, None] + torch.arange(longest)
        group.cache.rewind(group.mask.shape[1])
        hidden = self._student.read(group.cache, ids, torch.cat((group.mask, fed), dim=1), positions)
        for row, answer in enumerate(chosen):
            if len(answer) > 1:
                logs = self._student.logits(hidden[row, : len(answer) - 1]).float().log_softmax(dim=-1)
                sums[row] += float(logs.gather(1, torch.tensor(answer[1:], device=logs.device)[:, None]).sum())
        return sums

    def _grouped(self, lengths: Sequence[int], more: int) -> Iterator[list[int]]:
        """Indices of prompts that are read together, the short ones first."""
        current: list[int] = []
        for index in sorted(range(len(lengths)), key=lambda item: lengths[item]):
            full = (len(current) + 1) * (lengths[index] + more) > MOST_PLACES
            if current and (full or (self._windows and lengths[current[0]] != lengths[index])):
                yield current
                current = []
            current.append(index)
        if current:
            yield current

    def _read(self, base: Layers, past: int, prompts: Sequence[Sequence[int]], indices: list[int], room: int) -> Group:
        rows, longest = len(prompts), max(len(prompt) for prompt in prompts)
        ids = torch.zeros((rows, longest), dtype=torch.long)
        mask = torch.zeros((rows, past + longest), dtype=torch.bool)
        mask[:, :past] = True
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, past + longest - len(prompt) :] = True
        positions = (past + mask[:, past:].cumsum(dim=1) - 1).clamp_min(0)
        cache = RoomyCache(base, self._count, rows, past + longest + room, self._between)
        step = max(1, CHUNK // rows) if rows > 1 else CHUNK
        for start in range(0, longest, step):
            end = min(start + step, longest)
            hidden = self._student.read(cache, ids[:, start:end], mask[:, : past + end], positions[:, start:end])
        lengths = past + mask[:, past:].sum(dim=1)
        return Group(indices, cache, mask, lengths, self._student.logits(hidden[:, -1]).float())


def _common(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts begin with, of which each has at least one more."""
    most = min(len(prompt) for prompt in prompts) - 1
    first = list(prompts[0])
    for prompt in prompts[1:]:
        while first[:most] != list(prompt[:most]):
            most = next(place for place in range(most) if first[place] != prompt[place])
    return most
