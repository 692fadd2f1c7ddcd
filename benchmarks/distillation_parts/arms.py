"""What ``parity`` and ``feedback`` share: how a cartridge is trained, and every arm that answers beside it."""

from __future__ import annotations

import sys

from benchmarks.distillation_parts.eviction import Continuing, evicted, repeated
from benchmarks.distillation_parts.house import House, ask
from benchmarks.distillation_parts.rivals import nearest, summary, truncated
from lm.types import LanguageModel
from memory.distillation.config import CacheInit, TrainingConfig
from memory.distillation.evaluation import ArmResult, measure_arm
from memory.distillation.initialisers import initial_prefix
from workspace.models import LoadedModel
from workspace.prefix import KVPrefix

SLOTS = 64
KEPT = 512  #: tokens of the long prompt after a gentler eviction
SHOWN = 60  #: experiences in the long prompt
QUESTIONS = 90
STEPS = 150


def training(seed: int, *, quick: bool) -> TrainingConfig:
    """The same for both parts; nothing is held out, so it ends after its steps."""
    return TrainingConfig(
        slots=SLOTS,
        learning_rate=1e-2,
        warmup_steps=2 if quick else 10,
        max_steps=4 if quick else STEPS,
        rows=16,
        seed=seed,
        max_tokens=192,
        early_stop_patience=0,
        threads=1,
    )


def first_values(loaded: LoadedModel, house: House, seed: int) -> KVPrefix:
    """The beginning of what the long prompt shows."""
    history = house.after(house.shown, "")[:-1]
    return initial_prefix(loaded, CacheInit(type="text"), SLOTS, history=history, seed=seed)


def answers(
    loaded: LoadedModel, house: House, teacher: LanguageModel, init: KVPrefix, trained: KVPrefix
) -> dict[str, ArmResult]:
    """The house's questions, asked in every way; ``teacher`` writes the summary."""
    _, summarised = summary(house, teacher, SLOTS)
    return {
        "memoryless": ask(loaded, "memoryless", house),
        "long prompt": ask(loaded, "long prompt", house, [list(item.teacher) for item in house.questions]),
        f"first {SLOTS} tokens": ask(loaded, "first tokens", house, truncated(house, loaded, SLOTS, first=True)),
        f"last {SLOTS} tokens": ask(loaded, "last tokens", house, truncated(house, loaded, SLOTS, first=False)),
        "summary": ask(loaded, "summary", house, summarised),
        "8 nearest (BM25)": ask(loaded, "nearest", house, nearest(house)),
        "8 nearest, corrected": ask(loaded, "nearest, corrected", house, nearest(house, corrected=True)),
        f"evicted to {SLOTS}": _evicted(loaded, house, SLOTS),
        f"evicted to {KEPT}": _evicted(loaded, house, KEPT),
        "cartridge, untrained": ask(loaded, "untrained", house, prefix=init),
        "cartridge": ask(loaded, "cartridge", house, prefix=trained),
    }


def _evicted(loaded: LoadedModel, house: House, slots: int) -> ArmResult:
    """The long prompt's questions, the prompt before them being what is left of its keys and values."""
    print(f"  asking: evicted to {slots}", file=sys.stderr, flush=True)
    text, again = repeated(loaded, house.after(house.shown, "")[:-1])
    prefix = evicted(loaded, text, again, slots)
    prompts = [list(question.teacher) for question in house.questions]
    return measure_arm(loaded, Continuing(loaded, text), f"evicted to {slots}", prefix, prompts, house.questions)
