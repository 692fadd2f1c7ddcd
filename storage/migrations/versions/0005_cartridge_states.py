"""cartridge states"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("cartridges", schema=None) as batch_op:
        batch_op.add_column(sa.Column("replaced_id", sa.String(length=96), nullable=True))
        batch_op.add_column(sa.Column("state_reason", sa.Text(), nullable=False, server_default=""))
        batch_op.add_column(sa.Column("stale", sa.Boolean(), nullable=False, server_default=sa.false()))
        batch_op.add_column(sa.Column("bytes", sa.BigInteger(), nullable=False, server_default="0"))
        batch_op.add_column(sa.Column("metrics", sa.JSON(), nullable=False, server_default="{}"))
        batch_op.add_column(sa.Column("experience_ids", sa.JSON(), nullable=False, server_default="[]"))


def downgrade() -> None:
    with op.batch_alter_table("cartridges", schema=None) as batch_op:
        for column in ("experience_ids", "metrics", "bytes", "stale", "state_reason", "replaced_id"):
            batch_op.drop_column(column)
