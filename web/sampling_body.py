"""What requests for an answer have in common: how it is sampled, how long it may be, and how it is sent."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from web.body import ID_LIMIT, STOPS, Body, Ignored, LogitBias, stop_texts


class StreamOptions(Body):
    """Options of a stream."""

    include_usage: bool | None = None
    include_obfuscation: Ignored = None


class SamplerBody(Body):
    """Fields of OpenAI and vLLM that mean the same in every request for an answer."""

    model: Annotated[str, StringConstraints(max_length=256)] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1_000_000)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=ID_LIMIT)] | None = None
    stop: Annotated[tuple[str, ...], BeforeValidator(stop_texts, json_schema_input_type=STOPS)] = ()
    logit_bias: LogitBias = None
    ignore_eos: bool | None = None
    store: bool | None = None
    user: Ignored = None

    def sampler(self) -> dict[str, Any]:
        """These fields as those of a ``ChatRequest``."""
        same = ("model", "temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty")
        return {name: getattr(self, name) for name in (*same, "presence_penalty", "seed", "stop")} | {
            "top_k": None if self.top_k is None else max(0, self.top_k),  # -1 means off elsewhere
            "logit_bias": tuple(sorted((self.logit_bias or {}).items())),
            "ignore_eos": bool(self.ignore_eos),
            "unrecorded": self.store is False,
        }


class SamplingBody(SamplerBody):
    """And those that conversations and texts have in common, some of them Tokasaurus'."""

    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, le=ID_LIMIT)] | None = None
    n: Annotated[int, Field(ge=1, le=8)] | None = None
    logprobs_in_fingerprint: bool | None = None

    @model_validator(mode="after")
    def _streams_only_what_can_be_streamed(self) -> SamplingBody:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("value_error", "stream_options is only possible when stream is true")
        if self.logprobs_in_fingerprint and self.stream:
            raise PydanticCustomError("value_error", "logprobs_in_fingerprint is only possible without stream")
        return self

    @property
    def include_usage(self) -> bool:
        """True when the stream shall end with a chunk that holds the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling(self) -> dict[str, Any]:
        """All of them as fields of a ``ChatRequest``."""
        exact = bool(self.logprobs_in_fingerprint)
        return self.sampler() | {"max_tokens": self.max_tokens, "n": self.n or 1, "exact": exact}
