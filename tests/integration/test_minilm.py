"""The real MiniLM: meanings, not words; and the whole way from a row to a recollection."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest

from memory.embedding import MiniLM, open_minilm
from memory.episodic import EpisodicMemory, EpisodicOptions
from memory.history import History, NewExperience
from storage import migrate
from storage.database import Database
from workspace.errors import ModelDownloadFailed

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def model(model_cache: Path, skip_or_fail: Callable[[str], NoReturn]) -> MiniLM:
    try:
        return open_minilm(model_cache)
    except ModelDownloadFailed as error:
        skip_or_fail(f"MiniLM is not in {model_cache} and cannot be fetched: {error}")


def test_it_is_the_published_model(model: MiniLM) -> None:
    """The cosines are those of the quickstart of sentence-transformers' documentation."""
    rows = model.embed(
        ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."],
    )
    assert rows.shape == (3, 384)
    expected = [[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]]
    assert np.allclose(rows @ rows.T, expected, atol=2e-3)
    assert 0.15 < model.floor < 0.4


def test_what_is_said_in_other_words_is_recalled(model: MiniLM, tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/test.db")
    migrate.upgrade(database)
    history = History(database)
    told = ["I have been charged twice for the same purchase", "My kitten sleeps on the radiator all day"]
    history.append([NewExperience(text, "Noted.", "general", "chat") for text in told])
    memory = EpisodicMemory(
        database, history, EpisodicOptions(), default_domain="general", embedding=model, embedding_width=384
    )
    memory.start()
    assert memory.wait_until_settled(60)
    (found,) = memory("Where does our little cat like to rest?", session=None, domain=None, limit=4)
    assert found.text.startswith("My kitten")
    assert found.embedding is not None
    assert memory("How do quarks interact?", session=None, domain=None, limit=4) == []
    memory.stop()
    database.close()
