"""Cartridges in memory: read from disk once, proved, shared by all requests, the longest unused given up first.

A cartridge is immutable, so one that is given out stays right whatever happens to the shelf or the registry: a request
that has started keeps its own. Threads that ask for the same one at once cause one read.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from memory.cartridges.errors import CartridgeConflict
from memory.cartridges.registry import CartridgeRegistry
from memory.cartridges.rows import CartridgeRow

if TYPE_CHECKING:  # they bring torch, which the server imports with the model
    from memory.cartridges.cartridge import Cartridge
    from workspace.models import LoadedModel
    from workspace.prefix import KVPrefix

#: A rejected one may not serve, even when asked for by its id.
SERVABLE = ("candidate", "serving", "retired")


class CartridgeShelf:
    """At most ``memory_bytes`` of cartridges, and always the one just asked for. Safe to use from all threads."""

    def __init__(self, registry: CartridgeRegistry, memory_bytes: int = 1 << 30):
        self._registry = registry
        self._memory_bytes = memory_bytes
        self._lock = threading.Lock()  # guards everything below
        self._held: OrderedDict[str, Cartridge] = OrderedDict()
        self._loading: dict[str, threading.Lock] = {}
        self.loads = 0  #: reads from disk so far

    def get(self, cartridge_id: str, *, fresh: bool = False) -> Cartridge:
        """The cartridge of an id; ``fresh`` reads and proves it again.

        Raises ``InvalidCartridgeId``, ``CartridgeNotFound``, ``CartridgeConflict`` for a rejected one, or
        ``CartridgeDamaged``.
        """
        return self._get(self._registry.get(cartridge_id), fresh=fresh)

    def prefix_for(
        self, loaded: LoadedModel, names: Sequence[str], *, fresh: bool = False
    ) -> tuple[KVPrefix, list[CartridgeRow]]:
        """One prefix of the cartridges that ``names`` (ids or domains) stand for, sorted by id, and their rows.

        Sorted as Tokasaurus does it, so that the order in a request makes no difference. Raises what ``get`` does,
        ``CartridgeMismatch`` when one was made for another model, ``CartridgeConflict`` when one stands there twice.
        """
        from memory.cartridges.cartridge import check_model
        from workspace.prefix import join_prefixes

        rows = sorted((self._registry.resolve(name) for name in names), key=lambda row: row.id)
        if len({row.id for row in rows}) != len(rows):
            raise CartridgeConflict(f"a cartridge stands in the request twice: {', '.join(row.id for row in rows)}")
        found = []
        for row in rows:
            cartridge = self._get(row, fresh=fresh)
            check_model(cartridge.manifest, loaded)
            found.append(cartridge.prefix)
        return join_prefixes(found), rows

    def held(self) -> list[str]:
        """Ids in memory, the longest unused first."""
        with self._lock:
            return list(self._held)

    def nbytes(self) -> int:
        """Bytes of the tensors in memory."""
        with self._lock:
            return sum(cartridge.prefix.nbytes for cartridge in self._held.values())

    def check_invariants(self) -> None:
        """Raise ``AssertionError`` if the shelf holds more than it may."""
        with self._lock:
            total = sum(cartridge.prefix.nbytes for cartridge in self._held.values())
            assert total <= self._memory_bytes or len(self._held) <= 1, (total, self._memory_bytes)

    def _get(self, row: CartridgeRow, *, fresh: bool) -> Cartridge:
        if row.state not in SERVABLE:
            raise CartridgeConflict(
                f"{row.id} is {row.state} ({row.state_reason or 'no reason given'}) and cannot serve"
            )
        if not fresh and (known := self._known(row.id)) is not None:
            return known
        with self._lock:
            loading = self._loading.setdefault(row.id, threading.Lock())
        with loading:
            if not fresh and (known := self._known(row.id)) is not None:
                return known
            return self._load(row.id)

    def _known(self, cartridge_id: str) -> Cartridge | None:
        with self._lock:
            found = self._held.get(cartridge_id)
            if found is not None:
                self._held.move_to_end(cartridge_id)
            return found

    def _load(self, cartridge_id: str) -> Cartridge:
        from memory.cartridges.files import load_cartridge

        cartridge = load_cartridge(self._registry.path(cartridge_id))
        with self._lock:
            self.loads += 1
            self._loading.pop(cartridge_id, None)
            self._held[cartridge_id] = cartridge
            self._held.move_to_end(cartridge_id)
            total = sum(item.prefix.nbytes for item in self._held.values())
            while total > self._memory_bytes and len(self._held) > 1:
                _, given_up = self._held.popitem(last=False)
                total -= given_up.prefix.nbytes
        return cartridge
