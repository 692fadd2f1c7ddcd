"""Real applications around real runtimes: a tiny model, SQLite in a temporary folder, kernels that do not train."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient

from olympus.runtime import Runtime
from settings import load_settings
from tests.support.tiny_model import save_tiny_model
from web.app import create_app

BOOTSTRAP = "a-bootstrap-key-for-tests"
MakeRuntime = Callable[..., Runtime]


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the tiny model."""
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny-llama")


@contextmanager
def _runtimes(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Iterator[MakeRuntime]:
    made: list[Runtime] = []

    def make(*, model: bool = False, start: bool = True, **sections: dict[str, Any]) -> Runtime:
        chosen: dict[str, dict[str, Any]] = {
            "model": {"load": model, "name": str(tiny_model_dir), "threads": 1, "dtype": "float32"},
            "kernels": {"spawn_default": False},
            "server": {},
            "memory": {"episodic": {"embedding": "none"}},  # nothing is fetched
        }
        for name, values in sections.items():
            chosen[name] = chosen.get(name, {}) | values
        data_dir = tmp_path_factory.mktemp("data")
        runtime = Runtime(load_settings(environ={}, overrides={"data_dir": str(data_dir), **chosen}))
        made.append(runtime)
        if start:
            runtime.start(wait_for_model=True)
        return runtime

    yield make
    for runtime in made:
        runtime.shutdown(5)
        runtime.admission.check_invariants()
        assert runtime.admission.counts()["chats"] == runtime.admission.counts()["streams"] == 0


@pytest.fixture(scope="module")
def make_runtime(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Iterator[MakeRuntime]:
    """``make_runtime(model=True, start=True, **settings)``: a runtime with its own folder; stops with the module.

    A hundred servers that nobody asks any more would each keep seven threads until the last test.
    """
    with _runtimes(tmp_path_factory, tiny_model_dir) as make:
        yield make


@pytest.fixture(scope="session")
def lasting_runtime(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Iterator[MakeRuntime]:
    """As ``make_runtime``, for the two that all modules share; they stop with the last test."""
    with _runtimes(tmp_path_factory, tiny_model_dir) as make:
        yield make


@pytest.fixture(scope="session")
def served(lasting_runtime: MakeRuntime) -> Flask:
    """On loopback, with the tiny model, no key needed."""
    return create_app(runtime=lasting_runtime(model=True))


@pytest.fixture(scope="session")
def guarded(lasting_runtime: MakeRuntime) -> Flask:
    """Listens on all addresses, so every request needs a key. No model."""
    return create_app(runtime=lasting_runtime(server={"host": "0.0.0.0", "api_key": BOOTSTRAP}))


@pytest.fixture
def client(served: Flask) -> FlaskClient:
    """A client on this machine."""
    return served.test_client()


@pytest.fixture
def runtime(served: Flask) -> Runtime:
    """The runtime behind ``client``."""
    found: Runtime = served.extensions["olympus"]
    return found


@pytest.fixture
def key(guarded: Flask) -> Callable[..., dict[str, str]]:
    """``key("chat", ...)``: the header of a new key with these scopes for ``guarded``."""

    def make(*scopes: str) -> dict[str, str]:
        _, text = guarded.extensions["olympus"].keys.create("test", list(scopes))
        return {"Authorization": f"Bearer {text}"}

    return make


def events(text: str) -> list[dict[str, Any]]:
    """Server-sent events as ``{"id", "event", "data", "comment"}``; data is parsed JSON, or the text ``[DONE]``."""
    found = []
    for block in text.split("\n\n"):
        entry: dict[str, Any] = {}
        for line in filter(None, block.split("\n")):
            name, _, value = line.partition(":")
            entry[name or "comment"] = value.strip()
        if "data" in entry and entry["data"] != "[DONE]":
            entry["data"] = json.loads(entry["data"])
        if entry:
            found.append(entry)
    return found


def ask(text: str = "hi", **fields: Any) -> dict[str, Any]:
    """A small chat request."""
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 8, "temperature": 0, **fields}
