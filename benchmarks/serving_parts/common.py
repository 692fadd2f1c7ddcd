"""What the parts of ``benchmarks/serving.py`` share: the model as it is served, prompts, ratios and their spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.kernel_parts.common import cache_folder
from workspace.models import LoadedModel, load_model
from workspace.quantised import WeightsName

MODEL = "smollm2-135m-instruct"


def load(weights: WeightsName) -> LoadedModel:
    """The packaged model in its default dtype, its linears as ``model.weights`` says."""
    return load_model(MODEL, cache_dir=cache_folder(), weights=weights)


def words(loaded: LoadedModel, count: int, seed: int) -> list[int]:
    """``count`` token ids that have nothing in common with those of other seeds."""
    random = torch.Generator().manual_seed(seed)
    return torch.randint(10, loaded.vocabulary_size - 10, (count,), generator=random).tolist()


@dataclass(frozen=True)
class Taken:
    """Seconds on the wall, and of the processor, which leave out the time in which others ran."""

    wall: float
    processor: float


def timed(work: Callable[[], object]) -> Taken:
    """How long ``work`` takes; of the processor, the seconds of all threads of this process."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return Taken(time.perf_counter() - wall, time.process_time() - processor)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median and quartiles."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.{digits}f} ({low:.{digits}f} .. {high:.{digits}f})"
