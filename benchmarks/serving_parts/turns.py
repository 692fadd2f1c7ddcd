"""Time to the first token of the second turn of a 2,000-token conversation, against its first turn.

The second turn's prompt is the first one, its answer and a new question, as the chat template writes them. Beside it
the same second turn in an engine that keeps nothing, and another conversation that begins with the same system prompt.
A conversation is new in every round; the engines alternate.
"""

from __future__ import annotations

import sys
from typing import Any

from benchmarks.kernel_parts.common import Options, table
from benchmarks.serving_parts.common import load, spread, words
from workspace.engine import Engine
from workspace.generation import Finished
from workspace.sampling import SamplingParams

FIRST = 2000
ANSWER = 48
_ROUNDS = 3  #: for each seed
_KEPT = 256 << 20  #: the default of engine.prefix_cache_bytes


def run(options: Options) -> str:
    """The table."""
    loaded = load("auto")
    engines = {
        kept: Engine(loaded, max_active=1, max_waiting=0, threads=1, prefix_cache_bytes=kept) for kept in (_KEPT, 0)
    }
    for engine in engines.values():
        engine.start()
        engine.warm_up()
    seconds: dict[str, list[float]] = {}
    cached: dict[str, Finished] = {}

    def note(name: str, finished: Finished) -> None:
        assert finished.timings.ttft_s is not None
        seconds.setdefault(name, []).append(finished.timings.ttft_s)
        cached[name] = finished

    try:
        for seed in options.seeds:
            for number in range(1 if options.quick else _ROUNDS):
                _conversation(engines, note, 1000 * seed + 10 * number, 300 if options.quick else FIRST)
                print(f"  seed {seed}, round {number + 1}", file=sys.stderr, flush=True)
    finally:
        for engine in engines.values():
            engine.check_invariants()
            engine.stop()
    first = seconds["first turn"]
    lines = [
        [
            name,
            cached[name].usage.prompt_tokens,
            cached[name].usage.cached_tokens,
            spread([1000 * value for value in values], 0),
            spread([mine / other for mine, other in zip(values, first, strict=True)], 3),
        ]
        for name, values in seconds.items()
    ]
    return table(["", "prompt tokens", "not read again", "first token, ms", "over the first turn"], lines)


def _conversation(engines: dict[int, Engine], note: Any, seed: int, length: int) -> None:
    keeping, forgetting = engines.values()
    tokenizer = keeping.loaded.tokenizer
    system = {"role": "system", "content": tokenizer.decode(words(keeping.loaded, length, seed))}
    messages = [system, {"role": "user", "content": "What is this about?"}]
    params = SamplingParams(max_tokens=ANSWER, temperature=0, ignore_eos=True)
    told = keeping.submit(messages, params).result()
    note("first turn", told)
    turn = [
        *messages,
        {"role": "assistant", "content": told.text},
        {"role": "user", "content": "Say that in one word."},
    ]
    note("second turn", keeping.submit(turn, params).result())
    note("second turn, nothing kept", forgetting.submit(turn, params).result())
    other = [system, {"role": "user", "content": "Who wrote this, and why? Give your reasons."}]
    note("another conversation with that system prompt", keeping.submit(other, params).result())
