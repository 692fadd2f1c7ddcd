"""Parity: may a cartridge replace a long prompt that works? Labels say what they mean; the target is the long prompt.

60 experiences in turns (about 2,000 tokens) teach; the model answers further messages with them in the prompt, and a
cartridge of 64 slots learns to answer in the same way without them (KL on the 20 likeliest tokens). It is shown the
long prompt's own answers and nothing else: what would have been right is not.
No parity is claimed where the long prompt gains less than 20 points over no memory at all.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.distillation_parts import report
from benchmarks.distillation_parts.arms import QUESTIONS, SHOWN, SLOTS, answers, first_values, training
from benchmarks.distillation_parts.house import House, load, make_house
from benchmarks.distillation_parts.off_task import off_task
from benchmarks.kernel_parts.common import Options
from lm.engine_client import EngineClient
from lm.types import LanguageModel
from memory.distillation.encoding import Encoder
from memory.distillation.evaluation import ArmResult
from memory.distillation.rows import Row, RowMessage, flatten_topk
from memory.distillation.trainer import train_cartridge
from workspace.engine import Engine
from workspace.generation import TokenChunk
from workspace.models import LoadedModel
from workspace.prefix import prefix_of_tokens
from workspace.sampling import SampledToken, SamplingParams

ASKED = 240  #: training messages that the teacher answers; none of them is a held-out one


def run(options: Options) -> str:
    """All seeds."""
    loaded = load(options)
    engine = Engine(loaded, max_active=2, max_waiting=8, threads=1)
    engine.start()
    try:
        teacher = EngineClient(engine)
        found, notes = [], []
        for seed in options.seeds:
            arms, note = _seed(options, loaded, engine, teacher, seed)
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
    options: Options, loaded: LoadedModel, engine: Engine, teacher: LanguageModel, seed: int
) -> tuple[Mapping[str, ArmResult], str]:
    quick = options.quick
    house = make_house(
        options, "semantic", seed, episodes=SHOWN + ASKED, shown=SHOWN, questions=6 if quick else QUESTIONS
    )
    others = house.episodes[: 8 if quick else ASKED]
    begun = time.process_time()
    rows = _taught(house, engine, [record.observation for record in others])
    data_seconds = time.process_time() - begun
    config = training(seed, quick=quick)
    init = first_values(loaded, house, seed)
    begun = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        result = train_cartridge(loaded, rows, [], config, init, folder=Path(folder))
    seconds = time.process_time() - begun
    arms = answers(loaded, house, teacher, init, result.prefix)
    attended = arms["long prompt"].attended / arms["cartridge"].attended
    slots = (arms["long prompt"].prompt_tokens.mean() - arms["memoryless"].prompt_tokens.mean()) / SLOTS
    note = (
        f"Seed {seed}: the teacher's {len(rows)} answers took {data_seconds:.0f} CPU s, {config.max_steps} steps "
        f"{seconds:.0f} CPU s; {slots:.1f}x fewer slots than tokens of memory, {attended:.1f}x fewer places attended. "
        f"{off_task(loaded, teacher, result.prefix, 4 if quick else 24)}"
    )
    print(note, file=sys.stderr, flush=True)
    return arms, note


def _taught(house: House, engine: Engine, observations: Sequence[str]) -> list[Row]:
    """The long prompt's answers to messages, with their distributions; the student sees the message alone.

    What all these prompts begin with, the history, is read once and stands before each as it is: the same numbers as
    reading every prompt whole, up to rounding, in a fraction of the time.
    """
    encoder = Encoder(engine.loaded)
    prompts = [encoder.prompt(house.after(house.shown, text), after_prefix=False) for text in observations]
    shortest = min(len(prompt) for prompt in prompts)
    shared = next((place for place in range(shortest) if len({prompt[place] for prompt in prompts}) > 1), shortest - 1)
    history = prefix_of_tokens(engine.loaded, prompts[0][:shared])
    rows = []
    for text, prompt in zip(observations, prompts, strict=True):
        params = SamplingParams(max_tokens=12, temperature=0.0, logprobs=True, top_logprobs=20)
        generation = engine.submit(prompt[shared:], params, prefix=history)
        steps = [
            event for event in generation.stream(600) if isinstance(event, TokenChunk) and event.token_id is not None
        ]
        finished = generation.result(600)
        said = [
            SampledToken(step.token_id, step.logprob, step.top_logprobs) for step in steps if step.token_id is not None
        ]
        said += [] if finished.ending is None else [finished.ending]
        top = flatten_topk(
            [[item.token_id for item in step.top_logprobs] for step in said],
            [[min(0.0, item.logprob) for item in step.top_logprobs] for step in said],
        )
        answer = RowMessage("assistant", finished.text, tuple(step.token_id for step in said), top)
        student = tuple(RowMessage(item["role"], item["content"]) for item in house.student(text))
        rows.append(Row((*student, answer), metadata={"target": "teacher"}))
    return rows
