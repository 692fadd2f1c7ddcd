"""the audit log can be filtered, and only be added to

The database itself refuses to change or remove a row, so that neither a mistake in the program nor somebody who has its
key can. Whoever has the database's file can do anything; the log says what was done through this program.
"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

REFUSAL = "the audit log is append-only"
#: Each dialect's way to refuse, as DDL; others keep the log without this guard.
GUARDS = {
    "sqlite": [
        f"CREATE TRIGGER audit_no_update BEFORE UPDATE ON audit BEGIN SELECT RAISE(ABORT, '{REFUSAL}'); END",
        f"CREATE TRIGGER audit_no_delete BEFORE DELETE ON audit BEGIN SELECT RAISE(ABORT, '{REFUSAL}'); END",
    ],
    "postgresql": [
        "CREATE FUNCTION audit_refuse() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN RAISE EXCEPTION '{REFUSAL}'; END $$",
        "CREATE TRIGGER audit_no_change BEFORE UPDATE OR DELETE OR TRUNCATE ON audit "
        "FOR EACH STATEMENT EXECUTE FUNCTION audit_refuse()",
    ],
}
GUARDS_GONE = {
    "sqlite": ["DROP TRIGGER audit_no_update", "DROP TRIGGER audit_no_delete"],
    "postgresql": ["DROP TRIGGER audit_no_change ON audit", "DROP FUNCTION audit_refuse"],
}


def upgrade() -> None:
    for column in ("actor", "action", "target"):
        op.create_index(f"ix_audit_{column}", "audit", [column])
    for statement in GUARDS.get(op.get_bind().dialect.name, []):
        op.execute(sa.text(statement))


def downgrade() -> None:
    for statement in GUARDS_GONE.get(op.get_bind().dialect.name, []):
        op.execute(sa.text(statement))
    for column in ("target", "action", "actor"):
        op.drop_index(f"ix_audit_{column}", table_name="audit")
