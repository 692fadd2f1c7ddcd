"""The Harmony format of gpt-oss models, parsed as it arrives and whatever arrives.

An answer is a row of messages: ``<|start|>`` header ``<|message|>`` text ``<|end|>``, where the header names a role, a
channel (``analysis``, ``commentary``, ``final``), a recipient (``to=functions.f``, before or after the channel) and
the type of the text. The prompt ends within the first header, after ``<|start|>assistant``.

Headers are read as openai-harmony 0.0.8 reads them, and where it accepts an answer, channels, recipients and texts
are the same (tests compare). Where it raises, this goes on:

- no header, an unknown one, or text between messages: text of the answer (the final channel)
- a missing ``<|end|>``, ``<|start|>`` or ``<|message|>``: the next control token says where a message ends
- control tokens where none can be: left out; no text ever holds one
- cut off within a header: nothing; within a text: what is there

No tokens and no detokenising here, and no decision about what users see (``harmony_output.py``).
Format: the Harmony guide of openai/harmony. What models really write: vllm-project/vllm #22515, #22519, #32587.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Control = Literal["start", "channel", "constrain", "message", "end", "return", "call", "other"]

ROLES = frozenset({"assistant", "user", "system", "developer", "tool"})
CHANNELS = frozenset({"analysis", "commentary", "final"})

# Control tokens within a header. Lone surrogates, which no decoded text can hold, so that nobody can forge one.
_CHANNEL, _CONSTRAIN = "\ud800", "\ud801"
_MOST_WORDS = 2  # recipient and type of the text, besides role and channel
_LONGEST_HEADER = 256  # characters; a name of a function has at most 64
_WORD = re.compile(r"[^ \t\n\f\r]+")
# Unicode's white space; Python counts the four separators of ASCII as well.
_BLANKS = "".join(letter for letter in map(chr, range(0x3001)) if letter.isspace() and not "\x1c" <= letter <= "\x1f")
_CHANNEL_OF = re.compile(f"{_CHANNEL}([^{_BLANKS}<{_CONSTRAIN}]*)")
_HEADER_WORDS = re.compile(rf"\s*(?:to=[^\s{_CONSTRAIN}]*)?\s*(?:{_CONSTRAIN}\S*|json\b|code\b)?\s*")


@dataclass(frozen=True, slots=True, eq=False)
class Header:
    """What stands before a message. Each message has its own object, so identity tells messages apart."""

    role: str = "assistant"
    channel: str | None = None
    recipient: str | None = None
    content_type: str | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """The beginning of a message (its first piece, often without text), or more of its text."""

    header: Header
    text: str = ""


class HarmonyParser:
    """Feed it text and control tokens in the order in which they were written. Never raises.

    It begins within a header, as after ``<|start|>`` with that ``role``; None: the header will say it.
    """

    def __init__(self, role: str | None = "assistant"):
        self._role = role
        self._held = ""  # the header so far
        self._message: Header | None = None  # the message that is being written; None within a header

    @property
    def message(self) -> Header | None:
        """The header of the message to which text would belong now; None within a header."""
        return self._message

    def text(self, text: str) -> Piece | None:
        """Take ordinary text."""
        if self._message is not None:
            return Piece(self._message, text) if text else None
        return self._hold(self._held + text)

    def control(self, token: Control) -> Piece | None:
        """Take a control token."""
        if token == "message" and self._message is None:
            self._message = parse_header(self._held, self._role)
            self._held = ""
            return Piece(self._message)
        if token == "channel":
            if self._message is not None:  # the message before it was never ended
                self._expect("assistant")
            # A second channel in one header: the model corrected itself.
            return self._hold(_CHANNEL_OF.sub("", self._held) + _CHANNEL)
        if token == "constrain" and self._message is None:
            return self._hold(self._held + _CONSTRAIN)
        if token in ("start", "end", "return", "call"):
            left = self._leave()
            # After an end the next header may lack its <|start|>; then only the assistant can be meant.
            self._expect(None if token == "start" else "assistant")
            return left
        return None

    def close(self) -> Piece | None:
        """The text was cut off here: what was held back and is no header."""
        return None if _CHANNEL in self._held else self._leave()

    def begin_text(self) -> Piece:
        """What follows is text of the answer, without any header."""
        self._message, self._held = Header(), ""
        return Piece(self._message)

    def settle_role(self) -> str | None:
        """The header's first word is complete, so text from here on does not continue it; returns the role.

        For the end of a prompt. None: the header has no role, or was settled before.
        """
        if self._message is not None or self._role is not None or _CHANNEL in self._held:
            return None
        role, gap, rest = self._held.strip(_BLANKS).partition(" ")
        self._role, self._held = role or None, gap + rest
        return self._role

    def check_invariants(self) -> None:
        """Raise ``AssertionError`` if the state contradicts itself."""
        assert self._message is None or not self._held, "within a message nothing is held back"
        assert not self._is_no_header(), "text that can be no header is given out at once"

    def _expect(self, role: str | None) -> None:
        """Begin a header."""
        self._message, self._held, self._role = None, "", role

    def _hold(self, header: str) -> Piece | None:
        """Keep what may be a header; give it out when it can be none any more."""
        self._held = header
        return self._release() if self._is_no_header() else None

    def _leave(self) -> Piece | None:
        """Text that stands in a header's place where no ``<|message|>`` came, if it is text."""
        if self._message is not None:
            return None
        if _CHANNEL in self._held:
            header, body = _tolerate(self._held, self._role)
            return Piece(header, body) if body else None
        _, words = _split(self._held)
        if words and words[0] in (ROLES if self._role is None else {self._role}):
            words = words[1:]
        if all(word.startswith("to=") or word.startswith(_CONSTRAIN) for word in words):
            return None
        return self._release()

    def _is_no_header(self) -> bool:
        """True when what is held back can no longer become a header."""
        _, words = _split(self._held)
        named = bool(words) and (self._role is None or words[0] == self._role)
        return len(words) - named > _MOST_WORDS or len(self._held) > _LONGEST_HEADER

    def _release(self) -> Piece:
        """Give out what was held back as text, and stay in that message."""
        header, body = _tolerate(self._held, self._role)
        self._message, self._held = header, ""
        return Piece(header, body)


def parse_header(text: str, role: str | None) -> Header:
    """What a complete header says. ``role`` is known, or None: the first word says it."""
    channel, words = _split(text)
    author = role
    if author is None:
        named = words.pop(0) if words else "assistant"
        if named in ROLES:
            author = named
        elif named in CHANNELS and channel is None:
            author, channel = "assistant", named
        else:  # the name of a tool, when it is addressed to somebody; otherwise nothing that means anything
            author = "tool" if words or named.startswith(("to=", "functions.")) else "assistant"
    elif words and words[0] == author:
        words.pop(0)
    recipient = kind = None
    if words:
        last = words.pop()
        if last.startswith("to=") or not (words or last.startswith(_CONSTRAIN)):
            recipient = last
        else:
            kind = last
            recipient = words.pop() if words else None
    return Header(
        author,
        channel,
        None if recipient is None else _spelled(recipient).removeprefix("to="),
        None if kind is None else _spelled(kind),
    )


def _split(text: str) -> tuple[str | None, list[str]]:
    """The channel's name, and the other words of a header."""
    found = _CHANNEL_OF.search(text)
    channel = found.group(1) or None if found else None
    rest = text[: found.start()] + text[found.end() :] if found else text
    return channel, _WORD.findall(rest.strip(_BLANKS).replace(_CONSTRAIN, f" {_CONSTRAIN}"))


def _tolerate(text: str, role: str | None) -> tuple[Header, str]:
    """A header whose ``<|message|>`` is missing, and the text that follows it."""
    found = _CHANNEL_OF.search(text)
    if found is None or found.group(1) not in CHANNELS:
        first = _WORD.search(text)
        author = role or (first.group() if first and first.group() in ROLES else "assistant")
        if first and first.group() == author:
            text = text[first.end() :].lstrip()
        return Header(author), _spelled(text, "")
    words = _HEADER_WORDS.match(text, found.end())
    assert words is not None, "it matches the empty text"
    return parse_header(text[: words.end()], role), _spelled(text[words.end() :], "")


def _spelled(text: str, constrain: str = "<|constrain|>") -> str:
    """Text without the marks of control tokens; the type of a text is written with its own."""
    return text.replace(_CHANNEL, "").replace(_CONSTRAIN, constrain)
