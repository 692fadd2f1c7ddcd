"""The unmodified ``openai`` Python client embeds texts; it asks for base64 by itself and decodes it."""

from __future__ import annotations

import numpy as np
import openai
import pytest

from tests.support.server import Server

pytestmark = pytest.mark.model
TEXTS = ["My card has not arrived yet.", "Where is the card that I ordered?", "The glacier carved a wide valley."]


@pytest.mark.parametrize(("model", "width"), [("all-minilm-l6-v2", 384), ("smollm2-135m-instruct", 576)])
def test_what_means_the_same_is_near(server: Server, model: str, width: int) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any-text", max_retries=0, timeout=120) as client:
        assert model in [item.id for item in client.models.list()]
        answer = client.embeddings.create(model=model, input=TEXTS)
        vectors = np.array([item.embedding for item in answer.data])
        assert vectors.shape == (3, width)
        assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.1
        assert answer.usage.prompt_tokens > 15
        plain = client.embeddings.create(model=model, input=TEXTS[0], encoding_format="float", dimensions=64)
        short = np.array(plain.data[0].embedding)
        assert short.shape == (64,)
        assert short @ vectors[0][:64] == pytest.approx(np.linalg.norm(vectors[0][:64]), abs=1e-5)
