"""A strict stand-in for a Tokasaurus server (branch geoff/cartridges): its schema, its refusals, its fingerprint.

Written from the server's documented fields, not from our client: every unknown field is 422, as there.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from tests.support.json_server import Answer, Asked

ROUTES = {"v1": "/v1/cartridge/chat/completions", "custom": "/custom/cartridge/chat/completions"}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Message(_Strict):
    role: Literal["system", "user", "assistant"]
    content: str


class _Cartridge(_Strict):
    id: str
    source: Literal["wandb", "local", "huggingface"] = "wandb"
    force_redownload: bool = False


class _Chat(_Strict):
    messages: list[_Message]
    model: str
    frequency_penalty: float = 0.0
    logit_bias: dict[str, float] | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int = 1
    presence_penalty: float = 0.0
    response_format: dict[str, Any] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    temperature: float = 0.7
    top_p: float = 1.0
    user: str | None = None
    metadata: dict[str, str] | None = None
    ignore_eos: bool = False
    logprobs_in_fingerprint: bool = False
    apply_chat_template_overrides: dict[str, Any] | None = None


class _CartridgeChat(_Chat):
    cartridges: list[_Cartridge]


class FakeTokasaurus:
    """``routes``: which of ``ROUTES`` it has. Keeps what it was asked in ``asked``."""

    def __init__(
        self,
        *,
        routes: Sequence[str] = ("v1", "custom"),
        cartridges: Sequence[str] = ("rules_v0001",),
        ids: Sequence[int] = (5, 9, 2),
        max_topk_logprobs: int | None = 20,
    ):
        self.routes = tuple(ROUTES[name] for name in routes)
        self.cartridges = set(cartridges)
        self.ids = list(ids)
        self.max_topk_logprobs = max_topk_logprobs
        self.asked: list[Asked] = []

    def __call__(self, asked: Asked) -> Answer:
        self.asked.append(asked)
        if asked.path == "/ping":
            return Answer({"message": "pong"})
        if asked.path == "/v1/models":
            return Answer({"object": "list", "data": [{"id": "tiny", "object": "model"}]})
        if asked.path not in ("/v1/chat/completions", *self.routes):
            return Answer({"detail": "Not Found"}, 404)
        schema = _CartridgeChat if asked.path in self.routes else _Chat
        try:
            request = schema.model_validate(asked.body)
        except ValidationError as error:
            return Answer({"detail": json.loads(error.json(include_url=False))}, 422)
        refusal = self._refusal(request)
        return Answer({"detail": refusal}, 400) if refusal else Answer(self._completion(request))

    def _refusal(self, request: _Chat) -> str | None:
        if (request.max_tokens is None) == (request.max_completion_tokens is None):
            return "exactly one of max_tokens and max_completion_tokens must be set"
        if request.top_p != 1:
            return "top_p must be 1"
        if request.top_logprobs is not None and not request.logprobs:
            return "top_logprobs needs logprobs"
        if request.top_logprobs is not None and request.top_logprobs > (self.max_topk_logprobs or 0):
            return "top_logprobs exceeds max_topk_logprobs"
        if isinstance(request, _CartridgeChat):
            for cartridge in request.cartridges:
                if cartridge.source != "local" or cartridge.id not in self.cartridges:
                    return f"cartridge {cartridge.id} does not exist"
        return None

    def _completion(self, request: _Chat) -> dict[str, Any]:
        count, width = len(self.ids), request.top_logprobs or 0
        packed = request.logprobs_in_fingerprint and width > 0
        indices = [base % 50 + place for base in self.ids for place in range(width)]
        values = [-0.5 - place for _ in self.ids for place in range(width)]
        fingerprint = {
            "completion_ids": [self.ids],
            "packed_chosen_logprobs": [_pack([-0.5] * count, "<f4")] if packed else None,
            "packed_topk_indices": [_pack(indices, "<i4")] if packed else None,
            "packed_topk_logprobs": [_pack(values, "<f4")] if packed else None,
        }
        message = {"role": "assistant", "content": "an answer"}
        return {
            "id": "chatcmpl-1",
            "model": request.model,
            "object": "chat.completion",
            "created": 1,
            "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}],
            "usage": {
                "prompt_tokens": 11,
                "completion_tokens": count,
                "total_tokens": 11 + count,
                "prompt_tokens_details": {"cached_tokens": 0},
            },
            "system_fingerprint": json.dumps(fingerprint),
        }


def _pack(values: Sequence[float], dtype: str) -> str:
    return base64.b64encode(np.array(values, dtype=dtype).tobytes()).decode()
