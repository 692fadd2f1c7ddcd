"""Agents anywhere, memories on an Olympus server: its history as a log, its serving cartridges as a memory.

With these two and a client of the same server (``toka:``), every kind of agent lives over HTTP as it would beside the
engine. A cartridge that the server promotes is used from the next act on, because the domain's serving one is asked for
each time. The server's own schedule distils; nothing has to trigger it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from agents.experience_log import NEWEST
from lm.errors import InvalidResponse
from lm.transport import Connected, Patience, Transport
from lm.types import CartridgeRef
from memory.history import NewExperience, Record

_PAGE = 200


class OlympusServer(Connected):
    """``base_url`` is the server's root. Safe to use from any thread; ``close()`` it. Raises as ``lm`` does."""

    def __init__(self, base_url: str, *, api_key: str | None = None, patience: Patience | None = None):
        self._transport = Transport(base_url, api_key=api_key, patience=patience)

    def serving(self, domain: str) -> CartridgeRef | None:
        """The cartridge that ``domain`` is served with now: a ``memory.kv_cache_memory.ServingCartridge``."""
        found = self._transport.get("/olympus/cartridges", {"domain": domain, "state": "serving"})
        rows = [row for row in _rows(found, "cartridges") if row.get("state") == "serving"]
        if not rows:
            return None
        if len(rows) > 1 or not isinstance(rows[0].get("id"), str):
            raise InvalidResponse(
                f"{domain!r} must have at most one serving cartridge with an id, got {len(rows)} rows"
            )
        return CartridgeRef(rows[0]["id"])

    def append(self, item: NewExperience) -> Record:
        """Write ``item`` into the server's history; a known ``request_id`` is not written again."""
        fields = {name: value for name, value in asdict(item).items() if name not in ("source", "messages")}
        return _record(self._transport.post("/olympus/history", fields))

    def records(self, domain: str, limit: int) -> list[Record]:
        """The newest ``limit`` experiences of ``domain``, oldest first."""
        found: list[Record] = []
        before: int | None = None
        while len(found) < limit:
            query = {"domain": domain, "limit": str(min(_PAGE, limit - len(found)))}
            page = self._transport.get("/olympus/history", query | ({} if before is None else {"before": str(before)}))
            found += [_record(row) for row in _rows(page, "experiences")]
            before = page.get("next_before")
            if before is None:
                break
        return found[::-1]


class ServerLog:
    """One domain of a server's history, as an ``ExperienceLog``. ``newest``: how far an agent looks back."""

    def __init__(self, server: OlympusServer, domain: str, newest: int = NEWEST):
        self.domain = domain
        self._server = server
        self._newest = newest

    def append(self, item: NewExperience) -> Record:
        """It is in the server's database when this returns."""
        return self._server.append(item)

    def records(self, limit: int | None = None) -> Sequence[Record]:
        """Read anew every time, 200 to a request."""
        return self._server.records(self.domain, self._newest if limit is None else limit)


def _rows(found: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    rows = found.get(name)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InvalidResponse(
            f"expected a list of objects as {name}, got {type(rows).__name__}; is it an Olympus server?"
        )
    return rows


def _record(row: Mapping[str, Any]) -> Record:
    """A record as the server shows it: without the request's messages, and never a deleted one."""
    try:
        return Record(**{**row, "messages": None, "deleted": False})
    except TypeError as error:
        raise InvalidResponse(f"the server's experience has other fields than expected: {error}") from None
