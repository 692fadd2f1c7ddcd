"""A recipe for training the workspace: one frozen, validated object, read from YAML or made in code.

``workspace`` holds the structure and dials of the weights to be made (``WorkspaceConfig``); the rest says what is
trained on captured texts and how. Losses are those of ``training_losses.py``. A recipe that exists is valid.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from workspace.errors import TrainingConfigError
from workspace.modules import Part
from workspace.workspace_config import WorkspaceConfig


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class LossWeights(_Section):
    """Weights of the terms; 0 leaves a term out."""

    cross_entropy: float = Field(1.0, ge=0, description="Of the true next tokens.")
    distillation: float = Field(0.0, ge=0, description="KL to the model with the whole context, over its top tokens.")
    broadcast: float = Field(1.0, ge=0, description="Of what virtual tokens add to the loss with the whole context.")
    controller: float = Field(0.0, ge=0, description="KL of the controller's network to its heuristics.")


class TrainingConfig(_Section):
    """What is trained, on what, how long."""

    parts: tuple[Part, ...] = Field(("virtual_kv",), min_length=1, description="What is trained; the rest is kept.")
    workspace: WorkspaceConfig = Field(
        default_factory=lambda: WorkspaceConfig(kv_plan_bias=-1.0), description="Structure and dials of the weights."
    )
    losses: LossWeights = Field(default_factory=LossWeights)

    # What a student sees.
    whole_share: float = Field(0.5, ge=0, le=1, description="Share of steps in which the student has all the context.")
    keep: tuple[int, ...] = Field((16,), description="Last context tokens that it keeps otherwise, one by chance.")
    mid_answer_share: float = Field(0.25, ge=0, le=1, description="Rows whose broadcast comes within the answer.")
    most_targets: int = Field(128, ge=1, description="Predicted tokens of a row at most.")
    least_targets: int = Field(16, ge=1, description="A broadcast within the answer leaves so many to predict.")
    delta_rounds: int = Field(1, ge=1, le=4, description="Passes that find the residuals which deltas are made of.")
    top_k: int = Field(64, ge=1, description="Of the teacher's tokens; fewer are faster.")

    # How long and how fast.
    epochs: int = Field(3, ge=1)
    most_steps: int | None = Field(None, ge=1, description="Ends training before its epochs do.")
    rows: int = Field(4, ge=1, le=256, description="Texts of a step.")
    learning_rate: float = Field(2e-3, gt=0, le=1)
    static_learning_rate: float = Field(1e-2, gt=0, le=1, description="Of static tokens, which are larger numbers.")
    warmup_steps: int = Field(10, ge=0)
    final_share: float = Field(0.05, ge=0, le=1, description="Of the learning rate, at the end of its cosine.")
    weight_decay: float = Field(0.0, ge=0, lt=1)
    clip_norm: float = Field(1.0, gt=0, description="Longest gradient.")
    seed: int = Field(0, ge=0)

    # Looking after it.
    held_out_rows: int = Field(8, ge=1, description="Held-out texts of each kind in an evaluation.")
    evaluate_every: int = Field(100, ge=1, description="Steps between evaluations.")
    checkpoint_every: int = Field(50, ge=1, description="Steps between checkpoints.")
    keep_checkpoints: int = Field(2, ge=1)

    @field_validator("keep")
    @classmethod
    def _at_least_one(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(item < 1 for item in value):
            raise ValueError("a student keeps at least 1 token, the one that it reads first")
        return value

    @field_validator("parts")
    @classmethod
    def _once(cls, value: tuple[Part, ...]) -> tuple[Part, ...]:
        if len(set(value)) != len(value):
            raise ValueError("names a part twice")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> TrainingConfig:
        if self.whole_share < 1 and not self.keep:
            raise ValueError("keep names no number of tokens; name one, or set whole_share to 1")
        if ("static_tokens" in self.parts) != bool(self.workspace.static_tokens):
            raise ValueError(
                "parts names static_tokens if and only if workspace.static_tokens is above 0; change one of them"
            )
        if ("controller" in self.parts) != bool(self.losses.controller):
            raise ValueError("parts names controller if and only if losses.controller is above 0; change one of them")
        if self.least_targets > self.most_targets:
            raise ValueError(f"least_targets ({self.least_targets}) exceeds most_targets ({self.most_targets})")
        if self.steers and not (self.losses.cross_entropy or self.losses.distillation):
            raise ValueError("losses.cross_entropy and losses.distillation are both 0; what is to be learnt?")
        return self

    @property
    def steers(self) -> bool:
        """True when anything is trained that changes what the model says."""
        return self.parts != ("controller",)


def read_recipe(path: Path) -> dict[str, Any]:
    """The sections of a recipe file, ``capture`` and ``training``, both optional. Raises ``TrainingConfigError``."""
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TrainingConfigError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict) or set(value) - {"capture", "training"}:
        raise TrainingConfigError(f"{path} must have the sections capture and training, and no others")
    return value


def make_config(values: dict[str, Any], source: str) -> TrainingConfig:
    """A ``TrainingConfig`` from plain values. Raises ``TrainingConfigError`` naming ``source`` and every problem."""
    try:
        return TrainingConfig.model_validate(values)
    except ValidationError as error:
        problems = [
            f"{'.'.join(str(part) for part in item['loc']) or 'training'}: {item['msg']}"
            for item in error.errors(include_url=False)
        ]
        raise TrainingConfigError(f"{source}: {'; '.join(problems)}") from None
