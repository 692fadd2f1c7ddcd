"""The questions of the gate: held-out rows of replay, each with the long prompt that the candidate shall replace.

The long prompt is all of the domain's experiences but those with the same observation, as far as they fit: the standard
is an agent that carries everything, whatever part of it the strategy showed the teacher of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from memory.distillation.config import DistillConfig, GateConfig
from memory.distillation.data_generation import replay_environment
from memory.distillation.errors import ObservationTooLong
from memory.distillation.prompt_builder import Count
from memory.distillation.redaction import Redactor
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
    replay = replay_environment(clean, _with_long_prompts(config, context_length), count)
    wanted = {str(row.metadata["content_key"]): row for row in held_out if row.type == "replay"}
    if gate.metric == "exact" and config.gate.metric == "auto":
        wanted = {key: row for key, row in wanted.items() if row.target == "feedback"}
    candidates: list[str] = []
    if gate.metric == "ranked":
        candidates = sorted({row.answer.content for row in wanted.values()})
    chosen = set(sorted(wanted)[: gate.max_rows])
    found = []
    for sample in replay.samples():
        if sample.key in chosen:
            chosen.discard(sample.key)
            try:
                item = replay.item(sample)
            except ObservationTooLong:  # it has no long prompt to be compared with
                continue
            found.append(question_of(wanted[sample.key], item.prompt.teacher_messages, candidates))
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
            "data": config.data.model_copy(update={"max_rows": 1 << 30}),
        }
    )
