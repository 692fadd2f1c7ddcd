"""Reading and writing what all servers with OpenAI's chat API agree on: messages, one choice, usage.

Nothing here speaks HTTP, and nothing trusts an answer's shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lm.errors import InvalidCall, InvalidResponse
from lm.types import Messages, Reply

MOST_TOP_LOGPROBS = 20
_ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})


def plain_messages(messages: Messages) -> list[dict[str, str]]:
    """``messages`` with role and text only, which every server takes. Raises ``InvalidCall``."""
    if not messages:
        raise InvalidCall("messages: at least one is needed")
    plain = []
    for place, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in _ROLES:
            raise InvalidCall(f"messages[{place}]: the role {role!r} is none of {', '.join(sorted(_ROLES))}")
        if not isinstance(content, str):
            raise InvalidCall(f"messages[{place}]: content must be text, got {type(content).__name__}")
        if extra := sorted(set(message) - {"role", "content"}):
            raise InvalidCall(f"messages[{place}]: only role and content can be sent, found {', '.join(extra)}")
        plain.append({"role": role, "content": content})
    return plain


def check_limits(*, max_tokens: int, temperature: float = 0.0, top_logprobs: int = 1) -> None:
    """Raise ``InvalidCall`` for numbers that no server takes."""
    if max_tokens < 1:
        raise InvalidCall(f"max_tokens must be at least 1, got {max_tokens}")
    if not 0 <= temperature <= 2:
        raise InvalidCall(f"temperature must be from 0 to 2, got {temperature}")
    if not 1 <= top_logprobs <= MOST_TOP_LOGPROBS:
        raise InvalidCall(f"top_logprobs must be from 1 to {MOST_TOP_LOGPROBS}, got {top_logprobs}")


def only_choice(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """The one choice of an answer. Raises ``InvalidResponse``."""
    choices = body.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise InvalidResponse(f"expected one choice in the answer, got {_brief(choices)}")
    choice: Mapping[str, Any] = choices[0]
    return choice


def read_reply(body: Mapping[str, Any], seconds: float) -> Reply:
    """A reply from an answer of ``chat/completions``. Raises ``InvalidResponse``.

    Slots of cartridges are counted where the server tells them (Olympus does, Tokasaurus does not).
    """
    choice = only_choice(body)
    message = choice.get("message")
    if not isinstance(message, dict):
        raise InvalidResponse(f"expected a message in the choice, got {_brief(message)}")
    text = message.get("content")
    if text is not None and not isinstance(text, str):
        raise InvalidResponse(f"expected text as the message's content, got {_brief(text)}")
    usage = body.get("usage")
    if not isinstance(usage, dict):
        raise InvalidResponse(f"expected the usage in the answer, got {_brief(usage)}")
    return Reply(
        text=text or "",
        prompt_tokens=_count(usage, "prompt_tokens"),
        completion_tokens=_count(usage, "completion_tokens"),
        finish_reason=str(choice.get("finish_reason") or "unknown"),
        cartridge_slots=_count(usage, "cartridge_slots", absent=0),
        seconds=seconds,
    )


def _count(usage: Mapping[str, Any], name: str, absent: int | None = None) -> int:
    value = usage.get(name, absent)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise InvalidResponse(f"usage.{name} must be a count, got {_brief(value)}")
    return value


def _brief(value: object) -> str:
    return repr(value)[:80]
