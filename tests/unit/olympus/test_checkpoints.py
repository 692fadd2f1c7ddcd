"""Checkpoints: published whole, verified, kept by rules, repaired, mirrored."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
import torch

from olympus.checkpoint_files import load_checkpoint, read_manifest, step_of
from olympus.checkpoint_mirror import CheckpointMirror
from olympus.checkpoints import CheckpointStore
from olympus.errors import CheckpointInvalid, CheckpointNotFound, InvalidAction
from settings import RetentionSettings
from storage.database import Database
from storage.models import Base, Checkpoint, Kernel

ID = "athena-0a1b2c"


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'test.db'}")
    Base.metadata.create_all(database.engine)
    with database.write() as session:
        session.add(Kernel(id=ID, god_name="athena", domain="d", state="queued", config={}, seed=1))
    yield database
    database.close()


@pytest.fixture
def store(tmp_path: Path, database: Database) -> CheckpointStore:
    return CheckpointStore(tmp_path / "kernels", database, RetentionSettings(), checkpoint_every=100)


def publish(store: CheckpointStore, step: int, loss: float | None = None, converged: bool = False) -> dict[str, object]:
    tensors = {"model": {"w": torch.full((4, 4), float(step))}, "ema": {"w": torch.full((4, 4), float(step))}}
    metrics = {"holdout_loss": loss, "phi": None, "converged": converged}
    return store.publish(ID, step, tensors, {"step": step}, metrics)


def test_what_is_published_is_read_back_and_indexed(store: CheckpointStore) -> None:
    publish(store, 100, 2.5)
    loaded = store.load(ID, "step-00000100")
    assert torch.equal(loaded.tensors["model"]["w"], torch.full((4, 4), 100.0))
    assert loaded.state == {"step": 100}
    described = store.describe(ID)
    assert described["checkpoints"][0]["kept_by"] == ["every_100_steps", "latest", "best"]
    assert described["checkpoints"][0]["valid"] is True
    assert described["total_bytes"] == loaded.manifest.bytes
    assert described["policy"]["converged"] is None
    store.check_invariants()


def test_one_that_is_being_removed_is_not_shown_as_damaged(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(store, 100)
    publish(store, 200)
    halfway, delete_row = threading.Event(), store._delete_row

    def slowly(kernel_id: str, name: str) -> None:
        halfway.set()
        time.sleep(0.2)
        delete_row(kernel_id, name)

    monkeypatch.setattr(store, "_delete_row", slowly)
    thread = threading.Thread(target=store.delete, args=(ID, "step-00000100"))
    thread.start()
    assert halfway.wait(10)
    assert not store.path(ID, "step-00000100").exists()
    assert [(row["step"], row["valid"]) for row in store.describe(ID)["checkpoints"]] == [(200, True)]
    thread.join(10)


def test_names_are_steps_and_nothing_else() -> None:
    assert step_of("step-00000123") == 123
    for name in ("step-123", "../step-00000123", "step-00000123/..", "step-0000012x", "", "latest"):
        assert step_of(name) is None


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest", "no_manifest", "rename"])
def test_a_damaged_checkpoint_is_refused_and_the_previous_one_is_used(store: CheckpointStore, damage: str) -> None:
    publish(store, 100)
    publish(store, 200)
    path = store.path(ID, "step-00000200")
    model = path / "model.safetensors"
    if damage == "flip":
        data = bytearray(model.read_bytes())
        data[-1] ^= 1
        model.write_bytes(data)
    elif damage == "truncate":
        model.write_bytes(model.read_bytes()[:-1])
    elif damage == "remove":
        model.unlink()
    elif damage == "manifest":
        (path / "manifest.json").write_text("{")
    elif damage == "no_manifest":
        (path / "manifest.json").unlink()
    else:
        path = path.rename(path.with_name("step-00000300"))
    recovery = store.newest(ID)
    assert recovery.loaded is not None
    assert recovery.loaded.name == "step-00000100"
    assert recovery.damaged == (path.name,)
    with pytest.raises(CheckpointInvalid, match=path.name):
        load_checkpoint(path)


def test_a_manifest_cannot_point_outside_its_directory(store: CheckpointStore) -> None:
    publish(store, 100)
    path = store.path(ID, "step-00000100")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../../secret.json"] = manifest["files"].pop("state.json")
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointInvalid, match="unexpected file name"):
        read_manifest(path)


def test_a_damaged_step_is_replaced_when_it_is_reached_again(store: CheckpointStore) -> None:
    publish(store, 100)
    (store.path(ID, "step-00000100") / "state.json").write_text("{}")
    publish(store, 100)
    assert store.load(ID, "step-00000100").state == {"step": 100}
    store.check_invariants()


def test_convergence_at_a_saved_step_only_marks_the_row(store: CheckpointStore) -> None:
    first = publish(store, 100)
    second = publish(store, 100, converged=True)
    assert first["sha256"] == second["sha256"]
    assert "converged" in store.describe(ID)["checkpoints"][0]["kept_by"]


def test_retention_runs_after_each_publication_and_spares_what_is_used(store: CheckpointStore) -> None:
    publish(store, 100)
    with store.using(ID, "step-00000100"):
        for step in range(200, 1001, 100):
            publish(store, step)
        steps = [row["step"] for row in store.describe(ID)["checkpoints"]]
        assert steps == [1000, 900, 800, 700, 600, 100]
        assert store.describe(ID)["checkpoints"][-1]["kept_by"] == ["in_use"]
    assert store.prune(ID) == ["step-00000100"]
    store.check_invariants()


def test_pinned_checkpoints_stay_until_unpinned(store: CheckpointStore) -> None:
    publish(store, 100)
    store.pin(ID, "step-00000100", True)
    for step in range(200, 1001, 100):
        publish(store, step)
    assert [row["id"] for row in store.describe(ID)["checkpoints"] if row["pinned"]] == ["step-00000100"]
    with pytest.raises(InvalidAction, match="pinned"):
        store.delete(ID, "step-00000100")
    store.pin(ID, "step-00000100", False)
    store.delete(ID, "step-00000100")
    with pytest.raises(InvalidAction, match="latest"):
        store.delete(ID, "step-00001000")
    with pytest.raises(CheckpointNotFound):
        store.pin(ID, "step-00000100", True)
    store.check_invariants()


def test_rows_and_directories_are_reconciled_both_ways(store: CheckpointStore, database: Database) -> None:
    for step in (100, 200, 300):
        publish(store, step)
    with database.write() as session:  # died after the rename, before the row
        session.execute(sa.delete(Checkpoint).where(Checkpoint.step == 300))
    shutil.rmtree(store.path(ID, "step-00000200"))  # died between removing the directory and the row
    (store.path(ID, "step-00000100") / "manifest.json").unlink()
    (store.root / "ghost-000000" / "step-00000100").mkdir(parents=True)
    report = store.reconcile()
    assert report == {
        "indexed": [f"{ID}/step-00000300"],
        "rows_removed": [f"{ID}/step-00000100", f"{ID}/step-00000200"],
        "damaged": [f"{ID}/step-00000100"],
        "orphans_removed": ["ghost-000000"],
    }
    assert [row["step"] for row in store.describe(ID)["checkpoints"]] == [300]


def test_unrelated_directories_are_left_alone(store: CheckpointStore) -> None:
    (store.root / "notes" / "mine").mkdir(parents=True)
    assert store.reconcile()["orphans_removed"] == []
    assert (store.root / "notes" / "mine").is_dir()


def test_shortage_names_the_limit(tmp_path: Path, database: Database) -> None:
    store = CheckpointStore(tmp_path / "k", database, RetentionSettings(max_bytes=1 << 20, min_free_bytes=0), 100)
    assert store.shortage() is None
    tensors = {"model": {"w": torch.zeros(300_000)}}
    store.publish(ID, 100, tensors, {}, {})
    assert "kernels.retention.max_bytes" in (store.shortage() or "")
    full = CheckpointStore(tmp_path / "k", database, RetentionSettings(min_free_bytes=1 << 60), 100)
    assert "min_free_bytes" in (full.shortage() or "")


def test_the_mirror_brings_back_what_the_disk_lost(store: CheckpointStore, database: Database) -> None:
    clock = [0.0]
    mirror = CheckpointMirror(database, store, clock=lambda: clock[0])
    publish(store, 100, 2.0)
    assert mirror.copy(ID, "step-00000100", urgent=False)
    publish(store, 200, 1.5)
    assert not mirror.copy(ID, "step-00000200", urgent=False)
    clock[0] = 61.0
    assert mirror.copy(ID, "step-00000200", urgent=False)
    assert mirror.restore_missing() == []  # the disk still has it
    shutil.rmtree(store.root)
    assert mirror.restore_missing() == [f"{ID}/step-00000200"]
    store.reconcile()
    store.check_invariants()
    assert torch.equal(store.load(ID, "step-00000200").tensors["ema"]["w"], torch.full((4, 4), 200.0))


def test_a_damaged_mirror_is_reported_and_not_used(store: CheckpointStore, database: Database) -> None:
    mirror = CheckpointMirror(database, store)
    publish(store, 100)
    mirror.copy(ID, "step-00000100", urgent=True)
    shutil.rmtree(store.root)
    with database.write() as session:
        session.execute(sa.text("UPDATE checkpoint_blobs SET data = x'00'"))
    assert mirror.restore_missing() == []
