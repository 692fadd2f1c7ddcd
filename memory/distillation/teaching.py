"""Asks the teacher, patiently: what may pass is tried again after a pause, what will not is said at once.

broken connection, timeout, busy, failed generation, garbled answer   again, up to ``attempts`` times
a request that is refused (too long, say)                             ``Refused``: this sample has no answer
no log-probabilities, unknown cartridge, impossible client            the same; if it is the same for all, the
                                                                      run ends (``data_generation.py``)
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from lm.errors import (
    AmbiguousTokens,
    InvalidCall,
    InvalidSpec,
    LanguageModelError,
    RequestRefused,
    UnknownCartridge,
)
from lm.types import LanguageModel, Reply, Trace
from memory.distillation.config import TeacherConfig
from memory.distillation.errors import TeacherUnavailable

_Answer = TypeVar("_Answer")
_FINAL = (AmbiguousTokens, InvalidCall, InvalidSpec, RequestRefused, UnknownCartridge)
_PASSING = (LanguageModelError, OSError, TimeoutError)


class Refused(Exception):
    """The teacher will not answer this; asking again would change nothing. Never leaves this package."""


class Stopped(Exception):
    """The stop event was set while waiting. Never leaves this package."""


class Teacher:
    """A language model with patience. Safe to use from several threads if the model is."""

    def __init__(self, model: LanguageModel, config: TeacherConfig, stop: threading.Event | None = None):
        self.name = model.name
        self._model, self._config = model, config
        self._stop = stop or threading.Event()

    def write(self, messages: Sequence[Mapping[str, Any]], *, max_tokens: int, temperature: float, seed: int) -> str:
        """Free text. Raises ``TeacherUnavailable``, ``Refused`` or ``Stopped``."""

        def ask() -> str:
            return self._model.call(messages, max_tokens=max_tokens, temperature=temperature, seed=seed).text

        return self._patiently(ask)

    def answer(self, messages: Sequence[Mapping[str, Any]], top_logprobs: int) -> tuple[Reply, Trace]:
        """The greedy answer with its candidates. Raises as ``write`` does."""

        def ask() -> tuple[Reply, Trace]:
            return self._model.call_with_trace(messages, top_logprobs=top_logprobs, max_tokens=self._config.max_tokens)

        return self._patiently(ask)

    def _patiently(self, ask: Callable[[], _Answer]) -> _Answer:
        pause = self._config.backoff_seconds
        for attempt in range(1, self._config.attempts + 1):
            if self._stop.is_set():
                raise Stopped
            try:
                return ask()
            except _FINAL as error:
                raise Refused(f"{type(error).__name__}: {error}") from error
            except _PASSING as error:
                if attempt == self._config.attempts:
                    raise TeacherUnavailable(self.name, attempt, error) from error
            if self._stop.wait(pause):
                raise Stopped
            pause = min(2 * pause, self._config.max_backoff_seconds)
        raise AssertionError("attempts is at least 1")
