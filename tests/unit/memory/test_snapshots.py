"""Snapshots: out and in again without loss or repetition, whatever stands in the file."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memory.history import History, NewExperience
from memory.snapshots import (
    BadLine,
    SnapshotError,
    export_snapshot,
    import_snapshot,
    load_records,
    newest_snapshot,
    read_snapshot,
)
from storage import migrate
from storage.database import Database


@pytest.fixture
def histories(tmp_path: Path) -> Iterator[tuple[History, History]]:
    databases = [Database(f"sqlite:///{tmp_path}/{name}.db") for name in ("one", "two")]
    for database in databases:
        migrate.upgrade(database)
    yield History(databases[0]), History(databases[1])
    for database in databases:
        database.close()


def new(observation: str, action: str = "a", **fields: Any) -> NewExperience:
    return NewExperience(observation, action, **{"domain": "tags", "source": "test", **fields})


def entry(kind: str, content: Any) -> str:
    return json.dumps({"type": kind, "content": content})


def lines(path: Path, *items: str | bytes) -> Path:
    path.write_bytes(b"".join((item.encode() if isinstance(item, str) else item) + b"\n" for item in items))
    return path


def told(history: History, domain: str | None = None) -> list[tuple[str, str, str | None]]:
    return [(item.observation, item.action, item.feedback) for item in history.since(0, domain=domain)]


def test_rich_lines_come_back_whole(histories: tuple[History, History], tmp_path: Path) -> None:
    one, two = histories
    one.append(
        [
            new("Grüße\n\u2028 one", "a", feedback="Correct!", score=1.0, session_id="s", episode_id="e"),
            new("two", meta={"correction": "x"}, messages=[{"role": "user", "content": "two"}], source="chat"),
            new("gone"),
            new("other", domain="maths"),
        ]
    )
    one.delete(experience_id=3)
    path = tmp_path / "memory_1.jsonl"
    assert export_snapshot(one, path) == 3
    report = import_snapshot(two, path, domain="general")
    assert (report.imported, report.known, report.deleted, report.bad, report.rejected) == (3, 0, 0, [], None)
    for before, after in zip([one.get(1), one.get(2), one.get(4)], two.since(0), strict=True):
        assert before is not None
        for name in (
            "domain",
            "source",
            "observation",
            "action",
            "feedback",
            "score",
            "episode_id",
            "messages",
            "meta",
        ):
            assert getattr(before, name) == getattr(after, name)
    assert export_snapshot(one, path, domain="maths") == 1


def test_plain_lines_are_those_of_agents(histories: tuple[History, History], tmp_path: Path) -> None:
    one, two = histories
    one.append([new("one", feedback="Correct!"), new("two", "b")])
    path = tmp_path / "memory_1.jsonl"
    export_snapshot(one, path, rich=False)
    assert path.read_text().splitlines() == [
        entry("Observation", "one"),
        entry("Action", "a"),
        entry("Feedback", "Correct!"),
        entry("Observation", "two"),
        entry("Action", "b"),
    ]
    import_snapshot(two, path, domain="tags")
    assert told(two) == told(one)
    assert {item.domain for item in two.since(0)} == {"tags"}


def test_importing_again_adds_nothing(histories: tuple[History, History], tmp_path: Path) -> None:
    one, two = histories
    one.append([new("same"), new("same"), new("other"), new("same")])
    path = tmp_path / "memory_1.jsonl"
    export_snapshot(one, path)
    assert import_snapshot(two, path, domain="tags").imported == 4
    again = import_snapshot(two, path, domain="tags")
    assert (again.imported, again.known) == (0, 4)
    assert import_snapshot(one, path, domain="tags").known == 4  # also where it came from
    one.append([new("same")])
    export_snapshot(one, path)
    grown = import_snapshot(two, path, domain="tags")
    assert (grown.imported, grown.known) == (1, 4)
    assert two.count() == 5


def test_what_was_deleted_stays_deleted(histories: tuple[History, History], tmp_path: Path) -> None:
    one, two = histories
    one.append([new("keep"), new("forget me")])
    path = tmp_path / "memory_1.jsonl"
    export_snapshot(one, path)
    import_snapshot(two, path, domain="tags")
    for history in histories:
        history.delete(experience_id=2)
        report = import_snapshot(history, path, domain="tags")
        assert (report.imported, report.known, report.deleted) == (0, 1, 1)
        assert history.count() == 1


@pytest.mark.parametrize(
    ("written", "lived"),
    [
        (["O1", "A1", "F1", "O2", "A2"], [("1", "1", "1"), ("2", "2", None)]),
        (["O1", "A1", "O2", "F1", "A2", "F2"], [("1", "1", "1"), ("2", "2", "2")]),  # feedback after what came next
        (["O1", "A1", "O2", "F1", "O2", "A2"], [("1", "1", "1"), ("2", "2", None)]),  # seen, then acted on
        (["O1", "O2", "A2"], [("1", "", None), ("2", "2", None)]),
        (["A1", "A2", "F2"], [("", "1", None), ("", "2", "2")]),
        (["O1", "A1", "O1", "A1"], [("1", "1", None), ("1", "1", None)]),
        (["O1", "A1", "F1", "A2"], [("1", "1", "1"), ("", "2", None)]),
        ([], []),
    ],
)
def test_entries_are_grouped_into_experiences(
    tmp_path: Path, written: list[str], lived: list[tuple[str, str, str | None]]
) -> None:
    names = {"O": "Observation", "A": "Action", "F": "Feedback"}
    path = lines(tmp_path / "memory_1.jsonl", *(entry(names[item[0]], item[1:]) for item in written))
    records, bad = load_records(path, domain="tags")
    assert [(item.observation, item.action, item.feedback) for item in records] == lived
    assert bad == []
    assert [item.id for item in records] == list(range(1, len(lived) + 1))


def test_bad_lines_are_reported_with_their_numbers_and_kept(histories: tuple[History, History], tmp_path: Path) -> None:
    rich = {"schema": "olympus.experience/1", "observation": "o", "action": "a"}
    path = lines(
        tmp_path / "memory_1.jsonl",
        entry("Observation", "one"),
        "{torn",
        entry("Action", "a"),
        "",
        entry("Reflection", "hm"),
        entry("Feedback", ""),
        b'{"type": "Action", "content": "\xff"}',
        "[1]",
        "[" * 100_000,
        json.dumps({**rich, "score": float("nan")}),
        json.dumps({**rich, "score": True}),
        json.dumps({**rich, "domain": "x" * 65}),
        json.dumps({**rich, "observation": None}),
        json.dumps({**rich, "messages": ["x"]}),
        json.dumps({**rich, "meta": []}),
        json.dumps({**rich, "extra": 1}),
        json.dumps({**rich, "observation": "\ud800"}),
        entry("Observation", "nul\x00"),
        json.dumps({**rich, "observation": "", "action": ""}),
        json.dumps({"observation": "last", "action": "z", "score": 0.5}),
    )
    report = import_snapshot(histories[0], path, domain="tags")
    assert told(histories[0]) == [("one", "a", None), ("last", "z", None)]
    reasons = dict(report.bad)
    assert sorted(reasons) == [2, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19]
    assert reasons[2] == "not JSON"
    assert "Reflection" in reasons[5]
    assert reasons[7] == "not UTF-8"
    assert "unknown fields: extra" in reasons[16]
    assert "surrogate" in reasons[17]
    assert "NUL" in reasons[18]
    assert report.rejected == tmp_path / "memory_1.jsonl.rejected"
    kept = [json.loads(line) for line in report.rejected.read_text().splitlines()]
    assert [(item["line"], item["reason"]) for item in kept] == report.bad
    assert kept[0]["text"] == "{torn"


def test_a_very_long_line_is_bad_and_not_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memory.snapshots._LONGEST_LINE", 50)
    path = lines(tmp_path / "memory_1.jsonl", "x" * 2_200_000, entry("Observation", "one"))
    items = list(read_snapshot(path, domain="tags"))
    assert [item.line for item in items if isinstance(item, BadLine)] == [1]
    assert [item[1].observation for item in items if not isinstance(item, BadLine)] == ["one"]


def test_a_file_that_cannot_be_read_is_an_error(histories: tuple[History, History], tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match="No such file"):
        import_snapshot(histories[0], tmp_path / "absent.jsonl", domain="tags")
    with pytest.raises(SnapshotError, match="cannot be read"):
        import_snapshot(histories[0], tmp_path, domain="tags")


def test_an_import_that_breaks_off_is_run_again(
    histories: tuple[History, History], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = histories
    one.append([new(f"number {number % 7}", f"{number % 3}") for number in range(50)])
    path = tmp_path / "memory_1.jsonl"
    export_snapshot(one, path)
    monkeypatch.setattr("memory.snapshots._BATCH", 8)
    append, calls = two.append, []

    def breaks(items: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return append(items)

    monkeypatch.setattr(two, "append", breaks)
    with pytest.raises(OSError, match="No space"):
        import_snapshot(two, path, domain="tags")
    assert two.count() == 24
    monkeypatch.setattr(two, "append", append)
    report = import_snapshot(two, path, domain="tags")
    assert (report.known, report.imported) == (24, 26)
    assert told(two) == told(one)


def test_an_export_replaces_the_file_whole_or_not_at_all(
    histories: tuple[History, History], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = histories[0]
    history.append([new("one")])
    path = tmp_path / "memory_1.jsonl"
    export_snapshot(history, path)
    before = path.read_bytes()
    monkeypatch.setattr(history, "since", lambda *args, **more: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_snapshot(history, path)
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.glob(".partial*")] == []


def test_the_newest_snapshot_is_found(tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match=r"no memory_\*\.jsonl"):
        newest_snapshot(tmp_path)
    for number, name in enumerate(["memory_2.jsonl", "memory_1.jsonl", "other.jsonl"]):
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (number, number))
    assert newest_snapshot(tmp_path).name == "memory_1.jsonl"


@given(st.lists(st.binary(max_size=60), max_size=12))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_bytes_make_it_fail_or_lose_a_line(tmp_path: Path, rows: list[bytes]) -> None:
    path = tmp_path / "memory_1.jsonl"
    path.write_bytes(b"\n".join(rows))
    items = list(read_snapshot(path, domain="tags"))
    written = [number for number, row in enumerate(path.read_bytes().split(b"\n"), start=1) if row.strip()]
    assert [item.line for item in items if isinstance(item, BadLine)] == written


texts = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), min_size=1, max_size=8)


@given(st.lists(st.tuples(texts, texts, st.none() | texts), max_size=8))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
def test_plain_lines_give_back_what_was_lived(tmp_path: Path, lived: list[tuple[str, str, str | None]]) -> None:
    written = []
    for observation, action, feedback in lived:
        written += [entry("Observation", observation), entry("Action", action)]
        written += [] if feedback is None else [entry("Feedback", feedback)]
    records, bad = load_records(lines(tmp_path / "memory_1.jsonl", *written), domain="tags")
    assert bad == []
    assert [(item.observation, item.action, item.feedback) for item in records] == lived
