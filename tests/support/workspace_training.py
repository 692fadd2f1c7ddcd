"""A captured folder and a recipe for tiny models: all that training needs, in a second."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from workspace.capture import CaptureOptions, capture
from workspace.capture_folder import Capture, read_capture
from workspace.models import LoadedModel
from workspace.steering import Steering
from workspace.training_config import LossWeights, TrainingConfig
from workspace.workspace_config import WorkspaceConfig

WORKSPACE = WorkspaceConfig(
    slots=4,
    slot_width=16,
    write_slots=4,
    virtual_tokens=4,
    embedding_width=6,
    kv_plan_bias=-1,
    update_every=3,
    static_tokens=2,
    delta_rank=3,
)
OPTIONS = CaptureOptions(window=48, context=32, max_answer=10, batch=4, answer_stride=1, top_k=8, max_tokens=200)
RECIPE = TrainingConfig(
    parts=("virtual_kv", "static_tokens", "residual_delta", "controller"),
    workspace=WORKSPACE,
    losses=LossWeights(distillation=0.3, controller=0.1),
    keep=(4,),
    rows=3,
    epochs=2,
    least_targets=3,
    evaluate_every=3,
    checkpoint_every=2,
    held_out_rows=2,
)
_NAMES, _VERBS = ("The fox", "The dog", "Paris", "Bern", "A cat"), ("sees", "likes", "is not", "jumps over")


def sentences(seed: int, count: int) -> str:
    """Sentences of a small language: another seed tells other things in the same words."""
    chance = random.Random(seed)
    return " ".join(f"{chance.choice(_NAMES)} {chance.choice(_VERBS)} {chance.choice(_NAMES)}." for _ in range(count))


LINES: list[dict[str, Any]] = [
    {"text": sentences(0, 50), "kind": "fox"},
    {"text": "Paris is the capital of France; Bern is not. " * 16, "kind": "paris"},
    {"prompt": "Who are you?", "kind": "chat"},
    {"text": sentences(1, 30), "kind": "fox", "split": "held_out"},
    {"prompt": "Where is Paris?", "kind": "chat", "split": "held_out"},
]


def captured(loaded: LoadedModel, folder: Path, config: WorkspaceConfig = WORKSPACE, **options: Any) -> Capture:
    """Texts of ``LINES``, captured by ``loaded`` into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    steering = Steering(loaded, config)
    try:
        return read_capture(capture(steering, prompts, folder / "capture", OPTIONS.model_copy(update=options)).manifest)
    finally:
        steering.close()
