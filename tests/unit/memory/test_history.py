"""The history: one transaction, idempotent, tombstones, cursors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from memory.history import Entry, History, HistoryError, NewExperience, Record
from storage import migrate
from storage.database import Database
from storage.models import AuditEvent


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    database = Database(f"sqlite:///{tmp_path}/test.db")
    migrate.upgrade(database)
    yield History(database)
    database.close()


def _new(observation: str, action: str = "a", **extra: object) -> NewExperience:
    fields: dict[str, object] = {"domain": "general", "source": "test", **extra}
    return NewExperience(observation, action, **fields)  # type: ignore[arg-type]


def test_append_returns_what_is_stored_and_tells_listeners_after_commit(history: History) -> None:
    seen: list[Record] = []
    history.subscribe(lambda records: seen.extend(history.get(record.id) for record in records))  # type: ignore[misc]
    stored = history.append([_new("one", feedback="Correct!", score=1.0), _new("two")])
    assert [record.id for record in stored] == [1, 2]
    assert seen == stored == list(reversed(history.page()))
    assert stored[0].entries() == [Entry("Observation", "one"), Entry("Action", "a"), Entry("Feedback", "Correct!")]


def test_a_retry_with_the_same_request_id_is_written_once(history: History) -> None:
    first = history.append([_new("one", request_id="r1")])
    again = history.append([_new("other", request_id="r1"), _new("x", request_id="r2"), _new("y", request_id="r2")])
    assert again[0] == first[0]
    assert again[1] == again[2]
    assert history.count() == 2


def test_one_bad_item_writes_nothing(history: History) -> None:
    with pytest.raises(HistoryError, match="NUL"):
        history.append([_new("fine"), _new("\x00")])
    assert history.count() == 0


@pytest.mark.parametrize("bad", [{"domain": ""}, {"domain": "x" * 65}, {"observation": "", "action": ""}])
def test_a_meaningless_experience_cannot_be_made(bad: dict[str, str]) -> None:
    with pytest.raises(HistoryError):
        _new(bad.pop("observation", "o"), bad.pop("action", "a"), **bad)


def test_deleting_blanks_the_text_and_keeps_the_cursor(history: History) -> None:
    history.append([_new("secret", session_id="s", messages=[{"role": "user", "content": "secret"}]), _new("b")])
    assert history.delete(experience_id=1) == 1
    assert history.delete(experience_id=1) == 0
    assert [record.id for record in history.page()] == [2]
    tombstone, other = history.since(0)
    assert tombstone.deleted
    assert (tombstone.observation, tombstone.action, tombstone.messages) == ("", "", None)
    assert other.observation == "b"
    assert history.give_feedback(1, "late", None) is None


def test_the_title_of_a_conversation_forgets_with_it(history: History) -> None:
    first, second = history.append([_new("my secret name", session_id="s"), _new("and the weather", session_id="s")])
    assert history.sessions()[0]["title"] == "my secret name"
    history.delete(experience_id=first.id)
    assert history.sessions()[0]["title"] == "and the weather"
    history.correct(second.id, observation="and the sea")
    assert history.sessions()[0]["title"] == "and the sea"
    history.delete(session_id="s")
    assert history.sessions() == []
    history.append([_new("a new beginning", session_id="s")])
    assert [(item["id"], item["title"]) for item in history.sessions()] == [("s", "a new beginning")]


def test_delete_needs_a_filter_and_respects_it(history: History) -> None:
    history.append([_new("1", session_id="s"), _new("2", session_id="t"), _new("3", domain="other")])
    with pytest.raises(HistoryError, match="say what to delete"):
        history.delete()
    assert history.delete(session_id="s") == 1
    assert history.delete(domain="other") == 1
    assert [record.observation for record in history.page()] == ["2"]


def test_deleting_is_audited_without_the_text(history: History) -> None:
    history.append([_new("secret", session_id="s")])
    history.delete(session_id="s", actor="k1")
    history.delete(session_id="s", actor="k2")  # nothing left: nothing to note
    with history._database.read() as session:
        (event,) = session.scalars(sa.select(AuditEvent))
    assert (event.actor, event.action) == ("k1", "history.delete")
    assert event.detail == {"session_id": "s", "count": 1}


def test_pages_and_cursors_walk_everything_once(history: History) -> None:
    history.append([_new(str(i), domain="even" if i % 2 == 0 else "odd") for i in range(10)])
    assert [r.observation for r in history.page(limit=3)] == ["9", "8", "7"]
    assert [r.observation for r in history.page(before=8, domain="even")] == ["6", "4", "2", "0"]
    assert [r.observation for r in history.since(4, limit=2)] == ["4", "5"]
    assert history.count(domain="odd") == 5


def test_sessions_are_titled_by_their_first_words(history: History) -> None:
    history.append([_new("Hello   there,\nZeus", session_id="s1")])
    history.append([_new("other", session_id="s2")])
    history.append([_new("again", session_id="s1")])
    assert [(item["id"], item["title"]) for item in history.sessions()] == [
        ("s1", "Hello there, Zeus"),
        ("s2", "other"),
    ]


def test_feedback_can_come_later(history: History) -> None:
    history.append([_new("one")])
    record = history.give_feedback(1, "Correct!", 1.0)
    assert record is not None
    assert (record.feedback, record.score) == ("Correct!", 1.0)
    assert history.get(1) == record
    assert history.give_feedback(99, "x", None) is None


def test_domains_are_counted_without_what_was_deleted(history: History) -> None:
    assert history.domains() == {}
    history.append([_new("one"), _new("two"), _new("three", domain="maths")])
    assert history.domains() == {"general": (2, 2), "maths": (1, 3)}
    history.delete(experience_id=2)
    history.delete(domain="maths")
    assert history.domains() == {"general": (1, 1)}


def test_a_correction_takes_the_place_of_what_it_corrects(history: History) -> None:
    told: list[tuple[str, list[int]]] = []
    old = history.append(
        [
            NewExperience(
                "capital of France?", "Lyon", "general", "chat", session_id="s", messages=[{"a": 1}], meta={"n": 1}
            )
        ]
    )[0]
    history.subscribe(lambda records: told.append(("new", [record.id for record in records])))
    history.subscribe_changes(lambda ids: told.append(("changed", list(ids))))
    new = history.correct(old.id, action="Paris", feedback="it is the capital", actor="key-1")
    assert new is not None
    assert (new.observation, new.action, new.feedback, new.score) == (
        old.observation,
        "Paris",
        "it is the capital",
        1.0,
    )
    assert (new.session_id, new.messages, new.source) == ("s", [{"a": 1}], "correction")
    assert new.meta == {"n": 1, "corrects": old.id}
    assert new.id > old.id
    assert told == [("changed", [old.id]), ("new", [new.id])]
    assert history.verdicts([old.id, new.id]) == [(old.id, None, True), (new.id, 1.0, False)]
    assert [record.observation for record in history.since(0)] == ["", "capital of France?"]
    again = history.correct(new.id, observation="capital of Italy?", action="Rome", score=None)
    assert again is not None
    assert (again.messages, again.score) == (None, None), "the old messages end with the old question"


def test_a_correction_must_change_something_that_is_there(history: History) -> None:
    old = history.append([NewExperience("a", "b", "general", "test")])[0]
    with pytest.raises(HistoryError, match="give feedback"):
        history.correct(old.id, action="b")
    with pytest.raises(HistoryError, match="observation, an action"):
        history.correct(old.id, observation="", action="")
    assert history.get(old.id) == old, "a refused correction leaves everything as it was"
    assert history.correct(old.id + 1, action="c") is None
    history.delete(experience_id=old.id)
    assert history.correct(old.id, action="c") is None


def test_who_listens_to_changes_hears_of_judgements_and_deletions(history: History) -> None:
    first, second = history.append([NewExperience(text, "b", "general", "test") for text in "xy"])
    told: list[list[int]] = []
    history.subscribe_changes(lambda ids: told.append(list(ids)))
    history.give_feedback(first.id, "good", 1.0)
    history.give_feedback(99, "good", 1.0)
    history.delete(domain="general")
    history.delete(domain="general")
    assert told == [[first.id], [first.id, second.id]]


def test_contents_are_counted_with_their_tombstones(history: History) -> None:
    stored = history.append([_new("one"), _new("one"), _new("two"), _new("one", domain="maths")])
    history.delete(experience_id=stored[0].id)
    one, two = stored[0].content_hash, stored[2].content_hash
    assert history.content_counts("general", [one, two, "none"]) == {one: (2, 1), two: (1, 0)}
