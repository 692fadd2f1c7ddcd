"""Names of cartridges: ``<domain>_v<number>``, for ever the same cartridge.

Servers cache by id, so an id is never given twice. ``sanitize`` is Tokasaurus' rule for the folder of an id
(``sanitize_cartridge_id`` of its branch ``geoff/cartridges``); our ids are chosen so that it leaves them alone.
"""

from __future__ import annotations

import hashlib
import re

from memory.cartridges.errors import InvalidCartridgeId

MOST_CHARACTERS = 96
_ID = re.compile(r"[a-z0-9]+(?:_[a-z0-9]+)*_v([0-9]{4,9})")
_MOST_DOMAIN = 64


def sanitize(cartridge_id: str) -> str:
    """The folder in which Tokasaurus looks for ``cartridge_id``. Raises ``InvalidCartridgeId`` when nothing is left."""
    text = re.sub(r"[/\\]", "-", cartridge_id)
    text = re.sub(r"[:|?*<>\"'\x00-\x1f\x7f]", "_", text)
    text = re.sub(r"\.+", "_", text)
    text = re.sub(r"[_-]+", "_", text)
    if not text.strip("_"):
        raise InvalidCartridgeId(f"{cartridge_id!r} leaves no name for a folder; use letters and digits")
    return text


def domain_part(domain: str) -> str:
    """``domain`` as the first part of ids: lower case, everything else than letters and digits one underscore.

    Where that loses something, six hex digits of the domain keep two domains apart. Raises ``InvalidCartridgeId``.
    """
    if not 0 < len(domain) <= _MOST_DOMAIN:
        raise InvalidCartridgeId(f"a domain has 1 to {_MOST_DOMAIN} characters, got {domain!r}")
    plain = re.sub(r"[^a-z0-9]+", "_", domain.lower()).strip("_")
    if plain == domain:
        return plain
    digest = hashlib.sha256(domain.encode("utf-8", "surrogatepass")).hexdigest()[:6]
    return f"{plain}_{digest}" if plain else digest


def make_id(domain: str, version: int) -> str:
    """The id of version ``version`` (from 1) of ``domain``."""
    if version < 1:
        raise InvalidCartridgeId(f"versions count from 1, got {version}")
    return check_id(f"{domain_part(domain)}_v{version:04d}")


def check_id(cartridge_id: str) -> str:
    """``cartridge_id`` itself. Raises ``InvalidCartridgeId`` for what could not be one: a path, an empty text."""
    if len(cartridge_id) > MOST_CHARACTERS or _ID.fullmatch(cartridge_id) is None:
        raise InvalidCartridgeId(
            f"{cartridge_id[:120]!r} is not the id of a cartridge: ids look like memory_v0007, of a-z, 0-9 and _, "
            "and GET /olympus/cartridges lists those that exist"
        )
    return cartridge_id
