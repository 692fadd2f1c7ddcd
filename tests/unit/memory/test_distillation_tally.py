"""The count of what is new in a domain: incremental, equal to a count from scratch, honest about late scores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from memory.distillation.tally import Tally, estimate_tokens
from memory.history import History, NewExperience
from storage.database import Database
from storage.models import Base


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    database = Database(f"sqlite:///{tmp_path / 'history.db'}")
    Base.metadata.create_all(database.engine)
    yield History(database)
    database.close()


def _live(history: History, text: str, *, domain: str = "bank", episode: str | None = None) -> int:
    made = NewExperience(text, "ok", domain=domain, source="test", episode_id=episode, feedback="Correct!")
    return history.append([made])[0].id


def test_counts_follow_the_history(history: History) -> None:
    tally = Tally(history)
    assert tally.look("bank", 0).experiences == 0
    first = _live(history, "x" * 40)
    _live(history, "another domain", domain="other")
    _live(history, "y", episode="e1")
    _live(history, "z", episode="e1")
    count = tally.look("bank", 0)
    assert (count.experiences, count.episodes) == (3, 2)
    assert count.tokens == 10 + 1 + 1 + 3 * (estimate_tokens("ok") + estimate_tokens("Correct!"))
    assert Tally(history).look("bank", 0) == count
    assert tally.look("bank", first).experiences == 2


def test_only_what_is_new_is_read(history: History) -> None:
    asked: list[str] = []
    tally = Tally(history, lambda text: asked.append(text) or 1)  # type: ignore[func-returns-value]
    _live(history, "one")
    tally.look("bank", 0)
    before = len(asked)
    _live(history, "two")
    assert tally.look("bank", 0).tokens == 6
    assert len(asked) == before + 3


def test_scores_that_come_late_and_deletions(history: History) -> None:
    tally = Tally(history)
    ids = [_live(history, f"text {number}") for number in range(4)]
    assert tally.scores(tally.look("bank", 0)) == []
    history.give_feedback(ids[2], "no", 0.0)
    history.give_feedback(ids[0], "yes", 1.0)
    history.give_feedback(ids[3], "yes", 1.0)
    assert tally.scores(tally.look("bank", 0)) == [1.0, 0.0, 1.0]
    history.delete(experience_id=ids[3])
    assert tally.scores(tally.look("bank", 0)) == [1.0, 0.0]
