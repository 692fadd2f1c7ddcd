"""Texts for training: the same for the same seed, and held-out ones apart from the others."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from workspace.capture_prompts import read_prompts
from workspace.fluency import QUESTIONS
from workspace.training_texts import TextOptions, documents, held_out_name, write_texts

FEW = TextOptions(docs=12, chat=30, play=6, banking=5, held_out=4)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Data sets in small: every line of the play and every message is numbered."""
    folder = tmp_path / "data"
    (folder / "tinyshakespeare").mkdir(parents=True)
    (folder / "banking77").mkdir()
    lines = "".join(f"Line {number:05} of the play.\n" for number in range(3000))
    (folder / "tinyshakespeare" / "input.txt").write_text(lines)
    for name in ("train", "test"):
        rows = "".join(f"my {name} question {number},card_arrival\n" for number in range(400))
        (folder / "banking77" / f"{name}.csv").write_text("text,category\n" + rows)
    return folder


def test_the_file_is_readable_and_the_same_for_a_seed(data: Path, tmp_path: Path) -> None:
    counts = write_texts(tmp_path / "a.jsonl", FEW, data)
    assert counts == {
        **{"banking held_out": 4, "banking train": 5, "chat held_out": 4, "chat train": 30},
        **{"docs held_out": 4, "docs train": 12, "play held_out": 4, "play train": 6},
    }
    write_texts(tmp_path / "b.jsonl", FEW, data)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    write_texts(tmp_path / "c.jsonl", FEW.model_copy(update={"seed": 1}), data)
    assert (tmp_path / "a.jsonl").read_bytes() != (tmp_path / "c.jsonl").read_bytes()
    lines, _ = read_prompts(tmp_path / "a.jsonl")
    assert Counter(f"{line.kind} {line.split}" for line in lines) == counts


def test_what_is_held_out_is_not_trained_on(data: Path, tmp_path: Path) -> None:
    write_texts(tmp_path / "a.jsonl", FEW, data)
    by_split: dict[str, list[dict[str, str]]] = {"train": [], "held_out": []}
    for text in (tmp_path / "a.jsonl").read_text().splitlines():
        line = json.loads(text)
        by_split[line["split"]].append(line)
    for line in by_split["held_out"]:
        assert "train question" not in line.get("text", "")
        if line["kind"] == "play":
            assert line["text"][line["text"].index("Line ") + 5 :] > "02690"
    asked = {split: {line["prompt"] for line in lines if "prompt" in line} for split, lines in by_split.items()}
    assert not asked["train"] & asked["held_out"]
    assert not (asked["train"] | asked["held_out"]) & set(QUESTIONS)


def test_documents_are_at_hand_and_some_are_held_out() -> None:
    names = [name for name, _ in documents()]
    assert names == sorted(names)
    assert len(names) > 50
    assert 0.04 < sum(map(held_out_name, names)) / len(names) < 0.3


def test_without_data_sets_there_are_two_kinds(tmp_path: Path) -> None:
    assert set(write_texts(tmp_path / "a.jsonl", FEW)) == {
        *("docs train", "docs held_out", "chat train", "chat held_out"),
    }
