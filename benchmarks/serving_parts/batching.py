"""Tokens per second of 1, 4 and 8 streams at once, in shared passes and each alone.

Every stream has a prompt of its own (48 tokens) and is given 192 tokens, greedy; all start at the same moment. Tokens
per second are all tokens over the time from there to the last end, the reading of the prompts included; decoding is
streams over the time per token of the slowest, from its first token to its last. Arms alternate within a round, in an
order that turns from round to round.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass, field

from benchmarks.kernel_parts.common import Options, table
from benchmarks.serving_parts.common import load, spread, timed, words
from workspace.engine import Engine
from workspace.quantised import WeightsName
from workspace.sampling import SamplingParams
from workspace.stepping import Batching

PROMPT = 48
TOKENS = 192
_ROUNDS = 2  #: for each seed
_WEIGHTS: tuple[WeightsName, ...] = ("auto", "exact")
_BATCHING: tuple[Batching, ...] = ("batched", "exact")
_ARMS: list[tuple[Batching, int]] = [("batched", 1), ("batched", 4), ("batched", 8), ("exact", 1), ("exact", 8)]


@dataclass
class Arm:
    """Of each round: tokens per second, per processor second, and milliseconds per token of a stream."""

    whole: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    decoding: list[float] = field(default_factory=list)
    each_ms: list[float] = field(default_factory=list)


def run(options: Options) -> str:
    """A table for each kind of weights."""
    return "\n\n".join(_measured(options, weights) for weights in _WEIGHTS)


def _measured(options: Options, weights: WeightsName) -> str:
    loaded = load(weights)
    tokens = 12 if options.quick else TOKENS
    engines = {name: Engine(loaded, max_active=8, max_waiting=0, threads=1, batching=name) for name in _BATCHING}
    arms = {arm: Arm() for arm in _ARMS}
    for engine in engines.values():
        engine.start()
        engine.warm_up()
    try:
        order = list(arms)
        for seed in options.seeds:
            for number in range(1 if options.quick else _ROUNDS):
                for name, streams in order:
                    _round(engines[name], arms[name, streams], streams, tokens, 1000 * seed + 100 * number)
                order = [*order[1:], order[0]]
                print(f"  weights {weights}, seed {seed}, round {number + 1}", file=sys.stderr, flush=True)
    finally:
        for engine in engines.values():
            engine.stop()
    return f"model.weights {weights}\n\n{_table(arms)}"


def _round(engine: Engine, arm: Arm, streams: int, tokens: int, seed: int) -> None:
    prompts = [words(engine.loaded, PROMPT, seed + place) for place in range(streams)]
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    ends = []

    def work() -> None:
        generations = [engine.submit(prompt, params) for prompt in prompts]
        ends.extend(generation.result() for generation in generations)

    taken = timed(work)
    arm.whole.append(streams * tokens / taken.wall)
    arm.processor.append(streams * tokens / taken.processor)
    slowest = max(end.timings.decode_s for end in ends) / (tokens - 1)
    arm.each_ms.append(1000 * statistics.median(end.timings.decode_s for end in ends) / (tokens - 1))
    arm.decoding.append(streams / slowest)


def _table(arms: dict[tuple[Batching, int], Arm]) -> str:
    lines = []
    for (name, streams), arm in arms.items():
        alone = arms[name, 1]
        lines.append(
            [
                f"{streams}, {'shared passes' if name == 'batched' else 'each alone'}",
                f"{statistics.median(arm.whole):.1f}",
                f"{statistics.median(arm.decoding):.1f}",
                f"{statistics.median(arm.each_ms):.1f}",
                *(spread(_over(mine, one)) for mine, one in _pairs(arm, alone)),
            ]
        )
    head = ["streams", "tokens/s", "decoding", "ms per token of a stream", "tokens/s over 1 stream"]
    return table([*head, "decoding over 1 stream", "per processor second"], lines)


def _pairs(arm: Arm, alone: Arm) -> list[tuple[list[float], list[float]]]:
    return [(arm.whole, alone.whole), (arm.decoding, alone.decoding), (arm.processor, alone.processor)]


def _over(mine: list[float], one: list[float]) -> list[float]:
    return [left / right for left, right in zip(mine, one, strict=True)]
