"""Any server with OpenAI's chat API (Olympus itself, vLLM, a hosted model), over httpx.

Only fields that every such server knows are sent. Two things are extra and off by default: ``cartridges``, which
Olympus takes on this endpoint, and ``extra`` for fields that one server has and others refuse (Olympus' ``domain``).
``call_with_trace`` needs the model's tokenizer, because the API gives token strings and no ids (``token_strings.py``),
or a server that writes ids out.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from lm.chat_api import check_limits, only_choice, plain_messages, read_reply
from lm.errors import InvalidCall
from lm.token_strings import TokenStrings, read_trace
from lm.transport import Connected, Patience, Transport
from lm.types import CartridgeRef, Messages, Reply, Trace

#: vLLM's switch to write token ids out as strings.
WRITTEN_IDS = "return_tokens_as_token_ids"


class OpenAIClient(Connected):
    """``base_url`` ends where ``/chat/completions`` begins, usually in ``/v1``. Safe to use from any thread."""

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str | None = None,
        tokenizer: Any = None,
        accepts_cartridges: bool = False,
        extra: Mapping[str, Any] | None = None,
        patience: Patience | None = None,
        stop: threading.Event | None = None,
    ):
        self.name = f"openai:{model}"
        self._model = model
        self._accepts_cartridges = accepts_cartridges
        self._extra = dict(extra or {})
        self._tokenizer = tokenizer
        self._strings: TokenStrings | None = None
        self._strings_lock = threading.Lock()
        self._transport = Transport(base_url, api_key=api_key, patience=patience, stop=stop)

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
        check_limits(max_tokens=max_tokens, temperature=temperature)
        wishes: dict[str, Any] = {"temperature": temperature}
        if seed is not None:
            wishes["seed"] = seed
        if stop:
            wishes["stop"] = list(stop)
        body, seconds = self._ask(messages, max_tokens, cartridges, wishes)
        return read_reply(body, seconds)

    def call_with_trace(
        self,
        messages: Messages,
        *,
        top_logprobs: int = 20,
        max_tokens: int = 128,
        cartridges: Sequence[CartridgeRef] = (),
    ) -> tuple[Reply, Trace]:
        """The greedy answer with ids and log-probabilities. The token that ended it is in the trace only where the
        server shows it. Raises ``AmbiguousTokens`` besides what ``call`` raises.
        """
        check_limits(max_tokens=max_tokens, top_logprobs=top_logprobs)
        strings = self._token_strings()
        wishes = {"temperature": 0.0, "logprobs": True, "top_logprobs": top_logprobs}
        body, seconds = self._ask(messages, max_tokens, cartridges, wishes)
        return read_reply(body, seconds), read_trace(only_choice(body).get("logprobs"), strings, top_logprobs)

    def _ask(
        self, messages: Messages, max_tokens: int, cartridges: Sequence[CartridgeRef], wishes: Mapping[str, Any]
    ) -> tuple[dict[str, Any], float]:
        body: dict[str, Any] = {
            "model": self._model,
            "messages": plain_messages(messages),
            "max_tokens": max_tokens,
            **wishes,
            **self._extra,
        }
        if cartridges:
            if not self._accepts_cartridges:
                raise InvalidCall(
                    f"{self.name} is a plain OpenAI server, which takes no cartridges; "
                    "use toka:, flex:, engine:, or say accepts_cartridges for an Olympus server"
                )
            body["cartridges"] = [item.as_json() for item in cartridges]
        started = time.perf_counter()
        return self._transport.post("/chat/completions", body), time.perf_counter() - started

    def _token_strings(self) -> TokenStrings | None:
        """The tokenizer's table, made on first use; None where the server was asked to write ids out."""
        if self._extra.get(WRITTEN_IDS) is True:
            return None
        if self._tokenizer is None:
            raise InvalidCall(
                f"{self.name} answers with token strings: give the model's tokenizer to trace it, "
                f"or extra={{'{WRITTEN_IDS}': True}} where the server knows that"
            )
        with self._strings_lock:
            if self._strings is None:
                self._strings = TokenStrings(self._tokenizer)
            return self._strings
