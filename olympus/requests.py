"""What may be asked of Zeus, as frozen models that JSON is parsed into directly.

A request that exists is well formed: types, lengths and names are checked here; what depends on the state (does the
kernel exist, is it training) is checked by ``Zeus``. Unknown fields are errors, so that a misspelt option is never
silently ignored.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

NAME_PATTERN = r"^[a-z0-9][a-z0-9-]{0,62}\z"
#: The domain of a kernel that learns from every domain.
ALL_DOMAINS = "*"
MAX_TEXT = 32_768

Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
Domain = Annotated[str, StringConstraints(pattern=r"^(\*|[a-z0-9][a-z0-9-]{0,62})\z")]
Text = Annotated[str, StringConstraints(min_length=1, max_length=MAX_TEXT, pattern=r"^[^\x00]*\z")]
CheckpointName = Annotated[str, StringConstraints(pattern=r"^step-[0-9]{8}\z")]
CheckpointChoice = Annotated[str, StringConstraints(pattern=r"^(best|latest|step-[0-9]{8})\z")]


class _Request(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ExperienceIn(_Request):
    """One thing to learn from: after ``observation`` the right ``action`` was this one.

    ``score`` is the judgement, from -1 (wrong, never imitate it) to 1 (confirmed). ``request_id`` makes a retry
    harmless.
    """

    observation: Text
    action: Text
    feedback: Text | None = None
    score: float | None = Field(None, ge=-1, le=1)
    session_id: Annotated[str, StringConstraints(min_length=1, max_length=128)] | None = None
    request_id: Annotated[str, StringConstraints(min_length=1, max_length=128)] | None = None


class ExperienceBatch(_Request):
    """The body of ``POST /olympus/kernels/<id>/experiences``."""

    experiences: tuple[ExperienceIn, ...] = Field(min_length=1, max_length=1000)


class SpawnRequest(_Request):
    """A new kernel. Everything has a default; ``config`` overrides single values of the preset's network."""

    name: Name | None = None
    domain: Domain | None = None
    element: Annotated[str, StringConstraints(max_length=64)] = ""
    role: Annotated[str, StringConstraints(max_length=64)] = ""
    reason: Literal["user_request"] = "user_request"
    parent_gods: tuple[Name, ...] = Field((), max_length=8)
    force: bool = False
    seed: int | None = Field(None, ge=0, lt=2**53)
    preset: Literal["nano", "micro", "small"] | None = None
    config: dict[Annotated[str, StringConstraints(max_length=64)], bool | int | float | str] = Field(
        default_factory=dict, max_length=32
    )
    experiences: tuple[ExperienceIn, ...] = Field((), max_length=1000)
    train: bool = True
    idempotency_key: Annotated[str, StringConstraints(min_length=1, max_length=128)] | None = None


class QueryRequest(_Request):
    """Ask a kernel: free text, or a ranking when ``candidates`` are given.

    ``learn`` writes the question into the history without an answer to imitate: feedback makes it an experience.
    """

    input: Text
    candidates: tuple[Annotated[str, StringConstraints(min_length=1, max_length=512)], ...] | None = Field(
        None, min_length=1, max_length=128
    )
    max_tokens: int = Field(64, ge=1, le=512)
    temperature: float = Field(0.0, ge=0, le=2)
    checkpoint: CheckpointChoice = "best"
    return_basin: bool = False
    learn: bool = False
