"""Exporters: what is given away and what is not, and what is said when a library, a token or a right is missing."""

from __future__ import annotations

import builtins
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from memory.distillation.config import make_distill_config
from memory.distillation.data_generation import generate_dataset
from memory.distillation.dataset import read_dataset
from memory.distillation.errors import ExporterMissing, ExportError
from memory.distillation.exporters.hf_uploader import HubUploader
from memory.distillation.exporters.local import artifacts, export_local
from memory.distillation.exporters.wandb_exporter import export_wandb
from storage import files
from tests.support.experiences import tagged

CONFIG = make_distill_config({"hf_repo_id": "me/rows", "wandb_project": "p", "data": {"targets": "feedback"}})
NAMES = [
    "data/dataset.parquet",
    "data_report.json",
    "metrics.jsonl",
    "cache_last.pt",
    "cartridge/manifest.json",
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with everything in it."""
    folder = tmp_path / "run-1"
    generate_dataset(tagged(12), CONFIG, folder)
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    (folder / "cache-step2.pt").write_bytes(b"cache")
    (folder / "cache_last.pt").symlink_to("cache-step2.pt")
    (folder / "cartridge").mkdir()
    (folder / "cartridge" / "manifest.json").write_text("{}")
    return folder


class FakeHub:
    """As much of ``HfApi`` as is used, in memory."""

    def __init__(self, refuses: Exception | None = None):
        self.repositories: dict[str, tuple[str, bool]] = {}
        self.commits: list[tuple[str, str, dict[str, bytes]]] = []
        self._refuses = refuses

    def create_repo(self, repo_id: str, *, repo_type: str, private: bool, exist_ok: bool) -> str:
        assert exist_ok
        self.repositories[repo_id] = (repo_type, private)
        return f"https://hub.example/{repo_type}s/{repo_id}"

    def upload_folder(
        self, *, repo_id: str, folder_path: str, repo_type: str, commit_message: str, ignore_patterns: list[str]
    ) -> None:
        if self._refuses is not None:
            raise self._refuses
        root = Path(folder_path)
        held = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        self.commits.append((repo_id, commit_message, held))


def test_a_folder_gets_what_is_for_others(run: Path, tmp_path: Path) -> None:
    target = tmp_path / "out" / "export"
    assert export_local(run, target) == NAMES
    assert read_dataset(target / "data" / "dataset.parquet") == read_dataset(run / "dataset.parquet")
    assert not (target / "cache_last.pt").is_symlink()
    listing = json.loads((target / "files.json").read_text())
    assert [item["name"] for item in listing] == NAMES
    assert all(item["sha256"] == files.sha256_file(target / item["name"]) for item in listing)
    assert not list(target.rglob("journal*"))
    with pytest.raises(ExportError, match="exists already"):
        export_local(run, target)


def test_links_out_of_the_run_are_not_followed(run: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s")
    (run / "config.yaml").symlink_to(secret)
    (run / "cartridge" / "x").symlink_to(secret)
    assert [item.name for item in artifacts(run)] == NAMES


def test_a_run_without_a_dataset_has_nothing_to_export(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"no dataset\.parquet"):
        export_local(tmp_path, tmp_path / "out")


def test_a_failed_copy_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(ExportError, match="No space left"):
        export_local(run, tmp_path / "out" / "export")
    assert list((tmp_path / "out").iterdir()) == []


def test_the_hub_gets_one_private_commit(run: Path) -> None:
    hub = FakeHub()
    assert HubUploader(hub).upload_run(run, CONFIG) == "https://hub.example/datasets/me/rows"
    assert hub.repositories == {"me/rows": ("dataset", True)}
    ((repository, message, held),) = hub.commits
    assert (repository, message) == ("me/rows", "Dataset of run-1")
    assert sorted(held) == sorted([*NAMES, "README.md", "files.json"])
    assert held["data/dataset.parquet"] == (run / "dataset.parquet").read_bytes()


def test_a_cartridge_can_be_uploaded(run: Path, tmp_path: Path) -> None:
    hub = FakeHub()
    address = HubUploader(hub).upload_cartridge(run / "cartridge", "me/tags", private=False)
    assert address == "https://hub.example/models/me/tags"
    assert hub.repositories == {"me/tags": ("model", False)}
    with pytest.raises(ExportError, match="holds no cartridge"):
        HubUploader(hub).upload_cartridge(tmp_path / "absent", "me/tags")


def test_what_was_not_redacted_is_not_uploaded_by_accident(run: Path) -> None:
    bare = make_distill_config({"hf_repo_id": "me/rows", "data": {"redact": {"enabled": False}}})
    hub = FakeHub()
    with pytest.raises(ExportError, match="personal data"):
        HubUploader(hub).upload_run(run, bare)
    assert hub.commits == []
    HubUploader(hub).upload_run(run, bare, allow_unredacted=True)
    assert len(hub.commits) == 1


def test_what_the_hub_says_is_passed_on(run: Path) -> None:
    with pytest.raises(ExportError, match=r"did not take me/rows: PermissionError: 403"):
        HubUploader(FakeHub(PermissionError("403"))).upload_run(run, CONFIG)
    with pytest.raises(ExportError, match="set hf_repo_id"):
        HubUploader(FakeHub()).upload_run(run, make_distill_config({}))


def test_a_missing_library_or_token_is_said(monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(get_token=lambda: None))
    with pytest.raises(ExporterMissing, match="HF_TOKEN"):
        HubUploader()
    for name in ("huggingface_hub", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ExporterMissing, match="huggingface_hub"):
        HubUploader()
    with pytest.raises(ExporterMissing, match="package wandb"):
        export_wandb(run, CONFIG)


def test_nothing_optional_is_imported_until_it_is_used(run: Path, tmp_path: Path) -> None:
    """The library is asked for on use alone: exporting to a folder must work where it does not exist."""
    whole = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        assert name.partition(".")[0] not in ("wandb", "huggingface_hub"), name
        return whole(name, *rest)

    builtins.__import__ = without  # type: ignore[assignment]
    try:
        export_local(run, tmp_path / "export")
    finally:
        builtins.__import__ = whole


class FakeRun:
    url = "https://wandb.example/p/run-1"

    def __init__(self) -> None:
        self.logged: list[Any] = []
        self.finished = False

    def log(self, line: dict[str, Any]) -> None:
        self.logged.append(line)

    def log_artifact(self, artifact: Any) -> None:
        self.logged.append(sorted(artifact.names))

    def finish(self) -> None:
        self.finished = True


class FakeWandb:
    def __init__(self) -> None:
        self.run = FakeRun()
        self.asked: dict[str, Any] = {}

    def init(self, **asked: Any) -> FakeRun:
        self.asked = asked
        return self.run

    class Artifact:
        def __init__(self, name: str, type: str):
            self.names: list[str] = []

        def add_file(self, path: str, name: str) -> None:
            assert Path(path).is_file()
            self.names.append(name)


def test_wandb_gets_metrics_and_artifacts(run: Path) -> None:
    library = FakeWandb()
    assert export_wandb(run, CONFIG, library) == FakeRun.url
    assert library.asked["project"] == "p"
    assert library.asked["config"]["hf_repo_id"] == "me/rows"
    assert library.run.logged == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, sorted(NAMES)]
    assert library.run.finished


def test_wandb_says_what_is_wrong(run: Path) -> None:
    with pytest.raises(ExportError, match="set wandb_project"):
        export_wandb(run, make_distill_config({}), FakeWandb())
    broken = FakeWandb()
    broken.run.log = lambda line: 1 / 0  # type: ignore[method-assign]
    with pytest.raises(ExportError, match="ZeroDivisionError"):
        export_wandb(run, CONFIG, broken)
    (run / "metrics.jsonl").write_text("{")
    with pytest.raises(ExportError, match="not JSON lines"):
        export_wandb(run, CONFIG, FakeWandb())
