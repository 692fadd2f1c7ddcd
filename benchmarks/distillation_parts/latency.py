"""Time to the first token and per token: a long prompt, the same with cached keys and values, and a cartridge.

The fair rival is the long prompt whose keys and values lie ready (``cached``): it pays nothing for reading them, but
its attention still goes over all of them at every token. All three answer the same question through the engine, in
turns; medians, and the number of requests after which training has paid for itself.
"""

from __future__ import annotations

import statistics
import sys

from benchmarks.distillation_parts.house import House, load, make_house, observation
from benchmarks.kernel_parts.common import Options, table
from memory.distillation.encoding import Encoder
from workspace.engine import Engine
from workspace.models import LoadedModel
from workspace.prefix import KVPrefix, prefix_of_tokens
from workspace.sampling import SamplingParams

SHOWN = 60
SLOTS = 64
TOKENS = 24
#: CPU seconds of a training, as the part ``feedback`` measures them, are quoted there.
_ROUNDS = 15


def run(options: Options) -> str:
    """The table."""
    loaded = load(options)
    house = make_house(options, "semantic", options.seeds[0], episodes=SHOWN, shown=SHOWN, questions=8)
    engine = Engine(loaded, max_active=1, max_waiting=2, threads=1, prefill_chunk=512)
    engine.start()
    try:
        return _measured(loaded, engine, house, 2 if options.quick else _ROUNDS)
    finally:
        engine.stop()


def _measured(loaded: LoadedModel, engine: Engine, house: House, rounds: int) -> str:
    encoder = Encoder(loaded)
    whole = [encoder.prompt(list(item.teacher), after_prefix=False) for item in house.questions]
    shared = _common(whole)
    cached = prefix_of_tokens(loaded, whole[0][:shared])
    short = encoder.prompt(house.student(observation(house.questions[0])), after_prefix=True)
    cartridge = prefix_of_tokens(loaded, whole[0][:SLOTS])  # its values make no difference to its speed
    arms: dict[str, tuple[list[int], KVPrefix | None]] = {
        "long prompt": (whole[0], None),
        "long prompt, cached": (whole[0][shared:], cached),
        "cartridge": (short, cartridge),
    }
    first: dict[str, list[float]] = {name: [] for name in arms}
    each: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds):
        for name, (prompt, prefix) in arms.items():
            params = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
            told = engine.submit(prompt, params, prefix=prefix).result()
            assert told.timings.ttft_s is not None
            first[name].append(told.timings.ttft_s)
            each[name].append(told.timings.decode_s / (TOKENS - 1))
        print(f"  round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    lines = []
    for name, (prompt, prefix) in arms.items():
        slots = 0 if prefix is None else prefix.slots
        ratios = [one / other for one, other in zip(first["long prompt"], first[name], strict=True)]
        paces = [one / other for one, other in zip(each[name], each["cartridge"], strict=True)]
        lines.append(
            [
                name,
                len(prompt),
                slots,
                0 if prefix is None else f"{prefix.nbytes / 1e6:.1f} MB",
                f"{1000 * statistics.median(first[name]):.0f} ms",
                f"{statistics.median(ratios):.1f}x",
                f"{1000 * statistics.median(each[name]):.1f} ms",
                f"{statistics.median(paces):.3f}x",
            ]
        )
    saved = statistics.median(first["long prompt"]) - statistics.median(first["cartridge"])
    head = ["", "prompt tokens", "slots", "cache", "first token", "long prompt / this", "per token", "this / cartridge"]
    told = f"Against the uncached long prompt a cartridge saves {1000 * saved:.0f} ms a request; "
    return (
        table(head, lines)
        + f"\n\n{told}a training of T CPU seconds has paid for itself after T / {saved:.2f} requests."
    )


def _common(prompts: list[list[int]]) -> int:
    """How many tokens all prompts begin with."""
    shortest = min(len(prompt) for prompt in prompts)
    return next((place for place in range(shortest) if len({prompt[place] for prompt in prompts}) > 1), shortest - 1)
