"""The unmodified ``openai`` Python client asks SmolLM2 for several choices, and bans a word."""

from __future__ import annotations

from typing import Any

import openai
import pytest

pytestmark = pytest.mark.model
MODEL = "smollm2-135m-instruct"


def test_several_names_for_a_ship(client: openai.OpenAI) -> None:
    question: list[Any] = [{"role": "user", "content": "Invent a name for a ship and say why."}]
    options: dict[str, Any] = {"model": MODEL, "messages": question, "temperature": 1.0, "max_tokens": 16, "seed": 3}
    answer = client.chat.completions.create(**options, n=4)
    texts = [choice.message.content or "" for choice in answer.choices]
    assert len(set(texts)) == 4
    assert answer.usage is not None
    assert 40 <= answer.usage.completion_tokens <= 64
    streamed = dict.fromkeys(range(4), "")
    for chunk in client.chat.completions.create(**options, n=4, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert list(streamed.values()) == texts


def test_a_banned_word_is_not_said(client: openai.OpenAI, smollm2: Any) -> None:
    question: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
    ids = [smollm2.tokenizer.encode(word)[0] for word in (" Paris", "Paris")]
    bias = {str(token): -100 for token in ids}
    answer = client.chat.completions.create(
        model=MODEL, messages=question, temperature=0, max_tokens=30, logit_bias=bias
    )
    assert "Paris" not in (answer.choices[0].message.content or "Paris")
