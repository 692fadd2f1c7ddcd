"""Learning from feedback: arbitrary codes, of which only experience tells what they mean.

An agent lived 240 episodes, a fifth of them wrong and corrected. The cartridge (64 slots) trains on the right answers;
the long prompt shows the newest 60 episodes with their feedback (about 2,000 tokens). This is not parity: targets come
from feedback, and the comparison is with everything that could be done with the same experience.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from benchmarks.distillation_parts import report
from benchmarks.distillation_parts.arms import QUESTIONS, SHOWN, answers, first_values, training
from benchmarks.distillation_parts.house import ask, load, make_house
from benchmarks.distillation_parts.off_task import off_task
from benchmarks.distillation_parts.rivals import lora
from benchmarks.kernel_parts.common import Options
from lm.engine_client import EngineClient
from lm.types import LanguageModel
from memory.distillation.config import make_distill_config
from memory.distillation.data_generation import generate_dataset
from memory.distillation.dataset import read_dataset
from memory.distillation.evaluation import ArmResult
from memory.distillation.trainer import train_cartridge
from workspace.engine import Engine
from workspace.models import LoadedModel

EPISODES = 240


def run(options: Options) -> str:
    """All seeds; the LoRA on the first one only, since it needs a model of its own."""
    loaded = load(options)
    engine = Engine(loaded, max_active=2, max_waiting=8, threads=1)
    engine.start()
    try:
        found, notes = [], []
        for place, seed in enumerate(options.seeds):
            arms, note = _seed(options, loaded, EngineClient(engine), seed, with_lora=place == 0)
            found.append(arms)
            notes.append(note)
    finally:
        engine.stop()
    rivals = [name for name in found[0] if name != "cartridge"]
    return "\n\n".join([report.arms(found), report.against(found, "cartridge", rivals), *notes])


def _seed(
    options: Options, loaded: LoadedModel, teacher: LanguageModel, seed: int, *, with_lora: bool
) -> tuple[Mapping[str, ArmResult], str]:
    quick = options.quick
    house = make_house(options, "codes", seed, episodes=EPISODES, shown=SHOWN, questions=6 if quick else QUESTIONS)
    distil = make_distill_config(
        {"system_prompt": house.system_prompt, "seed": seed, "data": {"targets": "feedback", "eval_share": 0.0}}
    )
    config = training(seed, quick=quick)
    init = first_values(loaded, house, seed)
    with tempfile.TemporaryDirectory() as folder:
        made = generate_dataset(house.episodes, distil, Path(folder))
        rows = read_dataset(made.path)
        begun = time.process_time()
        result = train_cartridge(loaded, rows, [], config, init, folder=Path(folder) / "training")
        seconds = time.process_time() - begun
    arms = answers(loaded, house, teacher, init, result.prefix)
    note = f"Seed {seed}: {config.max_steps} steps on {len(rows)} rows took {seconds:.0f} CPU s. "
    if with_lora:
        numbers = 2 * sum(tensor.numel() for tensor in result.prefix.keys)
        adapted, count, took = lora(lambda: load(options), rows, config, numbers, _tell)
        arms["LoRA of equal bytes"] = ask(adapted, "LoRA", house)
        note += f"The LoRA has {count:,} numbers, the cartridge {numbers:,}; it took {took:.0f} s for as many steps. "
    note += off_task(loaded, teacher, result.prefix, 4 if quick else 24)
    print(note, file=sys.stderr, flush=True)
    return arms, note


def _tell(step: int, loss: float) -> None:
    if step % 10 == 0:
        print(f"  LoRA step {step}: {loss:.3f}", file=sys.stderr, flush=True)
