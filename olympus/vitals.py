"""How the process and its machine are, over the last hour: sampled by one thread, told to the dashboard as ``system``.

Sampling goes on whether anybody looks or not, so that a page that is opened shows the past, too; one sample costs about
a millisecond. The process's CPU is in percent of one core (200 is two busy cores), the machine's in percent of all. In
memory only; what should be kept for longer is in Prometheus' metrics (``telemetry/metrics.py``).

psutil counts CPU time between two calls of the same object, so that only this thread may call it.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import psutil
import structlog

from telemetry.hub import EventHub

log = structlog.get_logger(__name__)

EVERY_SECONDS = 5.0
KEPT = 720  # an hour
_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


@dataclass(frozen=True, slots=True)
class Sample:
    """One look. Bytes, percent of a core, counts."""

    at: float  #: seconds since the epoch
    cpu_percent: float  #: of one core
    machine_cpu_percent: float  #: of all cores together
    rss_bytes: int
    machine_available_bytes: int
    disk_free_bytes: int
    threads: int
    generating: int
    waiting: int  #: for a place at the model
    chats: int
    streams: int
    training: int  #: kernels


Counts = Callable[[], Mapping[str, int]]


class Vitals:
    """``start()`` it in the process that serves, ``stop()`` it once. ``counts`` gives a sample's last five fields."""

    def __init__(self, hub: EventHub, folder: Path, counts: Counts, *, every_seconds: float = EVERY_SECONDS):
        self._hub, self._folder, self._counts, self._every = hub, folder, counts, every_seconds
        self._samples: deque[Sample] = deque(maxlen=KEPT)
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._process: psutil.Process | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to sample."""
        self._process = psutil.Process()
        self._process.cpu_percent()  # the first call has nothing to compare with
        psutil.cpu_percent()
        self._thread = threading.Thread(target=self._go, name="vitals", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(2.0)

    def series(self) -> dict[str, list[float]]:
        """All kept samples as columns of equal length, oldest first."""
        with self._lock:
            samples = list(self._samples)
        return {field.name: [getattr(sample, field.name) for sample in samples] for field in fields(Sample)}

    @property
    def newest(self) -> Sample | None:
        """The last sample; None in the first seconds."""
        with self._lock:
            return self._samples[-1] if self._samples else None

    def check_invariants(self) -> None:
        """Raise ``AssertionError`` if the samples contradict each other."""
        with self._lock:
            times = [sample.at for sample in self._samples]
        assert len(times) <= KEPT
        assert times == sorted(times)

    # -- inside -----------------------------------------------------------------------------------------------

    def _go(self) -> None:
        while not self._stopping.wait(self._every):
            try:
                sample = self._look()
            except (psutil.Error, OSError) as error:  # a file of /proc that is away for a moment
                log.warning("the process could not be measured", reason=str(error))
                continue
            with self._lock:
                self._samples.append(sample)
            self._hub.publish("system", asdict(sample), key="system")

    def _look(self) -> Sample:
        assert self._process is not None, "start() comes first"
        return Sample(
            at=round(time.time(), 3),
            cpu_percent=self._process.cpu_percent(),
            machine_cpu_percent=psutil.cpu_percent(),
            rss_bytes=self._process.memory_info().rss,
            machine_available_bytes=psutil.virtual_memory().available,
            disk_free_bytes=shutil.disk_usage(self._folder).free,
            threads=threading.active_count(),
            **self._counts(),
        )


def machine() -> dict[str, Any]:
    """The machine as the process sees it; ``memory_limit_bytes`` is its container's, if it has one."""
    memory = psutil.virtual_memory()
    return {
        "cores": psutil.cpu_count() or 1,
        "load": [round(value, 2) for value in psutil.getloadavg()],
        "memory_bytes": memory.total,
        "memory_available_bytes": memory.available,
        "memory_limit_bytes": memory_limit(),
    }


def memory_limit(places: tuple[Path, ...] = _CGROUP_LIMITS) -> int | None:
    """What the control group may take, in bytes; None without a limit below the machine's memory."""
    for place in places:
        try:
            limit = int(place.read_text(encoding="ascii"))
        except (OSError, ValueError):  # there is none, or it says max
            continue
        return limit if limit < psutil.virtual_memory().total else None
    return None


def threads() -> list[dict[str, Any]]:
    """The threads of this process by name, numbers left out, with their CPU seconds; the busiest first."""
    spent = {item.id: item.user_time + item.system_time for item in psutil.Process().threads()}
    groups: dict[str, dict[str, Any]] = {}
    for thread in threading.enumerate():
        name = _group(thread.name)
        group = groups.setdefault(name, {"name": name, "threads": 0, "cpu_seconds": 0.0})
        group["threads"] += 1
        group["cpu_seconds"] += spent.pop(thread.native_id or -1, 0.0)
    if spent:  # of libraries: OpenMP's pool, tokenizers
        groups[""] = {"name": "native", "threads": len(spent), "cpu_seconds": sum(spent.values())}
    found = sorted(groups.values(), key=lambda group: -group["cpu_seconds"])
    return [{**group, "cpu_seconds": round(group["cpu_seconds"], 2)} for group in found]


def _group(name: str) -> str:
    """``ThreadPoolExecutor-0_12`` as ``ThreadPoolExecutor``, ``Thread-7 (serve)`` as ``Thread``."""
    plain = name.split(" (")[0].split("_")[0]
    head, _, tail = plain.rpartition("-")
    return head if head and tail.isdigit() else plain


def disk(parts: Mapping[str, Path], folder: Path) -> dict[str, Any]:
    """The disk under ``folder``, and how many bytes lie in each of ``parts`` (files or folders)."""
    usage = shutil.disk_usage(folder)
    sizes = {name: _size(path) for name, path in parts.items()}
    return {"total_bytes": usage.total, "free_bytes": usage.free, "parts": sizes}


def _size(path: Path) -> int:
    if path.is_file():  # a database with its journal
        return sum(_file_size(item) for item in path.parent.glob(f"{path.name}*"))
    return sum(_file_size(item) for item in path.rglob("*"))


def _file_size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:  # removed meanwhile
        return 0
