"""Who may do what: API keys, their scopes, and the principal that a request acts as.

A key is ``oly_<id>_<secret>``: the id finds the row, the secret is 256 random bits. Only its SHA-256 is stored (a
slow hash protects guessable secrets, this one is not) and compared in constant time. Every check reads the row, so
that revoking works at once, also for open streams and browser sessions. Nothing here knows HTTP.

The bootstrap key (``server.api_key``) is an administrator that is not stored: for hosts that hand out secrets by
environment. Idea and format: GitHub's prefixed tokens; OWASP, "Cryptographic Storage".
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
import structlog
from pydantic import SecretStr

from settings import SHORTEST_API_KEY, SettingsError
from storage.database import Database
from storage.models import ApiKey, AuditEvent

log = structlog.get_logger(__name__)

ADMIN = "admin"
SCOPES = (
    "chat",
    "kernels:read",
    "kernels:write",
    "history:read",
    "history:write",
    "cartridges:read",
    "cartridges:write",
    ADMIN,
)
KEY_PREFIX = "oly_"
_KEY = re.compile(r"oly_([0-9a-f]{8})_([A-Za-z0-9_-]{43})")
_USED_EVERY_SECONDS = 60.0  # last_used_at is for people: once a minute is enough


@dataclass(frozen=True, slots=True)
class Principal:
    """Whoever a request acts as. ``id`` is a key's id, ``bootstrap-...``, or ``local``."""

    id: str
    name: str
    scopes: frozenset[str]

    def allows(self, scope: str) -> bool:
        """True when ``scope`` was granted, by itself or by ``admin``."""
        return scope in self.scopes or ADMIN in self.scopes


#: A person on this machine, where the server listens on loopback only.
LOCAL = Principal("local", "this machine", frozenset({ADMIN}))


class KeyStore:
    """Makes, checks and revokes keys. Safe to use from all threads."""

    def __init__(self, database: Database, bootstrap: SecretStr | None = None):
        self._database = database
        self._bootstrap: tuple[str, Principal] | None = None
        if bootstrap is not None:
            self._bootstrap = _bootstrap_principal(bootstrap.get_secret_value())
        self._used_lock = threading.Lock()
        self._used: dict[str, float] = {}

    def create(
        self, name: str, scopes: Sequence[str], expires_in: float | None = None, *, actor: str = "local"
    ) -> tuple[str, str]:
        """Make a key and return ``(id, key)``; the key is shown this once. ``expires_in`` is in seconds.

        Raises ``ValueError`` for an empty or overlong name, an unknown scope, or a time that is not positive.
        """
        unknown = sorted(set(scopes) - set(SCOPES))
        if unknown or not scopes:
            what = f"unknown scope {', '.join(unknown)}" if unknown else "a key needs at least one scope"
            raise ValueError(f"{what}; known are {', '.join(SCOPES)}")
        if not 1 <= len(name) <= 100:
            raise ValueError("a key needs a name of 1 to 100 characters")
        if expires_in is not None and not expires_in > 0:
            raise ValueError("the time until a key expires must be positive")
        key_id, secret = secrets.token_hex(4), secrets.token_urlsafe(32)
        granted = [scope for scope in SCOPES if scope in scopes]
        expires_at = None if expires_in is None else time.time() + expires_in
        row = ApiKey(id=key_id, name=name, secret_sha256=_digest(secret), scopes=granted, expires_at=expires_at)
        detail = {"name": name, "scopes": granted}
        with self._database.write() as session:
            session.add(row)
            session.add(AuditEvent(actor=actor, action="key.create", target=key_id, detail=detail))
        return key_id, f"{KEY_PREFIX}{key_id}_{secret}"

    def verify(self, text: str) -> Principal | None:
        """The principal that ``text`` proves to be, or None: unknown, wrong, expired or revoked."""
        if self._bootstrap is not None and hmac.compare_digest(_digest(text), self._bootstrap[0]):
            return self._bootstrap[1]
        match = _KEY.fullmatch(text)
        if match is None:
            return None
        key_id, secret = match.groups()
        row = self._active(key_id)
        # An unknown id costs the same comparison as a wrong secret.
        stored = "0" * 64 if row is None else row.secret_sha256
        if not hmac.compare_digest(_digest(secret), stored) or row is None:
            return None
        self._note_use(key_id)
        return _principal(row)

    def find(self, principal_id: str) -> Principal | None:
        """The principal with that id if it may still act: for sessions and streams that outlive a request."""
        if principal_id == LOCAL.id:
            return LOCAL
        if self._bootstrap is not None and principal_id == self._bootstrap[1].id:
            return self._bootstrap[1]
        row = self._active(principal_id)
        return None if row is None else _principal(row)

    def list(self) -> Sequence[dict[str, Any]]:
        """All keys, oldest first, never their secrets. ``state``: ``active``, ``expired`` or ``revoked``."""
        columns = ("id", "name", "scopes", "created_at", "expires_at", "last_used_at", "revoked_at")
        with self._database.read() as session:
            rows = session.scalars(sa.select(ApiKey).order_by(ApiKey.created_at, ApiKey.id))
            return [{column: getattr(row, column) for column in columns} | {"state": _state(row)} for row in rows]

    def revoke(self, key_id: str, *, actor: str = "local") -> bool:
        """Make a key invalid at once; False when there is no active key with that id."""
        with self._database.write() as session:
            row = session.get(ApiKey, key_id)
            if row is None or row.revoked_at is not None:
                return False
            row.revoked_at = time.time()
            session.add(AuditEvent(actor=actor, action="key.revoke", target=key_id, detail={"name": row.name}))
        return True

    def any_active(self) -> bool:
        """True when somebody could authenticate: a stored key that is neither revoked nor expired, or the bootstrap."""
        if self._bootstrap is not None:
            return True
        with self._database.read() as session:
            return session.scalar(_unrevoked().limit(1)) is not None

    def _active(self, key_id: str) -> ApiKey | None:
        with self._database.read() as session:
            return session.scalar(_unrevoked().where(ApiKey.id == key_id))

    def _note_use(self, key_id: str) -> None:
        now = time.time()
        with self._used_lock:
            if now - self._used.get(key_id, 0.0) < _USED_EVERY_SECONDS:
                return
            self._used[key_id] = now
        try:
            with self._database.write() as session:
                session.execute(sa.update(ApiKey).where(ApiKey.id == key_id).values(last_used_at=now))
        except sa.exc.SQLAlchemyError as error:  # bookkeeping must not refuse a valid key, a full disk say
            log.warning("could not note the use of a key", key_id=key_id, error=type(error).__name__)


def _unrevoked() -> sa.Select[ApiKey]:
    alive = sa.or_(ApiKey.expires_at.is_(None), ApiKey.expires_at > time.time())
    return sa.select(ApiKey).where(ApiKey.revoked_at.is_(None), alive)


def _state(row: ApiKey) -> str:
    if row.revoked_at is not None:
        return "revoked"
    return "expired" if row.expires_at is not None and row.expires_at <= time.time() else "active"


def _principal(row: ApiKey) -> Principal:
    return Principal(row.id, row.name, frozenset(row.scopes))


def _bootstrap_principal(key: str) -> tuple[str, Principal]:
    if len(key) < SHORTEST_API_KEY:
        raise SettingsError(
            f"server.api_key: must have at least {SHORTEST_API_KEY} characters; it is an administrator's key, "
            "so use a long random one"
        )
    # The id changes with the key, so that sessions of a replaced key end.
    shown = _digest(f"olympus bootstrap id {key}")[:8]
    return _digest(key), Principal(f"bootstrap-{shown}", "bootstrap", frozenset({ADMIN}))


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()
