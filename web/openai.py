"""The OpenAI API: ``/v1/models`` and ``/v1/chat/completions``, streamed and not.

Source: the OpenAI API reference, and what its Python client, LangChain, litellm and llm really send and parse. The
final chunk carries one field of ours, ``olympus: {experience_id, domain}``, which those clients ignore. It is sent
after the exchange has been committed to the history, never before.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import Any

from flask import Blueprint, Response, current_app, g, jsonify, request

from olympus.admission import Slot
from olympus.chat import ChatRequest, ChatRun, Delta, Finished
from olympus.runtime import Runtime
from settings import EngineSettings
from web.auth import current_principal
from web.errors import ApiError, openai_error, read_body, translate
from web.schemas import ChatBody
from web.wire import client_has_gone, event_stream, sse

blueprint = Blueprint("openai", __name__, url_prefix="/v1")

_BATCH_SECONDS = 0.02  # one event per token would flood slow pages
_KEEP_ALIVE_SECONDS = 1.0
_POLL_SECONDS = 0.05
#: OpenAI knows no "cancelled"; the answer was cut short, which it calls "length".
_REASONS = {"stop": "stop", "length": "length", "cancelled": "length"}


def _runtime() -> Runtime:
    runtime: Runtime = current_app.extensions["olympus"]
    return runtime


@blueprint.get("/models")
def models() -> Response:
    """The model that is loaded; an empty list while it is not."""
    runtime = _runtime()
    ready = runtime.model_state.stage == "ready"
    return jsonify({"object": "list", "data": [_model(runtime)] if ready else []})


@blueprint.get("/models/<path:name>")
def model(name: str) -> Response:
    """One model."""
    runtime = _runtime()
    _check_model(runtime, name)
    return jsonify(_model(runtime))


def _model(runtime: Runtime) -> dict[str, Any]:
    loaded = runtime.engine.loaded
    created = int(runtime.started_at or 0)
    return {
        "id": loaded.name,
        "object": "model",
        "created": created,
        "owned_by": "olympus",
        "context_length": loaded.context_length,
    }


def _check_model(runtime: Runtime, name: str | None) -> None:
    known = runtime.chat.model_name
    if name is not None and name != known:
        raise ApiError(
            404,
            f"the model {name!r} is not served here; this server has {known!r}",
            code="model_not_found",
            param="model",
        )


@blueprint.post("/chat/completions")
def chat_completions() -> Response:
    """Answer a conversation."""
    runtime = _runtime()
    body = read_body(ChatBody)
    _check_model(runtime, body.model)
    chat_request = ChatRequest(
        messages=[message.plain() for message in body.messages],
        params=_sampling(body, runtime.settings.engine),
        domain=body.domain,
        session_id=body.session,
        request_id=_idempotency_key(),
    )
    slot = runtime.admission.admit("chat")
    try:
        run = runtime.chat.open(chat_request)
        answer = _Answer(run, body)
        if body.stream:
            return event_stream(_Stream(answer.chunks(request.environ), slot))
        return jsonify(answer.whole(request.environ))
    except BaseException:
        slot.release()
        raise
    finally:
        if not body.stream:
            slot.release()


def _idempotency_key() -> str | None:
    given = request.headers.get("Idempotency-Key")
    if given is None:
        return None
    if not 1 <= len(given) <= 96:
        raise ApiError(400, "Idempotency-Key: give 1 to 96 characters", param="Idempotency-Key", code="invalid_value")
    return f"{current_principal().id}:{given}"


def _sampling(body: ChatBody, defaults: EngineSettings) -> Any:
    from workspace.sampling import SamplingParams

    wanted = body.max_completion_tokens or body.max_tokens or defaults.default_max_tokens
    if wanted > defaults.max_tokens:
        raise ApiError(
            400,
            f"max_tokens: at most {defaults.max_tokens} (engine.max_tokens)",
            param="max_tokens",
            code="invalid_value",
        )
    return SamplingParams(
        max_tokens=wanted,
        temperature=defaults.temperature if body.temperature is None else body.temperature,
        top_p=defaults.top_p if body.top_p is None else body.top_p,
        top_k=body.top_k or 0,
        min_p=body.min_p or 0.0,
        repetition_penalty=body.repetition_penalty or 1.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        seed=body.seed,
        stop=body.stop,
        logprobs=bool(body.logprobs),
        top_logprobs=body.top_logprobs or 0,
    )


class _Stream:
    """The iterator handed to the server: releases the slot when it ends or the client goes, whatever happens."""

    def __init__(self, chunks: Iterator[str], slot: Slot):
        self._chunks = chunks
        self._slot = slot

    def __iter__(self) -> Iterator[str]:
        return self._chunks

    def close(self) -> None:
        """Called by the server in every case, also when iteration never began."""
        try:
            close = getattr(self._chunks, "close", None)
            if close is not None:
                close()
        finally:
            self._slot.release()


class _Answer:
    """One answer in OpenAI's shapes."""

    def __init__(self, run: ChatRun, body: ChatBody):
        self._run = run
        self._body = body
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._request_id = g.request_id

    # -- not streamed -----------------------------------------------------------------------------------------

    def whole(self, environ: dict[str, Any]) -> dict[str, Any]:
        """The complete body, once the exchange is committed. Stops early when the client has gone."""
        tokens: list[Any] = []
        finished: Finished | None = None
        for event in self._run.events(_POLL_SECONDS):
            if isinstance(event, Finished):
                finished = event
            elif isinstance(event, Delta):
                tokens.extend(event.tokens)
            if finished is None and client_has_gone(environ):
                self._run.cancel()
        assert finished is not None
        if finished.reason == "error":
            raise ApiError(500, f"the generation failed; the server's log has it under {self._request_id}")
        choice: dict[str, Any] = {
            "index": 0,
            "message": {"role": "assistant", "content": finished.text, "refusal": None},
            "logprobs": self._logprobs(tokens),
            "finish_reason": _REASONS[finished.reason],
        }
        return self._envelope("chat.completion", [choice]) | {"usage": _usage(finished), "olympus": _ours(finished)}

    # -- streamed ---------------------------------------------------------------------------------------------

    def chunks(self, environ: dict[str, Any]) -> Iterator[str]:
        """The server-sent events of the answer. Closing the iterator cancels the generation."""
        yield self._chunk({"role": "assistant", "content": "", "refusal": None})
        text, tokens = "", []
        sent = time.monotonic()
        events = self._run.events(_POLL_SECONDS)
        try:
            for event in events:
                now = time.monotonic()
                if isinstance(event, Delta):
                    text += event.text
                    tokens.extend(event.tokens)
                due = now - sent >= _BATCH_SECONDS or isinstance(event, Finished)
                if due and (text or (tokens and self._body.logprobs)):
                    yield self._chunk({"content": text}, logprobs=self._logprobs(tokens))
                    text, tokens, sent = "", [], now
                elif now - sent >= _KEEP_ALIVE_SECONDS:
                    yield ": keep-alive\n\n"
                    sent = now
                if isinstance(event, Finished):
                    yield from self._end(event)
                elif client_has_gone(environ):
                    return
        except Exception as error:  # headers are gone: the error has to travel inside the stream
            known = translate(error)
            if known is None:
                current_app.logger.exception("the stream failed")
            yield self._error(known)
        finally:
            events.close()  # type: ignore[attr-defined]

    def _end(self, finished: Finished) -> Iterator[str]:
        if finished.reason == "error":
            yield self._error(None)
            return
        yield self._chunk({}, finish_reason=_REASONS[finished.reason], olympus=_ours(finished))
        if self._body.stream_options is not None and self._body.stream_options.include_usage:
            yield sse(self._envelope("chat.completion.chunk", []) | {"usage": _usage(finished)})
        yield "data: [DONE]\n\n"

    def _error(self, known: ApiError | None) -> str:
        unexpected = ApiError(500, f"the generation failed; the server's log has it under {self._request_id}")
        return sse(openai_error(known or unexpected))

    # -- parts ------------------------------------------------------------------------------------------------

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._run.model,
            "system_fingerprint": None,
            "choices": choices,
        }

    def _chunk(
        self,
        delta: dict[str, Any],
        *,
        logprobs: Any = None,
        finish_reason: str | None = None,
        olympus: dict[str, Any] | None = None,
    ) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        chunk = self._envelope("chat.completion.chunk", [choice])
        return sse(chunk if olympus is None else chunk | {"olympus": olympus})

    def _logprobs(self, tokens: list[Any]) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        sampled = [token for token in tokens if token.token_id is not None]
        return {"content": [self._token(token) for token in sampled], "refusal": None}

    def _token(self, token: Any) -> dict[str, Any]:
        decode = _runtime().engine.loaded.tokenizer.decode
        top = [_logprob(decode([item.token_id]), item.logprob) for item in token.top_logprobs]
        return _logprob(decode([token.token_id]), token.logprob) | {"top_logprobs": top}


def _logprob(text: str, value: float) -> dict[str, Any]:
    return {"token": text, "logprob": value, "bytes": list(text.encode())}


def _usage(finished: Finished) -> dict[str, Any]:
    return {
        "prompt_tokens": finished.prompt_tokens,
        "completion_tokens": finished.completion_tokens,
        "total_tokens": finished.prompt_tokens + finished.completion_tokens,
    }


def _ours(finished: Finished) -> dict[str, Any]:
    record = finished.experience
    return {
        "experience_id": None if record is None else record.id,
        "domain": None if record is None else record.domain,
        "finish_reason": finished.reason,
        "replayed": finished.replayed,
        "timings": {name: None if value is None else round(value, 4) for name, value in finished.timings.items()},
    }
