"""The rows of a distillation as one parquet file in the schema of the Cartridges library.

Columns ``messages``, ``system_prompt``, ``metadata`` and ``type``; ``SCHEMA`` is the definition, docs/distillation.md
the explanation. Files are written by streaming, and appear whole or not at all. Any parquet reader opens them.

A row that the schema does not allow is an error that names it, on the way in and on the way out: a training run must
not lose an example without a word.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from memory.distillation.errors import BadRow, DatasetDamaged
from memory.distillation.rows import FlatTopLogprobs, Row, RowMessage
from storage import files

_GROUP = 500  # rows that are held in memory as Arrow arrays at once

TOP_LOGPROBS = pa.struct(
    [
        ("token_idx", pa.list_(pa.int32())),
        ("token_id", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),
        ("shape", pa.list_(pa.int64())),
    ]
)
MESSAGE = pa.struct(
    [
        ("content", pa.string()),
        ("role", pa.string()),
        ("token_ids", pa.list_(pa.int64())),
        ("top_logprobs", TOP_LOGPROBS),
    ]
)
#: The metadata that has a column of its own; everything else travels in ``extra`` as JSON.
METADATA = pa.struct(
    [
        ("content_key", pa.string()),
        ("experience_id", pa.int64()),
        ("split", pa.string()),
        ("weight", pa.float64()),
        ("target", pa.string()),
        ("kind", pa.string()),
        ("teacher_tokens", pa.int64()),
        ("extra", pa.string()),
    ]
)
SCHEMA = pa.schema(
    [
        ("messages", pa.list_(MESSAGE)),
        ("system_prompt", pa.string()),
        ("metadata", METADATA),
        ("type", pa.string()),
    ]
)
_NAMED = tuple(field.name for field in METADATA if field.name != "extra")
_NEEDED = ("messages", "system_prompt", "metadata", "type")


def write_dataset(path: Path | str, rows: Iterable[Row]) -> int:
    """Write ``rows`` to ``path``, durably, replacing what was there; returns how many.

    Raises ``BadRow`` naming the row (counted from 0); the file on disk is then as it was.
    """
    count = 0
    source = iter(rows)
    with (
        files.publish_file(Path(path)) as partial,
        pq.ParquetWriter(partial, SCHEMA, compression="snappy") as writer,
    ):
        while group := list(itertools.islice(source, _GROUP)):
            plain = [_plain(row, count + offset) for offset, row in enumerate(group)]
            writer.write_table(pa.Table.from_pylist(plain, schema=SCHEMA))
            count += len(group)
    return count


def read_dataset(path: Path | str) -> list[Row]:
    """All rows of a file. Raises ``DatasetDamaged`` for the file, ``BadRow`` for a row."""
    return list(iter_dataset(path))


def iter_dataset(path: Path | str) -> Iterator[Row]:
    """Like ``read_dataset``, holding a few hundred rows at a time."""
    try:
        with pq.ParquetFile(path) as file:
            missing = [name for name in _NEEDED if name not in file.schema_arrow.names]
            if missing:
                raise DatasetDamaged(f"{path}: lacks the columns {', '.join(missing)}; see docs/distillation.md")
            index = 0
            for batch in file.iter_batches(batch_size=_GROUP, columns=list(_NEEDED)):
                for plain in batch.to_pylist():
                    yield _row(plain, f"{path}: row {index}")
                    index += 1
    except (OSError, pa.ArrowException) as error:
        raise DatasetDamaged(f"{path}: no readable parquet file ({error}); make the dataset again") from None


def _plain(row: Row, index: int) -> dict[str, Any]:
    metadata = {name: row.metadata[name] for name in _NAMED if name in row.metadata}
    for name, value in metadata.items():
        try:
            pa.scalar(value, METADATA.field(name).type)
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise BadRow(f"row {index}: metadata.{name}: {error}") from None
        if value is None:
            raise BadRow(f"row {index}: metadata.{name} is None; leave it out instead")
    extra = {name: value for name, value in row.metadata.items() if name not in _NAMED}
    if extra:
        metadata["extra"] = json.dumps(extra, sort_keys=True, allow_nan=False)
    return {
        "messages": [_plain_message(message) for message in row.messages],
        "system_prompt": row.system_prompt,
        "metadata": metadata,
        "type": row.type,
    }


def _plain_message(message: RowMessage) -> dict[str, Any]:
    top = message.top_logprobs
    return {
        "content": message.content,
        "role": message.role,
        "token_ids": None if message.token_ids is None else list(message.token_ids),
        "top_logprobs": None
        if top is None
        else {
            "token_idx": top.token_idx,
            "token_id": top.token_id,
            "logprobs": top.logprobs,
            "shape": list(top.shape),
        },
    }


def _row(plain: dict[str, Any], where: str) -> Row:
    try:
        messages = tuple(_message(item) for item in plain["messages"] or ())
        metadata = {name: value for name, value in (plain["metadata"] or {}).items() if value is not None}
        extra = metadata.pop("extra", None)
        if extra is not None:
            metadata.update(json.loads(extra) if isinstance(extra, str) else {"extra": extra})
        kind = plain["type"] or str(metadata.get("kind", "replay"))
        return Row(messages, plain["system_prompt"] or "", metadata, kind)
    except BadRow as error:
        raise BadRow(f"{where}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadRow(f"{where}: not what the schema says: {error!r}") from None


def _message(plain: dict[str, Any]) -> RowMessage:
    top = plain.get("top_logprobs")
    if top is not None and top.get("token_idx") is None:
        top = None  # some writers turn an absent struct into one of absent members
    ids = plain.get("token_ids")
    return RowMessage(
        role=plain["role"],
        content=plain["content"],
        token_ids=None if ids is None else tuple(ids),
        top_logprobs=None
        if top is None
        else FlatTopLogprobs(top["token_idx"], top["token_id"], top["logprobs"], tuple(top["shape"])),
    )
