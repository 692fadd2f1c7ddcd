"""One row of a distillation's dataset: what the student sees, and what it is to answer.

The classes mirror the rows of the Cartridges library (HazyResearch, arXiv 2506.06266: ``Conversation``, ``Message``,
``FlatTopLogprobs``), so that files written from them can be read there. A row that exists is valid.

The memory is *not* part of a row: the teacher saw it, the student never does. That is what moves it into the prefix.

Not here: files (``dataset.py``), where rows come from (``data_generation.py``), token positions (the trainer).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memory.distillation.errors import BadRow

ROLES = ("system", "user", "assistant")
SPLITS = ("train", "eval")
TARGETS = ("teacher", "feedback")
#: A log-probability may exceed 0 by this much, which is rounding.
ROUNDING = 1e-3


@dataclass(frozen=True, eq=False)
class FlatTopLogprobs:
    """The teacher's likeliest tokens at each position of one message, as three parallel arrays of N candidates.

    ``token_idx`` [N] int32: the position within the message (0 .. T-1, ascending); ``token_id`` [N] int32: an id of
    the vocabulary; ``logprobs`` [N] float32: natural logarithms at temperature 1; ``shape``: (T, K) before flattening.
    """

    token_idx: NDArray[np.int32]
    token_id: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        for name, dtype in (("token_idx", np.int32), ("token_id", np.int32), ("logprobs", np.float32)):
            try:
                array = np.asarray(getattr(self, name)).astype(dtype)
            except (TypeError, ValueError, OverflowError) as error:
                raise BadRow(f"top_logprobs.{name}: {error}") from None
            object.__setattr__(self, name, array)
        object.__setattr__(self, "shape", _pair(self.shape))
        tokens, most = self.shape
        if any(array.ndim != 1 or len(array) != len(self.token_idx) for array in (self.token_id, self.logprobs)):
            raise BadRow("top_logprobs: token_idx, token_id and logprobs must be one-dimensional and equally long")
        if len(self.token_idx) > tokens * most:
            raise BadRow(f"top_logprobs: {len(self.token_idx)} candidates do not fit the shape {self.shape}")
        if len(self.token_idx) and (self.token_idx[0] < 0 or self.token_idx[-1] >= tokens):
            raise BadRow(f"top_logprobs.token_idx: outside of the message's {tokens} tokens")
        if np.any(np.diff(self.token_idx) < 0):
            raise BadRow("top_logprobs.token_idx: must ascend")
        if np.any(self.token_id < 0):
            raise BadRow("top_logprobs.token_id: must not be negative")
        if not np.all(np.isfinite(self.logprobs)) or np.any(self.logprobs > ROUNDING):
            raise BadRow("top_logprobs.logprobs: must be finite and at most 0")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FlatTopLogprobs):
            return NotImplemented
        return (
            self.shape == other.shape
            and np.array_equal(self.token_idx, other.token_idx)
            and np.array_equal(self.token_id, other.token_id)
            and np.array_equal(self.logprobs, other.logprobs)
        )

    __hash__ = None  # type: ignore[assignment]  # arrays can be changed


@dataclass(frozen=True)
class RowMessage:
    """One turn. ``token_ids``: the exact tokens that the teacher gave, where ``content`` alone is ambiguous."""

    role: str
    content: str
    token_ids: tuple[int, ...] | None = None
    top_logprobs: FlatTopLogprobs | None = None

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise BadRow(f"role: {self.role!r} is none of {', '.join(ROLES)}")
        if not isinstance(self.content, str):
            raise BadRow(f"content: expected text, found {type(self.content).__name__}")
        if self.token_ids is not None:
            object.__setattr__(self, "token_ids", tuple(int(token) for token in self.token_ids))
            if any(token < 0 for token in self.token_ids):
                raise BadRow("token_ids: must not be negative")
        if self.top_logprobs is None:
            return
        if self.token_ids is None:
            raise BadRow("top_logprobs without token_ids: of which tokens are they?")
        if self.top_logprobs.shape[0] != len(self.token_ids):
            raise BadRow(
                f"{len(self.token_ids)} token_ids, but top_logprobs for {self.top_logprobs.shape[0]} positions"
            )


@dataclass(frozen=True)
class Row:
    """What the student sees, then the answer that it is to give, as the last message.

    ``system_prompt`` is the student's system message, kept apart from ``messages`` as the library does.
    ``metadata`` (documented in docs/distillation.md): content_key, experience_id, split, weight, target, kind,
    teacher_tokens and whatever else is JSON. ``type``: the same as ``metadata["kind"]``, for readers of the library.
    """

    messages: tuple[RowMessage, ...]
    system_prompt: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    type: str = "replay"

    def __post_init__(self) -> None:
        object.__setattr__(self, "messages", tuple(self.messages))
        if not self.messages or self.messages[-1].role != "assistant":
            raise BadRow("messages: the last one must be the assistant's answer")
        if not self.answer.content and not self.answer.token_ids:
            raise BadRow("messages: the answer is empty")
        if self.split not in SPLITS:
            raise BadRow(f"metadata.split: {self.split!r} is none of {', '.join(SPLITS)}")
        if self.target not in TARGETS:
            raise BadRow(f"metadata.target: {self.target!r} is none of {', '.join(TARGETS)}")
        weight = self.metadata.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise BadRow(f"metadata.weight: {weight!r} is no finite number of at least 0")
        try:
            json.dumps(self.metadata, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise BadRow(f"metadata: not JSON: {error}") from None

    @property
    def answer(self) -> RowMessage:
        """The last message: what is trained on."""
        return self.messages[-1]

    def prompt(self) -> list[dict[str, str]]:
        """What comes before the answer, as a chat template takes it: the system message, if any, and the turns."""
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        return system + [{"role": item.role, "content": item.content} for item in self.messages[:-1]]

    @property
    def split(self) -> str:
        """``train`` or ``eval``."""
        return str(self.metadata.get("split", "train"))

    @property
    def target(self) -> str:
        """``teacher``: imitate its distribution; ``feedback``: the answer is known to be right."""
        return str(self.metadata.get("target", "feedback" if self.answer.top_logprobs is None else "teacher"))

    @property
    def weight(self) -> float:
        """How much the row counts; 1 is usual."""
        return float(self.metadata.get("weight", 1.0))

    @property
    def recency(self) -> float:
        """The part of the weight that age has left, 1 where age does not count."""
        return float(self.metadata.get("recency", 1.0))


def flatten_topk(token_ids: Any, logprobs: Any, mass: float = 0.99) -> FlatTopLogprobs:
    """Of each position's K candidates, keep the likeliest until their probabilities add up to ``mass``.

    ``token_ids`` [T, K], ``logprobs`` [T, K] natural logarithms, in any order within a position. A position whose K
    candidates never add up to ``mass`` keeps all of them (the reference implementation keeps one there, exactly
    where the distribution is flattest). Candidates of probability 0 are dropped. Raises ``BadRow``.
    """
    ids = np.asarray(token_ids)
    logs = np.asarray(logprobs, dtype=np.float64)
    if ids.ndim != 2 or ids.shape != logs.shape:
        raise BadRow(f"expected two arrays [T, K], found shapes {ids.shape} and {logs.shape}")
    if not 0 < mass <= 1:
        raise BadRow(f"mass must lie above 0 and at most at 1, got {mass}")
    if np.any(np.isnan(logs)) or np.any(logs > ROUNDING):
        raise BadRow("logprobs must be numbers of at most 0")
    order = np.argsort(-logs, axis=1, kind="stable")
    ids, logs = np.take_along_axis(ids, order, axis=1), np.take_along_axis(logs, order, axis=1)
    before = np.cumsum(np.exp(logs), axis=1) - np.exp(logs)  # [T, K] what likelier candidates add up to
    keep = (before < mass) & np.isfinite(logs)
    position, _ = np.nonzero(keep)
    tokens, most = ids.shape
    return FlatTopLogprobs(position.astype(np.int32), ids[keep], logs[keep].astype(np.float32), (tokens, most))


def _pair(shape: Any) -> tuple[int, int]:
    try:
        tokens, most = (int(number) for number in shape)
    except (TypeError, ValueError):
        raise BadRow(f"top_logprobs.shape: expected (positions, candidates), found {shape!r}") from None
    if tokens < 0 or most < 0:
        raise BadRow(f"top_logprobs.shape: negative: {shape!r}")
    return tokens, most
