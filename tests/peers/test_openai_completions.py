"""The unmodified ``openai`` Python client completes texts with SmolLM2."""

from __future__ import annotations

from typing import Any

import openai
import pytest

pytestmark = pytest.mark.model
ASKED: dict[str, Any] = {
    "model": "smollm2-135m-instruct",
    "prompt": "The capital of France is",
    "temperature": 0,
    "max_tokens": 8,
}


def test_a_text_from_its_words_and_from_its_ids(client: openai.OpenAI, smollm2: Any) -> None:
    whole = client.completions.create(**ASKED, logprobs=2)
    assert "Paris" in whole.choices[0].text
    numbers = whole.choices[0].logprobs
    assert numbers is not None
    assert numbers.tokens is not None
    assert "".join(numbers.tokens) == whole.choices[0].text
    ids = smollm2.tokenizer.encode(ASKED["prompt"])
    assert client.completions.create(**ASKED | {"prompt": ids}).choices[0].text == whole.choices[0].text
    stream = client.completions.create(**ASKED, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text


def test_what_is_not_there_is_the_clients_own_exception(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(**ASKED, echo=True)
    assert refused.value.param == "echo"
