"""The memory that is a cartridge: recall, atomic swaps, following a domain, snapshots."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from lm.types import CartridgeRef
from memory.kv_cache_memory import KVCacheMemory, KVMemoryError

ONE, TWO = CartridgeRef("bank_v0001"), CartridgeRef("bank_v0002", "huggingface", True)


class Shelf:
    """A registry of one domain: what is served can be changed."""

    def __init__(self, serving: CartridgeRef | None):
        self.current = serving

    def serving(self, domain: str) -> CartridgeRef | None:
        return self.current if domain == "bank" else None


def test_recall_is_plain_data() -> None:
    memory = KVCacheMemory([ONE, TWO])
    assert memory.recall() == {
        "type": "kv",
        "cartridges": [
            {"id": "bank_v0001", "source": "local", "force_redownload": False},
            {"id": "bank_v0002", "source": "huggingface", "force_redownload": True},
        ],
    }
    json.dumps(memory.recall())
    assert KVCacheMemory().recall() == {"type": "kv", "cartridges": []}


def test_nothing_is_written_to_it() -> None:
    with pytest.raises(KVMemoryError, match="distill"):
        KVCacheMemory([ONE]).update("an experience")


def test_swap_returns_what_was_there() -> None:
    memory = KVCacheMemory([ONE])
    assert memory.swap(TWO) == (ONE,)
    memory.set([ONE, TWO])
    assert memory.references() == (ONE, TWO)
    assert memory.swaps == 2


def test_readers_never_see_half_a_swap() -> None:
    old = tuple(CartridgeRef(f"a_v{number}") for number in range(4))
    new = tuple(CartridgeRef(f"b_v{number}") for number in range(4))
    memory, stop, seen = KVCacheMemory(old), threading.Event(), set()

    def read() -> None:
        while not stop.is_set():
            seen.add(memory.references())

    readers = [threading.Thread(target=read) for _ in range(4)]
    for reader in readers:
        reader.start()
    for turn in range(2000):
        memory.swap(new if turn % 2 == 0 else old)
    stop.set()
    for reader in readers:
        reader.join(10)
    assert seen <= {old, new}
    assert memory.swaps == 2000


def test_it_follows_the_domains_serving_cartridge() -> None:
    shelf = Shelf(None)
    memory = KVCacheMemory([ONE], domain="bank", source=shelf)
    assert memory.references() == (ONE,), "nothing is served yet"
    shelf.current = TWO
    frozen = memory.frozen()
    assert memory.references() == (TWO,)
    shelf.current = CartridgeRef("bank_v0003")
    assert memory.references() == (CartridgeRef("bank_v0003"),)
    assert frozen.references() == (TWO,), "an evaluation keeps what it began with"
    with pytest.raises(KVMemoryError, match="domain"):
        KVCacheMemory(source=shelf)


def test_a_registry_may_answer_with_its_row() -> None:
    class Registry:
        def serving(self, domain: str) -> SimpleNamespace:
            return SimpleNamespace(id=f"{domain}_v0007", domain=domain, state="serving")

    assert KVCacheMemory(domain="bank", source=Registry()).references() == (CartridgeRef("bank_v0007"),)


def test_snapshot_round_trip(tmp_path: Path) -> None:
    memory = KVCacheMemory([TWO], domain="bank", model_name="smollm2", tokenizer_name="smollm2")
    path = memory.save_snapshot(tmp_path / "deep", "ep_000010")
    assert path.name == "kv_memory_ep_000010.json"
    again = KVCacheMemory.load_snapshot(path)
    assert again.recall() == memory.recall()
    assert (again.domain, again.model_name, again.tokenizer_name) == ("bank", "smollm2", "smollm2")
    following = KVCacheMemory.load_snapshot(path, source=Shelf(ONE))
    assert following.references() == (ONE,)
    assert memory.save_snapshot(tmp_path / "deep", "ep_000010") == path, "a snapshot may be replaced"


@pytest.mark.parametrize("name", ["", "../x", "a/b", "x" * 97, "-x", "a\n"])
def test_snapshot_ids_stay_in_their_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(KVMemoryError, match="snapshot id"):
        KVCacheMemory().save_snapshot(tmp_path, name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"type": "kv"}',
        '{"type": "list", "cartridges": []}',
        '{"type": "kv", "cartridges": [{"id": 3}]}',
        '{"type": "kv", "cartridges": [], "more": 1}',
        '{"type": "kv", "cartridges": [{"id": "a", "source": "ftp"}]}',
    ],
)
def test_what_is_no_snapshot(tmp_path: Path, text: str) -> None:
    path = tmp_path / "kv_memory_x.json"
    path.write_text(text)
    with pytest.raises(KVMemoryError, match="no snapshot"):
        KVCacheMemory.load_snapshot(path)


def test_a_snapshot_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(KVMemoryError, match="cannot be read"):
        KVCacheMemory.load_snapshot(tmp_path / "kv_memory_x.json")
