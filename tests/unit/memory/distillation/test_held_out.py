"""Held-out rows: what training watches is not what the gate asks."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from memory.distillation.config import GateConfig
from memory.distillation.held_out import divide
from memory.distillation.rows import Row, RowMessage


def row(key: str, split: str = "eval", kind: str = "replay") -> Row:
    messages = (RowMessage("user", key), RowMessage("assistant", "yes"))
    return Row(messages, metadata={"content_key": key, "split": split}, type=kind)


def replay(count: int) -> list[Row]:
    return [row(f"{number:04x}") for number in range(count)]


def keys(rows: Sequence[Row]) -> set[str]:
    return {str(item.metadata["content_key"]) for item in rows}


@pytest.mark.parametrize(
    ("held_out", "watched", "asked"),
    [(300, 204, 96), (90, 30, 60), (36, 0, 36), (24, 0, 24), (12, 0, 12), (0, 0, 0)],
)
def test_the_gate_comes_first(held_out: int, watched: int, asked: int) -> None:
    rows = [*replay(held_out), *[row(f"t{number}", "train") for number in range(5)]]
    found = divide(rows, GateConfig(min_rows=20, max_rows=96), 24)
    assert (len(found[0]), len(found[1])) == (watched, asked)
    assert not keys(found[0]) & keys(found[1])
    assert found == divide(rows, GateConfig(min_rows=20, max_rows=96), 24)


def test_what_is_too_little_to_watch_is_asked() -> None:
    watched, asked = divide(replay(12), GateConfig(min_rows=2), 24)
    assert (len(watched), len(asked)) == (0, 12)


def test_rows_of_one_observation_stay_together() -> None:
    rows = [*replay(60), *replay(60)]
    watched, asked = divide(rows, GateConfig(min_rows=20), 24)
    assert not keys(watched) & keys(asked)
    assert len(watched) + len(asked) == 120


def test_self_study_is_watched_and_never_asked() -> None:
    study = [row(f"s{number}", kind="summary") for number in range(8)]
    watched, asked = divide([*replay(20), *study], GateConfig(min_rows=20), 8)
    assert watched == study
    assert len(asked) == 20
