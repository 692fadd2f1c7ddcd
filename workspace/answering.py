"""Ask the engine one question after the other, with a workspace or without: for evaluation, guard and capture.

The decode loop is the server's own, so that what is measured is what is served. One engine, one question at a time.
Not here: the questions (``evaluation.py``, ``fluency.py``), and serving (``olympus/chat.py``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from workspace.engine import Engine
from workspace.errors import EngineError
from workspace.forward import StepContext
from workspace.models import LoadedModel
from workspace.sampling import SamplingParams
from workspace.steering import Steering
from workspace.steering_types import Toggles, WorkspaceReport


@dataclass(frozen=True, slots=True)
class Answered:
    """One answer. ``seconds`` from the question to its end."""

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    seconds: float
    first_token_seconds: float
    report: WorkspaceReport | None = None  #: None without a workspace

    @property
    def decode_rate(self) -> float:
        """Tokens per second after the first one; 0 for answers of one token."""
        decoding = self.seconds - self.first_token_seconds
        return (len(self.token_ids) - 1) / decoding if decoding > 0 else 0.0


class Answering:
    """A running engine; use it as a context manager. ``steering`` None: the stock model only."""

    def __init__(
        self, loaded: LoadedModel, steering: Steering | None = None, *, threads: int = 1, prefill_chunk: int = 256
    ):
        self.loaded, self.steering = loaded, steering
        self._engine = Engine(loaded, max_active=1, max_waiting=0, threads=threads, prefill_chunk=prefill_chunk)

    def __enter__(self) -> Answering:
        self._engine.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.stop()

    def render(self, messages: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        """Token ids of a conversation up to where the answer begins."""
        return tuple(self._engine.render(messages))

    def answer(
        self,
        prompt: Sequence[int] | Sequence[Mapping[str, Any]],
        params: SamplingParams,
        toggles: Toggles | None = None,
        *,
        session: str | None = None,
        context: StepContext | None = None,
    ) -> Answered:
        """The answer to ``prompt``; with the workspace where ``toggles`` are given, or with another ``context``.

        Raises ``EngineError`` where the generation failed.
        """
        run = None
        if toggles is not None:
            if self.steering is None:
                raise ValueError("there is no workspace to switch on; give Answering a steering")
            run = self.steering.run(session=session, toggles=toggles)
        generation = self._engine.submit(prompt, params, request_context=run or context)
        finished = generation.result()
        if finished.reason == "error":
            raise EngineError(f"the model failed to answer: {finished.error}")
        timings = finished.timings
        first = timings.ttft_s or 0.0
        return Answered(
            prompt_ids=generation.prompt_ids,
            token_ids=finished.token_ids,
            text=finished.text,
            seconds=first + timings.decode_s,
            first_token_seconds=first,
            report=None if run is None else replace(run.report),
        )


@torch.inference_mode()
def answer_loss(loaded: LoadedModel, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> float:
    """Mean negative log-likelihood of an answer under the stock model with its prompt, nats per token."""
    if not token_ids:
        return math.nan
    ids = torch.tensor([[*prompt_ids, *token_ids]], device=loaded.device)
    places = torch.arange(len(prompt_ids) - 1, ids.shape[1] - 1, device=loaded.device)
    positions = torch.arange(ids.shape[1], device=loaded.device)[None]
    logits = loaded.model(ids, position_ids=positions, use_cache=False, logits_to_keep=places).logits[0]
    return float(torch.nn.functional.cross_entropy(logits.float(), ids[0, len(prompt_ids) :]))
