"""The questions of the gate: held-out rows of replay, each with the long prompt that the candidate shall replace.

The long prompt is all of the domain's experiences that were trained on, the newest that fit: the standard is an agent
that carries everything that the candidate could learn from, whatever part of it the strategy showed the teacher of a
row. It is the same experiences before every question, so that evaluation reads them once and not once for each.

With ``hold_out: reasks`` nothing is held out: the long prompt is everything but what has the question's observation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence, Set
from typing import TYPE_CHECKING

from memory.distillation.answers import content_key
from memory.distillation.config import DistillConfig, GateConfig
from memory.distillation.data_generation import replay_environment
from memory.distillation.errors import ObservationTooLong
from memory.distillation.prompt_builder import Count
from memory.distillation.redaction import Redactor
from memory.distillation.replay_env import ReplayItem
from memory.distillation.rows import Row
from memory.history import Record

if TYPE_CHECKING:  # torch comes with it
    from memory.distillation.evaluation import Question


def gate_questions(
    held_out: Sequence[Row],
    records: Sequence[Record],
    config: DistillConfig,
    gate: GateConfig,
    *,
    redactor: Redactor,
    count: Count,
    context_length: int,
) -> list[Question]:
    """At most ``gate.max_rows`` questions, chosen by their keys' hashes: the same in every attempt.

    Where the metric was left to the rows (``auto``) and is ``exact``, only those whose right answer is known count.
    """
    from memory.distillation.evaluation import question_of

    clean = [redactor.record(record) for record in records if not record.deleted]
    long = _with_long_prompts(config, context_length)
    wanted = {str(row.metadata["content_key"]): row for row in held_out if row.type == "replay"}
    if gate.metric == "exact" and config.gate.metric == "auto":
        wanted = {key: row for key, row in wanted.items() if row.target == "feedback"}
    candidates: list[str] = []
    if gate.metric == "ranked":
        candidates = sorted({row.answer.content for row in wanted.values()})
    chosen = set(sorted(wanted)[: gate.max_rows])
    items = _items(clean, long, chosen, count)
    if items and config.data.hold_out == "observations":
        fits = [item.prompt.included for item in items]
        # What fits before the longest question; one so long that it leaves no half of the room gets less than others.
        most = max(len(ids) for ids in fits)
        shortest = min((ids for ids in fits if 2 * len(ids) >= most), key=len)
        fit = set(shortest)
        kept = [item for item in clean if item.id in fit or content_key(item.observation) in chosen]
        items = _items(kept, long, chosen, count)
    return [question_of(wanted[item.sample.key], item.prompt.teacher_messages, candidates) for item in items]


def _items(records: Sequence[Record], config: DistillConfig, chosen: Set[str], count: Count) -> list[ReplayItem]:
    """The samples with the ``chosen`` content keys, one of each, with their prompts."""
    replay, found, left = replay_environment(records, config, count), [], set(chosen)
    for sample in replay.samples():
        if sample.key in left:
            left.discard(sample.key)
            with contextlib.suppress(ObservationTooLong):  # it has no long prompt to be compared with
                found.append(replay.item(sample))
    return found


def _with_long_prompts(config: DistillConfig, context_length: int) -> DistillConfig:
    """The configuration with all of the memory in every prompt, as far as the model itself can read it.

    A teacher elsewhere may read longer ones.
    """
    teacher, room = config.teacher, context_length - config.training.max_tokens
    most = min(teacher.max_prompt_tokens, max(64, room))
    return config.model_copy(
        update={
            "teacher": teacher.model_copy(update={"max_prompt_tokens": most}),
            "strategy": config.strategy.model_copy(
                update={"name": "full_memory", "failure_focus": False, "shuffle": False, "exclude_current": True}
            ),
            "data": config.data.model_copy(update={"max_rows": 1 << 30, "strict_hold_out": True}),
        }
    )
