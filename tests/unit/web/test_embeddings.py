"""Embeddings: forms of the input and of the vectors, counts, models, and what is refused."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flask.testing import FlaskClient

from memory.embedding import EngineEmbedding
from olympus import embeddings as module
from olympus.embeddings import MINILM_ID, Embeddings
from olympus.runtime import Runtime
from tests.unit.web.conftest import MakeRuntime
from web.app import create_app
from workspace.errors import ModelDownloadFailed

PATH = "/v1/embeddings"
TEXTS = ["Where is my card?", "The quick brown fox"]


def test_vectors_are_those_of_the_memorys_embedding(client: FlaskClient, runtime: Runtime) -> None:
    answer = client.post(PATH, json={"input": TEXTS, "model": "tiny-llama"}).json
    assert (answer["object"], answer["model"]) == ("list", "tiny-llama")
    assert [(item["object"], item["index"]) for item in answer["data"]] == [("embedding", 0), ("embedding", 1)]
    expected = EngineEmbedding(runtime.engine.loaded).embed(TEXTS)
    found = np.array([item["embedding"] for item in answer["data"]], np.float32)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    count = sum(len(runtime.engine.encode(text)) for text in TEXTS)
    assert answer["usage"] == {"prompt_tokens": count, "total_tokens": count}


def test_all_forms_of_an_input_and_of_a_vector(client: FlaskClient, runtime: Runtime) -> None:
    ids = runtime.engine.encode(TEXTS[0])
    forms: list[Any] = [TEXTS[0], [TEXTS[0]], ids, [ids]]
    answers = [client.post(PATH, json={"input": form, "encoding_format": "float", "user": "u"}).json for form in forms]
    assert all(answer == answers[0] for answer in answers)
    (packed,) = client.post(PATH, json={"input": TEXTS[0], "encoding_format": "base64"}).json["data"]
    numbers = np.frombuffer(base64.b64decode(packed["embedding"]), "<f4")
    np.testing.assert_array_equal(numbers, np.array(answers[0]["data"][0]["embedding"], np.float32))


def test_fewer_dimensions_have_length_one_again(client: FlaskClient) -> None:
    whole = np.array(client.post(PATH, json={"input": TEXTS[0]}).json["data"][0]["embedding"])
    short = np.array(client.post(PATH, json={"input": TEXTS[0], "dimensions": 5}).json["data"][0]["embedding"])
    np.testing.assert_allclose(short, whole[:5] / np.linalg.norm(whole[:5]), atol=1e-6)


def test_many_texts_are_each_their_own(client: FlaskClient) -> None:
    many = [f"text number {number}" for number in range(40)]
    answer = client.post(PATH, json={"input": many}).json
    (alone,) = client.post(PATH, json={"input": many[37]}).json["data"]
    np.testing.assert_allclose(answer["data"][37]["embedding"], alone["embedding"], atol=1e-6)


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"input": ""}, "input", "not empty"),
    ({"input": []}, "input", "not empty"),
    ({"input": ["a", ""]}, "input", "each input must be"),
    ({"input": [["a"]]}, "input", "each input must be"),
    ({"input": [1.5]}, "input", "each input must be"),
    ({"input": None}, "input", "a text, token ids"),
    ({"input": ["a"] * 2049}, "input", "at most 2048"),
    ({"input": [320]}, "input", "token id 320 is outside the model's vocabulary of 320"),
    ({"input": [-1]}, "input", "check_embedding_ctx_length"),
    ({"input": "a\x00"}, "input", "NUL"),
    ({"encoding_format": "hex"}, "encoding_format", "'float' or 'base64'"),
    ({"dimensions": 0}, "dimensions", "greater than or equal to 1"),
    ({"dimensions": 33}, "dimensions", "tiny-llama has 32, got 33"),
    ({"dimension": 5}, "dimension", "did you mean dimensions?"),
]


@pytest.mark.parametrize(("fields", "param", "message"), REFUSED)
def test_what_cannot_be_done_is_refused_by_name(
    client: FlaskClient, runtime: Runtime, fields: dict[str, Any], param: str, message: str
) -> None:
    response = client.post(PATH, json={"input": "a"} | fields)
    error = response.json["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert message in error["message"]
    assert runtime.admission.counts()["chats"] == 0


def test_another_model_is_not_here(client: FlaskClient) -> None:
    response = client.post(PATH, json={"input": "a", "model": "text-embedding-3-small"})
    assert (response.status_code, response.json["error"]["code"]) == (404, "model_not_found")
    assert "there is 'tiny-llama'" in response.json["error"]["message"]


def test_minilm_is_listed_and_says_why_it_cannot_be_had(
    make_runtime: MakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path) -> Path:
        raise ModelDownloadFailed("no network")

    monkeypatch.setattr(module, "ensure_minilm", fail)
    client = create_app(runtime=make_runtime(start=False, memory={"episodic": {"embedding": "minilm"}})).test_client()
    (listed,) = client.get("/v1/models").json["data"]
    assert listed == client.get(f"/v1/models/{MINILM_ID}").json
    assert (listed["id"], listed["object"]) == (MINILM_ID, "model")
    response = client.post(PATH, json={"input": "a"})
    assert (response.status_code, response.json["error"]["code"]) == (503, "embedding_unavailable")
    assert "no network; name the served model" in response.json["error"]["message"]


@pytest.mark.model
def test_minilm_counts_and_decodes_by_its_own_vocabulary(model_cache: Path, runtime: Runtime) -> None:
    service = Embeddings("auto", model_cache, lambda: runtime.engine)
    found = service.embed(["a cat sat on the mat", "a kitten on a rug", "interest rates rose"])
    assert (found.model, found.vectors.shape) == (MINILM_ID, (3, 384))
    near, far = found.vectors[0] @ found.vectors[1], found.vectors[0] @ found.vectors[2]
    assert near > far + 0.2
    ids = tuple(service._opened_minilm()[1].encode("a cat sat on the mat", add_special_tokens=False).ids)
    again = service.embed([ids])
    np.testing.assert_allclose(again.vectors[0], found.vectors[0], atol=1e-5)
    assert again.tokens == len(ids)
