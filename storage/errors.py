"""What can go wrong with stored state.

StorageError
 |-- SchemaTooNew        the database was written by a newer Olympus
 `-- DatabaseUnavailable the database cannot be opened or reached
"""

from __future__ import annotations


class StorageError(RuntimeError):
    """Base of this package's errors; the message says what to do next."""


class SchemaTooNew(StorageError):
    """The database's schema is unknown to this version: update Olympus, or use another data directory."""


class DatabaseUnavailable(StorageError):
    """The database cannot be opened: check the URL, the server, and the permissions of the data directory."""
