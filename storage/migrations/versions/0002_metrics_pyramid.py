"""metrics pyramid

The rows of ``kernel_metrics`` become level 0 of ``kernel_metric_points``; the levels above are built from them when a
kernel's measurements are first touched (``olympus.metrics_store``).
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_QUANTITIES = (
    "loss",
    "holdout_loss",
    "baseline_loss",
    "phi",
    "kappa",
    "grad_norm",
    "basin_drift",
    "step_ms",
)
_BATCH = 5000


def _old_table() -> sa.Table:
    return sa.Table(
        "kernel_metrics",
        sa.MetaData(),
        sa.Column("kernel_id", sa.String(), primary_key=True),
        sa.Column("step", sa.Integer(), primary_key=True),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("regime", sa.String(length=16)),
        *(sa.Column(name, sa.Float()) for name in _QUANTITIES),
    )


def _new_table() -> sa.Table:
    return sa.Table(
        "kernel_metric_points",
        sa.MetaData(),
        sa.Column("kernel_id", sa.String(), primary_key=True),
        sa.Column("level", sa.Integer(), primary_key=True),
        sa.Column("step", sa.Integer(), primary_key=True),
        sa.Column("first_step", sa.Integer(), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("regime", sa.String(length=16)),
        sa.Column("values", sa.JSON(), nullable=False),
    )


def upgrade() -> None:
    op.create_table(
        "kernel_metric_points",
        sa.Column("kernel_id", sa.String(length=64), nullable=False),
        sa.Column("level", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("step", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("first_step", sa.Integer(), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("regime", sa.String(length=16), nullable=True),
        sa.Column("values", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["kernel_id"], ["kernels.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("kernel_id", "level", "step"),
    )
    old, new, connection = _old_table(), _new_table(), op.get_bind()
    for kernel_id in connection.execute(sa.select(old.c.kernel_id).distinct()).scalars().all():
        before = 0
        while True:
            after = sa.select(old).where(old.c.kernel_id == kernel_id, old.c.step > before)
            rows = connection.execute(after.order_by(old.c.step).limit(_BATCH)).mappings().all()
            if not rows:
                break
            points = []
            for row in rows:
                values = {name: row[name] for name in _QUANTITIES if row[name] is not None}
                copied = {name: row[name] for name in ("kernel_id", "step", "at", "regime")}
                points.append({**copied, "level": 0, "first_step": before + 1, "values": values})
                before = row["step"]
            connection.execute(sa.insert(new), points)
    op.drop_table("kernel_metrics")


def downgrade() -> None:
    op.create_table(
        "kernel_metrics",
        sa.Column("kernel_id", sa.String(length=64), nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("loss", sa.Float(), nullable=True),
        sa.Column("holdout_loss", sa.Float(), nullable=True),
        sa.Column("baseline_loss", sa.Float(), nullable=True),
        sa.Column("phi", sa.Float(), nullable=True),
        sa.Column("kappa", sa.Float(), nullable=True),
        sa.Column("regime", sa.String(length=16), nullable=True),
        sa.Column("grad_norm", sa.Float(), nullable=True),
        sa.Column("basin_drift", sa.Float(), nullable=True),
        sa.Column("step_ms", sa.Float(), nullable=True),
        sa.ForeignKeyConstraint(["kernel_id"], ["kernels.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("kernel_id", "step"),
    )
    old, new, connection = _old_table(), _new_table(), op.get_bind()
    for row in connection.execute(sa.select(new).where(new.c.level == 0)).mappings().all():
        copied = {name: row[name] for name in ("kernel_id", "step", "at", "regime")}
        means = {name: _mean(row["values"].get(name)) for name in _QUANTITIES}
        connection.execute(sa.insert(old).values(**copied, **means))
    op.drop_table("kernel_metric_points")


def _mean(packed: float | list[float] | None) -> float | None:
    return packed[1] if isinstance(packed, list) else packed
