"""Specifications, and that the types alone cost no torch."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest

from lm.errors import InvalidSpec, RequestRefused
from lm.factory import lm_factory
from tests.support.fake_tokasaurus import FakeTokasaurus
from tests.support.json_server import json_server


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("toka:http://127.0.0.1:10210", "toka:http://127.0.0.1:10210"),
        ("toka:org/model@http://127.0.0.1:10210/", "toka:org/model"),
        ("olympus:http://127.0.0.1:5000", "toka:http://127.0.0.1:5000"),
        ("openai:tiny@http://127.0.0.1:5000/v1", "openai:tiny"),
        ("openai:gpt-4o-mini", "openai:gpt-4o-mini"),
        ("flex:smollm2-135m-instruct", "flex:smollm2-135m-instruct"),
    ],
)
def test_names(spec: str, name: str, tmp_path: Path) -> None:
    assert lm_factory(spec, cache_dir=tmp_path).name == name


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("", "engine:, flex:, olympus:, openai:, toka:"),
        ("smollm2-135m-instruct", "engine:, flex:"),
        ("vllm:x", "openai:"),
        ("engine:", "no"),
        ("engine:tiny", "nothing follows"),
        ("flex:", "lacks the model"),
        ("flex:tiny", "cache_dir"),
        ("toka:", "address"),
        ("toka:tiny", "address"),
        ("openai:", "lacks the model"),
        ("openai:http://127.0.0.1:1/v1", "lacks the model"),
        ("openai:tiny@ftp://x", "address"),
    ],
)
def test_what_names_nothing(spec: str, words: str) -> None:
    with pytest.raises(InvalidSpec, match=words):
        lm_factory(spec)


def test_the_key_of_the_environment_goes_to_no_named_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    named, unnamed = lm_factory("openai:tiny@http://127.0.0.1:8/v1"), lm_factory("openai:tiny")
    headers = [client._transport._client.headers.get("Authorization") for client in (named, unnamed)]
    assert headers == [None, "Bearer sk-secret"]
    assert unnamed._transport.base_url == "http://127.0.0.1:9/v1"


def test_types_and_factory_import_neither_torch_nor_httpx() -> None:
    code = "import sys, lm.types, lm.factory; sys.exit(int('torch' in sys.modules or 'httpx' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], check=False).returncode == 0


def test_an_olympus_is_asked_not_to_keep_what_it_answers_and_a_tokasaurus_is_not() -> None:
    fake = FakeTokasaurus()
    message = [{"role": "user", "content": "hi"}]
    with json_server(fake) as url:
        olympus, toka = lm_factory(f"olympus:{url}"), lm_factory(f"toka:{url}")
        with contextlib.closing(olympus), contextlib.closing(toka):
            with pytest.raises(RequestRefused, match="store"):
                olympus.call(message)
            assert toka.call(message).text == "an answer"
    assert fake.asked[-3].body["store"] is False
