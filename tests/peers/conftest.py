"""One real server with SmolLM2 for all clients of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.support.server import Server, running


@pytest.fixture(scope="session")
def server(smollm2: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Answers on a free port until the last test has ended."""
    with running(tmp_path_factory.mktemp("data")) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    """The unmodified Python client."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any-text", max_retries=0, timeout=120) as client:
        yield client
