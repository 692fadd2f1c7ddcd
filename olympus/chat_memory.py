"""The memory of a plain chat: its domain's cartridge in place of a long history, and the last turns as they were.

A client that says ``memory`` need not know that cartridges exist. What it sends, or what its session holds where it
sends the newest message only, is cut down to the system messages and the last ``recent_turns`` turns; the domain's
serving cartridge stands in for the rest. Where none serves, or it was made for another model, nothing is cut away: the
answer is that of the long prompt, and the report says why.

A turn is a user's message and all that follows it up to the next one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import structlog

from memory.cartridges.errors import CartridgeError
from memory.cartridges.registry import CartridgeRegistry
from memory.cartridges.shelf import CartridgeShelf
from memory.history import History
from olympus.chat_types import ChatRequest, MemoryWish
from settings import ChatMemorySettings

if TYPE_CHECKING:  # torch is imported by whoever loads the model
    from workspace.models import LoadedModel
    from workspace.prefix import KVPrefix

log = structlog.get_logger(__name__)

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Remembered:
    """What to ask the engine, and what is told of it. ``prefix`` None: no cartridge serves."""

    messages: list[Message]
    prefix: KVPrefix | None
    cartridges: tuple[str, ...]
    report: dict[str, Any]


class ChatMemory:
    """See the module docstring. Safe to use from all threads."""

    def __init__(
        self, history: History, registry: CartridgeRegistry, shelf: CartridgeShelf, settings: ChatMemorySettings
    ):
        self._history, self._registry, self._shelf, self._settings = history, registry, shelf, settings

    def wanted(self, request: ChatRequest) -> bool:
        """Whether this request is served with memory: as it says, else as the settings say."""
        wish = request.memory or MemoryWish()
        return self._settings.enabled if wish.enabled is None else wish.enabled

    def remember(
        self, loaded: LoadedModel, request: ChatRequest, domain: str, messages: Sequence[Message], named: bool
    ) -> Remembered:
        """The shorter conversation. ``named``: the request brings cartridges of its own, which then are the memory."""
        wish = request.memory or MemoryWish()
        recent = self._settings.recent_turns if wish.recent_turns is None else wish.recent_turns
        prefix, used, reason = (None, (), "the request names its own") if named else self._serving(loaded, domain)
        system, turns = _split(messages)
        recalled: list[list[Message]] = []
        if len(turns) == 1 and request.session_id is not None:
            recalled = self._of_session(request.session_id, recent)
        standing = prefix is not None or named
        earlier = [*recalled, *turns[:-1]]
        kept = earlier[max(0, len(earlier) - recent) :] if standing else earlier
        report = {
            "cartridge": used[0] if used else None,
            "reason": reason,
            "turns": len(kept),
            "turns_recalled": len(recalled),
            "turns_left_out": len(earlier) - len(kept),
        }
        told = [*system, *(message for turn in [*kept, *turns[-1:]] for message in turn)]
        return Remembered(told, prefix, used, report)

    def _serving(self, loaded: LoadedModel, domain: str) -> tuple[KVPrefix | None, tuple[str, ...], str]:
        row = self._registry.serving(domain)
        if row is None:
            return None, (), f"no cartridge serves the domain {domain!r} yet"
        try:
            prefix, rows = self._shelf.prefix_for(loaded, [row.id])
        except CartridgeError as error:  # a chat is answered in any case; what is broken is said and logged
            log.warning("a chat's memory is not used", domain=domain, cartridge=row.id, reason=str(error))
            return None, (), f"{row.id} cannot be used: {error}"
        return replace(prefix, id=row.id), tuple(item.id for item in rows), ""

    def _of_session(self, session: str, recent: int) -> list[list[Message]]:
        """The session's last exchanges, oldest first."""
        if not recent:
            return []
        found = self._history.page(session_id=session, limit=recent)
        return [
            [{"role": "user", "content": record.observation}, {"role": "assistant", "content": record.action}]
            for record in reversed(found)
            if record.observation and record.action
        ]


def _split(messages: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """System messages at the beginning, and turns; what comes before the first user message joins it."""
    system = []
    rest = list(messages)
    while rest and rest[0]["role"] in ("system", "developer"):
        system.append(rest.pop(0))
    turns: list[list[Message]] = []
    for message in rest:
        if not turns or (message["role"] == "user" and any(item["role"] == "user" for item in turns[-1])):
            turns.append([])
        turns[-1].append(message)
    return system, turns
