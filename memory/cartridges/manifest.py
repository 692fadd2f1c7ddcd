"""What a cartridge says of itself: which model it belongs to, its shape, and how it came about.

The manifest travels with the tensors (``files.py``) and stands in the database row (``registry.py``). It is written
once and never changed: state, metrics of the gate and staleness are the row's. ``id`` is empty and ``version`` 0 until
the cartridge is registered. ``origin`` is the id that an imported one had where it came from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

SCHEMA = 1

Hex64 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Text = Annotated[str, StringConstraints(max_length=256)]
DtypeName = Literal["float32", "bfloat16", "float16"]


class FileEntry(BaseModel):
    """A file that the manifest vouches for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes: Annotated[int, Field(ge=0)]
    sha256: Hex64


class Manifest(BaseModel):
    """All of ``manifest.json``. One that exists is consistent in itself."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True)

    version_of_schema: Literal[1] = Field(1, alias="schema")
    id: Text = ""
    domain: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    version: Annotated[int, Field(ge=0)] = 0
    parent: Text | None = None  #: the cartridge that it was trained on from
    origin: Text | None = None  #: its id or file name elsewhere
    run_id: Text | None = None  #: the distillation that made it, here
    model: Text  #: name, for people
    model_fingerprint: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    tokenizer_sha256: Hex64 | None = None
    template_sha256: Hex64 | None = None  #: of the chat template that its training text was rendered with
    layers: Annotated[int, Field(ge=1, le=1024)]
    kv_heads: Annotated[int, Field(ge=1, le=4096)]
    head_dim: Annotated[int, Field(ge=1, le=8192)]
    slots: Annotated[int, Field(ge=1, le=1 << 20)]
    frozen: Annotated[int, Field(ge=0)]  #: first slots that training leaves as they are
    rope: dict[str, Any] = Field(default_factory=dict)  #: as the model's configuration has it
    layer_types: tuple[str, ...] = ()
    sliding_window: int | None = None
    dtype: DtypeName
    init: dict[str, Any] = Field(default_factory=dict)  #: what the slots were before training
    data_sha256: Hex64 | None = None  #: of the training rows
    steps: Annotated[int, Field(ge=0)] = 0
    metrics: dict[str, Any] = Field(default_factory=dict)  #: of its training
    experience_ids_sha256: Hex64 | None = None
    created_at: float
    files: dict[str, FileEntry] = Field(default_factory=dict)  #: filled in by whoever writes the folder

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if self.frozen > self.slots:
            raise ValueError(f"frozen ({self.frozen}) must not exceed slots ({self.slots})")
        if self.layer_types and len(self.layer_types) != self.layers:
            raise ValueError(f"layer_types has {len(self.layer_types)} entries for {self.layers} layers")
        return self

    @property
    def shape(self) -> tuple[int, int, int]:
        """Layers, key-value heads and head size: what a model must have."""
        return self.layers, self.kv_heads, self.head_dim

    def to_json(self) -> dict[str, Any]:
        """JSON types, by the names of the file."""
        return self.model_dump(mode="json", by_alias=True)

    def to_bytes(self) -> bytes:
        """The file's content. Raises ``ValueError`` for NaN and infinity, which JSON does not have."""
        return (json.dumps(self.to_json(), indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def digest_of_ids(experience_ids: Sequence[int]) -> str | None:
    """What ``experience_ids_sha256`` is for these experiences; None for none."""
    if not experience_ids:
        return None
    return hashlib.sha256("\n".join(str(number) for number in sorted(experience_ids)).encode()).hexdigest()
