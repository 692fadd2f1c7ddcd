"""What the trainable parts cost per call on one core, for the shapes of SmolLM2-135M and gpt-oss-20b.

    python -m benchmarks.workspace_parts.modules [--rounds 1000]

Medians and fastest calls in milliseconds. Slots, virtual KV and deltas run once in ``update_every`` tokens, the
controller at every token. A machine that is busy with other work shows in the medians; compare the fastest calls.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from settings import prepare_process_environment  # noqa: E402

prepare_process_environment()  # before torch is imported

import torch  # noqa: E402

from workspace.controller import Controller  # noqa: E402
from workspace.modules import WorkspaceModules  # noqa: E402
from workspace.projector import ModuleShape  # noqa: E402
from workspace.workspace_config import WorkspaceConfig  # noqa: E402

SHAPES = {
    "SmolLM2-135M": (ModuleShape(576, 3, 64, (0, 5, 10, 15, 20, 25)), 49_152),
    "gpt-oss-20b": (ModuleShape(2880, 8, 64, (1, 5, 9, 13, 17, 21)), 201_088),
}


def milliseconds(work: Callable[[], object], rounds: int) -> str:
    for _ in range(20):
        work()
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - started))
    return f"{statistics.median(times):7.3f} ({min(times):.3f})"


def calls(modules: WorkspaceModules, vocabulary: int) -> dict[str, Callable[[], object]]:
    """What is timed, by name, at batch size 1."""
    shape = modules.shape
    residuals = {layer: torch.randn(1, shape.hidden_size) for layer in shape.layers}
    memories, logits = torch.randn(1, 4, modules.config.embedding_width), torch.randn(vocabulary) * 3
    slots = modules.update(residuals).slots
    heuristic = Controller(modules.config.thresholds)
    learned = Controller(modules.config.thresholds, modules.controller)
    return {
        f"update of 8 slots by {len(shape.layers)} probes": lambda: modules.update(residuals, slots),
        "the same with 4 memories": lambda: modules.update(residuals, slots, memories),
        "virtual KV, 16 tokens per layer": lambda: modules.projector.kv(slots),
        "deltas of all hooked layers": lambda: modules.projector.delta(slots, residuals),
        "controller, heuristic": lambda: heuristic.step(logits, 5),
        "controller, trained": lambda: learned.step(logits, 5, slots),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1000)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print("ms per call, median (fastest)")
    for name, (shape, vocabulary) in SHAPES.items():
        for width in (64, 128):
            modules = WorkspaceModules(shape, WorkspaceConfig(slot_width=width))
            print(f"{name}, width {width}: {modules.parameter_count:,} numbers, {modules.state_bytes:,} bytes")
            with torch.inference_mode():
                for what, call in calls(modules, vocabulary).items():
                    print(f"  {what:34} {milliseconds(call, rounds)}")


if __name__ == "__main__":
    main()
