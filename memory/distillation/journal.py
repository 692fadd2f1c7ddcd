"""The journal of a dataset in the making: one JSON line for each sample that has been dealt with.

A line is written and on disk before the next sample counts as done, so a run that is killed at any point goes on with
the first sample that has no line. The first line says of which settings and which history the rest are.

A torn last line, which a crash leaves, is cut off by the next write. A whole line that cannot be read is counted in
``damaged``, and its sample is made again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memory.distillation.errors import BadRow, JournalMismatch
from memory.distillation.rows import FlatTopLogprobs, Row, RowMessage
from storage import files

_VERSION = 1


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a sample: a row, or none and the reason. ``bad`` rows were to be made and could not."""

    sample: str
    row: Row | None = None
    reason: str = ""
    bad: bool = False


class Journal:
    """See the module docstring. One writer."""

    def __init__(self, path: Path, identity: dict[str, str]):
        """Opens or begins the journal at ``path``. Raises ``JournalMismatch`` where it is of another ``identity``."""
        self._path = path
        self._offsets: dict[str, int] = {}
        self.damaged = 0
        header = {"version": _VERSION, **identity}
        if path.exists() and self._read(header):
            return
        path.unlink(missing_ok=True)  # not even its first line is whole
        path.parent.mkdir(parents=True, exist_ok=True)
        files.append_line(path, json.dumps(header, sort_keys=True))

    def __contains__(self, sample: str) -> bool:
        return sample in self._offsets

    def __len__(self) -> int:
        return len(self._offsets)

    def append(self, outcomes: Sequence[Outcome]) -> None:
        """Note ``outcomes``, durably."""
        if not outcomes:
            return
        lines = [json.dumps(_plain(outcome), sort_keys=True, allow_nan=False) for outcome in outcomes]
        before = self._path.stat().st_size
        files.append_line(self._path, "\n".join(lines))
        size = sum(len(line.encode()) + 1 for line in lines)
        begin = self._path.stat().st_size - size  # a torn line may have gone, so not ``before``
        if begin > before:
            raise JournalMismatch(
                f"{self._path} is being written by somebody else; run one distillation in a directory"
            )
        for outcome, line in zip(outcomes, lines, strict=True):
            self._offsets[outcome.sample] = begin
            begin += len(line.encode()) + 1

    def outcomes(self, order: Iterable[str]) -> Iterator[Outcome]:
        """What became of the samples named in ``order``, in that order, read one at a time."""
        with open(self._path, "rb") as handle:
            for sample in order:
                if sample in self._offsets:
                    handle.seek(self._offsets[sample])
                    yield _outcome(json.loads(handle.readline()))

    def _read(self, header: dict[str, Any]) -> bool:
        """Index an existing file; False when it has no whole first line."""
        with open(self._path, "rb") as handle:
            first = handle.readline()
            if not first.endswith(b"\n"):
                return False
            self._check(first, header)
            begin = handle.tell()
            for line in handle:
                if line.endswith(b"\n"):
                    self._index(line, begin)
                begin += len(line)
        return True

    def _check(self, first: bytes, header: dict[str, Any]) -> None:
        try:
            found = json.loads(first)
        except ValueError:
            found = None
        if found == header:
            return
        names = sorted(name for name in header if not isinstance(found, dict) or found.get(name) != header[name])
        raise JournalMismatch(
            f"{self._path} was begun with another {', '.join(names)}; "
            "give this run its own directory, or start over in this one (restart)"
        )

    def _index(self, line: bytes, begin: int) -> None:
        try:
            sample = _outcome(json.loads(line)).sample
        except (ValueError, KeyError, TypeError, AttributeError):
            self.damaged += 1
            return
        self._offsets[sample] = begin


def row_to_json(row: Row) -> dict[str, Any]:
    """A row as JSON types."""
    return {
        "messages": [_message_to_json(message) for message in row.messages],
        "system_prompt": row.system_prompt,
        "metadata": row.metadata,
        "type": row.type,
    }


def row_from_json(plain: dict[str, Any]) -> Row:
    """The inverse of ``row_to_json``. Raises ``BadRow``, ``KeyError`` or ``TypeError`` for what is none."""
    messages = tuple(_message_from_json(item) for item in plain["messages"])
    return Row(messages, plain["system_prompt"], plain["metadata"], plain["type"])


def _message_to_json(message: RowMessage) -> dict[str, Any]:
    plain: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.token_ids is not None:
        plain["token_ids"] = list(message.token_ids)
    top = message.top_logprobs
    if top is not None:
        arrays = {"token_idx": top.token_idx, "token_id": top.token_id, "logprobs": top.logprobs}
        plain["top_logprobs"] = {name: array.tolist() for name, array in arrays.items()} | {"shape": list(top.shape)}
    return plain


def _message_from_json(plain: dict[str, Any]) -> RowMessage:
    ids, top = plain.get("token_ids"), plain.get("top_logprobs")
    flat = None
    if top is not None:
        flat = FlatTopLogprobs(top["token_idx"], top["token_id"], top["logprobs"], tuple(top["shape"]))
    return RowMessage(plain["role"], plain["content"], None if ids is None else tuple(ids), flat)


def _plain(outcome: Outcome) -> dict[str, Any]:
    if outcome.row is None:
        return {"sample": outcome.sample, "reason": outcome.reason, "bad": outcome.bad}
    return {"sample": outcome.sample, "row": row_to_json(outcome.row)}


def _outcome(plain: dict[str, Any]) -> Outcome:
    if "row" in plain:
        return Outcome(str(plain["sample"]), row_from_json(plain["row"]))
    if not isinstance(plain.get("reason"), str):
        raise BadRow("neither a row nor a reason")
    return Outcome(str(plain["sample"]), None, plain["reason"], bool(plain.get("bad", False)))
