"""The buffer: split, reservoir, duplicates, judgements, forgetting, rebuilding."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from memory.history import History, NewExperience, Record, content_hash
from olympus.experience_buffer import MAX_WATCHED, ExperienceBuffer
from olympus.experience_source import ExperienceSource
from storage.database import Database
from storage.models import Base


def record(number: int, text: str | None = None, score: float | None = None, **changes: object) -> Record:
    text = f"message {number}" if text is None else text
    fields = {
        "id": number,
        "domain": "d",
        "source": "api",
        "observation": text,
        "action": "answer",
        "feedback": None,
        "score": score,
        "session_id": None,
        "episode_id": None,
        "messages": None,
        "meta": {},
        "content_hash": content_hash(text, "answer"),
        "created_at": 0.0,
        "deleted": False,
        **changes,
    }
    return Record(**fields)  # type: ignore[arg-type]


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'test.db'}")
    Base.metadata.create_all(database.engine)
    yield database
    database.close()


@pytest.fixture
def history(database: Database) -> History:
    return History(database)


def experience(text: str, action: str = "answer", **changes: object) -> NewExperience:
    return NewExperience(text, action, domain="d", source=str(changes.pop("source", "api")), **changes)  # type: ignore[arg-type]


def test_the_split_follows_the_content_and_nothing_else() -> None:
    first, second = ExperienceBuffer(256, 20, seed=1), ExperienceBuffer(256, 20, seed=2)
    order = list(range(1, 200))
    for number in order:
        first.add(record(number))
    random.Random(0).shuffle(order)
    for number in order:
        second.add(record(number))
    assert {item.id for item in first.holdout()} == {item.id for item in second.holdout()}
    assert 20 < len(first.holdout()) < 60


def test_the_reservoir_is_a_fair_sample() -> None:
    """Over many seeds each of 400 experiences stands in the reservoir about equally often."""
    counts: Counter[int] = Counter()
    for seed in range(200):
        buffer = ExperienceBuffer(64, 5, seed)
        for number in range(1, 401):
            buffer.add(record(number))
        counts.update(buffer.state_dict()["reservoir"])
    training = [number for number in range(1, 401) if not buffer.is_held_out(record(number).content_hash)]
    expected = 200 * buffer.reservoir_capacity / len(training)
    thirds = [
        training[: len(training) // 3],
        training[len(training) // 3 : -len(training) // 3],
        training[-len(training) // 3 :],
    ]
    for part in thirds:
        mean = sum(counts[number] for number in part) / len(part)
        assert mean == pytest.approx(expected, rel=0.08)


def test_what_is_not_imitated() -> None:
    buffer = ExperienceBuffer(64, 5, seed=0)
    assert buffer.add(record(1, deleted=True)) == "skipped"
    assert buffer.add(record(2, action="")) == "skipped"
    assert buffer.add(record(3, meta={"finish_reason": "cancelled"})) == "skipped"
    assert buffer.add(record(4, score=-0.5)) == "waiting"
    assert buffer.add(record(5, source="query")) == "waiting"
    assert buffer.add(record(6, score=0.0)) in ("training", "holdout")
    assert buffer.add(record(7, text="message 6")) == "duplicate"
    assert buffer.cursor == 7
    assert len(buffer) == 1
    buffer.check_invariants()


def test_confirmed_experiences_are_drawn_twice_as_often() -> None:
    buffer = ExperienceBuffer(1000, 5, seed=0)
    for number in range(1, 201):
        buffer.add(record(number, score=1.0 if number % 2 else None))
    drawn = Counter(item.score for step in range(200) for item in buffer.sample(16, step))
    assert drawn[1.0] / drawn[None] == pytest.approx(2.0, rel=0.2)


def test_sampling_depends_on_the_step_alone() -> None:
    buffer = ExperienceBuffer(256, 10, seed=3)
    for number in range(1, 100):
        buffer.add(record(number))
    assert buffer.sample(16, 7) == buffer.sample(16, 7)
    assert buffer.sample(16, 7) != buffer.sample(16, 8)
    assert len(buffer.sample(5, 1)) == 5


def test_sampling_an_empty_buffer_says_so() -> None:
    with pytest.raises(ValueError, match="no training experience"):
        ExperienceBuffer(64, 5, seed=0).sample(1, 0)


def test_the_watch_list_is_bounded() -> None:
    buffer = ExperienceBuffer(64, 5, seed=0)
    for number in range(1, MAX_WATCHED + 50):
        buffer.add(record(number, score=-1.0))
    buffer.check_invariants()
    assert buffer.counts()["not_imitated"] == MAX_WATCHED


_operations = st.lists(
    st.tuples(
        st.sampled_from(["add", "forget", "judge", "reload"]),
        st.integers(1, 120),
        st.sampled_from([None, -1.0, 0.0, 1.0]),
    ),
    max_size=120,
)


@hypothesis_settings(max_examples=60, deadline=None)
@given(operations=_operations, percent=st.sampled_from([5, 30, 50]))
def test_invariants_hold_after_every_operation(operations: list[tuple[str, int, float | None]], percent: int) -> None:
    buffer = ExperienceBuffer(64, percent, seed=5)
    stored: dict[int, Record] = {}
    for operation, number, score in operations:
        if operation == "add":
            fresh = record(len(stored) + 1, text=f"text {number}", score=score)
            stored[fresh.id] = fresh
            buffer.add(fresh)
        elif operation == "forget":
            buffer.forget([number])
        elif operation == "judge":
            buffer.judge(number, score)
        else:
            state = buffer.state_dict()
            before = (buffer.training(), buffer.holdout())
            buffer = ExperienceBuffer(64, percent, seed=5)
            kept = {item.id: item.score for part in before for item in part}
            rows = [
                record(key, text=stored[key].observation, score=kept[key]) for key in ExperienceBuffer.ids_in(state)
            ]
            buffer.load_state_dict(state, rows)
            assert (buffer.training(), buffer.holdout()) == before
            assert buffer.state_dict() == state
        buffer.check_invariants()


def test_content_does_not_depend_on_how_the_history_was_cut(history: History, database: Database) -> None:
    source = ExperienceSource(history, "d")
    live = ExperienceBuffer(64, 15, seed=9)
    for part in range(20):
        history.append([experience(f"text {part} {number}") for number in range(part + 1)])
        source.sync(live)
        live.check_invariants()
    at_once = ExperienceBuffer(64, 15, seed=9)
    source.sync(at_once)
    assert at_once.state_dict() == live.state_dict()


def test_a_buffer_rebuilt_from_its_state_draws_the_same_batches(history: History, database: Database) -> None:
    source = ExperienceSource(history, "d")
    live = ExperienceBuffer(64, 15, seed=9)
    history.append([experience(f"text {number}") for number in range(300)])
    source.sync(live)
    rebuilt = ExperienceBuffer(64, 15, seed=9)
    source.restore(rebuilt, live.state_dict())
    rebuilt.check_invariants()
    history.append([experience(f"later {number}") for number in range(50)])
    source.sync(live)
    source.sync(rebuilt)
    assert [rebuilt.sample(16, step) for step in range(20)] == [live.sample(16, step) for step in range(20)]
    assert rebuilt.holdout() == live.holdout()


def test_deleted_experiences_leave_every_part(history: History, database: Database) -> None:
    source = ExperienceSource(history, "d")
    buffer = ExperienceBuffer(256, 30, seed=0)
    stored = history.append(
        [experience(f"text {number}", session_id="s" if number % 2 else "t") for number in range(100)]
    )
    source.sync(buffer)
    history.delete(session_id="s")
    report = source.sync(buffer)
    assert report.forgotten == 50
    gone = {row.id for row in stored if row.session_id == "s"}
    assert not gone & {item.id for item in [*buffer.training(), *buffer.holdout()]}
    assert len(buffer) == 50
    buffer.check_invariants()


def test_late_judgements_are_noticed(history: History, database: Database) -> None:
    source = ExperienceSource(history, "d")
    buffer = ExperienceBuffer(256, 5, seed=0)
    good, bad, own = history.append([experience("good"), experience("bad"), experience("own", source="query")])
    source.sync(buffer)
    assert own.id not in {item.id for item in buffer.training()}
    history.give_feedback(bad.id, "wrong", -1.0)
    history.give_feedback(own.id, "right", 1.0)
    source.sync(buffer)
    held = {item.id: item.score for item in [*buffer.training(), *buffer.holdout()]}
    assert held == {good.id: None, own.id: 1.0}
    history.give_feedback(bad.id, "right after all", 0.5)
    source.sync(buffer)
    assert bad.id in {item.id for item in [*buffer.training(), *buffer.holdout()]}
    buffer.check_invariants()


def test_domains_are_kept_apart_and_the_star_sees_all(history: History, database: Database) -> None:
    history.append([experience("mine"), NewExperience("theirs", "x", domain="other", source="api")])
    mine, everything = ExperienceBuffer(64, 5, seed=0), ExperienceBuffer(64, 5, seed=0)
    ExperienceSource(history, "d").sync(mine)
    ExperienceSource(history, "*").sync(everything)
    assert (len(mine), len(everything)) == (1, 2)


def test_a_prioritised_share_goes_to_what_is_known_worst() -> None:
    buffer = ExperienceBuffer(256, 5, seed=1, priority_share=0.5)
    for number in range(1, 101):
        buffer.add(record(number))
    held = [item.id for item in buffer.training()]
    buffer.learned(held, [2.0 if item == held[0] else 0.01 for item in held])
    drawn = Counter(item.id for step in range(100) for item in buffer.sample(16, step))
    plain = 100 * 16 / len(held)
    assert drawn[held[0]] > 5 * plain
    draw = buffer.draw(16, step=3)
    assert draw == buffer.draw(16, step=3)
    assert draw.weights[8:] == [1.0] * 8
    assert min(draw.weights[:8]) < 1.0
    by_id = dict(zip([item.id for item in draw.examples], draw.weights, strict=True))
    assert by_id.get(held[0], 0.0) < 1.0
    buffer.check_invariants()


def test_without_a_prioritised_share_every_row_counts_the_same() -> None:
    buffer = ExperienceBuffer(256, 5, seed=1)
    for number in range(1, 50):
        buffer.add(record(number))
    assert buffer.draw(16, 0).weights == [1.0] * 16
    assert buffer.state_dict()["priorities"] is None


def test_priorities_are_part_of_what_is_restored() -> None:
    live = ExperienceBuffer(64, 15, seed=9, priority_share=0.5)
    rows = [record(number) for number in range(1, 200)]
    for row in rows:
        live.add(row)
        live.learned([item.id for item in live.sample(4, row.id)], [row.id / 100] * 4) if live.training() else None
        live.check_invariants()
    restored = ExperienceBuffer(64, 15, seed=9, priority_share=0.5)
    restored.load_state_dict(live.state_dict(), rows)
    restored.check_invariants()
    assert restored.state_dict() == live.state_dict()
    for number in range(200, 240):
        for buffer in (live, restored):
            buffer.add(record(number))
    assert [live.draw(16, step) for step in range(20)] == [restored.draw(16, step) for step in range(20)]
    plain = ExperienceBuffer(64, 15, seed=9, priority_share=0.5)
    plain.load_state_dict({**live.state_dict(), "priorities": None}, [*rows, *(record(n) for n in range(200, 240))])
    plain.check_invariants()


def test_a_source_at_its_cap_replaces_only_its_own() -> None:
    buffer = ExperienceBuffer(100, 10, seed=2, source_cap_percent=40)
    for number in range(1, 31):
        buffer.add(record(number, source="api"))
    kept = {item.id for item in buffer.training()}
    for number in range(31, 2000):
        buffer.add(record(number, source="chat"))
        buffer.check_invariants()
    state = buffer.state_dict()
    flood = [item.id for item in buffer.training() if item.source == "chat"]
    assert kept <= {item.id for item in buffer.training()}
    assert len([item for item in state["recent"] if item in flood]) == buffer.recent_capacity * 40 // 100
    assert len([item for item in state["reservoir"] if item in flood]) == buffer.reservoir_capacity * 40 // 100
    in_reservoir = [item for item in state["reservoir"] if item in flood]
    assert min(in_reservoir) < 1000  # a sample of all that the source sent, not the newest
    restored = ExperienceBuffer(100, 10, seed=2, source_cap_percent=40)
    restored.load_state_dict(state, [record(n, source="api" if n < 31 else "chat") for n in range(1, 2000)])
    assert restored.state_dict() == state
    for number in range(2000, 2100):
        for each in (buffer, restored):
            each.add(record(number, source="chat"))
    assert restored.state_dict() == buffer.state_dict()
