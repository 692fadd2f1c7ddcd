"""The episodic memory in the server: off as before, and never more in a prompt than its budget."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from memory.history import History, NewExperience
from memory.recall import HistoryRecall
from olympus.chat_types import WorkspaceWish
from olympus.remembering import make_memory
from olympus.workbench import make_workbench
from settings import ROOT, Settings, load_settings
from storage import migrate
from storage.database import Database
from tests.support.tiny_model import save_tiny_model
from workspace.models import LoadedModel, load_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny-llama")


@pytest.fixture
def loaded(folder: Path) -> LoadedModel:
    """A model of one's own: it is hooked."""
    return load_model(str(folder), cache_dir=folder.parent, device="cpu", dtype="float32")


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path}/test.db")
    migrate.upgrade(database)
    yield database
    database.close()


def _settings(tmp_path: Path, **sections: Any) -> Settings:
    return load_settings(environ={}, overrides={"data_dir": str(tmp_path), **sections})


@pytest.mark.parametrize("budget", [40, 400, 4000])
def test_recollections_stay_within_the_budget_of_tokens(
    loaded: LoadedModel, database: Database, tmp_path: Path, budget: int
) -> None:
    history = History(database)
    settings = _settings(
        tmp_path,
        memory={"episodic": {"embedding": "engine"}},
        workspace={"retrieve_tokens": budget, "retrieve_items": 8},
    )
    memory = make_memory(settings, database, history, lambda: False)
    assert memory is not None
    memory.adopt_engine(loaded)
    memory.start()
    for number in range(12):
        text = "lighthouse " * (1 + 3 * number)
        history.append([NewExperience(text, f"answer {number}", "general", "chat")])
    assert memory.wait_until_settled(30)
    assert memory.status()["embedding"]["state"] == "ready"
    workbench = make_workbench(loaded, settings, database, history, memory)
    question = {"role": "user", "content": "which lighthouse?"}
    run = workbench.run(WorkspaceWish(enabled=True), session=None, domain="general", question="which lighthouse?")
    assert run is not None
    shown = workbench.with_memories([question], run)
    assert shown[-1] == question
    added = "" if len(shown) == 1 else str(shown[0]["content"])
    assert len(loaded.tokenizer.encode(added)) <= budget
    assert budget < 4000 or added.count("\n- ") >= 2, "there is room for some"
    workbench.close()
    memory.stop()


def test_switched_off_the_words_answer_as_before(loaded: LoadedModel, database: Database, tmp_path: Path) -> None:
    history = History(database)
    settings = _settings(tmp_path, memory={"episodic": {"enabled": False}})
    assert make_memory(settings, database, history, lambda: False) is None
    workbench = make_workbench(loaded, settings, database, history, None)
    assert workbench.steering is not None
    assert isinstance(workbench.steering._recall, HistoryRecall)
    workbench.close()


def test_the_start_of_the_server_imports_nothing_for_embedding() -> None:
    code = (
        "import sys; import olympus.runtime; print([name for name in ('faiss', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
