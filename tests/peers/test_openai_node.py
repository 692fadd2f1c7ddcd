"""The unmodified ``openai`` client for Node: chat, streams, tools, structured answers, responses, errors, leaving.

One run of ``node/ask.mjs``; the client is installed once, from its lock file, into the cache.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from tests.support.server import Server

pytestmark = pytest.mark.model
HERE = Path(__file__).parent / "node"


@pytest.fixture(scope="module")
def node_client(model_cache: Path, skip_or_fail: Callable[[str], NoReturn]) -> Path:
    """A folder with the client; skips where there is no Node."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        skip_or_fail("there is no Node with npm")
    lock = hashlib.sha256((HERE / "package-lock.json").read_bytes()).hexdigest()[:16]
    folder = model_cache / f"node-{lock}"
    if not (folder / "node_modules").is_dir():
        fresh = model_cache / f"node-{lock}.partial"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(HERE / name, fresh)
        command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        done = subprocess.run(command, cwd=fresh, capture_output=True, text=True, timeout=240, check=False)
        if done.returncode != 0:
            skip_or_fail(f"the openai client for Node cannot be installed: {done.stderr[-500:]}")
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)
    return folder


@pytest.fixture(scope="module")
def seen(server: Server, node_client: Path) -> dict[str, Any]:
    """What the program's user saw."""
    shutil.copy(HERE / "ask.mjs", node_client)  # modules are looked for beside the script
    command = ["node", "ask.mjs", server.url]
    done = subprocess.run(command, cwd=node_client, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:] + server.log[-3000:]
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def test_an_answer_whole_and_streamed(seen: dict[str, Any]) -> None:
    assert seen["models"] == ["smollm2-135m-instruct", "all-minilm-l6-v2"]
    assert "Paris" in seen["whole"]
    assert seen["streamed"] == seen["whole"]
    assert seen["streamedUsage"]["total_tokens"] == seen["usage"]["total_tokens"] > 20


def test_tools_and_structured_answers(seen: dict[str, Any]) -> None:
    assert seen["call"]["name"] == "get_weather"
    assert json.loads(seen["call"]["arguments"])["city"].startswith("Paris")
    assert json.loads(seen["shaped"]) == {"city": "Paris"}


def test_responses_and_their_chain(seen: dict[str, Any]) -> None:
    assert seen["response"] == seen["stored"] == seen["whole"]
    assert seen["events"][:2] == ["response.created", "response.in_progress"]
    assert {"response.output_text.delta", "response.output_text.done", "response.completed"} <= set(seen["events"])
    assert seen["previous"]
    assert "Rome" in seen["next"], "only the conversation says what is asked of Italy"
    assert seen["items"] == ["What is the capital of France?", seen["response"], "And of Italy?"]


def test_errors_are_the_clients_own(seen: dict[str, Any]) -> None:
    assert seen["errors"] == [
        ["NotFoundError", 404, "response_not_found", None, True],
        ["BadRequestError", 400, "invalid_value", "temperature", True],
        ["NotFoundError", 404, "model_not_found", None, True],
    ]


def test_leaving_ends_the_generation(seen: dict[str, Any], server: Server) -> None:
    for _ in range(300):
        if server.json("GET", "/olympus/status")["admission"]["chats"] == 0:
            break
        threading.Event().wait(0.1)
    assert server.json("GET", "/olympus/status")["admission"]["chats"] == 0
    newest = server.json("GET", "/olympus/history", params={"limit": 1})["experiences"][0]
    assert newest["meta"]["finish_reason"] == "cancelled"
    assert newest["meta"]["completion_tokens"] < 1000
