"""What may be asked of Zeus, as frozen models that JSON is parsed into directly.

A request that exists is well formed: types, lengths and names are checked here; what depends on the state (does the
kernel exist, is it training) is checked by ``Zeus``. Unknown fields are errors, so that a misspelt option is never
silently ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

NAME_PATTERN = r"^[a-z0-9][a-z0-9-]{0,62}\z"
#: The domain of a kernel that learns from every domain.
ALL_DOMAINS = "*"
MAX_TEXT = 32_768

Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
Domain = Annotated[str, StringConstraints(pattern=r"^(\*|[a-z0-9][a-z0-9-]{0,62})\z")]
Text = Annotated[str, StringConstraints(min_length=1, max_length=MAX_TEXT, pattern=r"^[^\x00]*\z")]
#: A kernel's id or its god's name.
KernelRef = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,79}\z")]
Reason = Literal["user_request", "domain_gap", "overload", "specialization", "emergence"]
Consensus = Literal["unanimous", "supermajority", "majority", "quorum"]
CheckpointName = Annotated[str, StringConstraints(pattern=r"^step-[0-9]{8}\z")]
CheckpointChoice = Annotated[str, StringConstraints(pattern=r"^(best|latest|step-[0-9]{8})\z")]


def _no_number(value: Any) -> Any:
    """A literal ``false`` also takes 0, which equals it."""
    if type(value) is not bool:
        raise PydanticCustomError("bool_type", "Input should be a valid boolean")
    return value


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
    session_id: Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[^\x00]*\z")] | None = None
    request_id: Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[^\x00]*\z")] | None = None


class ExperienceBatch(_Request):
    """The body of ``POST /olympus/kernels/<id>/experiences``."""

    experiences: tuple[ExperienceIn, ...] = Field(min_length=1, max_length=1000)


class SpawnRequest(_Request):
    """A new kernel. Everything has a default; ``config`` overrides single values of the preset's network.

    With ``vote``, or a ``reason`` other than a user's request, the kernels that exist decide (``governance``);
    ``force`` overrides them. ``inherit`` begins with the best weights of the first of ``parent_gods``.
    """

    name: Name | None = None
    domain: Domain | None = None
    element: Annotated[str, StringConstraints(max_length=64)] = ""
    role: Annotated[str, StringConstraints(max_length=64)] = ""
    reason: Reason = "user_request"
    parent_gods: tuple[KernelRef, ...] = Field((), max_length=8)
    inherit: bool = False
    vote: bool = False
    consensus_type: Consensus = "supermajority"
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

    ``samples`` above 1 asks for that many stochastic rollouts and one answer out of them; ``seed`` repeats them.
    ``learn`` writes the question into the history without an answer to imitate: feedback makes it an experience.
    """

    input: Text
    candidates: tuple[Annotated[str, StringConstraints(min_length=1, max_length=512)], ...] | None = Field(
        None, min_length=1, max_length=128
    )
    max_tokens: int = Field(64, ge=1, le=512)
    temperature: float = Field(0.0, ge=0, le=2)
    samples: int = Field(1, ge=1, le=16)
    noise: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**53)
    checkpoint: CheckpointChoice = "best"
    return_basin: bool = False
    learn: bool = False


class ImportRequest(_Request):
    """The query of ``POST /olympus/kernels/import``; the archive is the body. None: as the archive says."""

    name: Name | None = None
    domain: Domain | None = None
    train: bool = True


class ExportRequest(_Request):
    """The query of ``GET /olympus/kernels/<id>/export``."""

    checkpoint: CheckpointChoice = "best"
    include: Literal["", "training"] = ""


class ProposeRequest(_Request):
    """Would the kernels agree to a new one? ``experiences`` stand for it, or else the history of ``domain``."""

    name: Name | None = None
    domain: Domain | None = None
    reason: Reason = "user_request"
    parent_gods: tuple[KernelRef, ...] = Field((), max_length=8)
    consensus_type: Consensus = "supermajority"
    experiences: tuple[ExperienceIn, ...] = Field((), max_length=1000)


class RouteRequest(_Request):
    """``text`` or ``texts``: which kernel each of them belongs to."""

    text: Text | None = None
    texts: tuple[Text, ...] = Field((), max_length=256)

    @model_validator(mode="after")
    def _has_one(self) -> RouteRequest:
        if (self.text is None) == (not self.texts):
            raise ValueError("give text, or texts with at least one entry")
        return self


class PollRequest(QueryRequest):
    """One question to all kernels, or to ``kernels``; after ``seconds`` no further one is asked."""

    learn: Annotated[Literal[False], BeforeValidator(_no_number)] = False
    max_tokens: int = Field(32, ge=1, le=128)
    kernels: tuple[KernelRef, ...] | None = Field(None, min_length=1, max_length=64)
    seconds: float = Field(10.0, ge=0.1, le=60)
