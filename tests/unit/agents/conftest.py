"""A language model that can be read like a book, and one that is real and tiny."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest

from lm.engine_client import EngineClient
from lm.types import CartridgeRef, Reply
from tests.support.tiny_model import save_tiny_model
from workspace.engine import Engine
from workspace.models import LoadedModel, load_model
from workspace.prefix import KVPrefix, prefix_of_tokens


class Bookkeeper:
    """Answers with ``answer(messages, cartridges)`` and keeps what it was asked."""

    name = "bookkeeper"

    def __init__(self, answer: Callable[[Sequence[Mapping[str, Any]], Sequence[CartridgeRef]], str] | str = "OK"):
        self._answer = answer
        self._lock = threading.Lock()
        self.asked: list[list[dict[str, str]]] = []
        self.cartridges: list[tuple[CartridgeRef, ...]] = []
        self.options: list[dict[str, Any]] = []

    def call(
        self, messages: Sequence[Mapping[str, Any]], *, cartridges: Sequence[CartridgeRef] = (), **options: Any
    ) -> Reply:
        with self._lock:
            self.asked.append([dict(message) for message in messages])
            self.cartridges.append(tuple(cartridges))
            self.options.append(options)
        text = self._answer if isinstance(self._answer, str) else self._answer(messages, cartridges)
        return Reply(text, sum(len(str(item["content"])) for item in messages), 1, "stop", 64 * len(cartridges))

    def call_with_trace(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError

    def close(self) -> None:
        """Nothing is open."""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = save_tiny_model(tmp_path_factory.mktemp("model"), context_length=1024)
    return load_model(str(folder), cache_dir=folder, dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def shelf(tiny: LoadedModel) -> dict[str, KVPrefix]:
    """Two cartridges of different texts, so that they lead to different answers."""
    texts = {"bank_v0001": "Paris is the capital of France.", "bank_v0002": "The dog does not mind at all. 日本"}
    return {name: prefix_of_tokens(tiny, tiny.tokenizer.encode(text)) for name, text in texts.items()}


@pytest.fixture(scope="session")
def engine(tiny: LoadedModel) -> Iterator[Engine]:
    engine = Engine(tiny, max_active=4, max_waiting=8, threads=1)
    engine.start()
    yield engine
    assert engine.stop()
    engine.check_invariants()


@pytest.fixture
def client(engine: Engine, shelf: dict[str, KVPrefix]) -> EngineClient:
    return EngineClient(engine, resolve=shelf.__getitem__, timeout=60)
