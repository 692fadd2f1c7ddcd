"""Parity: may a cartridge replace a long prompt that works? Labels say what they mean; the target is the long prompt.

60 experiences in turns (about 2,000 tokens) teach; the model answers further messages with them in the prompt, and a
cartridge of 64 slots learns to answer in the same way without them (KL on the 20 likeliest tokens). It is shown the long
prompt's own answers and nothing else: what would have been right is not.
No parity is claimed where the long prompt gains less than 20 points over no memory at all.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from benchmarks.distillation_parts import report
from benchmarks.distillation_parts.house import House, ask, load, make_house
from benchmarks.distillation_parts.off_task import off_task
from benchmarks.distillation_parts.rivals import nearest, summary, truncated
from benchmarks.kernel_parts.common import Options
from lm.engine_client import EngineClient
from lm.types import LanguageModel
from memory.distillation.config import CacheInit, TrainingConfig
from memory.distillation.evaluation import ArmResult
from memory.distillation.initialisers import initial_prefix
from memory.distillation.rows import Row, RowMessage, flatten_topk
from memory.distillation.trainer import train_cartridge
from workspace.engine import Engine
from workspace.models import LoadedModel

SLOTS = 64
SHOWN = 60
QUESTIONS = 90
ASKED = 240  #: training messages that the teacher answers; none of them is a held-out one
STEPS = 100


def run(options: Options) -> str:
    """All seeds."""
    loaded = load(options)
    engine = Engine(loaded, max_active=2, max_waiting=8, threads=1)
    engine.start()
    try:
        teacher = EngineClient(engine)
        found, notes = [], []
        for seed in options.seeds:
            arms, note = _seed(options, loaded, teacher, seed)
            found.append(arms)
            notes.append(note)
    finally:
        engine.stop()
    means = [
        sum(float(arms[name].exact.mean()) for arms in found) / len(found) for name in ("long prompt", "memoryless")
    ]
    gain = means[0] - means[1]
    rivals = [name for name in found[0] if name not in ("cartridge", "memoryless")]
    works = gain >= 0.2
    claim = f"The long prompt gains {100 * gain:.0f} points over no memory" + (
        "." if works else ", which is less than 20: no parity is claimed."
    )
    return "\n\n".join([report.arms(found), claim, report.against(found, "cartridge", rivals), *notes])


def _seed(
    options: Options, loaded: LoadedModel, teacher: LanguageModel, seed: int
) -> tuple[Mapping[str, ArmResult], str]:
    quick = options.quick
    house = make_house(
        options, "semantic", seed, episodes=SHOWN + ASKED, shown=SHOWN, questions=6 if quick else QUESTIONS
    )
    shown, others = house.episodes[-SHOWN:], house.episodes[: 8 if quick else ASKED]
    begun = time.process_time()
    rows = [_taught(house, teacher, record.observation) for record in others]
    data_seconds = time.process_time() - begun
    config = TrainingConfig(
        slots=SLOTS,
        learning_rate=1e-2,
        warmup_steps=2 if quick else 10,
        max_steps=4 if quick else STEPS,
        rows=16,
        seed=seed,
        max_tokens=192,
        early_stop_patience=0,
        threads=1,
    )
    history = house.after(shown, "")[:-1]
    init = initial_prefix(loaded, CacheInit(type="text"), SLOTS, history=history, seed=seed)
    begun = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        result = train_cartridge(loaded, rows, [], config, init, folder=Path(folder))
    seconds = time.process_time() - begun
    _, summarised = summary(house, teacher, SLOTS)
    arms = {
        "memoryless": ask(loaded, "memoryless", house),
        "long prompt": ask(loaded, "long prompt", house, [list(item.teacher) for item in house.questions]),
        f"first {SLOTS} tokens": ask(loaded, "first tokens", house, truncated(house, loaded, SLOTS, first=True)),
        f"last {SLOTS} tokens": ask(loaded, "last tokens", house, truncated(house, loaded, SLOTS, first=False)),
        "summary": ask(loaded, "summary", house, summarised),
        "8 nearest (BM25)": ask(loaded, "nearest", house, nearest(house)),
        "cartridge, untrained": ask(loaded, "untrained", house, prefix=init),
        "cartridge": ask(loaded, "cartridge", house, prefix=result.prefix),
    }
    attended = arms["long prompt"].attended / arms["cartridge"].attended
    slots = (arms["long prompt"].prompt_tokens.mean() - arms["memoryless"].prompt_tokens.mean()) / SLOTS
    note = (
        f"Seed {seed}: the teacher's {len(rows)} answers took {data_seconds:.0f} CPU s, {config.max_steps} steps "
        f"{seconds:.0f} CPU s; {slots:.1f}x fewer slots than tokens of memory, {attended:.1f}x fewer places attended. "
        f"{off_task(loaded, teacher, result.prefix, 4 if quick else 24)}"
    )
    print(note, file=sys.stderr, flush=True)
    return arms, note


def _taught(house: House, teacher: LanguageModel, observation: str) -> Row:
    """The long prompt's answer to a message, with its distribution; the student sees the message alone."""
    reply, trace = teacher.call_with_trace(house.after(house.shown, observation), top_logprobs=20, max_tokens=12)
    top = flatten_topk(trace.topk_token_ids, trace.topk_logprobs)
    student = tuple(RowMessage(item["role"], item["content"]) for item in house.student(observation))
    return Row((*student, RowMessage("assistant", reply.text, trace.token_ids, top)), metadata={"target": "teacher"})
