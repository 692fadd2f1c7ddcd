"""A Tokasaurus server, or any that speaks its cartridge API (Olympus does).

That API rejects every field it does not know, wants exactly one token limit, and takes top_p 1 only; the documentation
says ``/v1/cartridge/chat/completions`` while the code at the head of its branch routes
``/custom/cartridge/chat/completions``, so the second is tried where the first is not there, and remembered.
Its log-probabilities are divided by the temperature; traces ask for temperature 0, which it treats as 1.
It sorts several cartridges by id and ignores their order in the request.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from lm.chat_api import check_limits, plain_messages, read_reply
from lm.errors import InvalidResponse, LanguageModelError, RequestRefused
from lm.fingerprint import unpack
from lm.transport import Connected, Patience, Transport
from lm.types import CartridgeRef, Messages, Reply, Trace

PLAIN = "/v1/chat/completions"
CARTRIDGE = ("/v1/cartridge/chat/completions", "/custom/cartridge/chat/completions")
_NOT_FOUND = 404


class TokasaurusClient(Connected):
    """``base_url`` is the server's root, without ``/v1``. Safe to use from any thread.

    ``model`` None asks the server once: it serves exactly one. ``extra``: fields that this server knows and Tokasaurus
    does not, such as Olympus' ``store``; a Tokasaurus server refuses them.
    """

    def __init__(
        self,
        base_url: str,
        model: str | None = None,
        *,
        api_key: str | None = None,
        extra: Mapping[str, Any] | None = None,
        patience: Patience | None = None,
        stop: threading.Event | None = None,
    ):
        self._transport = Transport(base_url, api_key=api_key, patience=patience, stop=stop)
        self._model = model
        self._extra = dict(extra or {})
        self._route: str | None = None  # the cartridge route that was there
        self.name = f"toka:{model or self._transport.base_url}"

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
        """The answer. Raises a ``LanguageModelError``; an unknown cartridge is ``RequestRefused`` with status 400."""
        check_limits(max_tokens=max_tokens, temperature=temperature)
        body = self._body(messages, max_tokens, temperature, cartridges)
        if seed is not None:
            body["seed"] = seed
        if stop:
            body["stop"] = list(stop)
        answer, seconds = self._ask(body)
        return read_reply(answer, seconds)

    def call_with_trace(
        self,
        messages: Messages,
        *,
        top_logprobs: int = 20,
        max_tokens: int = 128,
        cartridges: Sequence[CartridgeRef] = (),
    ) -> tuple[Reply, Trace]:
        """The greedy answer with its exact ids, the ending token included, and K candidates at each step."""
        check_limits(max_tokens=max_tokens, top_logprobs=top_logprobs)
        body = self._body(messages, max_tokens, 0.0, cartridges)
        body |= {"logprobs": True, "top_logprobs": top_logprobs, "logprobs_in_fingerprint": True}
        answer, seconds = self._ask(body)
        return read_reply(answer, seconds), unpack(answer.get("system_fingerprint"), top_logprobs)

    def ping(self) -> bool:
        """True when the server answers."""
        try:
            return self._transport.get("/ping").get("message") == "pong"
        except LanguageModelError:
            return False

    def served_model(self) -> str:
        """The id of the one model it serves. Raises a ``LanguageModelError``."""
        if self._model is None:
            found = self._transport.get("/v1/models").get("data")
            rows = found if isinstance(found, list) else []
            chat = [row for row in rows if isinstance(row, dict) and row.get("task") != "embedding"]
            if len(chat) != 1:
                raise InvalidResponse(f"{self.name} does not serve exactly one model; name the one that is meant")
            self._model = str(chat[0].get("id"))
        return self._model

    def _body(
        self, messages: Messages, max_tokens: int, temperature: float, cartridges: Sequence[CartridgeRef]
    ) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.served_model(),
            "messages": plain_messages(messages),
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_p": 1.0,
            **self._extra,
        }
        return body | ({"cartridges": [item.as_json() for item in cartridges]} if cartridges else {})

    def _ask(self, body: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
        started = time.perf_counter()
        if "cartridges" not in body:
            return self._transport.post(PLAIN, body), time.perf_counter() - started
        refused: RequestRefused | None = None
        for route in CARTRIDGE if self._route is None else (self._route,):
            try:
                answer = self._transport.post(route, body)
            except RequestRefused as error:
                if error.status == _NOT_FOUND and self._route is None:
                    # Both missing: the first answer says what is wrong (an unknown model is a 404, too).
                    refused = refused or error
                    continue
                self._route = route  # whatever it says no to, it is there
                raise
            self._route = route
            return answer, time.perf_counter() - started
        assert refused is not None
        raise refused
