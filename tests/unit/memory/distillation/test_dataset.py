"""The dataset file: the same rows come back, others can read it, and a bad row is named."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from memory.distillation import dataset
from memory.distillation.dataset import SCHEMA, iter_dataset, read_dataset, write_dataset
from memory.distillation.errors import BadRow, DatasetDamaged
from memory.distillation.rows import Row, RowMessage, flatten_topk


def row(number: int = 0, **metadata: Any) -> Row:
    answer = RowMessage(
        "assistant",
        f"Grüße {number}",
        (number, 7),
        flatten_topk([[number, 1, 2], [7, 8, 9]], np.log([[0.5, 0.3, 0.1], [0.995, 0.002, 0.001]])),
    )
    known = {"content_key": f"k{number}", "experience_id": number, "split": "train", "weight": 1.5, "kind": "replay"}
    return Row(
        (RowMessage("user", "q"), answer),
        "be brief",
        {**known, "target": "teacher", "teacher_tokens": 900, **metadata},
        "replay",
    )


GOLD = Row((RowMessage("user", "q"), RowMessage("assistant", "OPS-RED")), metadata={"target": "feedback"})


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    rows = [row(1), GOLD, row(2, style={"name": "turns", "dropped": 3}), row(3, split="eval")]
    assert write_dataset(tmp_path / "dataset.parquet", rows) == 4
    assert read_dataset(tmp_path / "dataset.parquet") == rows
    assert [path.name for path in tmp_path.iterdir()] == ["dataset.parquet"]


def test_many_rows_are_streamed_in_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "_GROUP", 4)
    assert write_dataset(tmp_path / "d.parquet", (row(number) for number in range(11))) == 11
    with pq.ParquetFile(tmp_path / "d.parquet") as file:
        assert file.num_row_groups == 3
    assert list(iter_dataset(tmp_path / "d.parquet")) == [row(number) for number in range(11)]
    assert write_dataset(tmp_path / "d.parquet", []) == 0
    assert read_dataset(tmp_path / "d.parquet") == []


def test_the_columns_are_those_of_the_cartridges_library(tmp_path: Path) -> None:
    """Read as that library does: ``pq.read_table(path).to_pylist()``, then by attribute names."""
    write_dataset(tmp_path / "d.parquet", [row(1)])
    table = pq.read_table(tmp_path / "d.parquet")
    assert table.schema.equals(SCHEMA)
    assert table.column_names == ["messages", "system_prompt", "metadata", "type"]
    (plain,) = table.to_pylist()
    assert sorted(plain["messages"][1]) == ["content", "role", "token_ids", "top_logprobs"]
    top = plain["messages"][1]["top_logprobs"]
    assert sorted(top) == ["logprobs", "shape", "token_id", "token_idx"]
    assert (top["token_idx"], top["token_id"], top["shape"]) == ([0, 0, 0, 1], [1, 1, 2, 7], [2, 3])
    assert plain["messages"][0]["token_ids"] is None
    assert plain["metadata"]["experience_id"] == 1
    with pq.ParquetFile(tmp_path / "d.parquet") as file:
        assert file.metadata.row_group(0).column(0).compression == "SNAPPY"


def test_what_that_library_writes_is_read(tmp_path: Path) -> None:
    """It lets Arrow infer the types from ``asdict``; metadata is whatever it was."""
    plain = {
        "messages": [
            {"content": "q", "role": "user", "token_ids": None, "top_logprobs": None},
            {
                "content": "a",
                "role": "assistant",
                "token_ids": [3],
                "top_logprobs": {"token_idx": [0], "token_id": [3], "logprobs": [-0.01], "shape": [1, 20]},
            },
        ],
        "system_prompt": "chunk",
        "metadata": {"tool_calls": [], "seed_prompt": "question"},
        "type": None,
    }
    pq.write_table(pa.Table.from_pylist([plain]), tmp_path / "d.parquet")
    (found,) = read_dataset(tmp_path / "d.parquet")
    assert found.answer.token_ids == (3,)
    assert found.metadata == {"tool_calls": [], "seed_prompt": "question"}
    assert found.target == "teacher"


def test_a_bad_row_on_the_way_in_is_named_and_nothing_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    write_dataset(path, [row(1)])
    with pytest.raises(BadRow, match=r"row 1: metadata\.experience_id"):
        write_dataset(path, [row(2), row(3, experience_id="seven")])
    with pytest.raises(BadRow, match=r"row 0: metadata\.kind is None"):
        write_dataset(path, [row(2, kind=None)])
    assert read_dataset(path) == [row(1)]
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    write_dataset(path, [row(1)])

    def fails() -> Iterator[Row]:
        yield row(2)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_dataset(path, fails())
    assert read_dataset(path) == [row(1)]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"role": "robot"}, "row 1: role"),
        ({"token_ids": [1, 2, 3]}, "row 1: 3 token_ids"),
        ({"content": None}, "row 1: content"),
    ],
)
def test_a_bad_row_on_the_way_out_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write_dataset(tmp_path / "good.parquet", [row(1), row(2)])
    plain = pq.read_table(tmp_path / "good.parquet").to_pylist()
    plain[1]["messages"][1].update(change)
    pq.write_table(pa.Table.from_pylist(plain, schema=SCHEMA), tmp_path / "bad.parquet")
    with pytest.raises(BadRow, match=message):
        read_dataset(tmp_path / "bad.parquet")


def test_what_is_no_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetDamaged, match="no readable parquet"):
        read_dataset(tmp_path / "absent.parquet")
    (tmp_path / "text.parquet").write_text("not parquet")
    with pytest.raises(DatasetDamaged, match="no readable parquet"):
        read_dataset(tmp_path / "text.parquet")
    pq.write_table(pa.table({"messages": [1]}), tmp_path / "other.parquet")
    with pytest.raises(DatasetDamaged, match="lacks the columns system_prompt, metadata, type"):
        read_dataset(tmp_path / "other.parquet")
