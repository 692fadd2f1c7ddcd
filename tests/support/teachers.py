"""A language model that answers by rule, for tests of what is made of its answers. No torch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lm.types import CartridgeRef, Reply, Trace

Messages = Sequence[Mapping[str, Any]]


def echo(messages: Messages) -> str:
    """The label of the last observation, as ``tests.support.experiences.tagged`` gives it."""
    words = str(messages[-1]["content"]).split()
    number = int(words[-1]) if words and words[-1].isdigit() else 0
    return f"OPS-{'RED' if number % 2 else 'BLUE'}"


class RuleTeacher:
    """Answers ``rule(messages)``, one token a character; raises what ``failures`` yields (None: no failure)."""

    def __init__(
        self,
        rule: Callable[[Messages], str] = echo,
        failures: Iterable[Exception | None] = (),
        name: str = "rule",
    ):
        self.name = name
        self.rule = rule
        self.asked: list[list[dict[str, Any]]] = []
        self._failures = iter(failures)
        self._lock = threading.Lock()

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
        with self._lock:
            self.asked.append([dict(message) for message in messages])
            failure = next(self._failures, None)
        if failure is not None:
            raise failure
        text = self.rule(messages)[:max_tokens]
        prompt_tokens = sum(len(str(message["content"]).split()) for message in messages)
        return Reply(text, prompt_tokens, len(text), "stop")

    def call_with_trace(
        self,
        messages: Messages,
        *,
        top_logprobs: int = 20,
        max_tokens: int = 128,
        cartridges: Sequence[CartridgeRef] = (),
    ) -> tuple[Reply, Trace]:
        reply = self.call(messages, max_tokens=max_tokens)
        ids = tuple(ord(char) for char in reply.text)
        top = np.asarray([[token + rank for rank in range(top_logprobs)] for token in ids], np.int32)
        shares = 0.5 ** np.arange(1, top_logprobs + 1)
        logs = np.log(np.tile(shares, (len(ids), 1))).astype(np.float32)
        return reply, Trace(ids, top.reshape(len(ids), top_logprobs), logs.reshape(len(ids), top_logprobs))
