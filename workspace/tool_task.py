"""A small task over many turns: answer every request by one line of JSON that calls the right tool.

The system message names four tools and shows one call of each; then requests follow, one per turn, in an order that
the seed decides. The model's own answers stay in the conversation, so a format that it loses once is hard to find
again: that is the long horizon. An answer counts as *formed* when it is one JSON object with a known tool and a text
argument, and as *right* when both are those that were asked for.

Nothing here runs a model (``evaluation.py`` does) or a tool.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass

#: Tool -> (a request for it, its argument, further arguments to ask for).
_TOOLS: dict[str, tuple[str, tuple[str, ...]]] = {
    "weather": ("What is the weather in {}?", ("Bern", "Oslo", "Cairo", "Lima", "Tokyo", "Rome")),
    "translate": ("Translate the word {} into French.", ("house", "river", "bread", "winter", "friend", "green")),
    "define": ("What does the word {} mean?", ("brisk", "tedious", "harbour", "lament", "frugal", "dawn")),
    "timer": ("Set a timer for {}.", ("5 minutes", "1 hour", "20 seconds", "3 hours", "45 minutes", "10 minutes")),
}
_EXAMPLES = {"weather": "Paris", "translate": "apple", "define": "gentle", "timer": "2 minutes"}


@dataclass(frozen=True, slots=True)
class Request:
    """One turn: what is said, and the call that it asks for."""

    text: str
    tool: str
    argument: str


def system_message() -> str:
    """What the model is told first."""
    calls = "\n".join(
        f"{_TOOLS[tool][0].format(argument)} -> {call_text(tool, argument)}" for tool, argument in _EXAMPLES.items()
    )
    return f"You call tools. Answer every request with exactly one line of JSON and nothing else. Examples:\n{calls}"


def call_text(tool: str, argument: str) -> str:
    """The line that is expected."""
    return json.dumps({"tool": tool, "argument": argument})


def requests(seed: int, turns: int) -> list[Request]:
    """``turns`` requests; the same for equal seeds."""
    chance = random.Random(seed)
    every = [Request(form.format(item), tool, item) for tool, (form, items) in _TOOLS.items() for item in items]
    return [chance.choice(every) for _ in range(turns)]


def is_formed(answer: str) -> bool:
    """One JSON object with a known tool and a text argument."""
    return _call(answer) is not None


def is_right(answer: str, request: Request) -> bool:
    """The call that was asked for; spelling of capitals does not matter."""
    call = _call(answer)
    return call is not None and call[0] == request.tool and call[1].lower() == request.argument.lower()


def _call(answer: str) -> tuple[str, str] | None:
    try:
        value = json.loads(answer)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or value.get("tool") not in _TOOLS or not isinstance(value.get("argument"), str):
        return None
    return value["tool"], value["argument"]


def shares(answered: Sequence[tuple[str, Request]]) -> tuple[float, float]:
    """Shares of formed and of right answers."""
    formed = sum(is_formed(answer) for answer, _ in answered)
    right = sum(is_right(answer, request) for answer, request in answered)
    return formed / len(answered), right / len(answered)
