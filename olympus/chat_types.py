"""What goes into a chat and what comes out of it, and what can go wrong on the way.

Plain frozen values: no engine, no history, no HTTP. ``ChatService`` (chat.py) works with them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from olympus.errors import InvalidAction, InvalidRequest, OlympusError
from workspace.channels import ToolCall, ToolCallDelta

FinishReason = Literal["stop", "length", "timeout", "cancelled"]


class ModelNotFound(OlympusError):
    """The request names a model that is not the loaded one."""

    status = 404
    code = "model_not_found"


class IdempotencyKeyReused(InvalidRequest):
    """The ``Idempotency-Key`` came with a different request before; use a fresh key for each request."""

    code = "idempotency_key_reused"


class RequestInProgress(InvalidAction):
    """A request with this ``Idempotency-Key`` is being answered right now; retry when it has ended."""

    code = "request_in_progress"
    retry_after = 1.0


class GenerationFailed(OlympusError):
    """The model failed on this request; the server's log says why."""

    code = "generation_failed"


@dataclass(frozen=True, slots=True)
class WorkspaceWish:
    """What a request says about the workspace. None means: as the settings say.

    ``seed`` serves where the request has none; ``compare`` answers with and without; ``trace`` tells of every token.
    """

    enabled: bool | None = None
    virtual_kv: bool | None = None
    residual_delta: bool | None = None
    controller: bool | None = None
    memory: bool | None = None
    seed: int | None = None
    trace: bool = False
    compare: bool = False


@dataclass(frozen=True, slots=True)
class CartridgeWish:
    """A cartridge that shall serve: an id, or a domain, which means the one that serves it now."""

    id: str
    source: Literal["local", "wandb", "huggingface"] = "local"
    force_redownload: bool = False


@dataclass(frozen=True, slots=True)
class MemoryWish:
    """What a request says about its memory (``chat_memory``). None means: as the settings say."""

    enabled: bool | None = None
    recent_turns: int | None = None


@dataclass(frozen=True, slots=True)
class ResponseNote:
    """A request in OpenAI's Responses dialect: what its response is called, and what it repeats of the request.

    ``id`` is hexadecimal; ``instructed`` counts the leading messages that are its instructions, which end with it;
    ``fields`` are JSON.
    """

    id: str
    instructed: int
    fields: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """What a client wants. None means: as the settings say. ``messages`` hold plain text contents; with a ``prompt``
    (a text, or token ids) there are none: the model goes on with it as it is.

    ``reasoning_effort`` counts for models that know it; ``tools`` are OpenAI's objects. ``exact`` asks for every token
    with its id, the ending one included (``ChatFinished.steps``). ``unrecorded``: it becomes no experience. ``n``
    choices are answered, of which the first becomes the experience. ``logit_bias`` holds (token id, bias).
    ``json_schema``: the answer shall be JSON that fits it. ``must_call``: it shall be a call of one of the ``tools``,
    the one ``call_named`` if that is set; ``one_call``: it ends after the first call. ``response``: it is stored as a
    response, which later requests go on from (``chat_responses``). ``retry``: the client says that it asks again.
    """

    messages: tuple[Mapping[str, Any], ...]
    prompt: str | tuple[int, ...] | None = None
    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: bool = False
    top_logprobs: int = 0
    tools: tuple[Mapping[str, Any], ...] = ()
    reasoning_effort: str | None = None
    workspace: WorkspaceWish | None = None
    cartridges: tuple[CartridgeWish, ...] = ()
    memory: MemoryWish | None = None
    n: int = 1
    logit_bias: tuple[tuple[int, float], ...] = ()
    json_schema: Mapping[str, Any] | None = None
    must_call: bool = False
    call_named: str | None = None
    one_call: bool = False
    ignore_eos: bool = False
    exact: bool = False
    unrecorded: bool = False
    session_id: str | None = None
    domain: str | None = None
    idempotency_key: str | None = None
    actor: str = "local"
    response: ResponseNote | None = None
    retry: bool = False

    def fingerprint(self) -> str:
        """Hex SHA-256 of what decides the answer; equal for a true retry."""
        content = {field.name: getattr(self, field.name) for field in fields(self)}
        del content["idempotency_key"], content["actor"], content["retry"]
        content["response"] = self.response is not None  # what it repeats does not decide the answer
        for younger in _YOUNGER:  # the digests of older requests know nothing of them
            if not content[younger] or (younger, content[younger]) == ("n", 1):
                del content[younger]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=_plain).encode()).hexdigest()


_YOUNGER = (
    "tools", "reasoning_effort", "workspace", "cartridges", "memory", "ignore_eos", "exact", "unrecorded", "n",
    "logit_bias", "prompt", "json_schema",
    "must_call", "call_named", "one_call", "response",
)  # fmt: skip


def _plain(value: Any) -> Any:
    """JSON types of what ``json`` does not know: mappings, and our own frozen values."""
    return dict(value) if isinstance(value, Mapping) else asdict(value)


@dataclass(frozen=True, slots=True)
class ModelCard:
    """The served model. ``id`` is what clients name; a local path shows only its last part."""

    id: str
    name: str
    context_length: int
    fingerprint: str

    def answers_to(self, name: str) -> bool:
        """True when ``name`` means this model."""
        return name in (self.id, self.name)


@dataclass(frozen=True, slots=True)
class TokenInfo:
    """A token as text, its log-probability, and its UTF-8 bytes; None where it is only part of a character."""

    token: str
    logprob: float
    bytes: tuple[int, ...] | None
    top: tuple[TokenInfo, ...] = ()


@dataclass(frozen=True, slots=True)
class Step:
    """One token as the model chose it: its id, and with log-probabilities those of the most probable, by id."""

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """What is certain now, and the tokens behind the text when log-probabilities were asked for.

    ``index`` says of which choice.
    """

    text: str
    tokens: tuple[TokenInfo, ...] = ()
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    index: int = 0


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer to a request that asked for several. Counts are its own."""

    finish_reason: FinishReason
    text: str
    completion_tokens: int
    reasoning: str = ""
    reasoning_tokens: int | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    steps: tuple[Step, ...] | None = None


@dataclass(frozen=True, slots=True)
class ChatFinished:
    """The last event; the exchange is in the history. ``timings`` are seconds, None where never reached.

    ``reasoning_tokens`` is None for models that have no channel for reasoning. ``workspace`` is what the workspace did,
    ``trace`` its numbers for every token, ``compare`` both answers; each None where it was not asked for.
    ``cartridges`` are the ids that served, ``cartridge_slots`` what was attended of them, ``memory`` what stood in for
    the history. What is said of an answer is said of the first choice; ``others`` are the further ones.
    ``cached_tokens`` of the prompt had been read before.
    """

    finish_reason: FinishReason
    text: str
    prompt_tokens: int
    completion_tokens: int
    experience_id: int | None
    domain: str
    session_id: str | None
    timings: Mapping[str, float | None]
    replayed: bool = False
    reasoning: str = ""
    reasoning_tokens: int | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    workspace: Mapping[str, Any] | None = None
    trace: Sequence[Mapping[str, Any]] | None = None
    compare: Mapping[str, Any] | None = None
    cartridges: tuple[str, ...] = ()
    cartridge_slots: int = 0
    memory: Mapping[str, Any] | None = None
    steps: tuple[Step, ...] | None = None
    others: tuple[Choice, ...] = ()
    cached_tokens: int = 0

    @property
    def choices(self) -> tuple[Choice, ...]:
        """All answers, in the order of their indices."""
        first = Choice(
            self.finish_reason,
            self.text,
            self.completion_tokens,
            self.reasoning,
            self.reasoning_tokens,
            self.tool_calls,
            self.steps,
        )
        return (first, *self.others)
