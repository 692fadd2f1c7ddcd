"""The unmodified ``openai`` Python client and ``curl -N`` against the real server with SmolLM2."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import threading
from pathlib import Path

import openai
import pytest

from tests.support import asynchronous
from tests.support.server import Server

pytestmark = pytest.mark.model
MODEL = "smollm2-135m-instruct"
QUESTION: list[dict[str, str]] = [{"role": "user", "content": "What is the capital of France?"}]


def test_an_answer_names_paris_and_counts_its_tokens(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=40)  # type: ignore[arg-type]
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens > 20


def test_a_streamed_answer_is_the_same_text(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=40)  # type: ignore[arg-type]
    stream = client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,  # type: ignore[arg-type]
        temperature=0,
        max_tokens=40,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage


def test_a_seed_makes_sampling_repeatable(client: openai.OpenAI) -> None:
    def once(seed: int) -> str | None:
        story: list[dict[str, str]] = [{"role": "user", "content": "Invent a name for a ship and say why."}]
        return (
            client.chat.completions.create(model=MODEL, messages=story, seed=seed, temperature=1.0, max_tokens=24)  # type: ignore[arg-type]
            .choices[0]
            .message.content
        )

    first = once(1)
    assert once(1) == first
    assert len({first, once(2), once(3)}) > 1


def test_log_probabilities_are_those_of_the_model(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,  # type: ignore[arg-type]
        temperature=0,
        max_tokens=5,
        logprobs=True,
        top_logprobs=3,
    )
    assert answer.choices[0].logprobs is not None
    tokens = answer.choices[0].logprobs.content
    assert tokens is not None
    assert len(tokens) == 5
    for token in tokens:
        assert len(token.top_logprobs) == 3
        assert token.logprob <= 0
        assert token.top_logprobs[0].token == token.token  # greedy
        assert token.bytes == list(token.token.encode())


def test_stop_strings_end_the_text_before_themselves(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,  # type: ignore[arg-type]
        temperature=0,
        max_tokens=40,
        stop=["Paris"],
    )
    assert answer.choices[0].finish_reason == "stop"
    assert "Paris" not in (answer.choices[0].message.content or "")


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL, "all-minilm-l6-v2"]
    assert client.models.retrieve(MODEL).id == MODEL


def test_errors_arrive_as_the_clients_own_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match=r"gpt-4o.*smollm2") as missing:
        client.chat.completions.create(model="gpt-4o", messages=QUESTION)  # type: ignore[arg-type]
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=9)  # type: ignore[arg-type]
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "word " * 9000}])
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as unknown:
        client.chat.completions.create(model=MODEL, messages=QUESTION, extra_body={"temprature": 1})  # type: ignore[arg-type]
    assert "temperature" in unknown.value.message


def test_several_async_requests_at_once_do_not_mix(server: Server) -> None:
    """Each of four answers at once is the text of the same question asked alone."""
    countries = ["France", "Italy", "Japan", "Germany"]

    async def ask(client: openai.AsyncOpenAI, country: str) -> str:
        messages = [{"role": "user", "content": f"What is the capital of {country}?"}]
        answer = await client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=30)  # type: ignore[arg-type]
        return answer.choices[0].message.content or ""

    async def both_ways() -> tuple[list[str], list[str]]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
            alone = [await ask(client, country) for country in countries]
            return alone, await asyncio.gather(*(ask(client, country) for country in countries))

    alone, together = asynchronous.run(both_ways)
    assert together == alone
    assert len(set(alone)) == 4


def test_our_fields_ride_in_extra_body_and_become_history(client: openai.OpenAI, server: Server) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "system", "content": "Be brief."}, *QUESTION],  # type: ignore[list-item]
        max_tokens=20,
        extra_body={"session": "peer-test", "domain": "travel"},
    )
    (record,) = server.json("GET", "/olympus/history", params={"session": "peer-test"})["experiences"]
    assert record["domain"] == "travel"
    assert record["observation"] == QUESTION[0]["content"]
    assert record["action"] == answer.choices[0].message.content
    assert record["id"] == answer.model_extra["olympus"]["experience_id"]  # type: ignore[index]
    assert server.json("GET", "/olympus/sessions")["sessions"][0]["id"] == "peer-test"
    assert server.json("DELETE", f"/olympus/history/{record['id']}")
    assert server.json("GET", "/olympus/history", params={"session": "peer-test"})["experiences"] == []


def test_a_client_that_leaves_stops_the_generation(client: openai.OpenAI, server: Server) -> None:
    story: list[dict[str, str]] = [{"role": "user", "content": "Tell a very long story."}]
    stream = client.chat.completions.create(model=MODEL, messages=story, stream=True, max_tokens=2000)  # type: ignore[arg-type]
    for _ in range(3):
        next(stream)
    stream.close()
    for _ in range(300):
        if server.json("GET", "/olympus/status")["admission"]["chats"] == 0:
            break
        threading.Event().wait(0.1)
    assert server.json("GET", "/olympus/status")["admission"]["chats"] == 0
    newest = server.json("GET", "/olympus/history", params={"limit": 1})["experiences"][0]
    assert newest["meta"]["finish_reason"] == "cancelled"
    assert newest["meta"]["completion_tokens"] < 500


def test_curl_streams(server: Server) -> None:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("there is no curl")
    body = json.dumps({"model": MODEL, "stream": True, "temperature": 0, "messages": QUESTION})
    command = [curl, "-sN", f"{server.url}/v1/chat/completions", "-H", "Content-Type: application/json", "-d", body]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    text = "".join(json.loads(item)["choices"][0]["delta"].get("content") or "" for item in data[:-1])
    assert "Paris" in text


def test_the_readme_runs(server: Server) -> None:
    """The Python example of the README, with this server's address."""
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    example = readme.split("```python\n")[1].split("```")[0].replace("http://127.0.0.1:5000", server.url)
    said: list[str] = []
    exec(example, {"print": said.append})
    assert "Paris" in said[0]
