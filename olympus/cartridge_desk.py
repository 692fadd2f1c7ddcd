"""The cartridges as the server handles them: seen, promoted and rejected, taken in and given out.

Everything that changes one is told as the event ``cartridge``. Which file format is which, and what a file must look
like, is ``memory.cartridges``; what serves in a chat is ``chat_cartridges.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import structlog

from memory.cartridges.errors import CartridgeMismatch
from memory.cartridges.registry import CartridgeRegistry
from memory.cartridges.rows import CartridgeRow
from memory.cartridges.shelf import CartridgeShelf
from telemetry.hub import EventHub

if TYPE_CHECKING:  # torch is imported by whoever loads the model
    from memory.cartridges.archive import Format, Uploaded
    from workspace.models import LoadedModel

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class CartridgeFile:
    """A cartridge for download."""

    name: str
    content: bytes


class CartridgeDesk:
    """One per process; safe to use from all threads."""

    def __init__(
        self,
        registry: CartridgeRegistry,
        shelf: CartridgeShelf,
        hub: EventHub,
        loaded: Callable[[], LoadedModel],
        import_max_bytes: int,
    ):
        self.registry, self.shelf = registry, shelf
        self._hub = hub
        self._loaded = loaded
        self._import_max_bytes = import_max_bytes

    def promote(self, cartridge_id: str, *, actor: str, reason: str = "", force: bool = False) -> dict[str, Any]:
        """Let it serve its domain."""
        return self.announce(self.registry.promote(cartridge_id, actor=actor, reason=reason, force=force))

    def reject(self, cartridge_id: str, *, actor: str, reason: str) -> dict[str, Any]:
        """It is not good enough."""
        return self.announce(self.registry.reject(cartridge_id, reason, actor=actor))

    def retire(self, cartridge_id: str, *, actor: str, reason: str = "") -> dict[str, Any]:
        """Let it serve no longer."""
        return self.announce(self.registry.retire(cartridge_id, reason, actor=actor))

    def rollback(self, domain: str, *, actor: str, reason: str = "") -> dict[str, Any]:
        """Back to the one before; returns the one that serves now."""
        return self.announce(self.registry.rollback(domain, actor=actor, reason=reason))

    def delete(self, cartridge_id: str, *, actor: str) -> dict[str, Any]:
        """Remove its tensors."""
        return self.announce(self.registry.delete(cartridge_id, actor=actor))

    def lineage(self, domain: str) -> dict[str, Any]:
        """Every cartridge of a domain, oldest first, and the one that serves."""
        rows = self.registry.lineage(domain)
        serving = next((row.id for row in rows if row.state == "serving"), None)
        return {"domain": domain, "serving": serving, "cartridges": [row.to_json() for row in rows]}

    def export(self, cartridge_id: str, how: Format) -> CartridgeFile:
        """As one zip. Raises ``CartridgeNotExportable`` where the format has no room for it."""
        from memory.cartridges.archive import pack

        cartridge = self.shelf.get(cartridge_id)
        return CartridgeFile(f"{cartridge_id}.{how}.zip", pack(cartridge, how))

    def take_in(self, data: bytes, *, domain: str, model: str | None, actor: str) -> dict[str, Any]:
        """Make a candidate of an upload. ``model`` declares the model that it was made for.

        Only files of ours tell the model themselves. Raises ``CartridgeFileInvalid``, ``CartridgeMismatch``,
        ``PrefixMismatch`` or ``ModelNotReady``.
        """
        from memory.cartridges.archive import unpack
        from memory.cartridges.cartridge import make_cartridge

        loaded = self._loaded()
        uploaded = unpack(data, self._import_max_bytes)
        self._check_declared(uploaded, model, loaded)
        said = uploaded.manifest
        cartridge = make_cartridge(
            loaded,
            uploaded.prefix,
            domain=domain,
            frozen=uploaded.frozen,
            origin=(said.id or said.origin) if said is not None else uploaded.format,
            init={"type": "import", "format": uploaded.format} | ({} if said is None else {"before": said.init}),
            data_sha256=None if said is None else said.data_sha256,
            steps=0 if said is None else said.steps,
            metrics={} if said is None else said.metrics,
        )
        return self.announce(self.registry.register(cartridge, actor=actor))

    def is_stale(self, domain: str) -> bool:
        """Whether something that the domain's serving cartridge was trained on was forgotten since."""
        row = self.registry.serving(domain)
        return row is not None and row.stale

    def refresh_stale(self, actor: str) -> None:
        """After something was forgotten or corrected: mark the cartridges that were trained on it, and tell."""
        for row in self.registry.refresh_stale(actor=actor):
            log.info("a cartridge is stale", cartridge=row.id, state=row.state)
            self.announce(row)

    def recover(self) -> None:
        """At start-up: bring folders and rows together, and say what was found."""
        for name, what in self.registry.recover().items():
            log.warning("cartridge", name=name, found=what)

    @staticmethod
    def _check_declared(uploaded: Uploaded, model: str | None, loaded: LoadedModel) -> None:
        """Somebody has to say that the numbers were made with this model: a wrong one answers noise, not an error."""
        said = uploaded.manifest
        if said is not None and said.model_fingerprint == loaded.fingerprint:
            return
        shown = loaded.name.rstrip("/").rsplit("/", 1)[-1]
        if model in (loaded.name, shown):
            return
        if model is not None:
            raise CartridgeMismatch(f"it is declared for {model!r}, but {shown!r} is loaded; load that model first")
        made = "" if said is None else f" (it says {said.model}, fingerprint {said.model_fingerprint[:12]})"
        raise CartridgeMismatch(
            f"nothing proves that it was made for the loaded model {shown!r}{made}; if you know that it was, say so "
            f"with model={shown}"
        )

    def announce(self, row: CartridgeRow) -> dict[str, Any]:
        """Tell watchers of the state of a cartridge; returns all that is known of it."""
        told = row.to_json()
        event = {key: told[key] for key in ("id", "domain", "version", "state", "state_reason", "stale")}
        self._hub.publish("cartridge", event)
        return told
