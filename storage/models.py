"""The tables: what the process knows that must outlive it.

One declarative model per table, the same on SQLite and PostgreSQL (no dialect's own types or SQL here). Times are
UTC seconds since the epoch (float): they sort, compare and travel as JSON without conversion. Rows of the history
are never updated except for feedback and the tombstone; everything that learns reads them by increasing ``id``.
"""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    String,
    Text,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

# SQLite only auto-increments a column whose type is exactly INTEGER.
_Id = BigInteger().with_variant(Integer, "sqlite")


class Base(DeclarativeBase):
    """Common base; its metadata is what the migrations are checked against."""


class Session(Base):
    """A conversation that a client named, or that the dashboard opened."""

    __tablename__ = "sessions"

    id: Mapped[str] = mapped_column(String(128), primary_key=True)
    title: Mapped[str] = mapped_column(String(200), default="")
    domain: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[float] = mapped_column(Float, default=time.time)
    updated_at: Mapped[float] = mapped_column(Float, default=time.time, index=True)


class Episode(Base):
    """A run of experiences that belong together and may share a score (an agent's task, a test)."""

    __tablename__ = "episodes"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    domain: Mapped[str] = mapped_column(String(64), index=True)
    score: Mapped[float | None] = mapped_column(Float)
    created_at: Mapped[float] = mapped_column(Float, default=time.time)
    finished_at: Mapped[float | None] = mapped_column(Float)


class Experience(Base):
    """One thing that was lived through: what was observed, what was done, what came back.

    ``messages`` holds the whole request of a chat; ``observation`` its last user turn; ``action`` the answer.
    ``request_id`` makes a retried write idempotent. ``deleted_at`` is the tombstone.
    """

    __tablename__ = "experiences"
    __table_args__ = (
        Index("ix_experiences_domain_id", "domain", "id"),
        Index("ix_experiences_session_id", "session_id", "id"),
    )

    id: Mapped[int] = mapped_column(_Id, primary_key=True, autoincrement=True)
    domain: Mapped[str] = mapped_column(String(64))
    session_id: Mapped[str | None] = mapped_column(String(128))
    episode_id: Mapped[str | None] = mapped_column(String(64), index=True)
    source: Mapped[str] = mapped_column(String(32))
    observation: Mapped[str] = mapped_column(Text)
    action: Mapped[str] = mapped_column(Text)
    feedback: Mapped[str | None] = mapped_column(Text)
    score: Mapped[float | None] = mapped_column(Float)
    messages: Mapped[list[dict[str, Any]] | None] = mapped_column(JSON)
    meta: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    content_hash: Mapped[str] = mapped_column(String(64), index=True)
    request_id: Mapped[str | None] = mapped_column(String(128), unique=True)
    created_at: Mapped[float] = mapped_column(Float, default=time.time, index=True)
    deleted_at: Mapped[float | None] = mapped_column(Float)


class Kernel(Base):
    """An M8 kernel: who it is, what it was asked to do, and where its training stands."""

    __tablename__ = "kernels"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    god_name: Mapped[str] = mapped_column(String(64))
    domain: Mapped[str] = mapped_column(String(64), index=True)
    state: Mapped[str] = mapped_column(String(16), index=True)
    state_reason: Mapped[str] = mapped_column(Text, default="")
    wanted: Mapped[str] = mapped_column(String(16), default="train")
    step: Mapped[int] = mapped_column(Integer, default=0)
    config: Mapped[dict[str, Any]] = mapped_column(JSON)
    seed: Mapped[int] = mapped_column(BigInteger)
    parents: Mapped[list[str]] = mapped_column(JSON, default=list)
    reason: Mapped[str] = mapped_column(Text, default="")
    idempotency_key: Mapped[str | None] = mapped_column(String(128), unique=True)
    summary: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    created_at: Mapped[float] = mapped_column(Float, default=time.time)
    updated_at: Mapped[float] = mapped_column(Float, default=time.time)


class MetricPoint(Base):
    """Measurements of one kernel over the steps ``first_step`` to ``step``; see ``olympus.metrics_pyramid``.

    ``values`` holds a number per quantity that was measured once, else ``[count, mean, least, greatest, last]``.
    """

    __tablename__ = "kernel_metric_points"

    kernel_id: Mapped[str] = mapped_column(ForeignKey("kernels.id", ondelete="CASCADE"), primary_key=True)
    level: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    step: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    first_step: Mapped[int] = mapped_column(Integer)
    at: Mapped[float] = mapped_column(Float, default=time.time)
    regime: Mapped[str | None] = mapped_column(String(16))
    values: Mapped[dict[str, Any]] = mapped_column(JSON)


class Checkpoint(Base):
    """A published checkpoint directory of a kernel."""

    __tablename__ = "checkpoints"
    __table_args__ = (UniqueConstraint("kernel_id", "name"),)

    id: Mapped[int] = mapped_column(_Id, primary_key=True, autoincrement=True)
    kernel_id: Mapped[str] = mapped_column(ForeignKey("kernels.id", ondelete="CASCADE"), index=True)
    name: Mapped[str] = mapped_column(String(64))
    step: Mapped[int] = mapped_column(Integer)
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    holdout_loss: Mapped[float | None] = mapped_column(Float)
    phi: Mapped[float | None] = mapped_column(Float)
    converged: Mapped[bool] = mapped_column(default=False)
    pinned: Mapped[bool] = mapped_column(default=False)
    created_at: Mapped[float] = mapped_column(Float, default=time.time)


class CheckpointBlob(Base):
    """The newest checkpoint of a kernel, packed, for hosts whose disk does not survive a restart (Replit)."""

    __tablename__ = "checkpoint_blobs"

    kernel_id: Mapped[str] = mapped_column(ForeignKey("kernels.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(String(64))
    data: Mapped[bytes] = mapped_column(LargeBinary)
    sha256: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[float] = mapped_column(Float, default=time.time)


class LatentSession(Base):
    """The virtual tokens of one session for one model, as a snapshot; see ``memory.latent``."""

    __tablename__ = "latent_sessions"

    session_id: Mapped[str] = mapped_column(String(256), primary_key=True)
    model_fingerprint: Mapped[str] = mapped_column(String(64), primary_key=True)
    data: Mapped[bytes] = mapped_column(LargeBinary)
    size: Mapped[int] = mapped_column(BigInteger)  # of data, in bytes
    sha256: Mapped[str] = mapped_column(String(64))
    updated_at: Mapped[float] = mapped_column(Float, default=time.time, index=True)


class EpisodicVector(Base):
    """What an experience means, as one embedding model sees it; see ``memory.episodic_store``.

    It goes in the transaction that sets the experience's tombstone.
    """

    __tablename__ = "episodic_vectors"

    embedding: Mapped[str] = mapped_column(String(96), primary_key=True)  # which model, and which version of it
    experience_id: Mapped[int] = mapped_column(
        ForeignKey("experiences.id", ondelete="CASCADE"), primary_key=True, index=True, autoincrement=False
    )
    vector: Mapped[bytes] = mapped_column(LargeBinary)  # float32, little-endian, of length 1


class Cartridge(Base):
    """A trained KV prefix and where it came from; its tensors lie in a folder named by its id.

    Rows are never removed, since ids are never given twice: a deleted one keeps its row. ``stale``: something that it
    was trained on (``experience_ids``) was forgotten since.
    """

    __tablename__ = "cartridges"
    __table_args__ = (UniqueConstraint("domain", "version"),)

    id: Mapped[str] = mapped_column(String(96), primary_key=True)
    domain: Mapped[str] = mapped_column(String(64), index=True)
    version: Mapped[int] = mapped_column(Integer)
    parent_id: Mapped[str | None] = mapped_column(String(96))
    replaced_id: Mapped[str | None] = mapped_column(String(96))  # what served before it was promoted
    run_id: Mapped[str | None] = mapped_column(String(64))
    state: Mapped[str] = mapped_column(String(16), index=True)
    state_reason: Mapped[str] = mapped_column(Text, default="")
    stale: Mapped[bool] = mapped_column(default=False)
    model_fingerprint: Mapped[str] = mapped_column(String(64))
    slots: Mapped[int] = mapped_column(Integer)
    bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    manifest: Mapped[dict[str, Any]] = mapped_column(JSON)
    metrics: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)  # of the gate
    experience_ids: Mapped[list[int]] = mapped_column(JSON, default=list)
    created_at: Mapped[float] = mapped_column(Float, default=time.time)
    promoted_at: Mapped[float | None] = mapped_column(Float)


class DistillationRun(Base):
    """One run of the pipeline from history to cartridge, with its lease and progress."""

    __tablename__ = "distillation_runs"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    domain: Mapped[str] = mapped_column(String(64), index=True)
    state: Mapped[str] = mapped_column(String(16), index=True)
    trigger: Mapped[str] = mapped_column(String(32))
    config: Mapped[dict[str, Any]] = mapped_column(JSON)
    progress: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    error: Mapped[str | None] = mapped_column(Text)
    lease_owner: Mapped[str | None] = mapped_column(String(64))
    lease_expires_at: Mapped[float | None] = mapped_column(Float)
    created_at: Mapped[float] = mapped_column(Float, default=time.time)
    finished_at: Mapped[float | None] = mapped_column(Float)


class ApiKey(Base):
    """A credential. Only the SHA-256 of its 256-bit random secret is kept."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(String(16), primary_key=True)
    name: Mapped[str] = mapped_column(String(100))
    secret_sha256: Mapped[str] = mapped_column(String(64))
    scopes: Mapped[list[str]] = mapped_column(JSON)
    created_at: Mapped[float] = mapped_column(Float, default=time.time)
    expires_at: Mapped[float | None] = mapped_column(Float)
    last_used_at: Mapped[float | None] = mapped_column(Float)
    revoked_at: Mapped[float | None] = mapped_column(Float)


class AuditEvent(Base):
    """Who changed what, append-only: triggers of the database refuse to change or remove a row (migration 0006)."""

    __tablename__ = "audit"

    id: Mapped[int] = mapped_column(_Id, primary_key=True, autoincrement=True)
    at: Mapped[float] = mapped_column(Float, default=time.time, index=True)
    actor: Mapped[str] = mapped_column(String(64), index=True)
    action: Mapped[str] = mapped_column(String(64), index=True)
    target: Mapped[str] = mapped_column(String(128), index=True)
    detail: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
