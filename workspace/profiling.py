"""What each part of the workspace costs in one generation: milliseconds per use, memory, and how loud it is.

Steps of a decode are timed with one part more each time, alternating with the stock step; parts that run once in a
while (slots, projector) are timed by themselves. Memory is the growth of the process's resident set while the part is
made, and the bytes of its tensors: the resident set is what counts, and it moves in pages and by chance, so both are
shown. Norms are those of a broadcast made of a real prompt, beside the real keys and values of its layer.

One thread, one sequence; nothing is random. ``benchmarks/`` has the ratios that we claim, this is for looking.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import DynamicCache

from workspace.calibration import real_kv
from workspace.context import Context, Delta, Recorder
from workspace.hooking import HookedModel
from workspace.models import LoadedModel
from workspace.prompting import Prompting
from workspace.run import probe_places
from workspace.steering import Steering
from workspace.workspace_config import WorkspaceConfig

_PROMPT = "Tell me about the history of the printing press, and what it changed in the lives of ordinary people."


@dataclass(frozen=True, slots=True)
class Cost:
    """One part. ``milliseconds``: of one use; ``against``: how much that is of a stock decode step."""

    part: str
    milliseconds: float
    against: float
    uses: str  #: how often it runs


@dataclass(frozen=True, slots=True)
class Memory:
    """What making a part took."""

    part: str
    resident_bytes: int
    tensor_bytes: int


@dataclass(frozen=True, slots=True)
class LayerNorms:
    """Mean lengths in one hooked layer: of virtual and of real keys and values."""

    layer: int
    virtual_keys: float
    real_keys: float
    virtual_values: float
    real_values: float


@dataclass(frozen=True, slots=True)
class Profile:
    """All of it."""

    model: str
    context: int
    rounds: int
    stock_milliseconds: float
    costs: tuple[Cost, ...]
    memory: tuple[Memory, ...]
    norms: tuple[LayerNorms, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON types."""
        return asdict(self)

    def table(self) -> str:
        """For people."""
        lines = [
            f"{self.model}, {self.context} tokens of context, medians of {self.rounds} rounds",
            f"stock decode step {self.stock_milliseconds:.2f} ms",
            "",
            f"{'part':34}{'ms':>9}{'of a step':>11}  runs",
        ]
        lines += [f"{c.part:34}{c.milliseconds:9.3f}{c.against:11.1%}  {c.uses}" for c in self.costs]
        lines += ["", f"{'memory':34}{'resident':>12}{'tensors':>12}"]
        lines += [f"{m.part:34}{m.resident_bytes / 1024:9.0f} kB{m.tensor_bytes / 1024:9.0f} kB" for m in self.memory]
        lines += ["", f"{'layer':>7}{'virtual keys':>14}{'real':>9}{'virtual values':>16}{'real':>9}"]
        lines += [
            f"{n.layer:7}{n.virtual_keys:14.3f}{n.real_keys:9.3f}{n.virtual_values:16.3f}{n.real_values:9.3f}"
            for n in self.norms
        ]
        return "\n".join(lines)


@torch.inference_mode()
def profile(loaded: LoadedModel, config: WorkspaceConfig, *, context: int = 256, rounds: int = 20) -> Profile:
    """Profile ``config`` (with its weights, if it names some) on a loaded, un-hooked model.

    Raises what ``Steering`` raises.
    """
    before = _resident()
    hooks_only = HookedModel(loaded, config.hooked_layers)
    hooked_bytes = _resident() - before
    hooks_only.remove()
    before = _resident()
    steering = Steering(loaded, config)
    made_bytes = _resident() - before
    try:
        return _Profiler(steering, context, rounds).profile(
            [
                Memory("hooks", max(0, hooked_bytes), 0),
                Memory("hooks, modules and store", max(0, made_bytes), steering.modules.state_bytes),
            ]
        )
    finally:
        steering.close()


class _Profiler:
    """Times one steering on a repeated prompt."""

    def __init__(self, steering: Steering, context: int, rounds: int):
        self._steering, self._rounds = steering, rounds
        loaded = steering.loaded
        rendered = Prompting(loaded).render([{"role": "user", "content": _PROMPT}])
        ids = (rendered * -(-context // len(rendered)))[:context]
        self._ids = torch.tensor([ids], device=loaded.device)
        self._cache = DynamicCache(config=loaded.model.config)
        recorder = Recorder(steering.layers, whole=True)
        self._position = 0
        self._pass(self._ids, Context(recorder=recorder))
        self._seen = {layer: recorder.residuals[layer][:, probe_places(context)] for layer in steering.layers}

    def profile(self, memory: list[Memory]) -> Profile:
        steering, modules = self._steering, self._steering.modules
        slots = modules.update(self._seen).slots
        before = _resident()
        layers = steering.broadcast(slots, self._seen)
        segments = steering.as_segments(layers, born=0)
        tensors = [tensor for made in segments.values() for tensor in (made.keys, made.values, made.bias)]
        broadcast = Memory("one broadcast", max(0, _resident() - before), sum(tensor.nbytes for tensor in tensors))
        last = {layer: seen[:, -1] for layer, seen in self._seen.items()}
        first = torch.zeros(1, dtype=torch.int64)
        deltas = {layer: Delta(vector, first) for layer, vector in modules.projector.delta(slots, last).items()}
        step: Mapping[str, Callable[[], Context | None]] = {
            "stock": lambda: None,
            "hooks, nothing carried": Context,
            "probes": lambda: Context(recorder=Recorder(steering.layers)),
            f"{next(iter(segments.values())).tokens} virtual tokens": lambda: Context(segments),
            "residual deltas": lambda: Context(deltas=deltas),
            "all of these": lambda: Context(segments, deltas, recorder=Recorder(steering.layers)),
        }
        times = self._steps(step)
        stock = statistics.median(times["stock"])
        costs = [
            Cost(
                part, _paired(times[part], times["stock"]), _paired(times[part], times["stock"]) / stock, "every token"
            )
            for part in step
            if part != "stock"
        ]
        logits = self._pass(self._ids[:, -1:], None)[0, -1].float()
        controller = modules.new_controller()
        every = f"every {steering.config.update_every} tokens"
        alone: list[tuple[str, Callable[[], object], str]] = [
            ("controller", lambda: controller.step(logits, 1, slots), "every token"),
            ("deltas made", lambda: modules.projector.delta(slots, last), "every token, where trained"),
            ("slots updated by the prompt", lambda: modules.update(self._seen), "once"),
            ("slots updated by a token", lambda: modules.update(last, slots), every),
            ("broadcast made", lambda: steering.broadcast(slots, self._seen), "when the controller says so"),
        ]
        for part, work, uses in alone:
            taken = self._median(work)
            costs.append(Cost(part, taken, taken / stock, uses))
        return Profile(
            model=steering.loaded.name,
            context=self._ids.shape[1],
            rounds=self._rounds,
            stock_milliseconds=stock,
            costs=tuple(costs),
            memory=(*memory, broadcast),
            norms=tuple(self._norms(layers)),
        )

    def _pass(self, ids: Tensor, context: Context | None) -> Tensor:
        """Append ``ids`` [1, T] to the cache; logits [1, 1, V]."""
        loaded, start = self._steering.loaded, self._position
        self._position += ids.shape[1]
        out = loaded.model(
            ids,
            position_ids=torch.arange(start, self._position, device=loaded.device)[None],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=torch.tensor([ids.shape[1] - 1], device=loaded.device),
            **({} if context is None else {"workspace": context}),
        )
        logits: Tensor = out.logits
        return logits

    def _steps(self, contexts: Mapping[str, Callable[[], Context | None]]) -> dict[str, list[float]]:
        """Milliseconds of a decode step with each context, all of them in each round, in turning order.

        The cache grows by a token each time, for all alike.
        """
        names = list(contexts)
        times: dict[str, list[float]] = {name: [] for name in names}
        for number in range(-2, self._rounds):  # two rounds to warm up
            turned = names[number % len(names) :] + names[: number % len(names)]
            for name in turned:
                started = time.perf_counter()
                self._pass(self._ids[:, -1:], contexts[name]())
                if number >= 0:
                    times[name].append(1e3 * (time.perf_counter() - started))
        return times

    def _median(self, work: Callable[[], object]) -> float:
        work()
        times = []
        for _ in range(self._rounds):
            started = time.perf_counter()
            work()
            times.append(1e3 * (time.perf_counter() - started))
        return statistics.median(times)

    def _norms(self, layers: Mapping[int, tuple[Tensor, Tensor, Tensor]]) -> list[LayerNorms]:
        real = real_kv(self._steering.hooked, self._ids[0])
        return [
            LayerNorms(layer, _length(keys), _length(real[layer][0]), _length(values), _length(real[layer][1]))
            for layer, (keys, values, _) in layers.items()
        ]


def _paired(times: list[float], stock: list[float]) -> float:
    """Median difference to the stock step of the same round."""
    return statistics.median(mine - its for mine, its in zip(times, stock, strict=True))


def _length(vectors: Tensor) -> float:
    return float(vectors.float().norm(dim=-1).mean())


def _resident() -> int:
    return int(psutil.Process().memory_info().rss)
