"""Alembic's entry point. Called only through ``storage.migrate``, which hands over an open connection."""

from alembic import context

from storage.models import Base

connection = context.config.attributes["connection"]
# Batch mode: SQLite cannot alter a column in place, so Alembic copies the table.
context.configure(
    connection=connection,
    target_metadata=Base.metadata,
    render_as_batch=True,
    compare_type=True,
    transactional_ddl=True,  # SQLite too: the connection begins its transactions itself
)
with context.begin_transaction():
    context.run_migrations()
