"""Durable files: whole or absent; the lock; the janitor."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from storage import files

ROOT = Path(__file__).resolve().parents[3]


def test_write_bytes_replaces_atomically_and_leaves_no_partial(tmp_path: Path) -> None:
    target = tmp_path / "x"
    files.write_bytes(target, b"one")
    files.write_bytes(target, b"two", mode=0o600)
    assert target.read_bytes() == b"two"
    assert target.stat().st_mode & 0o777 == 0o600
    assert [item.name for item in tmp_path.iterdir()] == ["x"]


def test_write_json_refuses_nan_and_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "x.json"
    files.write_json(target, {"a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        files.write_json(target, {"a": float("nan")})
    assert json.loads(target.read_text()) == {"a": 1}


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        files.write_bytes(tmp_path / "x", b"data")
    assert list(tmp_path.iterdir()) == []


def test_publish_directory_is_all_or_nothing(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "step-1"
    with files.publish_directory(final) as partial:
        (partial / "a").write_text("a")
        assert not final.exists()
    assert (final / "a").read_text() == "a"
    with pytest.raises(FileExistsError, match="never change"), files.publish_directory(final) as partial:
        (partial / "a").write_text("b")
    with pytest.raises(RuntimeError, match="boom"), files.publish_directory(tmp_path / "deep" / "step-2"):
        raise RuntimeError("boom")
    assert [item.name for item in final.parent.iterdir()] == ["step-1"]
    files.remove_directory(final)
    assert list(final.parent.iterdir()) == []


def test_sweep_removes_only_partials(tmp_path: Path) -> None:
    (tmp_path / "a" / files.partial_path(Path("step-1")).name).mkdir(parents=True)
    (tmp_path / files.partial_path(Path("f")).name).write_text("half")
    (tmp_path / "a" / "keep").write_text("whole")
    assert len(files.sweep_partials(tmp_path)) == 2
    assert sorted(item.name for item in tmp_path.rglob("*")) == ["a", "keep"]


def test_publishing_survives_kill_9_at_any_moment(tmp_path: Path) -> None:
    """A writer that publishes without pause is killed many times: what is there is always whole."""
    script = textwrap.dedent("""
        import sys
        from pathlib import Path
        from storage import files
        root = Path(sys.argv[1]); n = len(list(root.glob("step-*")))
        print("go", flush=True)
        while True:
            with files.publish_directory(root / f"step-{n:06d}") as partial:
                for name in ("a", "b"):
                    (partial / name).write_bytes(bytes([n % 251]) * 200_000)
            n += 1
    """)
    for trial in range(5):
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "go\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.05 + 0.03 * trial)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    published = sorted(tmp_path.glob("step-*"))
    assert published
    for index, path in enumerate(published):
        for name in ("a", "b"):
            assert (path / name).read_bytes() == bytes([index % 251]) * 200_000
    assert len(files.sweep_partials(tmp_path)) <= 5


def test_the_lock_names_its_owner_and_dies_with_it(tmp_path: Path) -> None:
    script = (
        "import sys, time; from storage.files import *; lock = DataDirLock(Path(sys.argv[1])); "
        "lock.acquire(); print(1, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    lock = files.DataDirLock(tmp_path)
    with pytest.raises(files.DataDirInUse, match=f"in use by process {process.pid}; stop that server"):
        lock.acquire()
    assert not lock.held
    process.kill()
    process.wait()
    process.stdout.close()
    lock.acquire()
    assert lock.held
    lock.release()


def test_lines_are_added_whole_and_a_torn_one_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    files.append_line(path, "one")
    files.append_line(path, "two")
    assert path.read_text() == "one\ntwo\n"
    with open(path, "ab") as handle:
        handle.write(b"x" * 200_000)  # torn, and longer than what is looked at in one go
    files.append_line(path, "three")
    assert path.read_text() == "one\ntwo\nthree\n"
    (tmp_path / "torn").write_bytes(b"never whole")
    files.append_line(tmp_path / "torn", "one")
    assert (tmp_path / "torn").read_text() == "one\n"


def test_a_streamed_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    final = tmp_path / "new" / "file"
    with files.publish_file(final) as partial:
        partial.write_text("first")
        assert not final.exists()

    def interrupted() -> None:
        with files.publish_file(final) as partial:
            partial.write_text("sec")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        interrupted()
    assert final.read_text() == "first"
    assert list(final.parent.iterdir()) == [final]
