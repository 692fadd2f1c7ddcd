"""Texts to train the workspace on, from what a machine has: documentation, questions, and data sets where they lie.

    docs      Python's own reference (pydoc) and the descriptions of installed packages
    chat      questions of many forms and topics, which the model answers itself (self-study)
    play      tinyshakespeare, its last tenth held out        } where a folder of
    banking   banking77 messages with their intents           } data sets is given

Held-out texts are other documents, other topics, the last tenth of the plays and the test messages; nothing of them is
in the training texts, and none of the guard's questions (``fluency.py``). The choice depends on the seed alone, and on
which packages are installed. Nothing here knows a model; the result is a file for ``capture_prompts.py``.
"""

from __future__ import annotations

import csv
import hashlib
import json
import pydoc_data.topics
import random
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, Field

from storage import files
from workspace.capture_folder import Split

_LEAST_CHARACTERS = 3000  # of a document
_PIECE = 1800  # characters, a little more than a window of 384 tokens takes

_KINDS = ("docs", "chat", "play", "banking")
_FORMS = (
    "Explain {} to a child.",
    "What is {}?",
    "Write a short story about {}.",
    "Give me five facts about {}.",
    "Why does {} matter?",
    "Write a short poem about {}.",
    "Describe {} in one paragraph.",
    "What are common mistakes with {}?",
    "How would you teach somebody about {}?",
    "Compare {} with something similar.",
)
_TOPICS = (
    "a garden", "the moon", "electric cars", "a wedding speech", "rivers", "chess", "a thunderstorm",
    "public libraries", "cheese", "earthquakes", "the alphabet", "swimming", "photography", "trains",
    "honest advertising", "a good apology", "desert plants", "mathematics", "dreams", "running a small shop",
    "a violin", "the water cycle", "maps", "elections", "camping", "old coins", "cooking rice", "whales",
    "teamwork", "a broken promise", "volcanoes", "the stock market", "growing tomatoes", "a lost key",
    "sorting algorithms", "migration of birds", "winter sports", "gravity", "tea", "keeping a diary", "robots",
    "a long journey", "the human heart", "silence", "recycling", "street markets", "learning a language", "bridges",
    "fear of heights", "an unexpected guest", "the internet", "pottery", "glaciers", "a recipe for soup",
    "friendship", "clocks", "wind power", "a school play", "moving house", "insects",
)  # fmt: skip


class TextOptions(BaseModel):
    """How many texts of each kind; a kind with 0 is left out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    docs: int = Field(200, ge=0)
    chat: int = Field(200, ge=0)
    play: int = Field(200, ge=0)
    banking: int = Field(200, ge=0)
    held_out: int = Field(24, ge=0, description="Of each kind.")
    seed: int = Field(0, ge=0)


def write_texts(path: Path, options: TextOptions, data: Path | None = None) -> dict[str, int]:
    """Write a file of prompts; how many texts of each kind and split are in it. ``data``: a folder of data sets."""
    lines: list[dict[str, Any]] = []
    for split in get_args(Split):
        of = options if split == "train" else options.model_copy(update=dict.fromkeys(_KINDS, options.held_out))
        lines += _docs(split, of.docs, of.seed) + _chat(split, of.chat, of.seed)
        if data is not None:
            lines += _play(data, split, of.play, of.seed) + _banking(data, split, of.banking, of.seed)
    random.Random(options.seed).shuffle(lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_bytes(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
    counts: dict[str, int] = {}
    for line in lines:
        name = f"{line['kind']} {line['split']}"
        counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items()))


def held_out_name(name: str) -> bool:
    """About one document in eight, decided by its name alone."""
    return hashlib.sha256(name.encode()).digest()[0] < 32


def documents() -> Iterator[tuple[str, str]]:
    """Names and texts of the documentation at hand, sorted by name."""
    found = {f"pydoc {name}": text for name, text in pydoc_data.topics.topics.items()}
    for distribution in metadata.distributions():
        _, _, described = (distribution.read_text("METADATA") or "").partition("\n\n")  # behind the headers
        found[f"package {distribution.metadata['Name']}"] = described
    yield from ((name, text) for name, text in sorted(found.items()) if len(text) >= _LEAST_CHARACTERS)


def _docs(split: Split, count: int, seed: int) -> list[dict[str, Any]]:
    """Pieces of documents, at most 24 of each."""
    pieces = [
        piece
        for name, text in documents()
        if held_out_name(name) == (split == "held_out")
        for piece in _pieces(text)[:24]
    ]
    return _lines(_chosen(pieces, count, f"docs {split} {seed}"), "docs", split)


def _chat(split: Split, count: int, seed: int) -> list[dict[str, Any]]:
    topics = [topic for topic in _TOPICS if held_out_name(topic) == (split == "held_out")]
    questions = [form.format(topic) for topic in topics for form in _FORMS]
    chosen = _chosen(questions, count, f"chat {split} {seed}")
    return [{"prompt": question, "kind": "chat", "split": split} for question in chosen]


def _play(data: Path, split: Split, count: int, seed: int) -> list[dict[str, Any]]:
    text = (data / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
    cut = len(text) * 9 // 10
    return _lines(
        _chosen(_pieces(text[:cut] if split == "train" else text[cut:]), count, f"play {seed}"), "play", split
    )


def _banking(data: Path, split: Split, count: int, seed: int) -> list[dict[str, Any]]:
    """Messages with their intents, one after the other: a convention that shows in the context."""
    with open(data / "banking77" / ("train.csv" if split == "train" else "test.csv"), encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    random.Random(f"banking {seed}").shuffle(rows)
    text = "\n\n".join(f"Customer: {row['text'].strip()}\nIntent: {row['category'].replace('_', ' ')}" for row in rows)
    return _lines(_chosen(_pieces(text), count, f"banking {seed}"), "banking", split)


def _pieces(text: str) -> list[str]:
    return [text[start : start + _PIECE] for start in range(0, len(text) - _PIECE + 1, _PIECE)]


def _chosen(items: Sequence[str], count: int, seed: str) -> list[str]:
    return random.Random(seed).sample(list(items), min(count, len(items)))


def _lines(texts: Sequence[str], kind: str, split: Split) -> list[dict[str, Any]]:
    return [{"text": text, "kind": kind, "split": split} for text in texts]
