"""From logits to the next token: what a request asks for, and one sampler per request with its own randomness.

Definitions follow vLLM and the OpenAI API, in vLLM's order:

0. ``logit_bias`` is added to the logits of its tokens;
1. repetition penalty r over prompt and generated tokens: logit / r if positive, else logit * r (CTRL, 1909.05858);
2. frequency and presence penalties over generated tokens: logit - f * count - p * (count > 0);
3. temperature 0: argmax of that. Otherwise divide by the temperature, then keep
4. ``min_p``: tokens with at least that share of the most probable token's probability (2407.01082);
5. ``top_k``: the k most probable;
6. ``top_p``: the smallest set of the most probable ones that holds that mass of what is left (1904.09751);
   Where a grammar holds the answer (``constraints.py``), only its tokens are looked at, from step 3 on;
7. draw by inverting the cumulative distribution with one uniform number.

Log-probabilities are those of the unmodified model distribution: before biases, penalties, grammars,
temperature and truncation.
The global random generator is never used: equal seeds give equal tokens whatever else runs.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from workspace.errors import InvalidSampling

if TYPE_CHECKING:  # only generations that have one need its library
    from workspace.constraints import Constraint

MAX_TOP_LOGPROBS = 20
MAX_BIAS = 100
#: Candidates looked at before the whole vocabulary is sorted; top_p almost always ends within them.
_FIRST_CANDIDATES = 256


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """What a request asks for; one that exists is valid. Raises ``InvalidSampling`` naming the parameter.

    ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 mean no truncation; ``seed`` None draws one from the system.
    ``logit_bias`` holds (token id, bias), each id once, from -100 (practically never) to 100 (practically always).
    ``stop`` strings end the text before themselves; ``stop_ids`` end it like an end-of-sequence token.
    """

    max_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    logprobs: bool = False
    top_logprobs: int = 0
    ignore_eos: bool = False
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        _require("max_tokens", self.max_tokens, self.max_tokens >= 1, "must be at least 1")
        _require("temperature", self.temperature, 0 <= self.temperature <= 100, "must be from 0 to 100")
        _require("top_p", self.top_p, 0 < self.top_p <= 1, "must be above 0 and at most 1")
        _require("top_k", self.top_k, self.top_k >= 0, "must be 0 (off) or positive")
        _require("min_p", self.min_p, 0 <= self.min_p <= 1, "must be from 0 to 1")
        in_range = 0 < self.repetition_penalty <= 100
        _require("repetition_penalty", self.repetition_penalty, in_range, "must be above 0 and at most 100")
        for name in ("frequency_penalty", "presence_penalty"):
            value = getattr(self, name)
            _require(name, value, -2 <= value <= 2, "must be from -2 to 2")
        in_range = self.seed is None or -(1 << 63) <= self.seed < 1 << 64
        _require("seed", self.seed, in_range, "must fit in 64 bits")
        proper = isinstance(self.stop, tuple) and all(isinstance(item, str) and item for item in self.stop)
        _require("stop", self.stop, proper, "must be a tuple of strings, none of them empty")
        in_range = 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS
        _require("top_logprobs", self.top_logprobs, in_range, f"must be from 0 to {MAX_TOP_LOGPROBS}")
        if self.logit_bias:
            in_range = all(-MAX_BIAS <= bias <= MAX_BIAS for _, bias in self.logit_bias)
            _require("logit_bias", dict(self.logit_bias), in_range, f"must be from -{MAX_BIAS} to {MAX_BIAS}")
            ids = [token for token, _ in self.logit_bias]
            _require("logit_bias", ids, min(ids) >= 0 and len(set(ids)) == len(ids), "must name each token id once")
        if self.top_logprobs and not self.logprobs:
            raise InvalidSampling("top_logprobs", "needs logprobs to be true")

    @property
    def changes_logits(self) -> bool:
        """True when the greatest logit need not be the greedy choice."""
        return self.has_penalties or bool(self.logit_bias)

    @property
    def has_penalties(self) -> bool:
        """True when logits have to be changed by what was said before."""
        return self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0


def _require(param: str, value: object, in_range: bool, rule: str) -> None:
    if not in_range:  # which NaN never is
        raise InvalidSampling(param, f"{rule}, got {value!r}")


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and the natural logarithm of its probability under the unmodified model."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A choice. ``logprob`` and ``top_logprobs`` (most probable first) are there when they were asked for."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[TokenLogprob, ...] = ()


class Sampler:
    """Chooses one request's tokens; owns its random generator and its penalties' counts. Used by one thread."""

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int], constraint: Constraint | None = None):
        self.params = params
        self._constraint = constraint
        self._is_greatest = params.temperature == 0 and not params.changes_logits and constraint is None
        self.seed = secrets.randbits(63) if params.seed is None else params.seed
        self._generator = torch.Generator().manual_seed(self.seed)
        self._prompt_ids = prompt_ids
        self._bias: tuple[torch.Tensor, torch.Tensor] | None = None  # ids [B] and what is added to their logits [B]
        self._history: _History | None = None  # made with the first logits, which say how large the vocabulary is

    def choose(self, logits: torch.Tensor) -> SampledToken:
        """The next token for ``logits`` [V] in float32, on any device. Counts it for the penalties.

        Raises ``FloatingPointError`` when the model's logits are not numbers.
        """
        params = self.params
        if self._is_greatest:
            token = int(logits.argmax())
            if not math.isfinite(float(logits[token])):
                raise FloatingPointError("the model's logits are not finite")
        else:
            token = self._choose_from(logits.cpu())
        if self._history is not None:
            self._history.add(token)
        if self._constraint is not None:
            self._constraint.advance(token)
        if not params.logprobs:
            return SampledToken(token)
        return _with_logprobs(token, logits, params.top_logprobs)

    def _choose_from(self, logits: torch.Tensor) -> int:
        logits = self._penalise(logits)
        if self._constraint is not None:
            logits = self._constraint.mask(logits)
        greatest = float(logits.max())
        if not math.isfinite(greatest):
            raise FloatingPointError("the model's logits are not finite")
        if self.params.temperature == 0:
            return int(logits.argmax())
        # Subtracting the greatest first keeps tiny temperatures from overflowing: they become greedy.
        scaled = (logits - greatest).double() / self.params.temperature  # [V]
        return self._draw(scaled)

    def _penalise(self, logits: torch.Tensor) -> torch.Tensor:
        if self.params.logit_bias:
            if self._bias is None:
                ids, values = zip(*self.params.logit_bias, strict=True)
                self._bias = torch.tensor(ids), torch.tensor(values, dtype=torch.float32)
            logits = logits.index_add(0, *self._bias)  # a new tensor: the model's own stay as they are
        if not self.params.has_penalties:
            return logits
        if self._history is None:
            self._history = _History(logits.numel(), self._prompt_ids)
        return self._history.penalise(logits, self.params)

    def _draw(self, scaled: torch.Tensor) -> int:
        """One draw from softmax(``scaled`` [V]) after truncation; always uses exactly one uniform number."""
        params = self.params
        uniform = torch.rand((), generator=self._generator, dtype=torch.float64)
        mass = scaled.exp()  # [V], the greatest entry is 1
        if params.min_p > 0:
            mass = torch.where(mass >= params.min_p, mass, 0.0)
        if params.top_k or params.top_p < 1:
            mass, ids = _most_probable(mass, params.top_k, params.top_p)  # [K], descending
        else:
            ids = None
        cumulative = mass.cumsum(0)
        # The first entry whose cumulative mass exceeds the number: never one of mass zero.
        place = int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True))
        if place == mass.numel():  # the product was rounded up to the whole
            place = int(mass.nonzero()[-1])
        return place if ids is None else int(ids[place])


class _History:
    """What was said so far, as the penalties need it."""

    def __init__(self, vocabulary_size: int, prompt_ids: Sequence[int]):
        self.counts = torch.zeros(vocabulary_size)  # [V], how often each token was generated
        self.seen = torch.zeros(vocabulary_size, dtype=torch.bool)  # [V], whether prompt or answer hold it
        self.seen[torch.tensor(prompt_ids, dtype=torch.long)] = True

    def add(self, token: int) -> None:
        self.counts[token] += 1
        self.seen[token] = True

    def penalise(self, logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
        """Steps 1 and 2 of the module's list; returns new logits [V]."""
        factor = params.repetition_penalty
        if factor != 1:
            logits = torch.where(self.seen, torch.where(logits > 0, logits / factor, logits * factor), logits)
        return logits - params.frequency_penalty * self.counts - params.presence_penalty * (self.counts > 0)


def _most_probable(mass: torch.Tensor, top_k: int, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that top_k and then top_p keep: their masses [K], descending, and ids [K].

    Sorting a vocabulary takes milliseconds and the nucleus is nearly always small, so the largest few hundred are
    looked at first; the result is the same as that of a full sort.
    """
    size = mass.numel()
    if top_k:
        values, ids = mass.topk(min(top_k, size))
        whole = values.sum()
    else:
        whole = mass.sum()
        values, ids = mass.topk(min(_FIRST_CANDIDATES, size))
        if values.sum() < top_p * whole:
            values, ids = mass.sort(descending=True)
    if top_p < 1:
        # Every token before which less than top_p was gathered is kept; so the first one always is.
        keep = int(((values.cumsum(0) - values) < top_p * whole).sum())
        values, ids = values[:keep], ids[:keep]
    return values, ids


def _with_logprobs(token: int, logits: torch.Tensor, top: int) -> SampledToken:
    logprobs = torch.log_softmax(logits, dim=-1)  # [V]
    alternatives: tuple[TokenLogprob, ...] = ()
    if top:
        values, ids = logprobs.topk(min(top, logprobs.numel()))
        alternatives = tuple(
            TokenLogprob(number, value) for number, value in zip(ids.tolist(), values.tolist(), strict=True)
        )
    return SampledToken(token, float(logprobs[token]), alternatives)
