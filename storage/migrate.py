"""Bring a database to the schema of this version, with Alembic.

Before an existing SQLite database is changed, a whole copy is written beside it (``VACUUM INTO``). A database that
a newer Olympus has written is refused, not guessed at. Migrations live in ``storage/migrations/versions``; make one
with ``python -m cli.main db revision "what changes"`` and read it before you commit it.
"""

from __future__ import annotations

import time
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError

from storage.database import Database
from storage.errors import DatabaseUnavailable, SchemaTooNew
from storage.models import Base

_SCRIPTS = Path(__file__).resolve().parent / "migrations"


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(_SCRIPTS).replace("%", "%%"))
    return config


def head() -> str:
    """The newest revision that this version knows."""
    revision = ScriptDirectory.from_config(_config()).get_current_head()
    assert revision is not None, "the package has lost its migrations"
    return revision


def current(database: Database) -> str | None:
    """The revision that the database is at; None for an empty one."""
    try:
        with database.engine.connect() as connection:
            return MigrationContext.configure(connection).get_current_revision()
    except sa.exc.OperationalError as error:
        raise DatabaseUnavailable(
            f"cannot open the database {database.url.render_as_string(hide_password=True)}: {error.orig}; "
            "check the URL, that the server runs, and the permissions"
        ) from None


def upgrade(database: Database) -> Path | None:
    """Migrate to ``head()``; returns the backup's path when one was made.

    Raises ``SchemaTooNew`` when the database knows a revision that this version does not.
    """
    revision = current(database)
    if revision == head():
        return None
    if revision is not None:
        _must_be_known(revision)
    backup = _backup(database, revision)
    config = _config()
    with database.transaction() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
    return backup


def _must_be_known(revision: str) -> None:
    try:
        ScriptDirectory.from_config(_config()).get_revision(revision)
    except CommandError:
        raise SchemaTooNew(
            f"the database is at schema {revision}, which this version does not know (it knows up to {head()}); "
            "update Olympus, or restore the backup that was made before the upgrade"
        ) from None


def _backup(database: Database, revision: str | None) -> Path | None:
    if not database.is_sqlite or revision is None or not database.url.database:
        return None
    source = Path(database.url.database)
    target = source.with_name(f"{source.stem}-before-{head()}-{int(time.time())}.db")
    connection = database.engine.raw_connection()  # VACUUM runs outside any transaction
    try:
        connection.cursor().execute("VACUUM INTO ?", (str(target),))
    finally:
        connection.close()
    return target


def _next_id() -> str:
    count = len(list(ScriptDirectory.from_config(_config()).walk_revisions()))
    return f"{count + 1:04d}"


def drift(database: Database) -> list[object]:
    """What differs between the models and a migrated database; empty when they agree (tested)."""
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        return list(compare_metadata(context, Base.metadata))


def make_revision(database: Database, message: str) -> Path:
    """Write a new migration from the difference between ``database`` (at head) and the models."""
    config = _config()
    with database.engine.connect() as connection:
        config.attributes["connection"] = connection
        script = command.revision(config, message, autogenerate=True, rev_id=_next_id())
    assert not isinstance(script, list)
    assert script is not None
    return Path(script.path)
