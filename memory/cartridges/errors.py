"""What can go wrong with cartridges.

CartridgeError
 |-- InvalidCartridgeId     an id or a domain that no cartridge can have
 |-- CartridgeNotFound      no cartridge has this id, or none serves this domain
 |-- CartridgeConflict      its state does not allow that (promoting a rejected one)
 |-- CartridgeMismatch      sound, but of another model
 |-- CartridgeFileInvalid   a file that somebody brought is not a cartridge; the message names it and says why
 |-- CartridgeNotExportable the format asked for cannot hold this cartridge
 `-- CartridgeDamaged       a file of ours is missing or altered; the message names it
"""

from __future__ import annotations


class CartridgeError(RuntimeError):
    """Base of this package's errors; the message says what to do next."""


class InvalidCartridgeId(CartridgeError, ValueError):
    """Ids are ``<domain>_v<number>`` of lower-case letters, digits and underscores; domains become their first part."""


class CartridgeNotFound(CartridgeError):
    """There is no such cartridge, or it was deleted."""


class CartridgeConflict(CartridgeError):
    """The state of the cartridge, or of its domain, does not allow that; the message says which state does."""


class CartridgeMismatch(CartridgeError):
    """The cartridge was made for another model. Its numbers would be noise to this one."""


class CartridgeFileInvalid(CartridgeError, ValueError):
    """A file from elsewhere is not what it should be. ``source`` names it; nothing of it was used."""

    def __init__(self, source: str, problem: str):
        self.source, self.problem = source, problem
        super().__init__(f"{source}: {problem}")


class CartridgeNotExportable(CartridgeError):
    """The other format has no room for this cartridge; the message says what it would need to look like."""


class CartridgeDamaged(CartridgeError):
    """A cartridge of ours does not match its manifest. Restore its folder from a copy, or delete it."""
