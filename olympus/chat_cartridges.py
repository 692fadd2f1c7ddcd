"""The cartridges of a chat: from what a request names to one prefix for the engine.

Only cartridges that are here serve. What lies on a hub is imported first, where its shape is checked and somebody
answers for it; an id in a request never starts a download. Problems are the request's (400), as Tokasaurus has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from memory.cartridges.errors import CartridgeDamaged, CartridgeError
from memory.cartridges.shelf import CartridgeShelf
from olympus.chat_types import CartridgeWish
from olympus.errors import InvalidRequest

if TYPE_CHECKING:  # torch is imported by whoever loads the model
    from workspace.models import LoadedModel
    from workspace.prefix import KVPrefix


class CartridgeUnusable(InvalidRequest):
    """A cartridge that the request names cannot serve it; the message says which and what to do."""

    status = 400
    code = "invalid_cartridge"


class ChatCartridges:
    """Finds the cartridges of chats. Safe to use from all threads."""

    def __init__(self, shelf: CartridgeShelf, most_per_request: int):
        self._shelf = shelf
        self._most = most_per_request

    def prefix(self, loaded: LoadedModel, wishes: Sequence[CartridgeWish]) -> tuple[KVPrefix, tuple[str, ...]] | None:
        """One prefix of all, sorted by id, and their ids; None where none is wanted. Raises ``CartridgeUnusable``."""
        if not wishes:
            return None
        if len(wishes) > self._most:
            raise CartridgeUnusable(
                f"cartridges: {len(wishes)} are named, at most {self._most} serve one request "
                "(cartridges.most_per_request): those that were not trained beside each other get in each other's way"
            )
        foreign = next((wish for wish in wishes if wish.source != "local"), None)
        if foreign is not None:
            raise CartridgeUnusable(
                f"cartridges: {foreign.id!r} is to come from {foreign.source!r}, but this server loads nothing from "
                "there; download it, import it with POST /olympus/cartridges/import, and name it with source 'local'"
            )
        fresh = any(wish.force_redownload for wish in wishes)
        try:
            prefix, rows = self._shelf.prefix_for(loaded, [wish.id for wish in wishes], fresh=fresh)
        except CartridgeDamaged:
            raise
        except CartridgeError as error:
            raise CartridgeUnusable(f"cartridges: {error}") from error
        return prefix, tuple(row.id for row in rows)
