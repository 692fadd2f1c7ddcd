"""Recall: how many arbitrary pairs does a cartridge hold, where the model itself reads them off a prompt without fault?

The model is a small gpt-oss that was trained for this and nothing else (``recall_model.py``; its weights are in
benchmarks/models/recall): a history is N turns in which a name is answered by a value, four tokens a pair, and a
question is a name. A cartridge of p slots learns the long prompt's own answers to the N questions (KL on its 20
likeliest tokens, the product's trainer). What is asked of all arms is the same N names: alone, as in training, and
after another question with its answer, which only one arm (``mixed``) met in training.

Arms: no memory; the whole history in the prompt; as much of its beginning or end as has p tokens; the first p tokens
as a cartridge, untrained, and trained. For 64 pairs in 16 slots also: from noise of the size of real keys in place of
text; with four frozen slots in place of one; and with half of the rows asked after another question.

Where the model recalls less than 95 % of a history from its prompt, nothing is said about cartridges.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from benchmarks.distillation_parts import recall_report
from benchmarks.distillation_parts.recall_report import TRAINED, UNTRAINED, WHOLE, Found
from benchmarks.distillation_parts.recall_world import TOKENS_PER_PAIR, VALUES, history
from benchmarks.kernel_parts.common import ROOT, MissingData, Options
from lm.engine_client import EngineClient
from lm.types import LanguageModel
from memory.distillation.config import CacheInit, TrainingConfig
from memory.distillation.encoding import Encoder
from memory.distillation.evaluation import Question, measure_arm
from memory.distillation.initialisers import initial_prefix
from memory.distillation.rows import Row, RowMessage, flatten_topk
from memory.distillation.trainer import train_cartridge
from workspace.engine import Engine
from workspace.models import LoadedModel, load_model
from workspace.prefix import KVPrefix

MODEL = ROOT / "benchmarks" / "models" / "recall"
NEEDED = 0.95  #: of a history must be recalled from the prompt
PAIRS = (32, 64, 128)
SLOTS = (16, 32, 64, 128)  #: those up to the number of pairs
VARIED = (64, 16)  #: where the variants are tried: a quarter of a slot per pair
HISTORIES = 1  #: of each size and seed
STEPS = 200
LEARNING_RATE = 1e-1  #: of 2e-2, 5e-2 and 1e-1 the lowest KL on seed 7, 32 pairs in 16 slots
Message = dict[str, str]


@dataclass(frozen=True)
class Variant:
    """How a cartridge is trained."""

    init: Literal["text", "random"] = "text"
    frozen: int = 1
    mixed: bool = False  #: half of the rows are asked after another question


VARIANTS = {
    "cartridge, random init": Variant(init="random"),
    "cartridge, 4 frozen": Variant(frozen=4),
    "cartridge, mixed": Variant(mixed=True),
}


@dataclass(frozen=True)
class Setting:
    """A history, and its pairs as questions."""

    pairs: list[tuple[str, str]]
    alone: list[Question]
    after_another: list[Question]
    rows: list[Row]  #: the long prompt's answers to the names alone
    mixed_rows: list[Row]  #: the same; every second name after another question than ``after_another`` has

    @property
    def turns(self) -> list[Message]:
        """The history as a chat."""
        return _turns(self.pairs)


def load_recall_model(folder: Path = MODEL) -> LoadedModel:
    """In float32, which is exact for its weights. Raises ``MissingData`` without them."""
    if not (folder / "model.safetensors").is_file():
        raise MissingData(f"there is no model in {folder}; make one with recall_model.py --out {folder}")
    return load_model(str(folder), cache_dir=ROOT / ".cache", dtype="float32", device="cpu")


def circumstances(options: Options, seconds: float) -> str:
    """The line about model and machine."""
    quick = "; QUICK, not a result" if options.quick else ""
    return (
        f"The recall model (gpt-oss architecture, 0.34 M parameters) in float32, torch {torch.__version__}, "
        f"{os.cpu_count()} cores ({platform.machine()}), 1 thread; seeds {', '.join(map(str, options.seeds))}; "
        f"{seconds:.0f} s{quick}"
    )


def run(options: Options) -> str:
    """All sizes and seeds."""
    loaded = load_recall_model()
    engine = Engine(loaded, max_active=2, max_waiting=8, threads=1)
    engine.start()
    try:
        bench = Bench(options, loaded, EngineClient(engine))
        for pairs in PAIRS[:1] if options.quick else PAIRS:
            bench.size(pairs)
    finally:
        engine.stop()
    return bench.report()


class Bench:
    """Collects what every arm answers."""

    def __init__(self, options: Options, loaded: LoadedModel, teacher: LanguageModel):
        self._options, self._loaded, self._teacher = options, loaded, teacher
        self._encoder = Encoder(loaded)
        self._found: dict[tuple[int, str, int], Found] = {}
        self._refused: list[str] = []

    def size(self, pairs: int) -> None:
        """All arms for histories of ``pairs``; prompts come first, and decide whether the others are asked."""
        count = 1 if self._options.quick else HISTORIES
        settings = [
            (seed, self._setting(history(pairs, 1000 * seed + number)))
            for seed in self._options.seeds
            for number in range(count)
        ]
        for _, setting in settings:
            bare = [list(question.student) for question in setting.alone]
            self._ask(setting, "memoryless", prompts=bare)
            self._ask(setting, WHOLE, prompts=[list(question.teacher) for question in setting.alone])
        recalled = float(self._found[pairs, WHOLE, 0].recalled().mean())
        if recalled < NEEDED:
            self._refused.append(
                f"{pairs} pairs: the model recalls {recalled:.1%} from its prompt, less than {NEEDED:.0%}; "
                "no cartridge is reported."
            )
            return
        for slots in SLOTS[: 1 if self._options.quick else None]:
            if slots <= pairs:
                for seed, setting in settings:
                    self._cartridges(setting, slots, seed)

    def report(self) -> str:
        """Tables of everything."""
        found = list(self._found.values())
        chance = f"Chance is 1 in {VALUES}. Histories: {HISTORIES} of each size and seed."
        tables = [recall_report.arms(found), chance]
        if any(arm.arm == TRAINED for arm in found):
            tables += [recall_report.capacity(found), recall_report.against(found)]
        return "\n\n".join([*self._refused, *tables])

    def _setting(self, pairs: list[tuple[str, str]]) -> Setting:
        memory = _turns(pairs)
        alone, later, rows, mixed = [], [], [], []
        for place, (key, value) in enumerate(pairs):
            ask: list[Message] = [{"role": "user", "content": key}]
            other = _turns([pairs[(place + len(pairs) // 2) % len(pairs)]])
            before = _turns([pairs[(place + 1) % len(pairs)]])
            rows.append(self._taught(memory, ask))
            mixed.append(self._taught(memory, before + ask) if place % 2 else rows[-1])
            alone.append(Question(key, tuple(ask), tuple(memory + ask), value, row=rows[-1]))
            later.append(Question(key, tuple(other + ask), tuple(memory + other + ask), value))
        return Setting(pairs, alone, later, rows, mixed)

    def _taught(self, memory: list[Message], asked: list[Message]) -> Row:
        """The long prompt's answer, with its distribution; the student sees what is asked alone."""
        reply, trace = self._teacher.call_with_trace(memory + asked, top_logprobs=20, max_tokens=4)
        top = flatten_topk(trace.topk_token_ids, trace.topk_logprobs)
        student = tuple(RowMessage(message["role"], message["content"]) for message in asked)
        answer = RowMessage("assistant", reply.text, trace.token_ids, top)
        return Row((*student, answer), metadata={"target": "teacher"})

    def _cartridges(self, setting: Setting, slots: int, seed: int) -> None:
        fits = slots // TOKENS_PER_PAIR
        for name, shown in (("first", setting.pairs[:fits]), ("last", setting.pairs[-fits:])):
            prompts = [_turns(shown) + list(question.student) for question in setting.alone]
            self._ask(setting, f"{name} {slots} tokens", prompts=prompts, budget=slots)
        varied = (len(setting.pairs), slots) == VARIED
        for name, variant in {TRAINED: Variant(), **(VARIANTS if varied else {})}.items():
            init = initial_prefix(
                self._loaded,
                CacheInit(type=variant.init),
                slots,
                frozen=variant.frozen,
                history=setting.turns,
                seed=seed,
            )
            if name == TRAINED:
                self._ask(setting, UNTRAINED, prefix=init)
            begun = time.process_time()
            trained = self._trained(setting, init, variant, seed)
            seconds = time.process_time() - begun
            self._ask(setting, name, prefix=trained).seconds.append(seconds)

    def _trained(self, setting: Setting, init: KVPrefix, variant: Variant, seed: int) -> KVPrefix:
        rows = setting.mixed_rows if variant.mixed else setting.rows
        config = TrainingConfig(
            slots=init.slots,
            frozen=variant.frozen,
            learning_rate=LEARNING_RATE,
            warmup_steps=2 if self._options.quick else 10,
            max_steps=8 if self._options.quick else STEPS,
            rows=min(64, len(rows)),
            seed=seed,
            max_tokens=64,
            early_stop_patience=0,
            save_every=STEPS,
            threads=1,
        )
        with tempfile.TemporaryDirectory() as folder:
            return train_cartridge(self._loaded, rows, [], config, init, folder=Path(folder)).prefix

    def _ask(
        self,
        setting: Setting,
        arm: str,
        prompts: Sequence[Sequence[Message]] | None = None,
        prefix: KVPrefix | None = None,
        budget: int = 0,
    ) -> Found:
        """The history's questions; cartridges and the whole history are also asked after another question."""
        budget = budget if prefix is None else prefix.slots
        key = (len(setting.pairs), arm, budget)
        found = self._found.setdefault(key, Found(*key))
        asked = prompts or [list(question.student) for question in setting.alone]
        found.alone.append(measure_arm(self._loaded, self._encoder, arm, prefix, asked, setting.alone))
        if prefix is not None or arm == WHOLE:
            later = [
                list(question.student if prefix is not None else question.teacher) for question in setting.after_another
            ]
            found.after_another.append(
                measure_arm(self._loaded, self._encoder, arm, prefix, later, setting.after_another)
            )
        print(
            f"  {len(setting.pairs)} pairs, {arm}, p = {budget}: {found.alone[-1].exact.mean():.3f}",
            file=sys.stderr,
            flush=True,
        )
        return found


def _turns(pairs: Sequence[tuple[str, str]]) -> list[Message]:
    """Each pair as a question and its answer."""
    return [
        message
        for key, value in pairs
        for message in ({"role": "user", "content": key}, {"role": "assistant", "content": value})
    ]
