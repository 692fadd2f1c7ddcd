"""What a question brings to mind, and what it must not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from memory.history import History, NewExperience
from memory.recall import HistoryRecall, recall_turns
from storage.database import Database
from storage.models import Base


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    database = Database(f"sqlite:///{tmp_path / 'recall.db'}")
    Base.metadata.create_all(database.engine)
    yield History(database)
    database.close()


def _tell(
    history: History, observation: str, action: str = "Noted.", domain: str = "general", session: str | None = None
) -> int:
    return history.append([NewExperience(observation, action, domain=domain, source="chat", session_id=session)])[0].id


def _sources(recall: HistoryRecall, query: str, **where: str | None) -> list[str]:
    asked = {"session": None, "domain": None, **where}
    return [item.source for item in recall(query, session=asked["session"], domain=asked["domain"], limit=2)]


def test_shared_words_bring_it_back_best_first(history: History) -> None:
    cat = _tell(history, "My cat is called Tibbles and sleeps all day")
    _tell(history, "The lighthouse stands in the north")
    dog = _tell(history, "My dog chases the neighbour's cat")
    recall = HistoryRecall(history, "general")
    assert _sources(recall, "What is my cat called?") == [f"experience {cat}", f"experience {dog}"]
    found = recall("what is my cat called", session=None, domain=None, limit=1)
    assert found[0].text == "My cat is called Tibbles and sleeps all day\nNoted."
    assert found[0].score > 0


def test_nothing_in_common_is_nothing(history: History) -> None:
    recall = HistoryRecall(history, "general")
    assert _sources(recall, "anything") == []
    _tell(history, "My cat is called Tibbles")
    assert _sources(recall, "quantum chromodynamics") == []
    assert _sources(recall, "?!") == []
    assert _sources(recall, "") == []


def test_the_session_itself_and_other_domains_are_left_out(history: History) -> None:
    _tell(history, "the password is swordfish", session="mine")
    other = _tell(history, "the password was herring", session="another")
    _tell(history, "the password of the bank", domain="bank")
    assert _sources(HistoryRecall(history, "general"), "which password", session="mine") == [f"experience {other}"]


def test_what_is_new_is_found_and_what_is_deleted_is_not(history: History) -> None:
    recall = HistoryRecall(history, "general")
    first = _tell(history, "Tibbles likes herring")
    assert _sources(recall, "herring") == [f"experience {first}"]
    second = _tell(history, "herring is a fish, herring is cheap")
    assert set(_sources(recall, "herring")) == {f"experience {first}", f"experience {second}"}
    history.delete(experience_id=first)
    assert _sources(recall, "herring") == [f"experience {second}"]
    history.delete(experience_id=second)
    assert _sources(recall, "herring") == []


def test_a_conversations_own_turns_come_back(history: History) -> None:
    turns = ["Hello! My cat is called Milo.", "How do plants make food?", "Why is the sky blue?"]
    (found,) = recall_turns(turns, "What is my cat called?", 2)
    assert (found.text, found.source) == (turns[0], "turn 1")
    assert recall_turns(turns, "quantum chromodynamics", 2) == []
    assert recall_turns([], "anything", 2) == []
    assert recall_turns(["the", "of"], "the", 2) == []
