"""The history as files: ``memory_*.jsonl`` of agents, and a richer form of our own, in and out.

Plain lines are ``{"type": "Observation" | "Action" | "Feedback", "content": ...}``, as agents that keep a list of
entries save them: an observation opens an experience, action and feedback complete it. Rich lines hold one experience
each (``RICH`` names their fields). Both may stand in one file.

Importing reads line by line, loses nothing and repeats nothing: a line that cannot be used is reported with its number
and kept in ``<file>.rejected``; what the domain holds already is not written again, and what was deleted there stays
deleted. An import that was interrupted is simply run again.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from memory.history import History, HistoryError, NewExperience, Record, content_hash
from storage import files

SCHEMA = "olympus.experience/1"
#: Fields of a rich line beside ``schema``. The last three say where it came from; they are not taken over.
RICH = (
    *("domain", "source", "observation", "action", "feedback", "score"),
    *("session_id", "episode_id", "messages", "meta"),
    *("id", "content_hash", "created_at"),
)
_LONGEST_LINE = 16 << 20
_BATCH = 200
_LENGTHS = {"domain": 64, "source": 32, "session_id": 128, "episode_id": 64}


class SnapshotError(HistoryError):
    """A snapshot cannot be read or written at all; the message says which and why."""


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line, or the experience that begins there, that cannot be used."""

    line: int
    reason: str
    text: str


@dataclass
class ImportReport:
    """What an import did. ``rejected`` is the file with the bad lines, if there are any."""

    imported: int = 0
    known: int = 0  #: in the history already
    deleted: int = 0  #: was deleted there, and stays so
    bad: list[tuple[int, str]] = field(default_factory=list)
    rejected: Path | None = None


def export_snapshot(history: History, path: Path, *, domain: str | None = None, rich: bool = True) -> int:
    """Write a domain (or all of them) to ``path``, oldest first, tombstones left out; returns how many experiences.

    Plain lines (``rich=False``) are what agents load; they hold no domain, score or session.
    """
    count = 0
    with files.publish_file(path) as partial, open(partial, "w", encoding="utf-8") as handle:
        for record in _living(history, domain):
            for value in [_rich(record)] if rich else _plain(record):
                handle.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")
            count += 1
    return count


def import_snapshot(history: History, path: Path, *, domain: str, source: str = "snapshot") -> ImportReport:
    """Append what ``path`` holds to the history. ``domain`` and ``source`` are for lines that name none.

    Raises ``SnapshotError`` when the file cannot be read; single lines never raise.
    """
    report, seen = ImportReport(), _Seen(history)
    with ExitStack() as stack:
        reject = _Rejects(path.with_name(path.name + ".rejected"), stack)
        batch: list[tuple[int, NewExperience]] = []
        for item in read_snapshot(path, domain=domain, source=source):
            if isinstance(item, BadLine):
                report.bad.append((item.line, item.reason))
                reject.add(item)
                continue
            batch.append(item)
            if len(batch) == _BATCH:
                _append(history, batch, seen, report)
                batch = []
        _append(history, batch, seen, report)
        report.rejected = reject.path if report.bad else None
    return report


def read_snapshot(
    path: Path, *, domain: str, source: str = "snapshot"
) -> Iterator[tuple[int, NewExperience] | BadLine]:
    """The experiences of a file with the numbers of their first lines, and what is bad, as it is read."""
    grouping = _Grouping(domain, source)
    try:
        with open(path, "rb") as handle:
            for number, raw in enumerate(_lines(handle), start=1):
                if raw.strip():
                    yield from grouping.add(number, raw)
            yield from grouping.close()
    except OSError as error:
        raise SnapshotError(f"{path} cannot be read: {error.strerror or error}") from None


def load_records(path: Path, *, domain: str) -> tuple[list[Record], list[BadLine]]:
    """A snapshot as records that are in no database, numbered from 1; for distilling a file."""
    records: list[Record] = []
    bad: list[BadLine] = []
    for item in read_snapshot(path, domain=domain):
        if isinstance(item, BadLine):
            bad.append(item)
        else:
            records.append(_loose(item[1], len(records) + 1))
    return records, bad


def newest_snapshot(folder: Path) -> Path:
    """The ``memory_*.jsonl`` in ``folder`` that was changed last. Raises ``SnapshotError`` when there is none."""
    found = sorted(folder.glob("memory_*.jsonl"), key=lambda path: (path.stat().st_mtime_ns, path.name))
    if not found:
        raise SnapshotError(f"{folder} holds no memory_*.jsonl; export one, or distil the history itself")
    return found[-1]


# -- writing ------------------------------------------------------------------------------------------------------


def _living(history: History, domain: str | None) -> Iterator[Record]:
    cursor = 0
    while page := history.since(cursor, domain=domain):
        yield from (record for record in page if not record.deleted)
        cursor = page[-1].id


def _rich(record: Record) -> dict[str, Any]:
    return {"schema": SCHEMA, **{name: getattr(record, name) for name in RICH}}


def _plain(record: Record) -> list[dict[str, str]]:
    return [{"type": entry.type, "content": entry.content} for entry in record.entries()]


class _Rejects:
    """The file of bad lines; it is written only if there are any."""

    def __init__(self, path: Path, stack: ExitStack):
        self.path, self._stack = path, stack
        self._handle: Any = None

    def add(self, bad: BadLine) -> None:
        if self._handle is None:
            partial = self._stack.enter_context(files.publish_file(self.path))
            self._handle = self._stack.enter_context(partial.open("w", encoding="utf-8"))
        line = {"line": bad.line, "reason": bad.reason, "text": bad.text}
        self._handle.write(json.dumps(line, ensure_ascii=True) + "\n")


# -- appending ----------------------------------------------------------------------------------------------------


class _Seen:
    """How often each content occurred in the file so far, and in the history before it was read."""

    def __init__(self, history: History):
        self._history = history
        self._before: dict[tuple[str, str], tuple[int, int]] = {}
        self._file: Counter[tuple[str, str]] = Counter()

    def look_up(self, items: Iterable[NewExperience]) -> None:
        wanted: dict[str, list[str]] = {}
        for item in items:
            key = _key(item)
            if key not in self._before:
                self._before[key] = (0, 0)
                wanted.setdefault(item.domain, []).append(key[1])
        for domain, hashes in wanted.items():
            counts = self._history.content_counts(domain, hashes)
            self._before.update({(domain, name): count for name, count in counts.items()})

    def place(self, item: NewExperience) -> tuple[int, int, int]:
        """Which occurrence in the file this is; how many the history had before, and had deleted."""
        key = _key(item)
        self._file[key] += 1
        return self._file[key], *self._before[key]


def _append(history: History, batch: Sequence[tuple[int, NewExperience]], seen: _Seen, report: ImportReport) -> None:
    seen.look_up(item for _, item in batch)
    fresh: list[NewExperience] = []
    for _, item in batch:
        occurrence, stored, deleted = seen.place(item)
        if occurrence <= stored - deleted:
            report.known += 1
        elif occurrence <= stored:
            report.deleted += 1
        else:  # the id makes two imports at once harmless
            digest = hashlib.sha256(f"{item.domain}\n{_key(item)[1]}\n{occurrence}".encode()).hexdigest()
            fresh.append(replace(item, request_id=f"import:{digest}"))
    if fresh:
        history.append(fresh)
        report.imported += len(fresh)


def _key(item: NewExperience) -> tuple[str, str]:
    return item.domain, content_hash(item.observation, item.action)


def _loose(item: NewExperience, number: int) -> Record:
    return Record(
        id=number,
        domain=item.domain,
        source=item.source,
        observation=item.observation,
        action=item.action,
        feedback=item.feedback,
        score=item.score,
        session_id=item.session_id,
        episode_id=item.episode_id,
        messages=item.messages,
        meta=item.meta,
        content_hash=content_hash(item.observation, item.action),
        created_at=float(number),
        deleted=False,
    )


# -- reading ------------------------------------------------------------------------------------------------------


class _Bad(ValueError):
    """A line that cannot be used; the message is the reason."""


class _Grouping:
    """Turns lines into experiences: entries are collected until the next observation, rich lines stand alone."""

    def __init__(self, domain: str, source: str):
        self._domain, self._source = domain, source
        self._open: dict[str, str] = {}
        self._line = 0
        self._complete: list[tuple[int, dict[str, str]]] = []

    def add(self, number: int, raw: bytes) -> Iterator[tuple[int, NewExperience] | BadLine]:
        try:
            value = _parse(raw)
            if value.get("schema") == SCHEMA or "observation" in value:
                yield from self.close()
                yield number, _experience(value, self._domain, self._source)
                return
            kind, content = _entry(value)
        except _Bad as error:
            yield BadLine(number, str(error), raw.decode("utf-8", "backslashreplace").rstrip("\n"))
            return
        yield from self._entry(number, kind, content)

    def close(self) -> Iterator[tuple[int, NewExperience] | BadLine]:
        """What is still open, at the end or before a rich line."""
        if self._open:
            self._complete.append((self._line, self._open))
            self._open = {}
        yield from self._release(keep=0)

    def _entry(self, number: int, kind: str, content: str) -> Iterator[tuple[int, NewExperience] | BadLine]:
        if kind == "Feedback" and "Action" not in self._open and self._complete:
            # Agents may write the next observation before the feedback on the last action.
            _, last = self._complete[-1]
            if "Action" in last and "Feedback" not in last:
                last["Feedback"] = content
                return
        repeated = kind == "Observation" and self._open == {kind: content}
        if repeated:
            return  # written once when it was seen and once when it was acted on
        if kind == "Observation" or kind in self._open or "Feedback" in self._open:
            if self._open:
                self._complete.append((self._line, self._open))
            self._open = {}
        if not self._open:
            self._line = number
        self._open[kind] = content
        yield from self._release(keep=1)

    def _release(self, keep: int) -> Iterator[tuple[int, NewExperience] | BadLine]:
        """All complete experiences but the last ``keep``, whose feedback may be still to come."""
        while len(self._complete) > keep:
            line, entries = self._complete.pop(0)
            fields = {
                "observation": entries.get("Observation", ""),
                "action": entries.get("Action", ""),
                "feedback": entries.get("Feedback"),
            }
            try:
                yield line, _experience(fields, self._domain, self._source)
            except _Bad as error:
                yield BadLine(line, str(error), json.dumps(entries))


def _lines(handle: IO[bytes]) -> Iterator[bytes]:
    """The lines of a file; of one that is too long, enough to see that it is."""
    while line := handle.readline(_LONGEST_LINE + 1):
        yield line
        while not line.endswith(b"\n") and line:
            line = handle.readline(1 << 20)


def _parse(raw: bytes) -> dict[str, Any]:
    if len(raw) > _LONGEST_LINE:
        raise _Bad(f"longer than {_LONGEST_LINE} bytes")
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError:
        raise _Bad("not UTF-8") from None
    except (ValueError, RecursionError):
        raise _Bad("not JSON") from None
    if not isinstance(value, dict):
        raise _Bad("not a JSON object")
    return value


def _entry(value: dict[str, Any]) -> tuple[str, str]:
    kind, content = value.get("type"), value.get("content")
    if not isinstance(kind, str) or kind not in ("Observation", "Action", "Feedback"):
        raise _Bad(f"type is {kind!r}, not Observation, Action or Feedback"[:200])
    if isinstance(content, dict | list):
        content = json.dumps(content, ensure_ascii=False)
    if not isinstance(content, str) or not content:
        raise _Bad("content is no text")
    return kind, content


def _experience(value: dict[str, Any], domain: str, source: str) -> NewExperience:
    unknown = set(value) - set(RICH) - {"schema"}
    if unknown:
        raise _Bad(f"unknown fields: {', '.join(sorted(unknown))}"[:200])
    fields: dict[str, Any] = {name: value.get(name) for name in RICH[:-3]}
    fields["domain"], fields["source"] = fields["domain"] or domain, fields["source"] or source
    for name, text in fields.items():
        wanted = name in ("domain", "source", "observation", "action")
        if name in ("score", "messages", "meta") or (text is None and not wanted):
            continue
        if not isinstance(text, str) or len(text) > _LENGTHS.get(name, len(text)):
            raise _Bad(f"{name} must be text of at most {_LENGTHS.get(name, _LONGEST_LINE)} characters")
    score = fields["score"]
    if score is not None and (
        isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score)
    ):
        raise _Bad("score must be a finite number")
    messages = fields["messages"]
    if messages is not None and not (isinstance(messages, list) and all(isinstance(item, dict) for item in messages)):
        raise _Bad("messages must be a list of objects")
    fields["meta"] = {} if fields["meta"] is None else fields["meta"]
    if not isinstance(fields["meta"], dict):
        raise _Bad("meta must be an object")
    try:
        "".join(text for text in fields.values() if isinstance(text, str)).encode("utf-8")
        return NewExperience(**fields)
    except UnicodeEncodeError:
        raise _Bad("text holds half a surrogate pair") from None
    except HistoryError as error:
        raise _Bad(str(error)) from None
