"""Where an agent's experiences go and come from: the history, a file, or nowhere (in an evaluation).

All three are append-only and give back ``memory.history.Record``, so that agents, prompts and distillation see the
same thing whatever is behind. The history in the database is the truth of a server; the file is for lives without one.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from agents.errors import AgentConfigError, LogDamaged
from memory.history import Entry, History, NewExperience, Record, content_hash
from storage.files import append_line, write_bytes

#: Experiences of a domain that an agent looks back on: the newest.
NEWEST = 4096
_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,95}")


class ExperienceLog(Protocol):
    """Append and look back. Safe to use from all threads."""

    @property
    def domain(self) -> str:
        """The domain of the history that it is."""

    def append(self, item: NewExperience) -> Record:
        """Write down ``item``; one with a known ``request_id`` is not written again, the stored one is returned."""

    def records(self, limit: int | None = None) -> Sequence[Record]:
        """The newest ``limit`` experiences of the domain (None: as many as an agent looks back on), oldest first.

        Deleted ones are not among them.
        """


class HistoryLog:
    """One domain of the history in the database."""

    def __init__(self, history: History, domain: str, newest: int = NEWEST):
        self.domain = domain
        self._history = history
        self._newest = newest

    def append(self, item: NewExperience) -> Record:
        """One transaction; on disk when it returns."""
        return self._history.append([item])[0]

    def records(self, limit: int | None = None) -> Sequence[Record]:
        """Read anew every time: deletions and corrections count at once."""
        return self._history.page(domain=self.domain, limit=self._newest if limit is None else limit)[::-1]


class FileLog:
    """Experiences in memory and, with ``path``, in a file with one JSON object per line, read again at the start.

    A line is on disk when ``append`` returns; a torn last line, which a crash leaves, is cut off by the next one.
    """

    def __init__(self, domain: str, path: Path | None = None):
        self.domain = domain
        self._path = path
        self._lock = threading.Lock()
        self._records: list[Record] = []
        self._requests: dict[str, Record] = {}
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            for item, created in _read(path):
                self._keep(item, self._record(item, created))

    def append(self, item: NewExperience) -> Record:
        """See the class."""
        with self._lock:
            known = self._requests.get(item.request_id or "")
            if known is not None:
                return known
            created = time.time()
            record = self._record(item, created)
            if self._path is not None:
                append_line(self._path, json.dumps(asdict(item) | {"created_at": created}))
            return self._keep(item, record)

    def records(self, limit: int | None = None) -> Sequence[Record]:
        """See ``ExperienceLog``; None: all of them."""
        with self._lock:
            return _newest(self._records, limit)

    def _record(self, item: NewExperience, created: float) -> Record:
        return _as_record(item, len(self._records) + 1, created)

    def _keep(self, item: NewExperience, record: Record) -> Record:
        self._records.append(record)
        if item.request_id:
            self._requests[item.request_id] = record
        return record


@dataclass(frozen=True)
class FrozenLog:
    """What an evaluation looks back on: the experiences of one moment. What is appended is dropped."""

    domain: str
    kept: tuple[Record, ...]

    def append(self, item: NewExperience) -> Record:
        """Nothing happens; the record has id 0."""
        return _as_record(item, 0, time.time())

    def records(self, limit: int | None = None) -> Sequence[Record]:
        """Those of the moment."""
        return _newest(self.kept, limit)


def freeze(log: ExperienceLog) -> FrozenLog:
    """``log`` as it is now."""
    return FrozenLog(log.domain, tuple(log.records()))


def save_snapshot(log: ExperienceLog, folder: Path, snapshot_id: str) -> Path:
    """Write ``memory_{snapshot_id}.jsonl``: one ``{"type", "content"}`` per entry, as the seed's memories are kept.

    Scores are not part of that format; feedback is, and says the same.
    """
    if not _ID.fullmatch(snapshot_id):
        raise AgentConfigError(f"snapshot id {snapshot_id!r}: use letters, digits, _ and -, at most 96")
    entries: list[Entry] = [entry for record in log.records() for entry in record.entries()]
    lines = [json.dumps(asdict(entry)) + "\n" for entry in entries]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"memory_{snapshot_id}.jsonl"
    write_bytes(path, "".join(lines).encode())
    return path


def with_feedback(item: NewExperience, feedback: str | None, score: float | None) -> NewExperience:
    """``item`` with what came back for it."""
    return replace(item, feedback=feedback, score=score)


def _newest(records: Sequence[Record], limit: int | None) -> list[Record]:
    return list(records if limit is None else records[max(0, len(records) - limit) :])


def _as_record(item: NewExperience, number: int, created: float) -> Record:
    fields: dict[str, Any] = {name: getattr(item, name) for name in item.__dataclass_fields__ if name != "request_id"}
    digest = content_hash(item.observation, item.action)
    return Record(id=number, content_hash=digest, created_at=created, deleted=False, **fields)


def _read(path: Path) -> list[tuple[NewExperience, float]]:
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline was never acknowledged
    return [_parse(path, number, line) for number, line in enumerate(lines, start=1)]


def _parse(path: Path, number: int, line: bytes) -> tuple[NewExperience, float]:
    try:
        found = json.loads(line)
        created = float(found.pop("created_at"))
        return NewExperience(**found), created
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise LogDamaged(
            f"{path.name}, line {number}: not an experience of ours ({error}); repair or remove that line"
        ) from None
