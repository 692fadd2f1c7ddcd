"""What surrounds a run's decision: the long prompts of its questions, and exports that cannot break it."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from memory.distillation.answers import content_key
from memory.distillation.config import make_distill_config
from memory.distillation.data_generation import generate_dataset
from memory.distillation.dataset import read_dataset
from memory.distillation.exporting import export_run
from memory.distillation.leftovers import prune
from memory.distillation.prompt_builder import estimate_tokens
from memory.distillation.questions import gate_questions
from memory.distillation.redaction import Redactor
from memory.distillation.rows import Row
from memory.history import Record
from tests.support.experiences import tagged


def _questions(
    tmp_path: Path, records: list[Record], context_length: int = 8192, **config: Any
) -> tuple[list[Any], list[Row]]:
    values = {"data": {"targets": "feedback", "eval_share": 0.4}, "gate": {"min_rows": 1, "max_rows": 5}, **config}
    chosen = make_distill_config(values)
    rows = read_dataset(generate_dataset(records, chosen, tmp_path).path)
    held_out = [row for row in rows if row.split == "eval"]
    found = gate_questions(
        held_out,
        records,
        chosen,
        chosen.gate,
        redactor=Redactor(chosen.data.redact),
        count=estimate_tokens,
        context_length=context_length,
    )
    return found, held_out


@pytest.mark.parametrize("strategy", ["rolling_window", "random_subset", "mixed", "full_memory"])
def test_the_rival_has_the_whole_memory(tmp_path: Path, strategy: str) -> None:
    records = tagged(30)
    found, held_out = _questions(tmp_path, records, strategy={"name": strategy, "window_k": 2})
    assert 0 < len(found) <= 5 < len(held_out)
    kept_out = {str(row.metadata["content_key"]) for row in held_out}
    lived = {record.observation for record in records if content_key(record.observation) not in kept_out}
    for question in found:
        shown = [message["content"] for message in question.teacher if message["role"] == "user"]
        own = question.student[-1]["content"]
        assert shown.count(own) == 1, "the question itself, last, and not its answer"
        assert shown[-1] == own
        assert lived <= {*shown}
    again, _ = _questions(tmp_path, records, strategy={"name": strategy, "window_k": 2})
    assert [item.key for item in again] == [item.key for item in found]


def test_all_questions_come_after_the_same_memory(tmp_path: Path) -> None:
    """So that it is read once; and nothing of it is a question that another one's prompt would give away."""
    records = [
        replace(record, observation=record.observation + " please" * (number % 7))
        for number, record in enumerate(tagged(60))
    ]
    found, held_out = _questions(tmp_path, records, 700, training={"max_tokens": 100})
    memories = [question.teacher[:-1] for question in found]
    assert len(memories) > 1
    assert len(memories[0]) > 10
    assert all(memory == memories[0] for memory in memories)
    kept_out = {row.messages[-2].content for row in held_out}
    assert not kept_out & {message["content"] for message in memories[0]}
    assert len({len(question.teacher[-1]["content"]) for question in found}) > 1, "questions of several lengths"


def test_it_has_no_more_than_the_model_can_read(tmp_path: Path) -> None:
    found, _ = _questions(tmp_path, tagged(60), 400, training={"max_tokens": 100})
    assert found
    for question in found:
        assert 100 < estimate_tokens(list(question.teacher)) <= 300


def test_exports_are_told_and_break_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run-000000000001"
    config = make_distill_config(
        {"output_path": str(tmp_path / "copies"), "hf_repo_id": "owner/name", "data": {"redact": {"enabled": False}}}
    )
    generate_dataset(tagged(8), make_distill_config({"data": {"targets": "feedback"}}), run)
    before = sorted(path.name for path in run.iterdir())
    told = export_run(run, config)
    assert "data/dataset.parquet" in told["local"]
    listing = json.loads((tmp_path / "copies" / run.name / "files.json").read_text())
    assert "data/dataset.parquet" in [item["name"] for item in listing]
    assert told["hub"].startswith("failed: ")
    assert export_run(run, config)["local"].startswith("failed: "), "a copy is never overwritten"
    assert sorted(path.name for path in run.iterdir()) == before
    assert export_run(run, make_distill_config({})) == {}


def test_old_runs_keep_their_reports_alone(tmp_path: Path) -> None:
    for number in range(4):
        run = tmp_path / f"run-{number}"
        (run / "state" / "step-000050").mkdir(parents=True)
        for name in (
            "config.json",
            "metrics.jsonl",
            "gate.json",
            "experiences.json",
            "dataset.parquet",
            "cache-step50.pt",
        ):
            (run / name).write_text("{}")
        (run / "cache_last.pt").symlink_to("cache-step50.pt")
        os.utime(run / "config.json", (1000 + number, 1000 + number))
    assert sorted(prune(tmp_path, 1, {"run-0"})) == ["run-1", "run-2"], "the open one and the newest ended one stay"
    kept = {"config.json", "metrics.jsonl", "gate.json", "experiences.json"}
    for number in range(4):
        names = {path.name for path in (tmp_path / f"run-{number}").iterdir()}
        assert (names == kept) == (number in (1, 2))
    assert prune(tmp_path, 1, {"run-0"}) == []
