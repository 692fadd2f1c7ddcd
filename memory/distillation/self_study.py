"""Self-study: the teacher asks itself about its memory and answers with the memory in view.

After Cartridges (arXiv 2506.06266, section 4): five kinds of seed prompts, none of which knows the domain. One role
reads some experiences and a seed prompt, and writes a message; the other reads the same experiences and the message,
and answers greedily. What is kept is message and answer. Translated to an agent: a document's sections are the
experiences, a closed-book question is a fresh observation of the same family, a use case is a new episode, and
structuring asks for the rules that were learned.

The role that asks sees its experiences as a list, whatever the prompt style: in turns a small model would go on
answering instead of asking.
"""

from __future__ import annotations

from collections.abc import Sequence

from memory.distillation.config import SeedType
from memory.distillation.prompt_builder import EXPERIENCES, Message
from memory.distillation.strategies.base import chance
from memory.history import Record

ASKING = "You write one message that somebody sends to an assistant. Write the message alone, without any comment."
_FORMATS = ("JSON", "YAML", "TOML", "a table", "a numbered list", "plain sentences")
_SEEDS: dict[SeedType, tuple[str, ...]] = {
    "structuring": (
        "Write a message that asks the assistant to list the rules it has learned from these experiences as {format}. "
        "Say which kind of observation is meant, and ask for exact names.",
        "Write a message that asks the assistant to arrange what it knows about one of these kinds of observations as "
        "{format}, with every name and number kept as it is.",
    ),
    "summarization": (
        "Write a message that asks the assistant to summarise what it has learned about one kind of observation. "
        "Name that kind, so that the message can be understood without seeing the list.",
        "Write a message that asks the assistant which mistakes were made in these experiences and what is right "
        "instead. Name the kind of observation.",
    ),
    "question": (
        "Write a new observation of the same kind as those in the list, but about something that is not in it. "
        "It must read as if it came from the same source.",
        "Write an observation that means the same as one in the list and says it in quite different words.",
    ),
    "use_case": (
        "Think of a practical task in which these experiences help. Write the message with which somebody hands that "
        "task to the assistant, with all details it needs.",
        "Write the first message of a new episode in which the assistant will need what it learned here.",
    ),
    "creative": (
        "Write a message that opens an unusual conversation inspired by these experiences.",
        "Write a message that asks the assistant to teach a beginner, in its own words, what these experiences teach.",
    ),
}


def question_messages(kind: SeedType, name: str, memory: Sequence[Record], seed: int) -> list[Message]:
    """What the asking role reads. ``name`` makes the choice among a kind's seed prompts, with ``seed``."""
    dice = chance(seed, "seed prompt", name)
    instruction = dice.choice(_SEEDS[kind]).format(format=dice.choice(_FORMATS))
    lines = [EXPERIENCES]
    lines += [f"{entry.type.upper()}: {entry.content}" for record in memory for entry in record.entries()]
    content = "\n\n".join([*lines, instruction])
    return [{"role": "system", "content": ASKING}, {"role": "user", "content": content}]


def clean_question(text: str) -> str:
    """The message that was written, without what small models put around it; empty when there is none."""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    if lines and lines[0].rstrip().endswith(":") and len(lines) > 1 and len(lines[0]) < 80:
        lines = lines[1:]  # "Here is a message:"
    question = "\n".join(lines).strip()
    for label in ("OBSERVATION:", "Observation:", "Message:", "User:"):
        question = question.removeprefix(label).strip()
    if len(question) > 1 and question[0] == question[-1] and question[0] in "\"'`":
        question = question[1:-1].strip()
    return question if any(char.isalnum() for char in question) else ""
