"""Rows and conversations as the tokens that a model reads: the same in training, in evaluation and in service.

After a prefix a conversation is rendered without a beginning of sequence (``Prompting.render(after_prefix=True)``, the
function that the engine uses too), so that training and serving agree to the token. The answer follows the rendered
prompt: the teacher's own tokens where a row has them, else the text as the chat template writes an answer, with the
token that ends the turn, because the model has to learn to stop as well.

Only the answer is learnt from. Its targets are distributions: the teacher's likeliest candidates at each position, or
all of the probability on one token where only the answer itself is known.

Not here: batches (``training_batches.py``), losses, the memory that the teacher saw.

Shapes: N targets of a row, K candidates.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memory.distillation.errors import BadRow
from memory.distillation.rows import FlatTopLogprobs, Row
from workspace.models import LoadedModel
from workspace.prompting import Prompting

Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class Targets:
    """What is to be said at N positions of an answer."""

    offsets: NDArray[np.int64]  #: [N] ascending: which token of the answer
    top_ids: NDArray[np.int64]  #: [N, K]; 0 where there are fewer candidates
    top_logprobs: NDArray[np.float32]  #: [N, K] natural logarithms; minus infinity where there are fewer candidates


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """A row as tokens: a prompt of ``start`` tokens, then the answer."""

    name: str  #: for messages about it
    token_ids: tuple[int, ...]
    start: int
    targets: Targets
    weight: float = 1.0

    @property
    def places(self) -> NDArray[np.int64]:
        """[N]: the token whose logits predict each target."""
        return self.targets.offsets + (self.start - 1)

    @property
    def fed(self) -> int:
        """Tokens that the model has to read for the last target."""
        return int(self.places[-1]) + 1

    @property
    def pairs(self) -> int:
        """Candidates of all positions together."""
        return int(np.isfinite(self.targets.top_logprobs).sum())


class Encoder:
    """Turns conversations into token ids for one model.

    It has a copy of the tokenizer: encoding changes settings of a tokenizer for the length of a call, and the engine
    encodes with its own at the same time, in another thread.
    """

    def __init__(self, loaded: LoadedModel):
        self.loaded = dataclasses.replace(loaded, tokenizer=copy.deepcopy(loaded.tokenizer))
        self._prompting = Prompting(self.loaded)

    def prompt(self, messages: Sequence[Message], *, after_prefix: bool) -> list[int]:
        """The conversation up to where the answer begins. Raises ``InvalidPrompt``."""
        return self._prompting.render(messages, after_prefix=after_prefix)

    def conversation(self, messages: Sequence[Message]) -> list[int]:
        """The whole conversation, with its beginning of sequence. Raises ``InvalidPrompt``."""
        return self._prompting.render(messages, add_generation_prompt=False)

    def answer(self, messages: Sequence[Message], content: str, *, after_prefix: bool) -> list[int]:
        """The tokens of ``content`` as an answer to ``messages``, up to and with the one that ends the turn."""
        if self.loaded.chat_stop:  # a plain transcript: the next line of the user ends the turn
            return self.plain(f" {content}{self.loaded.chat_stop[0]}")
        prompt = self.prompt(messages, after_prefix=after_prefix)
        answered = [*messages, {"role": "assistant", "content": content}]
        whole = self._prompting.render(answered, after_prefix=after_prefix, add_generation_prompt=False)
        ends = [place for place, token in enumerate(whole) if token in self.loaded.eos_ids]
        if whole[: len(prompt)] == prompt:
            found = next((place for place in ends if place >= len(prompt)), len(whole) - 1)
            return whole[len(prompt) : found + 1]
        # Templates that write an old answer in another way than the model would (without its thinking, say).
        return [*self.plain(content), *([whole[ends[-1]]] if ends else sorted(self.loaded.eos_ids)[:1])]

    def example(
        self, row: Row, *, name: str, top_k: int, max_tokens: int, gold_weight: float = 1.0, after_prefix: bool = True
    ) -> Example:
        """The row as the student sees it. A prompt that is too long loses its beginning, then an answer its end.

        ``gold_weight`` multiplies the weight of rows without the teacher's distribution. Raises ``BadRow`` for tokens
        that the model does not have, and ``InvalidPrompt`` for messages that do not fit its template.
        """
        messages = [{"role": message.role, "content": message.content} for message in row.messages[:-1]]
        return self.answered(
            messages,
            row,
            name=name,
            top_k=top_k,
            max_tokens=max_tokens,
            gold_weight=gold_weight,
            after_prefix=after_prefix,
        )

    def answered(
        self,
        messages: Sequence[Message],
        row: Row,
        *,
        name: str,
        top_k: int,
        max_tokens: int,
        gold_weight: float = 1.0,
        after_prefix: bool = True,
    ) -> Example:
        """The answer of ``row`` after other ``messages``, for instance those with the memory in them."""
        answer = row.answer
        prompt = self.prompt(messages, after_prefix=after_prefix)
        ids = list(answer.token_ids or self.answer(messages, answer.content, after_prefix=after_prefix))
        ids = ids[: max_tokens - 1]  # at least one token of the prompt stays: its logits predict the first target
        prompt = prompt[-(max_tokens - len(ids)) :]
        top = answer.top_logprobs
        targets = gold_targets(ids) if top is None else teacher_targets(top, len(ids), top_k)
        if not len(targets.offsets):
            raise BadRow(f"{name}: its answer has log-probabilities for no position; drop the row, or its top_logprobs")
        outside = [number for number in ids if number >= self.loaded.vocabulary_size]
        if outside or (targets.top_ids >= self.loaded.vocabulary_size).any():
            raise BadRow(
                f"{name}: it has tokens outside the vocabulary of {self.loaded.name} "
                f"({self.loaded.vocabulary_size}); its teacher must be a model with the same tokenizer"
            )
        weight = row.weight * (gold_weight if top is None else 1.0)
        return Example(name, (*prompt, *ids), len(prompt), targets, weight)

    def plain(self, text: str) -> list[int]:
        """Token ids of text in which control tokens are ordinary characters."""
        ids = self.loaded.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return [int(number) for number in ids]


def gold_targets(ids: Sequence[int]) -> Targets:
    """All probability on the answer's own tokens."""
    tokens = np.asarray(ids, dtype=np.int64)
    return Targets(np.arange(len(tokens)), tokens[:, None], np.zeros((len(tokens), 1), dtype=np.float32))


def teacher_targets(top: FlatTopLogprobs, tokens: int, top_k: int) -> Targets:
    """The first ``top_k`` candidates at each of the answer's first ``tokens`` positions that has any.

    Candidates stand in the order in which ``flatten_topk`` writes them, the likeliest first.
    """
    inside = top.token_idx < tokens
    positions, ids, logs = top.token_idx[inside], top.token_id[inside], top.logprobs[inside]
    offsets, first, counts = np.unique(positions, return_index=True, return_counts=True)
    width = max(1, min(top_k, int(counts.max(initial=1))))
    top_ids = np.zeros((len(offsets), width), dtype=np.int64)
    top_logprobs = np.full((len(offsets), width), -np.inf, dtype=np.float32)
    rank = np.arange(len(positions)) - np.repeat(first, counts)  # of each candidate at its position
    kept = rank < width
    place = np.repeat(np.arange(len(offsets)), counts)[kept]
    top_ids[place, rank[kept]] = ids[kept]
    top_logprobs[place, rank[kept]] = np.minimum(logs[kept], 0.0)
    return Targets(offsets.astype(np.int64), top_ids, top_logprobs)


def row_name(index: int, row: Row) -> str:
    """How messages call a row: its number and what its metadata has to find it by."""
    known = [f"{key} {row.metadata[key]}" for key in ("experience_id", "content_key") if key in row.metadata]
    return f"row {index}" + (f" ({', '.join(known)})" if known else "")


def digest(examples: Sequence[Example]) -> str:
    """SHA-256 of everything that is learnt from."""
    found = hashlib.sha256()
    for example in examples:
        found.update(np.asarray([len(example.token_ids), example.start, *example.token_ids], dtype=np.int64).tobytes())
        found.update(np.float64(example.weight).tobytes())
        for array in (example.targets.offsets, example.targets.top_ids, example.targets.top_logprobs):
            found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()
