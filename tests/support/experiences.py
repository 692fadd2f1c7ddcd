"""Experiences without a database, for tests of what is made of them."""

from __future__ import annotations

from typing import Any

from memory.history import Record, content_hash


def record(number: int, observation: str, action: str = "a", feedback: str | None = None, **fields: Any) -> Record:
    """A stored experience with the id ``number``."""
    values: dict[str, Any] = {
        "id": number,
        "domain": "tags",
        "source": "test",
        "observation": observation,
        "action": action,
        "feedback": feedback,
        "score": None,
        "session_id": None,
        "episode_id": None,
        "messages": None,
        "meta": {},
        "content_hash": content_hash(observation, action),
        "created_at": float(number),
        "deleted": False,
    }
    return Record(**{**values, **fields})


def tagged(count: int, every_wrong: int = 3) -> list[Record]:
    """``count`` messages with labels; every third was answered wrongly and corrected."""
    made = []
    for number in range(1, count + 1):
        label = f"OPS-{'RED' if number % 2 else 'BLUE'}"
        wrong = number % every_wrong == 0
        said = f"Incorrect! The correct answer is {label}." if wrong else "Correct!"
        made.append(record(number, f"message number {number}", "OPS-GREY" if wrong else label, said))
    return made
