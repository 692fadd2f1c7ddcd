"""The episodic memory follows the rows: what is new is found, what is gone is not, and who asks gets the best first."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from memory.catalog import Filters, Line
from memory.embedding import Matrix
from memory.episodic import EpisodicMemory, EpisodicOptions, fuse
from memory.episodic_follower import Courtesy
from memory.episodic_index import EpisodicIndex
from memory.episodic_store import Page
from memory.history import History, NewExperience
from storage import migrate
from storage.database import Database
from storage.models import EpisodicVector
from tests.support.letters import Letters

MakeMemory = Callable[..., EpisodicMemory]


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path}/test.db")
    migrate.upgrade(database)
    yield database
    database.close()


@pytest.fixture
def history(database: Database) -> History:
    return History(database)


@pytest.fixture
def make(database: Database, history: History) -> Iterator[MakeMemory]:
    made: list[EpisodicMemory] = []

    def make(model: Any = None, *, courtesy: Courtesy | None = None, width: int = 0, **options: Any) -> Any:
        chosen = EpisodicOptions(**{"embedding": "none", **options})
        memory = EpisodicMemory(
            database,
            history,
            chosen,
            default_domain="general",
            embedding=model,
            courtesy=courtesy,
            embedding_width=width,
        )
        memory.start()
        made.append(memory)
        return memory

    yield make
    for memory in made:
        memory.stop()
        memory.check_invariants()


def _tell(history: History, *observations: str, **fields: Any) -> list[int]:
    fields = {"action": "Noted.", "domain": "general", "source": "chat", **fields}
    return [record.id for record in history.append([NewExperience(text, **fields) for text in observations])]


def _settled(memory: EpisodicMemory) -> EpisodicMemory:
    assert memory.wait_until_settled(20)
    return memory


def _ids(memory: EpisodicMemory, query: str, filters: Filters | None = None, limit: int = 10) -> list[int]:
    return [item.experience.id for item in memory.search(query, filters or Filters(), limit)]


def _stored(database: Database) -> dict[str, set[int]]:
    with database.read() as session:
        rows = session.execute(sa.select(EpisodicVector.embedding, EpisodicVector.experience_id)).all()
    return {name: {row.experience_id for row in rows if row.embedding == name} for name in {r.embedding for r in rows}}


def test_words_and_meaning_find_and_say_what_they_found(history: History, make: MakeMemory) -> None:
    cat, sea, dog = _tell(history, "My cat is called Tibbles", "The sea is calm", "My dog chases the cat next door")
    memory = _settled(make(Letters()))
    found = memory.search("My cat, is it called Tibbles?", limit=3)
    assert [item.experience.id for item in found[:2]] == [cat, dog]
    best = found[0]
    assert best.words is not None
    assert best.meaning is not None
    assert (best.words.rank, best.meaning.rank) == (1, 1)
    assert best.score == pytest.approx(1.0)
    assert best.experience.action == "Noted."
    assert "called Tibbles" in best.snippet
    assert sea not in _ids(memory, "My cat, is it called Tibbles?", limit=2)
    status = memory.status()
    assert (status["entries"], status["vectors"], status["pending"], status["complete"]) == (3, 3, 0, True)
    assert status["embedding"]["state"] == "ready"


def test_meaning_finds_what_shares_no_word(history: History, make: MakeMemory) -> None:
    (known,) = _tell(history, "swordfishes", action="")
    memory = _settled(make(Letters()))
    (found,) = memory.search("swordfish")
    assert (found.experience.id, found.words) == (known, None)
    assert found.meaning is not None
    assert memory.search("zzzz quuux jjkk") == [], "a cosine below the floor is nothing in common"


def test_words_alone_answer_without_an_embedding(history: History, make: MakeMemory) -> None:
    cat, _ = _tell(history, "My cat is called Tibbles", "The sea is calm")
    memory = _settled(make())
    assert _ids(memory, "which cat?") == [cat]
    assert memory.search("quantum chromodynamics") == memory.search("") == memory.search("cat", limit=0) == []
    assert memory.status()["embedding"]["state"] == "off"


def test_filters_reach_both_rankings(history: History, make: MakeMemory) -> None:
    mine = _tell(history, "the password is swordfish", session_id="mine")[0]
    other = _tell(history, "the password was herring", session_id="other", score=-1.0)[0]
    bank = _tell(history, "the password of the bank", domain="bank", score=0.5)[0]
    memory = _settled(make(Letters()))
    created = history.get(bank).created_at  # type: ignore[union-attr]
    query = "which password"
    assert set(_ids(memory, query)) == {mine, other, bank}
    assert _ids(memory, query, Filters(domain="bank")) == [bank]
    assert _ids(memory, query, Filters(session="mine")) == [mine]
    assert set(_ids(memory, query, Filters(without_session="mine"))) == {other, bank}
    assert _ids(memory, query, Filters(min_score=0.0)) == [bank]
    assert _ids(memory, query, Filters(since=created)) == [bank]
    assert set(_ids(memory, query, Filters(until=created))) == {mine, other}
    assert _ids(memory, query, Filters(domain="nowhere")) == []
    ids, _ = memory.nearest(Letters().embed([query])[0], 10, Filters(domain="general"))
    assert set(ids.tolist()) == {mine, other}


def test_recall_leaves_out_the_session_other_domains_and_what_was_wrong(history: History, make: MakeMemory) -> None:
    _tell(history, "the password is swordfish", session_id="mine")
    other = _tell(history, "the password was herring", session_id="other")[0]
    _tell(history, "the password of the bank", domain="bank")
    _tell(history, "the password is wrong", score=-1.0)
    memory = _settled(make(Letters(), width=32))
    (found,) = memory("which password", session="mine", domain=None, limit=4)
    assert (found.source, found.text) == (f"experience {other}", "the password was herring\nNoted.")
    assert found.embedding is not None
    assert found.embedding.shape == (32,)
    narrow = _settled(make(Letters(), width=64))
    assert narrow("which password", session="mine", domain=None, limit=4)[0].embedding is None, "it would not fit"


def test_it_follows_what_comes_later(history: History, make: MakeMemory) -> None:
    memory = _settled(make(letters := Letters()))
    assert letters.seen == [], "nothing to embed and nobody asked: no embedding is opened"
    assert memory.status()["embedding"]["state"] == "waiting"
    first = _tell(history, "herring is a fish")
    assert _ids(_settled(memory), "herring") == first
    more = _tell(history, *(f"herring number {number}" for number in range(40)))
    assert _settled(memory).status()["vectors"] == 41
    assert set(_ids(memory, "herring", limit=50)) == {*first, *more}
    assert memory.search("herring", limit=50)[0].meaning is not None


def test_what_was_just_written_is_found_by_its_words(history: History, make: MakeMemory) -> None:
    memory = _settled(make())
    for number in range(30):  # a chat asks right after it has answered
        (known,) = _tell(history, f"the secret number{number}")
        assert _ids(memory, f"number{number}") == [known]
        history.delete(experience_id=known)
        assert _ids(memory, f"number{number}") == []
    _settled(memory)


def test_rows_and_verdicts_may_overtake_each_other() -> None:
    index = EpisodicIndex()
    lines = [Line(number, "general", None, 1.0, None, f"herring {number}") for number in range(1, 6)]
    index.judge([(1, None, True), (2, 0.5, False)])
    index.hear(lines[:2])
    assert (1 in index, 2 in index) == (False, True), "the deletion was here first"
    index.about_to_read()
    index.hear(lines[2:4])
    index.judge([(3, None, True)])
    assert index.take(Page(lines[:4], [], 4), 4) == [1, 2, 4], "read before it was deleted"
    index.about_to_read()
    index.hear(lines[:4])
    assert 3 not in index, "what comes after the reading is not news"
    index.hear(lines[4:])  # a ghost: its deletion was forgotten when a reading began
    assert index.take(Page([], [5], 5), 5) == []
    assert 5 not in index
    assert [known for known, _ in index.best_words("herring", 5, Filters(min_score=0.5))] == [2]
    index.clear_removed()
    index.check_invariants()


def test_what_is_deleted_is_gone_when_delete_returns(database: Database, history: History, make: MakeMemory) -> None:
    first, second = _tell(history, "herring is a fish", "herring is cheap")
    _tell(history, "the bank", domain="bank")
    memory = _settled(make(Letters()))
    history.delete(experience_id=first)
    assert _ids(memory, "herring") == [second], "without waiting"
    ids, _ = memory.nearest(Letters().embed(["herring is a fish"])[0], 5)
    assert first not in ids.tolist()
    assert first not in _stored(database)["letters"]
    history.delete(domain="general")
    assert _ids(memory, "herring") == []
    assert _settled(memory).status()["vectors"] == 1


def test_feedback_and_corrections_count_at_once(history: History, make: MakeMemory) -> None:
    (asked,) = _tell(history, "capital of France", action="Lyon")
    memory = _settled(make(Letters()))
    assert _ids(memory, "capital", Filters(min_score=0.0)) == []
    history.give_feedback(asked, None, 0.5)
    assert _ids(memory, "capital", Filters(min_score=0.0)) == [asked]
    history.give_feedback(asked, "wrong", -1.0)
    assert memory("capital", session=None, domain=None, limit=3) == []
    corrected = history.correct(asked, action="Paris")
    assert corrected is not None
    assert asked not in _ids(memory, "capital")
    (found,) = _settled(memory).search("capital of France")
    assert (found.experience.id, found.experience.action, found.experience.score) == (corrected.id, "Paris", 1.0)
    assert memory.search("Lyon") == []


def test_a_row_deleted_while_it_is_embedded_leaves_no_vector(
    database: Database, history: History, make: MakeMemory
) -> None:
    class Deleting(Letters):
        def embed(self, texts: Sequence[str]) -> Matrix:
            if texts == ["doomed\nNoted."]:
                history.delete(experience_id=doomed)
            return super().embed(texts)

    (doomed,) = _tell(history, "doomed")
    memory = _settled(make(Deleting()))
    assert _stored(database) == {}
    assert memory.status()["vectors"] == memory.status()["entries"] == 0
    assert memory.search("doomed") == []


def test_vectors_are_kept_and_not_made_again(database: Database, history: History, make: MakeMemory) -> None:
    ids = _tell(history, "one", "two", "three")
    _settled(make(Letters())).stop()
    later = _tell(history, "four")
    memory = _settled(make(again := Letters()))
    assert again.seen == ["four\nNoted."]
    assert _stored(database) == {"letters": {*ids, *later}}
    assert memory.status()["vectors"] == 4


def test_vectors_of_another_embedding_are_replaced_and_damaged_ones_made_anew(
    database: Database, history: History, make: MakeMemory
) -> None:
    ids = _tell(history, "one", "two")
    _settled(make(Letters(name="old"))).stop()
    with database.write() as session:
        for known, data in zip(ids, (b"short", np.full(32, np.nan, "<f4").tobytes()), strict=True):
            session.add(EpisodicVector(embedding="letters", experience_id=known, vector=data))
    memory = _settled(make(Letters()))
    assert _stored(database) == {"letters": set(ids)}
    assert memory.status()["vectors"] == 2


def test_a_text_that_cannot_be_embedded_is_found_by_its_words(history: History, make: MakeMemory) -> None:
    class Picky(Letters):
        def embed(self, texts: Sequence[str]) -> Matrix:
            if any("poison" in text for text in texts):
                raise ValueError("not this one")
            rows = super().embed(texts)
            rows[[index for index, text in enumerate(texts) if "weird" in text]] = np.nan
            return rows

    good, bad, weird = _tell(history, "good apples", "poison apples", "weird apples")
    memory = _settled(make(Picky()))
    assert (memory.status()["vectors"], memory.status()["refused"]) == (1, 2)
    assert set(_ids(memory, "apples")) == {good, bad, weird}
    assert [item.meaning for item in memory.search("poison")] == [None], "nor can the question be"
    more = _tell(history, "more apples")
    assert set(more) < set(_ids(_settled(memory), "apples"))


def test_an_embedding_that_cannot_be_opened_leaves_the_words(
    tmp_path: Path, history: History, make: MakeMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    from workspace.errors import ModelDownloadFailed

    def refuse(*_: Any, **__: Any) -> None:
        raise ModelDownloadFailed("no network here")

    monkeypatch.setattr("memory.episodic.open_minilm", refuse)
    (known,) = _tell(history, "herring is a fish")
    memory = _settled(make(embedding="minilm", cache_dir=tmp_path))
    assert memory.status()["embedding"]["state"] == "failed"
    assert memory.status()["embedding"]["detail"] == "no network here"
    assert _ids(memory, "herring") == [known]


def test_the_oldest_leave_when_it_is_full(history: History, make: MakeMemory) -> None:
    old = _tell(history, *(f"herring number {number}" for number in range(30)))
    memory = _settled(make(Letters(), max_entries=20))
    assert _settled(memory).status()["entries"] == 20
    assert min(_ids(memory, "herring", limit=50)) == old[10]
    new = _tell(history, *(f"herring again {number}" for number in range(5)))
    assert _settled(memory).status()["vectors"] == 20
    assert set(new) <= set(_ids(memory, "herring", limit=50))


def test_embedding_waits_while_requests_are_served(history: History, make: MakeMemory) -> None:
    busy = threading.Event()
    busy.set()
    on_thread: list[str] = []
    courtesy = Courtesy(lambda: on_thread.append(threading.current_thread().name), busy.is_set)
    (known,) = _tell(history, "herring is a fish")
    memory = make(letters := Letters(), courtesy=courtesy)
    assert not memory.wait_until_settled(0.7)
    assert letters.seen == []
    assert _ids(memory, "herring") == [known], "words do not wait"
    busy.clear()
    _settled(memory)
    assert letters.seen
    assert on_thread[0] == "episodic-memory"


def test_many_writers_deleters_and_askers(database: Database, history: History, make: MakeMemory) -> None:
    memory = make(Letters(), approximate_from=60)
    gone: list[int] = []
    errors: list[BaseException] = []

    def live(number: int) -> None:
        try:
            for turn in range(25):
                (known,) = _tell(history, f"herring {number} of {turn}", session_id=f"s{number}")
                if turn % 3 == 0:
                    history.delete(experience_id=known)
                    gone.append(known)
                    assert known not in _ids(memory, f"herring {number} of {turn}", limit=50)
                memory("herring", session=f"s{number}", domain=None, limit=4)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=live, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert _settled(memory).status()["vectors"] == 100 - len(gone) == 64
    living = {record.id for record in history.page(limit=200)}
    assert _stored(database)["letters"] == living
    assert set(_ids(memory, "herring", limit=100)) == living


def test_fusion_prefers_what_both_rankings_know() -> None:
    ranked = fuse([(1, 9.0), (2, 8.0)], [(2, 0.9), (3, 0.8)], 0.5)
    assert [known for known, *_ in ranked] == [2, 3, 1]
    alone = fuse([(1, 9.0), (2, 8.0)], [], 0.5)
    assert [known for known, *_ in alone] == [1, 2]
    assert alone[0][1] == 1.0
    assert fuse([(1, 9.0)], [(1, 0.9)], 2.0)[0][1] == pytest.approx(1.0)
    assert fuse([], [(3, 0.8)], 2.0)[0][1] == pytest.approx(1.0)
    assert fuse([], [], 0.5) == []


def test_rare_words_decide_and_common_ones_hardly_count() -> None:
    meanings = [(number, 0.9 - number / 100) for number in range(1, 40)]
    rare = fuse([(99, 9.0), *((number, 0.5) for number in range(10, 40))], meanings, 2.0)
    assert rare[0][0] == 99
    common = fuse([(99, 9.0), *((number, 8.0) for number in range(10, 40))], meanings, 2.0)
    assert [known for known, *_ in common[:5]] == [1, 2, 3, 4, 5]
