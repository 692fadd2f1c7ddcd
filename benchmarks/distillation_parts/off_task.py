"""What a cartridge does to questions that have nothing to do with it.

The stock model's own greedy answers are the reference: how far is the model with the cartridge from them, in nats per
token, and how often does it say the same? A memory that is always attended should not be felt here.
"""

from __future__ import annotations

import numpy as np

from benchmarks.distillation_parts.house import Message
from lm.types import LanguageModel
from memory.distillation.encoding import Encoder
from memory.distillation.evaluation import Question, measure_arm
from memory.distillation.rows import Row, RowMessage, flatten_topk
from workspace.models import LoadedModel
from workspace.prefix import KVPrefix

_PLACES = ("Bern", "Oslo", "Lima", "Cairo", "Delhi", "Tokyo", "Quito", "Rome")
_ASKS = (
    "Name one thing that {} is known for.",
    "Write one sentence about the weather in {}.",
    "In which country is {}?",
)


def off_task(loaded: LoadedModel, teacher: LanguageModel, prefix: KVPrefix, count: int) -> str:
    """One sentence with the numbers."""
    questions = [_question(teacher, ask.format(place)) for ask in _ASKS for place in _PLACES][:count]
    prompts = [list(question.student) for question in questions]
    found = measure_arm(loaded, Encoder(loaded), "off task", prefix, prompts, questions, max_tokens=24)
    drift = float(np.nanmean(found.kl))
    same = float(found.exact.mean())
    return (
        f"Off task ({count} questions): {drift:.2f} nats per token from the stock model, the same answer in {same:.0%}."
    )


def _question(teacher: LanguageModel, text: str) -> Question:
    messages: list[Message] = [{"role": "user", "content": text}]
    reply, trace = teacher.call_with_trace(messages, top_logprobs=20, max_tokens=24)
    top = flatten_topk(trace.topk_token_ids, trace.topk_logprobs)
    row = Row((RowMessage("user", text), RowMessage("assistant", reply.text, trace.token_ids, top)), metadata={})
    return Question(text, tuple(messages), tuple(messages), reply.text, (), row)
