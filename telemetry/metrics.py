"""What Prometheus is told: request times as they happen, everything else read at the moment of a scrape.

One ``Metrics`` object with a registry of its own per application, nothing global, so that two applications in one
process (tests) do not count each other's requests. State that somebody else owns already (kernels, the engine's
totals, open chats) is asked for through ``Sources`` when it is wanted and never copied. Names follow Prometheus'
conventions: base units, ``_total`` for counters. docs/api.md lists them.
"""

from __future__ import annotations

import threading
from collections import Counter as Tally
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE"})
_REQUEST_BUCKETS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_WRITE_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)
#: Name of the metric, key in a kernel's line, help text.
_KERNEL_GAUGES = (
    ("olympus_kernel_steps", "step", "Training steps of a kernel, over restarts."),
    ("olympus_kernel_phi", "phi", "Integration (Phi) of a kernel, 0 to 1, where it is measured."),
    ("olympus_kernel_loss_nats", "loss", "Smoothed training loss of a kernel, nats per byte."),
    ("olympus_kernel_holdout_loss_nats", "holdout_loss", "Held-out loss of a kernel, nats per byte."),
    ("olympus_kernel_baseline_loss_nats", "baseline_loss", "Loss of the context-free baseline, nats per byte."),
    ("olympus_kernel_experiences", "experiences", "Experiences in the kernel's buffer."),
)


class PrefixCacheTotals(Protocol):
    """The part of ``workspace.prefix_cache.PrefixCacheStats`` that is told."""

    @property
    def bytes(self) -> int: ...
    @property
    def lookups(self) -> int: ...
    @property
    def hits(self) -> int: ...


class EngineTotals(Protocol):
    """The part of ``workspace.engine.EngineStats`` that is told."""

    @property
    def active(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def finished(self) -> Mapping[str, int]: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def completion_tokens(self) -> int: ...
    @property
    def cached_tokens(self) -> int: ...
    @property
    def decode_passes(self) -> int: ...
    @property
    def decode_rows(self) -> int: ...
    @property
    def prefix_cache(self) -> PrefixCacheTotals | None: ...
    @property
    def busy_seconds(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Sources:
    """Where a scrape looks. Each is called in the scraping thread; ``engine`` gives None while no model is loaded."""

    kernels: Callable[[], Sequence[Mapping[str, Any]]]
    checkpoint_bytes: Callable[[], int]
    admission: Callable[[], Mapping[str, int]]
    engine: Callable[[], EngineTotals | None]
    experiences: Callable[[], int]


class Metrics:
    """The registry, and the two things that are measured where they happen."""

    def __init__(self, sources: Sources):
        self.registry = CollectorRegistry()
        self._requests = Histogram(
            "olympus_http_request_seconds",
            "Time until a response was complete, streams included, by route.",
            ("method", "route", "status"),
            buckets=_REQUEST_BUCKETS,
            registry=self.registry,
        )
        self._writes = Histogram(
            "olympus_database_write_seconds",
            "Write transactions, from asking for the lock to the commit.",
            buckets=_WRITE_BUCKETS,
            registry=self.registry,
        )
        self.registry.register(_StateCollector(sources))
        ProcessCollector(registry=self.registry)

    def observe_request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count one finished request. ``route`` is the template, never the path: paths are without number."""
        known = method if method in _METHODS else "other"
        self._requests.labels(known, route, str(status)).observe(seconds)

    def observe_write(self, seconds: float) -> None:
        """Count one write transaction."""
        self._writes.observe(seconds)

    def render(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)


class _StateCollector(Collector):
    """Reads the sources at scrape time."""

    def __init__(self, sources: Sources):
        self._sources = sources

    def describe(self) -> list[Metric]:
        return []  # what there is depends on the state; the registry need not look before the first scrape

    def collect(self) -> Iterator[Metric]:
        yield from self._admission()
        yield from self._engine()
        yield from self._kernels()
        yield GaugeMetricFamily(
            "olympus_experiences", "Experiences in the history that are not deleted.", self._sources.experiences()
        )
        yield GaugeMetricFamily("olympus_threads", "Python threads of the process.", threading.active_count())

    def _admission(self) -> Iterator[Metric]:
        counts = self._sources.admission()
        yield GaugeMetricFamily("olympus_chats_active", "Chat requests that are open.", counts["chats"])
        yield GaugeMetricFamily("olympus_streams_active", "Event streams that are open.", counts["streams"])
        refused = CounterMetricFamily("olympus_refused", "Requests refused: too many were open.", labels=["kind"])
        refused.add_metric(["chat"], counts["chats_refused"])
        refused.add_metric(["stream"], counts["streams_refused"])
        yield refused

    def _engine(self) -> Iterator[Metric]:
        totals = self._sources.engine()
        yield GaugeMetricFamily("olympus_model_loaded", "1 when the language model is loaded.", int(totals is not None))
        if totals is None:
            return
        yield GaugeMetricFamily("olympus_generations_active", "Generations that share the engine.", totals.active)
        yield GaugeMetricFamily("olympus_generations_waiting", "Generations in the engine's queue.", totals.waiting)
        ended = CounterMetricFamily("olympus_generations", "Generations that ended, by reason.", labels=["reason"])
        for reason, count in totals.finished.items():
            ended.add_metric([reason], count)
        yield ended
        yield CounterMetricFamily("olympus_prompt_tokens", "Prompt tokens of ended generations.", totals.prompt_tokens)
        yield CounterMetricFamily(
            "olympus_completion_tokens", "Tokens generated by ended generations.", totals.completion_tokens
        )
        yield CounterMetricFamily(
            "olympus_cached_prompt_tokens", "Prompt tokens that were not read again.", totals.cached_tokens
        )
        yield CounterMetricFamily(
            "olympus_decode_passes", "Forward passes over tokens of answers.", totals.decode_passes
        )
        yield CounterMetricFamily(
            "olympus_decode_rows", "Tokens that these passes took; divided: generations in a pass.", totals.decode_rows
        )
        if (kept := totals.prefix_cache) is not None:
            yield GaugeMetricFamily("olympus_prefix_cache_bytes", "Kept of earlier prompts and answers.", kept.bytes)
            yield CounterMetricFamily("olympus_prefix_cache_lookups", "Prompts that were looked up.", kept.lookups)
            yield CounterMetricFamily("olympus_prefix_cache_hits", "Prompts whose beginning was known.", kept.hits)
        yield CounterMetricFamily(
            "olympus_engine_busy_seconds", "Time the engine spent in model steps.", totals.busy_seconds
        )

    def _kernels(self) -> Iterator[Metric]:
        kernels = self._sources.kernels()
        states = GaugeMetricFamily("olympus_kernels", "Kernels by state.", labels=["state"])
        for state, count in sorted(Tally(str(kernel["state"]) for kernel in kernels).items()):
            states.add_metric([state], count)
        yield states
        for name, key, text in _KERNEL_GAUGES:
            gauge = GaugeMetricFamily(name, text, labels=["kernel", "domain"])
            for kernel in kernels:
                if kernel.get(key) is not None:
                    gauge.add_metric([str(kernel["kernel_id"]), str(kernel["domain"])], kernel[key])
            yield gauge
        yield GaugeMetricFamily(
            "olympus_checkpoint_bytes", "Size of all kernels' checkpoints.", self._sources.checkpoint_bytes()
        )
