"""overhead: what the hooks and the workspace cost per token, in prefill and in memory, against our own loop without.

SmolLM2-135M in its default dtype, one thread. Three generations of the same prompt walk in lockstep, one token each, in
an order that rotates from token to token, so that a noisy machine is noisy for all:

    bare   no hooks on the model, no context: our own decode loop
    off    the hooks are there, the request has no context
    on     6 layers with 32 virtual tokens each, 8 slots, controller, residual delta: all parts as if trained
           (their weights are random; that changes answers, not times), broadcasts and slot updates where they fall

A step is feed, sample and decide, in CPU time of the thread and in wall time; ratios are paired by token, medians.
Hooks are put on and taken off between steps, off the clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from benchmarks.kernel_parts.common import ROOT, MissingData, Options, cache_folder, table
from workspace.channels import PlainOutput
from workspace.errors import ModelDownloadFailed
from workspace.forward import Forward, StepContext
from workspace.generation import Generation
from workspace.hooking import HookedModel
from workspace.models import LoadedModel, load_model
from workspace.sampling import Sampler, SamplingParams
from workspace.state_files import TrainingRecord
from workspace.steering import Steering
from workspace.steering_types import Toggles
from workspace.stepping import Stepper
from workspace.workspace_config import WorkspaceConfig

CONTEXTS = (256, 2048)
TOKENS = 160
PREFILL = 1024
PREFILL_ROUNDS = 7
CHUNK = 256
CONFIG = WorkspaceConfig(virtual_tokens=32, slots=8, kv_plan_bias=-2.0)
ARMS = ("bare", "off", "on")


@dataclass
class Times:
    """Seconds of each step."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)


class Bench:
    """One model with a workspace whose parts all run."""

    def __init__(self, loaded: LoadedModel):
        self.loaded = loaded
        self.steering = Steering(loaded, CONFIG)
        parts = ("virtual_kv", "residual_delta", "controller")
        self.steering.modules.record = TrainingRecord(step=1, parts=parts, data_digest="random weights, for their cost")
        self._hooks: HookedModel | None = self.steering.hooked
        self._stepper = Stepper(loaded, Forward(loaded), prefill_chunk=CHUNK, batching="exact")

    def begin(self, arm: str, prompt: Sequence[int], tokens: int) -> Generation:
        """A generation as the engine makes it."""
        params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
        context: StepContext | None = None
        if arm == "on":
            context = self.steering.run(toggles=Toggles(memory=False))
        made = Generation(
            tuple(prompt),
            params,
            limit=tokens,
            sampler=Sampler(params, prompt),
            output=PlainOutput(self.loaded.tokenizer, prompt),
            context=context,
        )
        made.admit()
        return made

    def step(self, arm: str, generation: Generation, times: Times) -> None:
        """One step of the generation, with or without hooks on the model."""
        if arm == "bare" and self._hooks is not None:
            self._hooks.remove()
            self._hooks = None
        elif arm != "bare" and self._hooks is None:
            self._hooks = HookedModel(self.loaded, self.steering.layers)
        wall, cpu = time.perf_counter(), time.thread_time()
        self._stepper.round([generation], lambda: False)
        times.cpu.append(time.thread_time() - cpu)
        times.wall.append(time.perf_counter() - wall)

    def close(self) -> None:
        if self._hooks is not None:
            self._hooks.remove()


def run(options: Options) -> str:
    """The part. Raises MissingData where the model cannot be had."""
    try:
        loaded = load_model("smollm2-135m-instruct", cache_dir=cache_folder(), device="cpu")
    except ModelDownloadFailed as error:
        raise MissingData(f"SmolLM2 is not here and cannot be fetched: {error}") from None
    bench = Bench(loaded)
    tokens = 12 if options.quick else TOKENS
    try:
        with torch.inference_mode():
            decoded = {context: _decode(bench, context, tokens) for context in CONTEXTS}
            prefilled = _prefill(bench, 2 if options.quick else PREFILL_ROUNDS)
            report = _memory(bench)
    finally:
        bench.close()
    return _report(loaded, decoded, prefilled, report, tokens)


def _prompt(loaded: LoadedModel, length: int) -> list[int]:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8") * 2
    ids = loaded.tokenizer.encode(text)[:length]
    assert len(ids) == length
    return [int(number) for number in ids]


def _decode(bench: Bench, context: int, tokens: int) -> dict[str, Times]:
    """Times of the decode steps after a prompt of ``context`` tokens."""
    prompt = _prompt(bench.loaded, context)
    running = {arm: bench.begin(arm, prompt, tokens + 1) for arm in ARMS}
    for arm, generation in running.items():
        while not generation.prefilled:
            bench.step(arm, generation, Times())
    times = {arm: Times() for arm in ARMS}
    order = list(ARMS)
    for _ in range(tokens):
        for arm in order:
            bench.step(arm, running[arm], times[arm])
        order.append(order.pop(0))
    return times


def _prefill(bench: Bench, rounds: int) -> dict[str, list[float]]:
    """CPU seconds of reading a prompt, per arm and round."""
    prompt = _prompt(bench.loaded, PREFILL)
    found: dict[str, list[float]] = {arm: [] for arm in ARMS}
    order = list(ARMS)
    for _ in range(rounds):
        for arm in order:
            generation, times = bench.begin(arm, prompt, 2), Times()
            while not generation.prefilled:
                bench.step(arm, generation, times)
            found[arm].append(sum(times.cpu))
        order.append(order.pop(0))
    return found


def _memory(bench: Bench) -> str:
    shape = bench.steering.store.shape
    layers = len(shape.layers)
    return (
        f"A virtual token takes {shape.token_bytes:,} bytes in one layer and {shape.token_bytes * layers:,} in the "
        f"{layers} hooked ones ({shape.dtype}); {CONFIG.virtual_tokens} of them "
        f"{shape.token_bytes * layers * CONFIG.virtual_tokens / 1024:,.0f} KiB. A real token of this model takes "
        f"{_real_token(bench.loaded):,} bytes."
    )


def _real_token(loaded: LoadedModel) -> int:
    config = loaded.model.config.get_text_config()
    size = int(config.head_dim or config.hidden_size // config.num_attention_heads)
    return 2 * int(config.num_hidden_layers) * int(config.num_key_value_heads) * size * loaded.dtype.itemsize


def _ratio(ours: Sequence[float], base: Sequence[float]) -> str:
    ratios = sorted(a / b for a, b in zip(ours, base, strict=True))
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.3f} ({low:.3f} .. {high:.3f})"


def _report(
    loaded: LoadedModel,
    decoded: dict[int, dict[str, Times]],
    prefilled: dict[str, list[float]],
    memory: str,
    tokens: int,
) -> str:
    rows = []
    for context, times in decoded.items():
        for arm in ARMS:
            own, bare = times[arm], times["bare"]
            mean = sum(own.cpu) / sum(bare.cpu)
            cells = [f"{1e3 * statistics.median(own.cpu):.2f}", f"{1e3 * statistics.median(own.wall):.2f}"]
            rows.append([context, arm, *cells, _ratio(own.cpu, bare.cpu), _ratio(own.wall, bare.wall), f"{mean:.3f}"])
    head = ["context", "arm", "CPU ms", "wall ms", "CPU / bare (quartiles)", "wall / bare", "all CPU / bare"]
    prefill = [
        [arm, f"{statistics.median(seconds):.3f}", _ratio(seconds, prefilled["bare"])]
        for arm, seconds in prefilled.items()
    ]
    return "\n\n".join(
        [
            f"{loaded.name}, {loaded.dtype}, 1 thread, {tokens} tokens after each context, one step each in turn.",
            table(head, rows),
            "``all CPU`` holds broadcasts and slot updates, which the median leaves out.",
            f"Prefill of {PREFILL} tokens in chunks of {CHUNK}:",
            table(["arm", "CPU s", "CPU / bare (quartiles)"], prefill),
            memory,
        ]
    )
