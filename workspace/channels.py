"""What a model says, told apart: the answer, its reasoning, and calls of tools.

Most models write one stream of text, which is all answer (``PlainOutput``). Some write several messages per answer
with control tokens between them; for those a parser of their format stands behind the same protocol
(``harmony_output.py``). One parser per generation, driven by the engine's thread. Stop strings, sampling and the end
of a generation are not decided here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from workspace.text import IncrementalDetokenizer

Channel = Literal["content", "reasoning", "tool"]


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of a tool call. ``name`` is set in the first piece of each call, and only there."""

    index: int  #: which call of the answer, from 0
    name: str | None
    arguments: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A whole tool call; ``arguments`` are as the model wrote them, which need not be valid JSON."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Output:
    """What became certain with one token. ``channel`` is where that token belongs; None for control tokens."""

    channel: Channel | None
    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()


class OutputParser(Protocol):
    """Turns the tokens of one generation into what they mean. Never raises, whatever the tokens."""

    def push(self, token_id: int) -> Output:
        """Take the next token."""

    def flush(self, ended_by: int | None) -> Output:
        """The end, with all that was held back. ``ended_by``: the end token that was sampled, if one was."""

    @property
    def ended(self) -> bool:
        """True when the answer is over although no end token came."""

    @property
    def reasoning_tokens(self) -> int | None:
        """How many tokens so far were reasoning; None where the format knows no reasoning."""


class PlainOutput:
    """All text is the answer. Special tokens are left out."""

    ended = False
    reasoning_tokens = None

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int]):
        self._detokenizer = IncrementalDetokenizer(tokenizer, prompt_ids)

    def push(self, token_id: int) -> Output:
        """Take the next token."""
        return Output("content", self._detokenizer.push(token_id))

    def flush(self, ended_by: int | None) -> Output:
        """What is left at the end."""
        return Output(None, self._detokenizer.flush())
