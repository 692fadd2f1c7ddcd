"""What the process and its machine use: samples, threads, sizes, the container's limit."""

from __future__ import annotations

import threading
from pathlib import Path

import psutil

from olympus import vitals
from olympus.vitals import Vitals
from telemetry.hub import EventHub

COUNTS = {"generating": 1, "waiting": 2, "chats": 3, "streams": 4, "training": 5}


def test_samples_are_kept_and_told(tmp_path: Path) -> None:
    hub = EventHub()
    watched = Vitals(hub, tmp_path, lambda: COUNTS, every_seconds=0.02)
    assert watched.newest is None
    assert watched.series()["at"] == []
    with hub.subscribe(["system"]) as watcher:
        watched.start()
        event = watcher.get(10)[-1]
        watched.stop()
    watched.check_invariants()
    assert event.data["training"] == 5
    assert event.data["rss_bytes"] > 1 << 20
    series = watched.series()
    assert len({len(column) for column in series.values()}) == 1
    assert series["waiting"][-1] == 2
    newest = watched.newest
    assert newest is not None
    assert newest.disk_free_bytes > 0
    assert newest.threads >= 1


def test_threads_are_grouped_by_name_with_the_libraries_apart() -> None:
    stop = threading.Event()
    made = [threading.Thread(target=stop.wait, name=f"pool-{number}_{number}", daemon=True) for number in range(3)]
    for thread in made:
        thread.start()
    try:
        told = {item["name"]: item for item in vitals.threads()}
    finally:
        stop.set()
    assert told["pool"]["threads"] == 3
    assert told["MainThread"]["threads"] == 1
    seconds = [item["cpu_seconds"] for item in vitals.threads()]
    assert seconds == sorted(seconds, reverse=True)


def test_sizes_of_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "one").write_bytes(b"x" * 10)
    (tmp_path / "a" / "b" / "two").write_bytes(b"x" * 20)
    (tmp_path / "olympus.db").write_bytes(b"x" * 5)
    (tmp_path / "olympus.db-wal").write_bytes(b"x" * 6)
    parts = {"a": tmp_path / "a", "database": tmp_path / "olympus.db", "none": tmp_path / "none"}
    told = vitals.disk(parts, tmp_path)
    assert told["parts"] == {"a": 30, "database": 11, "none": 0}
    assert 0 < told["free_bytes"] <= told["total_bytes"]


def test_a_limit_of_the_control_group(tmp_path: Path) -> None:
    limit = tmp_path / "memory.max"
    assert vitals.memory_limit((limit,)) is None
    limit.write_text("max\n")
    assert vitals.memory_limit((limit,)) is None
    limit.write_text("123456789\n")
    assert vitals.memory_limit((limit,)) == 123_456_789
    limit.write_text(str(psutil.virtual_memory().total * 2))
    assert vitals.memory_limit((limit,)) is None, "more than there is limits nothing"
