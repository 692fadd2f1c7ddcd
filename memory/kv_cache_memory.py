"""The memory of an agent whose memory is a cartridge: which prefix to attend, and nothing else.

It holds names, not tensors. It is read by every act and changed as a whole: a reader sees the cartridges before a swap
or those after it, never some of each. Where it follows a domain, it asks for the domain's serving cartridge at every
recall, so that a promotion is followed without a restart.

Nothing is written into a cartridge: what is lived through goes to the history, and from there into the next version.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, ValidationError

from lm.types import CartridgeRef, Source
from storage.files import write_json

_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,95}")


class KVMemoryError(ValueError):
    """The memory was asked for something it cannot do; the message says what to do instead."""


class _Named(Protocol):
    @property
    def id(self) -> str:
        """Of a cartridge."""


class ServingCartridge(Protocol):
    """Who knows the serving cartridge of a domain: the registry of this process, or a server that has one."""

    def serving(self, domain: str) -> _Named | None:
        """The cartridge of ``domain`` that is served now, or its row; None when there is none."""


class _CartridgeEntry(BaseModel):
    model_config = ConfigDict(extra="forbid")

    id: str
    source: Source = "local"
    force_redownload: bool = False


class _Snapshot(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["kv"]
    cartridges: list[_CartridgeEntry]
    domain: str | None = None
    model_name: str | None = None
    tokenizer_name: str | None = None


class KVCacheMemory:
    """Cartridges by name, or those of a ``domain`` that ``source`` knows. Safe to use from all threads.

    While the domain has no serving cartridge, ``cartridges`` count. ``model_name`` and ``tokenizer_name`` are notes in
    the snapshot; whether a cartridge fits a model is checked where it is loaded.
    """

    def __init__(
        self,
        cartridges: Iterable[CartridgeRef] = (),
        *,
        domain: str | None = None,
        source: ServingCartridge | None = None,
        model_name: str | None = None,
        tokenizer_name: str | None = None,
    ):
        if source is not None and domain is None:
            raise KVMemoryError("say which domain to follow, or give no source")
        self.domain = domain
        self.model_name = model_name
        self.tokenizer_name = tokenizer_name
        self._source = source
        self._lock = threading.Lock()
        self._cartridges = tuple(cartridges)
        self._swaps = 0

    @property
    def swaps(self) -> int:
        """How often ``set`` or ``swap`` changed it."""
        with self._lock:
            return self._swaps

    def references(self) -> tuple[CartridgeRef, ...]:
        """The cartridges to attend now, for ``LanguageModel.call``. Raises what ``source`` raises."""
        if self._source is not None and self.domain is not None:
            serving = self._source.serving(self.domain)
            if serving is not None:
                return (serving if isinstance(serving, CartridgeRef) else CartridgeRef(serving.id),)
        with self._lock:
            return self._cartridges

    def recall(self) -> dict[str, Any]:
        """The same as plain data: ``{"type": "kv", "cartridges": [{"id", "source", "force_redownload"}, ...]}``."""
        return {"type": "kv", "cartridges": [item.as_json() for item in self.references()]}

    def update(self, *_: object) -> None:
        """Raise ``KVMemoryError``: a cartridge is trained, not written to."""
        raise KVMemoryError(
            "a cartridge cannot be written to; append to the history and distill it, then swap the new version in"
        )

    def set(self, cartridges: Iterable[CartridgeRef]) -> None:
        """Attend ``cartridges`` from the next recall on."""
        self.swap(cartridges)

    def swap(self, cartridges: CartridgeRef | Iterable[CartridgeRef]) -> tuple[CartridgeRef, ...]:
        """Replace all at once; returns what was there. Acts that have begun keep what they recalled."""
        fresh = (cartridges,) if isinstance(cartridges, CartridgeRef) else tuple(cartridges)
        with self._lock:
            old, self._cartridges = self._cartridges, fresh
            self._swaps += 1
            return old

    def frozen(self) -> KVCacheMemory:
        """A memory that stays with the cartridges of this moment: for evaluation beside a running agent."""
        return KVCacheMemory(
            self.references(), domain=self.domain, model_name=self.model_name, tokenizer_name=self.tokenizer_name
        )

    def save_snapshot(self, folder: Path, snapshot_id: str) -> Path:
        """Write ``kv_memory_{snapshot_id}.json`` into ``folder`` atomically; the cartridges' files are not in it."""
        if not _ID.fullmatch(snapshot_id):
            raise KVMemoryError(f"snapshot id {snapshot_id!r}: use letters, digits, _ and -, at most 96")
        path = folder / f"kv_memory_{snapshot_id}.json"
        folder.mkdir(parents=True, exist_ok=True)
        told = {"domain": self.domain, "model_name": self.model_name, "tokenizer_name": self.tokenizer_name}
        write_json(path, self.recall() | told)
        return path

    @classmethod
    def load_snapshot(cls, path: Path, *, source: ServingCartridge | None = None) -> KVCacheMemory:
        """The memory that ``save_snapshot`` wrote; it follows its domain again if ``source`` is given.

        Raises ``KVMemoryError`` for a file that is missing or something else.
        """
        try:
            found = _Snapshot.model_validate_json(path.read_bytes())
        except OSError as error:
            raise KVMemoryError(f"{path.name} cannot be read: {error.strerror}") from None
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "the top"
            raise KVMemoryError(f"{path.name} is no snapshot of a KV memory: at {where}: {first['msg']}") from None
        return cls(
            _references(found.cartridges),
            domain=found.domain,
            source=source if found.domain is not None else None,
            model_name=found.model_name,
            tokenizer_name=found.tokenizer_name,
        )


def _references(entries: Sequence[_CartridgeEntry]) -> tuple[CartridgeRef, ...]:
    return tuple(CartridgeRef(item.id, item.source, item.force_redownload) for item in entries)
