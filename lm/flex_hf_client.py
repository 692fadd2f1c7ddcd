"""A local or hub model with an engine of its own: answers with cartridges where no server runs.

The name is the seed's; nothing here needs FlexAttention. The model is loaded by ``workspace.models`` on first use and
kept until ``close``. Where the server of this process has the model loaded already, ``engine_client.py`` is the better
choice: it shares it.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from lm.engine_client import EngineClient, Resolve
from lm.errors import Unavailable
from lm.transport import Closing
from lm.types import CartridgeRef, Messages, Reply, Trace
from workspace.engine import Engine
from workspace.errors import ModelError
from workspace.models import DtypeName, LoadedModel, load_model


class LocalFlexHFClient(Closing):
    """``model``: a packaged name, a directory, or a hub id. Safe to use from any thread; ``close()`` it.

    ``threads`` 0 takes all cores but one. ``max_active`` answers are generated at once; more wait.
    """

    def __init__(
        self,
        model: str,
        *,
        cache_dir: Path,
        resolve: Resolve | None = None,
        dtype: DtypeName = "auto",
        device: str = "auto",
        threads: int = 0,
        max_active: int = 4,
        timeout: float = 600.0,
    ):
        self.name = f"flex:{model}"
        self._model = model
        self._cache_dir = cache_dir
        self._resolve = resolve
        self._dtype: DtypeName = dtype
        self._device = device
        self._threads = threads
        self._max_active = max_active
        self._timeout = timeout
        self._lock = threading.Lock()
        self._engine: Engine | None = None
        self._client: EngineClient | None = None
        self._closed = False

    @property
    def loaded(self) -> LoadedModel:
        """The model, loaded now if it was not. Raises ``Unavailable``."""
        self._ready()
        assert self._engine is not None
        return self._engine.loaded

    def call(
        self,
        messages: Messages,
        *,
        max_tokens: int = 128,
        temperature: float = 0.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        cartridges: Sequence[CartridgeRef] = (),
    ) -> Reply:
        """The answer. Raises a ``LanguageModelError``."""
        client = self._ready()
        return client.call(
            messages, max_tokens=max_tokens, temperature=temperature, seed=seed, stop=stop, cartridges=cartridges
        )

    def call_with_trace(
        self,
        messages: Messages,
        *,
        top_logprobs: int = 20,
        max_tokens: int = 128,
        cartridges: Sequence[CartridgeRef] = (),
    ) -> tuple[Reply, Trace]:
        """The greedy answer with exact ids, and K candidates at each step."""
        client = self._ready()
        return client.call_with_trace(messages, top_logprobs=top_logprobs, max_tokens=max_tokens, cartridges=cartridges)

    def count_tokens(self, messages: Messages) -> int:
        """Tokens of the prompt that ``messages`` become."""
        return self._ready().count_tokens(messages)

    def context_length(self) -> int:
        """Of the model, in tokens."""
        return self._ready().context_length()

    def close(self) -> None:
        """Stop the engine and let go of the model."""
        with self._lock:
            self._closed = True
            if self._engine is not None:
                self._engine.stop()
            self._engine = self._client = None

    def _ready(self) -> EngineClient:
        with self._lock:
            if self._closed:
                raise Unavailable(self.name, 1, "this client was closed; make a new one")
            if self._client is None:
                try:
                    loaded = load_model(self._model, cache_dir=self._cache_dir, dtype=self._dtype, device=self._device)
                except ModelError as error:
                    raise Unavailable(self.name, 1, str(error)) from error
                self._engine = Engine(
                    loaded, max_active=self._max_active, max_waiting=4 * self._max_active, threads=self._threads
                )
                self._engine.start()
                self._client = EngineClient(self._engine, resolve=self._resolve, timeout=self._timeout)
            return self._client
