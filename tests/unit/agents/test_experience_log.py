"""Three logs, one behaviour; and what a crash leaves of a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agents.errors import AgentConfigError, LogDamaged
from agents.experience_log import ExperienceLog, FileLog, HistoryLog, freeze, save_snapshot
from memory.history import History, NewExperience
from memory.snapshots import load_records
from storage import migrate
from storage.database import Database


def _item(number: int, **changes: object) -> NewExperience:
    fields: dict[str, object] = {
        "observation": f"what is {number}?",
        "action": f"it is {number}",
        "domain": "bank",
        "source": "test",
        "feedback": "Correct!",
        "score": 1.0,
        "request_id": f"life/{number}",
    }
    return NewExperience(**(fields | changes))  # type: ignore[arg-type]


@pytest.fixture(params=["history", "file", "nowhere"])
def make_log(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], ExperienceLog]]:
    """``make_log()`` opens the same log again, except for the one that is kept nowhere."""
    if request.param == "history":
        database = Database(f"sqlite:///{tmp_path / 'x.db'}")
        migrate.upgrade(database)
        yield lambda: HistoryLog(History(database), "bank")
        database.close()
    else:
        path = tmp_path / "deep" / "log.jsonl" if request.param == "file" else None
        yield lambda: FileLog("bank", path)


def test_append_and_look_back(make_log: Callable[[], ExperienceLog]) -> None:
    log = make_log()
    stored = [log.append(_item(number)) for number in range(3)]
    again = log.append(_item(1, action="something else"))
    assert again.id == stored[1].id, "the first write of a request wins"
    records = log.records()
    assert [record.observation for record in records] == ["what is 0?", "what is 1?", "what is 2?"]
    assert (records[1].action, records[1].feedback, records[1].score) == ("it is 1", "Correct!", 1.0)
    assert [record.id for record in records] == sorted(record.id for record in records)


def test_a_frozen_log_stays_as_it_was(make_log: Callable[[], ExperienceLog]) -> None:
    log = make_log()
    log.append(_item(0))
    frozen = freeze(log)
    frozen.append(_item(1))
    log.append(_item(2))
    assert [record.observation for record in frozen.records()] == ["what is 0?"]
    assert len(log.records()) == 2
    assert frozen.domain == "bank"


def test_a_file_is_read_again_and_a_torn_line_was_never_there(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = FileLog("bank", path)
    for number in range(3):
        log.append(_item(number, observation="grüße \u2028 \n zwei Zeilen"))
    before = [record for record in log.records()]
    with open(path, "ab") as handle:
        handle.write(b'{"observation": "to')
    log = FileLog("bank", path)
    assert list(log.records()) == before
    log.append(_item(1))
    assert len(log.records()) == 3, "request ids are remembered"
    log.append(_item(7))
    assert [record.id for record in FileLog("bank", path).records()] == [1, 2, 3, 4]


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"observation": 3, "created_at": 1}', '{"created_at": "x"}'])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "log.jsonl"
    FileLog("bank", path).append(_item(0))
    with open(path, "a") as handle:
        handle.write(line + "\n")
    with pytest.raises(LogDamaged, match=r"log\.jsonl, line 2"):
        FileLog("bank", path)


def test_snapshot_has_the_seeds_format(tmp_path: Path, make_log: Callable[[], ExperienceLog]) -> None:
    log = make_log()
    log.append(_item(0))
    log.append(_item(1, feedback=None))
    path = save_snapshot(log, tmp_path / "snapshots", "ep_000002")
    assert path.name == "memory_ep_000002.jsonl"
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"type": "Observation", "content": "what is 0?"},
        {"type": "Action", "content": "it is 0"},
        {"type": "Feedback", "content": "Correct!"},
        {"type": "Observation", "content": "what is 1?"},
        {"type": "Action", "content": "it is 1"},
    ]
    found, bad = load_records(path, domain="bank")
    assert not bad, "a distillation reads it as it is"
    assert [(record.observation, record.action, record.feedback) for record in found] == [
        (record.observation, record.action, record.feedback) for record in log.records()
    ]
    with pytest.raises(AgentConfigError, match="snapshot id"):
        save_snapshot(log, tmp_path, "../x")
