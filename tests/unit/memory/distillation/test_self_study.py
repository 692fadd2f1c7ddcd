"""Self-study: what the asking role reads, and what is left of what it writes."""

from __future__ import annotations

import pytest

from memory.distillation.config import SEED_TYPES, SeedType
from memory.distillation.self_study import ASKING, clean_question, question_messages
from tests.support.experiences import tagged


@pytest.mark.parametrize("kind", SEED_TYPES)
def test_every_kind_shows_the_experiences_and_asks_for_one_message(kind: SeedType) -> None:
    messages = question_messages(kind, f"{kind}:0", tagged(3), seed=0)
    assert messages[0] == {"role": "system", "content": ASKING}
    assert messages[1]["content"].startswith(
        "Here is a list of your previous experiences:\n\nOBSERVATION: message number 1\n\nACTION: OPS-RED"
    )
    assert messages == question_messages(kind, f"{kind}:0", tagged(3), seed=0)
    others = {question_messages(kind, f"{kind}:{number}", tagged(3), seed=0)[1]["content"] for number in range(30)}
    assert len(others) > 1
    assert "{format}" not in "".join(others)


@pytest.mark.parametrize(
    ("written", "question"),
    [
        ("What is new?", "What is new?"),
        ('  "What is new?" \n', "What is new?"),
        ("Here is a message:\n\nWhat is new?", "What is new?"),
        ("OBSERVATION: my card is late", "my card is late"),
        ("Observation: first\nsecond", "first\nsecond"),
        ("Note:", "Note:"),
        ('"', ""),
        (" \n ", ""),
        ("...", ""),
    ],
)
def test_what_small_models_put_around_a_question_goes(written: str, question: str) -> None:
    assert clean_question(written) == question
