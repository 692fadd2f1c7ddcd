"""Time between the tokens of a chat: alone, and beside three kernels that train in the same process.

A real Zeus with a real database trains three kernels of the default preset on banking77 (``kernel_parts/service.py``)
while the engine answers, as it is served on a CPU: quantised where that is lossless, with one core less than there are.
Blocks of three kinds alternate, in an order that changes from round to round:

    alone      the kernels are paused
    paced      they train and keep to ``kernels.serve_share`` of a core each (what ships)
    flat out   they train as if nobody were served, at the same niceness: what the pace is good for

Times are wall times at the reader of the stream: run this on a machine that does nothing else.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Literal

from benchmarks.kernel_parts.common import Options, table
from benchmarks.kernel_parts.service import TRAINERS, messages_of, open_zeus, set_training, spawn, wait_for_step
from olympus.requests import ExperienceIn
from olympus.zeus import Zeus
from settings import load_settings
from workspace.engine import Engine
from workspace.generation import TokenChunk
from workspace.models import load_model
from workspace.sampling import SamplingParams

Kind = Literal["alone", "paced", "flat out"]
KINDS: tuple[Kind, ...] = ("alone", "paced", "flat out")
QUESTION = "Tell me about the sea."


def run(options: Options) -> str:
    """Percentiles for each kind of block, pooled, and the ratios of each round."""
    settings = load_settings()
    loaded = load_model("smollm2-135m-instruct", cache_dir=settings.model.cache_dir, device="cpu", weights="auto")
    engine = Engine(loaded, max_active=4, max_waiting=4, threads=0)
    engine.start()
    engine.warm_up()
    kind: list[Kind] = ["alone"]
    try:
        with open_zeus(lambda: engine.is_busy and kind[0] != "flat out") as zeus:
            kernels = _kernels(zeus, options)
            return _measured(zeus, kernels, engine, lambda chosen: kind.__setitem__(0, chosen), options)
    finally:
        engine.stop()


def _kernels(zeus: Zeus, options: Options) -> list[str]:
    items = tuple(ExperienceIn(observation=text, action=label) for text, label in messages_of(options))
    kernels = [spawn(zeus, f"trainer-{number}", "nano", options.seeds[0] + number, items) for number in range(TRAINERS)]
    for kernel in kernels:
        wait_for_step(zeus, kernel, 2 if options.quick else 10)
    return kernels


def _measured(zeus: Zeus, kernels: list[str], engine: Engine, choose: Callable[[Kind], None], options: Options) -> str:
    rounds, answers, tokens = (2, 1, 24) if options.quick else (8, 4, 64)
    gaps: dict[Kind, list[list[float]]] = {kind: [] for kind in KINDS}
    pace: dict[Kind, list[float]] = {kind: [] for kind in KINDS}
    for number in range(rounds):
        turn = number % len(KINDS)
        for kind in KINDS[turn:] + KINDS[:turn]:
            choose(kind)
            set_training(zeus, kernels, kind != "alone")
            before, begun = _steps(zeus, kernels), time.perf_counter()
            gaps[kind].append([gap for _ in range(answers) for gap in _gaps(engine, tokens)])
            pace[kind].append((_steps(zeus, kernels) - before) / (time.perf_counter() - begun))
        print(f"  round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    rows = []
    for kind in KINDS:
        pooled = [gap for block in gaps[kind] for gap in block]
        ratios = [_p95(own) / _p95(base) for own, base in zip(gaps[kind], gaps["alone"], strict=True)]
        row = [statistics.median(pooled) * 1000, _p95(pooled) * 1000]
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} .. {max(ratios):.2f})"
        rows.append([kind, *(f"{value:.1f}" for value in row), ratio, f"{statistics.median(pace[kind]):.2f}"])
    head = [
        "kernels",
        "ms between tokens, p50",
        "p95",
        "p95 against alone, median of rounds (least .. most)",
        "steps/s",
    ]
    cores = f"{engine.threads} thread{'s' if engine.threads > 1 else ''} for the model"
    return f"{TRAINERS} kernels, {rounds} rounds of {answers} answers of {tokens} tokens, {cores}.\n\n" + table(
        head, rows
    )


def _steps(zeus: Zeus, kernels: list[str]) -> int:
    return sum(int(zeus.status(kernel)["step"]) for kernel in kernels)


def _gaps(engine: Engine, tokens: int) -> list[float]:
    """Seconds between one token and the next, as a reader of the stream sees them."""
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    times = []
    for event in engine.submit([{"role": "user", "content": QUESTION}], params).stream():
        if isinstance(event, TokenChunk) and event.token_id is not None:
            times.append(time.perf_counter())
    return [after - before for before, after in itertools.pairwise(times)]


def _p95(values: list[float]) -> float:
    return statistics.quantiles(values, n=20)[-1]
