"""A Harmony answer as its client gets it: reasoning, text, and tool calls.

- ``analysis`` is reasoning, ``final`` is the answer's text.
- ``commentary`` to nobody in particular is a preamble, which the format means for the user: text of the answer.
- Whatever is addressed to ``functions.NAME``, in any channel, is a tool call; also to a bare NAME that was offered.
- ``commentary`` to another tool (``python``, ``browser.search``; nobody offered one) is reasoning, so that nothing
  that was not meant for the user reaches the answer.
- No channel, or an unknown one: text of the answer.
- A message of another role: the model went on to write somebody else's turn. It is left out and the answer is over.

Several messages of one kind are set apart by an empty line. The format itself is in ``harmony.py``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from workspace.channels import Channel, Output, OutputParser, PlainOutput, ToolCallDelta
from workspace.harmony import CHANNELS, HarmonyParser, Header, Piece
from workspace.harmony_tokens import HarmonyTokens
from workspace.hermes_output import HermesOutput
from workspace.text import IncrementalDetokenizer

if TYPE_CHECKING:
    from workspace.models import LoadedModel

_NAMESPACE = "functions."
_NO_TOOLS = CHANNELS | {"assistant", "user", "all"}  # recipients that are none


class HarmonyOutput:
    """Parses the tokens of one generation; ``tools`` are the names of the functions that the request offered."""

    def __init__(self, tokenizer: Any, tokens: HarmonyTokens, prompt_ids: Sequence[int], tools: Collection[str] = ()):
        self._tokenizer = tokenizer
        self._controls = tokens.controls
        self._tools = frozenset(tools)
        self._parser = HarmonyParser(None)
        self._detokenizer = IncrementalDetokenizer(tokenizer, ())
        self._author = "assistant"
        self._header: Header | None = None  # the message to which the last piece belonged
        self._channel: Channel | None = None  # where its text goes; None: nowhere
        self._gap = ""  # what stands before its first text
        self._begun: set[Channel] = set()  # channels that have text
        self._calls = 0
        self._reasoning_tokens = 0
        self._ended = False
        self._follow(prompt_ids, tokens.start)

    @property
    def ended(self) -> bool:
        """True when the model began to write somebody else's turn."""
        return self._ended

    @property
    def reasoning_tokens(self) -> int:
        """How many tokens so far were text of reasoning."""
        return self._reasoning_tokens

    def push(self, token_id: int) -> Output:
        """Take the next token."""
        control = self._controls.get(token_id)
        if control is not None:
            # At most one of the two has text: a control token gives out what a header held back, or opens a message.
            return self._output(False, self._parser.text(self._rest()), self._parser.control(control))
        return self._output(True, self._parser.text(self._detokenizer.push(token_id)))

    def flush(self, ended_by: int | None) -> Output:
        """The end, with all that was held back."""
        rest = self._parser.text(self._rest())
        return self._output(False, rest, self._parser.close() if ended_by is None else self._parser.control("return"))

    def _follow(self, prompt_ids: Sequence[int], start: int) -> None:
        """Read the end of the prompt, which says where in a message the answer begins."""
        begin = max((place for place, token in enumerate(prompt_ids) if token == start), default=None)
        for token in () if begin is None else prompt_ids[begin:]:
            self.push(token)
        if begin is None or (self._parser.message is not None and self._channel is None):
            self._output(False, self._parser.begin_text())  # not a conversation, or one that goes on within a question
        else:
            self._output(False, self._parser.text(self._rest()))
            self._author = self._parser.settle_role() or "assistant"
        # All this was the prompt's. A call with which the answer goes on is told from its name on.
        self._header = None
        self._begun.clear()
        self._gap = ""
        self._calls, self._reasoning_tokens, self._ended = 0, 0, False

    def _output(self, is_text: bool, *pieces: Piece | None) -> Output:
        """What the pieces say; ``is_text``: the token was no control token."""
        texts: dict[Channel, str] = {"content": "", "reasoning": ""}
        calls: list[ToolCallDelta] = []
        for piece in pieces:
            if piece is None:
                continue
            if piece.header is not self._header:
                self._enter(piece.header)
                if self._channel == "tool":
                    calls.append(ToolCallDelta(self._calls, self._function(piece.header), ""))
                    self._calls += 1
            if not piece.text or self._channel is None:
                continue
            if self._channel == "tool":
                calls.append(ToolCallDelta(self._calls - 1, None, piece.text))
                continue
            texts[self._channel] += self._gap + piece.text
            self._gap = ""
            self._begun.add(self._channel)
        channel = self._channel if is_text and self._parser.message is not None else None
        self._reasoning_tokens += channel == "reasoning"
        return Output(channel, texts["content"], texts["reasoning"], tuple(calls))

    def _enter(self, header: Header) -> None:
        """Make a message the current one."""
        self._header = header
        if header.role != self._author:
            self._channel, self._ended = None, True
            return
        self._channel = self._route(header)
        self._gap = "\n\n" if self._channel in self._begun else ""

    def _route(self, header: Header) -> Channel:
        if self._function(header) is not None:
            return "tool"
        channel = header.channel
        if channel is None and header.recipient in CHANNELS:  # its <|channel|> is missing
            channel = header.recipient
        if channel == "analysis":
            return "reasoning"
        foreign = header.recipient is not None and header.recipient not in _NO_TOOLS
        return "reasoning" if channel == "commentary" and foreign else "content"

    def _function(self, header: Header) -> str | None:
        """The name of the function that a message calls."""
        recipient = header.recipient or ""
        name = recipient.removeprefix(_NAMESPACE)
        return name if name and (name != recipient or name in self._tools) else None

    def _rest(self) -> str:
        """The end of a text: what its detokenizer held back. The next text has a new one."""
        rest = self._detokenizer.flush()
        self._detokenizer = IncrementalDetokenizer(self._tokenizer, ())
        return rest


def choose_output(
    loaded: LoadedModel,
    prompt_ids: Sequence[int],
    tools: Sequence[Mapping[str, Any]] | None,
    *,
    one_call: bool = False,
) -> OutputParser:
    """The parser for one generation of ``loaded``; ``tools`` are what the request offered."""
    if loaded.harmony is None and tools:
        return HermesOutput(loaded.tokenizer, prompt_ids, one_call=one_call)
    if loaded.harmony is None:
        return PlainOutput(loaded.tokenizer, prompt_ids)
    names = [str(tool.get("function", tool).get("name")) for tool in tools or ()]
    return HarmonyOutput(loaded.tokenizer, loaded.harmony, prompt_ids, names)
