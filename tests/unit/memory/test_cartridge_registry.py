"""The registry and the shelf: states, one serving per domain under many threads, crashes, and what is in memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from memory.cartridges.cartridge import Cartridge, make_cartridge
from memory.cartridges.errors import (
    CartridgeConflict,
    CartridgeDamaged,
    CartridgeMismatch,
    CartridgeNotFound,
    InvalidCartridgeId,
)
from memory.cartridges.files import save_cartridge
from memory.cartridges.registry import CartridgeRegistry
from memory.cartridges.shelf import CartridgeShelf
from memory.history import History, NewExperience
from storage import migrate
from storage.database import Database
from storage.models import AuditEvent
from storage.models import Cartridge as Row
from tests.support.architectures import loaded, stock_model
from workspace.models import LoadedModel
from workspace.prefix import prefix_of_tokens

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return replace(loaded(stock_model("llama")), fingerprint="f" * 32)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path}/test.db")
    migrate.upgrade(database)
    yield database
    database.close()


@pytest.fixture
def registry(database: Database, tmp_path: Path) -> Iterator[CartridgeRegistry]:
    registry = CartridgeRegistry(database, tmp_path / "cartridges")
    yield registry
    registry.check_invariants()


@pytest.fixture
def make(model: LoadedModel) -> Callable[..., Cartridge]:
    def made(domain: str = "d", slots: int = 4, seed: int = 2, **more: Any) -> Cartridge:
        return make_cartridge(model, prefix_of_tokens(model, list(range(seed, seed + slots))), domain=domain, **more)

    return made


def audited(database: Database) -> list[tuple[str, str, str]]:
    with database.read() as session:
        return [(row.action, row.target, row.actor) for row in session.scalars(sa.select(AuditEvent))]


# States.


def test_a_registered_one_has_an_id_of_its_own_and_is_a_candidate(
    registry: CartridgeRegistry, make: Callable[..., Cartridge], database: Database
) -> None:
    first = registry.register(make(experience_ids=[5, 6], run_id="r1"), actor="ann")
    second = registry.register(make(), actor="ann")
    other = registry.register(make("Other Domain"))
    assert [first.id, second.id] == ["d_v0001", "d_v0002"]
    assert (other.version, other.domain) == (1, "Other Domain")
    assert (first.state, first.run_id, first.slots, first.experiences, first.stale) == ("candidate", "r1", 4, 2, False)
    assert first.bytes > 4 * 2 * 4 * 2 * 8 * 4
    assert registry.get(first.id) == first
    assert {row.id for row in registry.list()} == {first.id, second.id, other.id}
    assert [row.id for row in registry.list("d")] == [second.id, first.id]
    assert audited(database)[0] == ("cartridge.register", first.id, "ann")
    assert registry.serving("d") is None


def test_promoting_retires_the_one_before_and_rolling_back_goes_step_by_step(
    registry: CartridgeRegistry, make: Callable[..., Cartridge], database: Database
) -> None:
    ids = [registry.register(make(parent=None)).id for _ in range(4)]
    for cartridge_id in ids[:3]:
        row = registry.promote(cartridge_id, actor="gate", reason="good", metrics={"accuracy": 0.9})
        assert (row.state, row.metrics, row.state_reason) == ("serving", {"accuracy": 0.9}, "good")
        registry.check_invariants()
    assert [row.state for row in registry.lineage("d")] == ["retired", "retired", "serving", "candidate"]
    assert registry.promote(ids[2]).id == ids[2], "again is no change"
    assert registry.rollback("d", actor="ann", reason="worse").id == ids[1]
    assert registry.rollback("d").id == ids[0]
    with pytest.raises(CartridgeConflict, match=rf"before {ids[0]}"):
        registry.rollback("d")
    registry.promote(ids[2])
    serving = registry.serving("d")
    assert serving is not None
    assert serving.id == ids[2]
    assert registry.rollback("d").id == ids[0], "the one that served before, not the number before"
    with pytest.raises(CartridgeConflict, match="nothing serves"):
        registry.rollback("elsewhere")
    assert ("cartridge.rollback", ids[1], "ann") in audited(database)


def test_rejecting_and_deleting(registry: CartridgeRegistry, make: Callable[..., Cartridge]) -> None:
    one, other = registry.register(make()).id, registry.register(make()).id
    rejected = registry.reject(one, "KL 0.9 is above 0.5", metrics={"kl": 0.9})
    assert (rejected.state, rejected.state_reason, rejected.metrics) == ("rejected", "KL 0.9 is above 0.5", {"kl": 0.9})
    with pytest.raises(CartridgeConflict, match=r"was rejected \(KL 0.9"):
        registry.promote(one)
    with pytest.raises(CartridgeConflict, match="only a candidate"):
        registry.reject(one, "again")
    assert registry.promote(one, force=True).state == "serving"
    with pytest.raises(CartridgeConflict, match="serves 'd'; promote another or retire"):
        registry.delete(one)
    assert registry.retire(one, "wrong").state == "retired"
    with pytest.raises(CartridgeConflict, match="only the serving one"):
        registry.retire(one)
    registry.delete(one)
    assert not registry.path(one).exists()
    with pytest.raises(CartridgeNotFound, match="was deleted"):
        registry.get(one)
    with pytest.raises(CartridgeNotFound):
        registry.promote(one)
    assert [row.id for row in registry.list("d")] == [other]
    assert [row.state for row in registry.lineage("d")] == ["deleted", "candidate"]
    assert registry.register(make()).id == "d_v0003", "an id is never given twice"


def test_the_newest_number_is_not_given_again_after_its_deletion(
    registry: CartridgeRegistry, make: Callable[..., Cartridge]
) -> None:
    registry.delete(registry.register(make()).id)
    assert registry.register(make()).id == "d_v0002"


@pytest.mark.parametrize("bad", ["../d_v0001", "/etc/passwd", "", "d_v0001/..", "d", "x" * 500, "d_v0001\x00"])
def test_ids_that_are_none_reach_neither_database_nor_disk(registry: CartridgeRegistry, bad: str) -> None:
    for call in (registry.get, registry.path, registry.promote, registry.delete):
        with pytest.raises(InvalidCartridgeId):
            call(bad)
    with pytest.raises(CartridgeNotFound):
        registry.get("d_v0001")


def test_a_domain_stands_for_the_one_that_serves_it(
    registry: CartridgeRegistry, make: Callable[..., Cartridge]
) -> None:
    one, other = registry.register(make("My Domain")).id, registry.register(make("My Domain")).id
    with pytest.raises(InvalidCartridgeId):
        registry.resolve("My Domain")
    registry.promote(one)
    part = one.removesuffix("_v0001")
    assert {registry.resolve(name).id for name in ("My Domain", part, one)} == {one}
    assert registry.resolve(other).state == "candidate"
    for bad in ("../x", "a\x00b", "y" * 200):
        with pytest.raises(InvalidCartridgeId):
            registry.resolve(bad)


# Forgetting.


def test_what_was_trained_on_something_forgotten_is_stale(
    registry: CartridgeRegistry, make: Callable[..., Cartridge], database: Database
) -> None:
    one = registry.register(make(experience_ids=[1, 2, 3])).id
    other = registry.register(make(experience_ids=[4])).id
    registry.promote(one)
    assert [row.id for row in registry.mark_stale([3, 99])] == [one]
    assert registry.mark_stale([3]) == []
    assert (registry.get(one).stale, registry.get(one).state, registry.get(other).stale) == (True, "serving", False)
    registry.promote(other)
    with pytest.raises(CartridgeConflict, match="is stale"):
        registry.promote(one)
    with pytest.raises(CartridgeConflict, match="may serve"):
        registry.rollback("d")
    assert ("cartridge.stale", one, "local") in audited(database)


def test_tombstones_of_the_history_are_found(
    registry: CartridgeRegistry, make: Callable[..., Cartridge], database: Database
) -> None:
    history = History(database)
    records = history.append([NewExperience(f"o{n}", "a", domain="d", source="test") for n in range(3)])
    one = registry.register(make(experience_ids=[record.id for record in records[:2]])).id
    assert registry.refresh_stale() == []
    history.delete(experience_id=records[2].id)
    assert registry.refresh_stale() == []
    history.delete(experience_id=records[1].id)
    assert [row.id for row in registry.refresh_stale()] == [one]
    assert registry.refresh_stale() == []


# Many threads.


def test_many_threads_register_and_promote(registry: CartridgeRegistry, make: Callable[..., Cartridge]) -> None:
    stop = threading.Event()
    seen: list[int] = []

    def watch() -> None:
        while not stop.is_set():
            seen.append(sum(row.state == "serving" for row in registry.list("d")))

    watcher = threading.Thread(target=watch)
    watcher.start()

    def live(number: int) -> list[str]:
        made = []
        for _ in range(4):
            row = registry.register(make(slots=2, seed=2 + number))
            registry.promote(row.id)
            made.append(row.id)
        return made

    with ThreadPoolExecutor(8) as pool:
        ids = [made for found in pool.map(live, range(8)) for made in found]
    stop.set()
    watcher.join()
    assert sorted(ids) == [f"d_v{number:04d}" for number in range(1, 33)]
    assert set(seen) <= {0, 1}, "never two at once, and none only before the first"
    assert seen == sorted(seen), "never none again"
    registry.check_invariants()
    while True:
        try:
            registry.rollback("d")
        except CartridgeConflict:
            break
    assert [row.state for row in registry.lineage("d")].count("retired") == 31


# Crashes.


def test_a_folder_without_a_row_becomes_a_candidate(
    registry: CartridgeRegistry, make: Callable[..., Cartridge], database: Database
) -> None:
    row = registry.register(make(experience_ids=[7], run_id="run-1"))
    with database.write() as session:  # the crash between folder and row
        session.execute(sa.delete(Row))
    assert registry.recover() == {row.id: "adopted as a candidate: the process ended before it was registered"}
    adopted = registry.get(row.id)
    assert (adopted.state, adopted.experiences, adopted.manifest) == ("candidate", 1, row.manifest)
    assert adopted.run_id == "run-1", "its run, gone on with, finds it and trains no second one"
    assert registry.recover() == {}
    assert registry.register(make()).id == "d_v0002"


def test_the_number_of_a_folder_without_a_row_is_not_given_again(
    registry: CartridgeRegistry, make: Callable[..., Cartridge], database: Database
) -> None:
    registry.register(make())
    with database.write() as session:
        session.execute(sa.delete(Row))
    assert registry.register(make()).id == "d_v0002"
    registry.recover()
    assert len(registry.list("d")) == 2


def test_the_folder_of_a_deleted_row_goes_and_a_missing_one_is_told(
    registry: CartridgeRegistry, make: Callable[..., Cartridge], tmp_path: Path
) -> None:
    kept, deleted, strange = (registry.register(make()).id for _ in range(3))
    copy = tmp_path / "copy"
    registry.path(deleted).rename(copy)
    registry.delete(deleted)
    copy.rename(registry.path(deleted))  # as if the process had ended between row and folder
    away = tmp_path / "away"
    registry.path(strange).rename(away)
    (registry.folder / "not_ours").mkdir()
    (registry.folder / ".partial-x").mkdir()
    told = registry.recover()
    assert told[deleted] == "removed: it was deleted"
    assert "missing" in told[strange]
    assert "left alone" in told["not_ours"]
    assert set(told) == {deleted, strange, "not_ours"}
    assert kept not in told
    away.rename(registry.path(strange))


def test_a_folder_under_a_false_name_is_left_alone(
    registry: CartridgeRegistry, make: Callable[..., Cartridge], model: LoadedModel
) -> None:
    registry.register(make())
    save_cartridge(registry.folder / "d_v0009", make())
    told = registry.recover()
    assert "not one of ours" in told["d_v0009"]
    assert len(registry.list()) == 1


def test_kill_nine_while_registering_loses_nothing_that_was_told(tmp_path: Path) -> None:
    """A process registers and promotes without end and is killed; what it told is there, and all is consistent."""
    script = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from dataclasses import replace
        from memory.cartridges.cartridge import make_cartridge
        from memory.cartridges.registry import CartridgeRegistry
        from storage import migrate
        from storage.database import Database
        from tests.support.architectures import loaded, stock_model
        from workspace.prefix import prefix_of_tokens

        root = Path(sys.argv[1])
        database = Database(f"sqlite:///{root}/k.db")
        migrate.upgrade(database)
        registry = CartridgeRegistry(database, root / "cartridges")
        model = replace(loaded(stock_model("llama")), fingerprint="f" * 32)
        prefix = prefix_of_tokens(model, [2, 3, 4])
        while True:
            row = registry.register(make_cartridge(model, prefix, domain="d"))
            print(row.id, flush=True)
            registry.promote(row.id)
            print("+" + row.id, flush=True)
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    told = [process.stdout.readline().strip() for _ in range(12)]
    time.sleep(0.013)
    os.kill(process.pid, signal.SIGKILL)
    told += [line.strip() for line in process.stdout.read().splitlines() if line.strip()]
    process.wait()
    process.stdout.close()
    database = Database(f"sqlite:///{tmp_path}/k.db")
    try:
        migrate.upgrade(database)
        from storage import files

        files.sweep_partials(tmp_path)
        registry = CartridgeRegistry(database, tmp_path / "cartridges")
        registry.recover()
        registry.check_invariants()
        known = {row.id for row in registry.list("d")}
        assert {name.removeprefix("+") for name in told} <= known
        serving = registry.serving("d")
        promoted = [name.removeprefix("+") for name in told if name.startswith("+")]
        assert serving is not None
        assert serving.id >= promoted[-1]
        shelf = CartridgeShelf(registry)
        assert all(shelf.get(name).frozen == 1 for name in known)
    finally:
        database.close()


# The shelf.


def test_the_shelf_reads_once_and_gives_up_the_longest_unused(
    registry: CartridgeRegistry, make: Callable[..., Cartridge]
) -> None:
    ids = [registry.register(make()).id for _ in range(3)]
    size = make().prefix.nbytes
    shelf = CartridgeShelf(registry, memory_bytes=2 * size)
    first = shelf.get(ids[0])
    assert shelf.get(ids[0]) is first
    assert shelf.loads == 1
    shelf.get(ids[1])
    shelf.get(ids[0])
    shelf.get(ids[2])
    assert shelf.held() == [ids[0], ids[2]]
    assert shelf.nbytes() == 2 * size
    shelf.check_invariants()
    assert shelf.get(ids[0], fresh=True) is not first
    assert shelf.loads == 4
    tiny = CartridgeShelf(registry, memory_bytes=1)
    tiny.get(ids[0])
    tiny.get(ids[1])
    assert tiny.held() == [ids[1]], "one always fits"
    tiny.check_invariants()


def test_threads_that_ask_at_once_cause_one_read(registry: CartridgeRegistry, make: Callable[..., Cartridge]) -> None:
    cartridge_id = registry.register(make()).id
    shelf = CartridgeShelf(registry)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: shelf.get(cartridge_id), range(16)))
    assert len({id(item) for item in found}) == 1
    assert shelf.loads == 1


def test_damage_on_disk_is_told_when_it_is_read(registry: CartridgeRegistry, make: Callable[..., Cartridge]) -> None:
    cartridge_id = registry.register(make()).id
    path = registry.path(cartridge_id) / "prefix.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    shelf = CartridgeShelf(registry)
    for _ in range(2):
        with pytest.raises(CartridgeDamaged, match=r"prefix.safetensors.*SHA-256"):
            shelf.get(cartridge_id)


def test_a_prefix_for_a_model_is_checked_joined_and_sorted(
    registry: CartridgeRegistry, make: Callable[..., Cartridge], model: LoadedModel
) -> None:
    a, b = registry.register(make("a", seed=10)).id, registry.register(make("b", slots=6)).id
    shelf = CartridgeShelf(registry)
    prefix, rows = shelf.prefix_for(model, [b, a])
    assert ([row.id for row in rows], prefix.slots, prefix.id) == ([a, b], 10, f"{a}+{b}")
    with pytest.raises(CartridgeConflict, match="twice"):
        shelf.prefix_for(model, [a, a])
    with pytest.raises(CartridgeNotFound):
        shelf.prefix_for(model, ["a_v0009"])
    other = replace(model, fingerprint="a" * 32, name="another")
    with pytest.raises(CartridgeMismatch, match="another"):
        shelf.prefix_for(other, [a])
    registry.reject(a, "bad")
    with pytest.raises(CartridgeConflict, match=r"rejected \(bad\)"):
        shelf.prefix_for(model, [a])
    registry.delete(b)
    with pytest.raises(CartridgeNotFound, match="was deleted"):
        shelf.prefix_for(model, [b])


def test_server_start_does_not_wait_for_torch() -> None:
    code = (
        "import sys, memory.cartridges.registry, memory.cartridges.shelf, memory.cartridges.errors; "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_rows_of_before_get_the_new_columns(tmp_path: Path) -> None:
    """Migration 0005 on a table that holds something."""
    from alembic import command

    database = Database(f"sqlite:///{tmp_path}/m.db")
    try:
        migrate.upgrade(database)
        config = migrate._config()
        with database.transaction() as connection:
            config.attributes["connection"] = connection
            command.downgrade(config, "0004")
        with database.transaction() as connection:
            connection.execute(
                sa.text(
                    "INSERT INTO cartridges (id, domain, version, state, model_fingerprint, slots, manifest,"
                    " created_at) VALUES ('d_v0001', 'd', 1, 'candidate', 'f', 4, '{}', 1.0)"
                )
            )
        migrate.upgrade(database)
        row = CartridgeRegistry(database, tmp_path / "c").get("d_v0001")
        assert (row.stale, row.metrics, row.experiences, row.bytes, row.state_reason) == (False, {}, 0, 0, "")
        assert migrate.drift(database) == []
    finally:
        database.close()
