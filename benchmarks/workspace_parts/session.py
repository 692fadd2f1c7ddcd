"""session: a fact that was told more than 1,000 tokens ago and has left the active cache; is it still known?

Generated dialogues in the model's own chat format: the user tells something about himself, then asks about other
things for more than 1,000 tokens, then about the fact. SmolLM2-135M reads them as the server does with a capped cache:
blocks of 128 tokens, 4 sinks and the last 252 tokens kept, everything older evicted. It completes "Your cat is
called"; the right name competes with eleven others, by the probability of its first token. Chance is 1 in 12.

    full context   nothing is evicted: what the model can know
    window         evicted and gone
    virtual KV     evicted tokens are compacted into 64 virtual tokens per layer
    recall         the question brings back, by its words, earlier turns within 64 tokens (``memory.recall``)
    both           which is what the server does with a capped cache and ``memory``

Which fact, which name, which other questions and their order depend on the dialogue's number. Intervals are paired
bootstraps over dialogues.
"""

from __future__ import annotations

import copy
import json
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache

from benchmarks.kernel_parts.common import MissingData, Options, cache_folder, table
from memory.recall import recall_turns
from workspace.context import Context
from workspace.errors import ModelDownloadFailed
from workspace.hooking import HookedModel, hookable_layers
from workspace.models import LoadedModel, load_model
from workspace.window import ActiveWindow, WindowSettings

DIALOGUES = 100
BUDGET = 64
RECALLED_TOKENS = 64
LEAST_DISTANCE = 1000
_DRAWS = 4000

#: ``facts`` with the names that compete, and ``chatter``: questions and answers about other things.
TEXTS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Dialogue:
    """Ids up to the last turn, and two endings: the question alone, and with what it brings back. ``told``: where the
    fact ends. ``names``: their first tokens, the right one first."""

    ids: list[int]
    plain: list[int]
    reminded: list[int]
    told: int
    names: list[int]


@dataclass
class Arm:
    """Per dialogue: the log-probability of the right name among the twelve, and whether it came first."""

    log_probs: list[float] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)

    def take(self, logits: Tensor, dialogue: Dialogue) -> None:
        among = torch.log_softmax(logits[dialogue.names].float(), dim=0)
        self.log_probs.append(float(among[0]))
        self.right.append(int(among.argmax()) == 0)


def dialogue(loaded: LoadedModel, number: int) -> Dialogue:
    """Dialogue ``number``; always the same."""
    draw = random.Random(number)
    fact = TEXTS["facts"][number % len(TEXTS["facts"])]
    names = draw.sample(fact["names"], len(fact["names"]))
    messages = [
        {"role": "user", "content": f"Hello! {fact['told'].format(names[0])}"},
        {"role": "assistant", "content": "Thank you for telling me. What can I do for you?"},
    ]
    told = len(_encode(loaded, messages, False))
    for asked, answered in draw.sample(TEXTS["chatter"], len(TEXTS["chatter"])):
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    begun = len(_encode(loaded, messages, False))
    spoken = [message["content"] for message in messages if message["role"] == "user"]
    answer = loaded.tokenizer.encode(fact["answer"], add_special_tokens=False)
    endings = []
    for content in (fact["asked"], f"{_recalled(loaded, spoken, fact['asked'])}\n\n{fact['asked']}"):
        ids = _encode(loaded, [*messages, {"role": "user", "content": content}], True)
        endings.append(ids[begun:] + answer)
    firsts = [loaded.tokenizer.encode(f" {name}", add_special_tokens=False)[0] for name in names]
    if len(set(firsts)) != len(firsts) or begun - told < LEAST_DISTANCE:
        raise ValueError(f"dialogue {number} has {begun - told} tokens after its fact, or names that begin alike")
    return Dialogue(ids[:begun], *endings, told, firsts)


def _recalled(loaded: LoadedModel, turns: Sequence[str], question: str) -> str:
    """The turns that come back, as the server words them."""
    lines, left = ["From earlier conversations, possibly useful:"], RECALLED_TOKENS
    for item in recall_turns(turns, question, 4):
        line = f"- {item.text}"
        cost = len(loaded.tokenizer.encode(line)) + 1
        if cost <= left:
            lines.append(line)
            left -= cost
    return "\n".join(lines) if len(lines) > 1 else ""


def _encode(loaded: LoadedModel, messages: list[dict[str, str]], begin: bool) -> list[int]:
    ids = loaded.tokenizer.apply_chat_template(messages, add_generation_prompt=begin, return_dict=False)
    return [int(number) for number in ids]


class Reader:
    """A dialogue that is read through a capped cache, and can be ended in several ways."""

    def __init__(self, hooked: HookedModel, ids: Sequence[int], settings: WindowSettings):
        self._hooked = hooked
        self._window = ActiveWindow(hooked, DynamicCache(config=hooked.loaded.model.config), settings)
        self._feed(self._window, ids)

    def ending(self, ids: Sequence[int]) -> Tensor:
        """Logits [V] after ``ids``; the state stays where it was."""
        fork = copy.copy(self._window)
        fork.cache = copy.deepcopy(self._window.cache)
        fork._queries, fork._segments = self._window._queries.copy(), {}
        return self._feed(fork, ids)

    def _feed(self, window: ActiveWindow, ids: Sequence[int]) -> Tensor:
        logits, begin = torch.empty(0), window.seen
        for first, count in window.pieces(begin + len(ids)):
            recorder = window.recorder(count)
            logits = self._hooked.loaded.model(
                torch.tensor([list(ids[first - begin : first - begin + count])]),
                past_key_values=window.cache,
                position_ids=torch.arange(first, first + count)[None],
                workspace=Context(window.segments(count), recorder=recorder),
                logits_to_keep=1,
            ).logits[0, -1]
            window.advance(count, recorder)
        return logits


def run(options: Options) -> str:
    """The part. Raises MissingData where the model cannot be had."""
    try:
        loaded = load_model("smollm2-135m-instruct", cache_dir=cache_folder(), device="cpu")
    except ModelDownloadFailed as error:
        raise MissingData(f"SmolLM2 is not here and cannot be fetched: {error}") from None
    hooked = HookedModel(loaded, hookable_layers(loaded.model.config))
    arms = {name: Arm() for name in ("full context", "window", "virtual KV", "recall", "both")}
    distances = []
    try:
        with torch.inference_mode():
            for number in range(4 if options.quick else DIALOGUES):
                made = dialogue(loaded, number)
                distances.append(len(made.ids) - made.told)
                whole = len(made.ids) + len(made.plain) + 1
                arms["full context"].take(Reader(hooked, made.ids, _settings(whole, 0)).ending(made.plain), made)
                bare = Reader(hooked, made.ids, _settings(256, 0))
                arms["window"].take(bare.ending(made.plain), made)
                arms["recall"].take(bare.ending(made.reminded), made)
                kept = Reader(hooked, made.ids, _settings(256, BUDGET))
                arms["virtual KV"].take(kept.ending(made.plain), made)
                arms["both"].take(kept.ending(made.reminded), made)
                shown = {name: int(arm.right[-1]) for name, arm in arms.items()}
                print(f"session: dialogue {number}: {shown}", file=sys.stderr, flush=True)
    finally:
        hooked.remove()
    return _report(arms, distances)


def _settings(chunk: int, budget: int) -> WindowSettings:
    return WindowSettings(chunk_size=chunk, virtual_tokens=budget)


def _report(arms: dict[str, Arm], distances: Sequence[int]) -> str:
    base = arms["window"]
    rows = []
    for name, arm in arms.items():
        gains = [float(a) - float(b) for a, b in zip(arm.right, base.right, strict=True)]
        nats = [a - b for a, b in zip(arm.log_probs, base.log_probs, strict=True)]
        rows.append(
            [
                name,
                f"{statistics.fmean(arm.right):.3f}",
                _interval(gains),
                f"{statistics.fmean(arm.log_probs):.3f}",
                _interval(nats),
            ]
        )
    head = ["arm", "right of 12", "minus window (95 %)", "log-probability", "minus window (95 %)"]
    return "\n\n".join(
        [
            f"{len(base.right)} dialogues; the fact lies {min(distances):,} to {max(distances):,} tokens back. Capped "
            "cache of 256 tokens, all layers hooked. Bootstraps over dialogues, seed 0.",
            table(head, rows),
        ]
    )


def _interval(values: Sequence[float]) -> str:
    draw = random.Random(0)
    means = sorted(statistics.fmean(draw.choices(values, k=len(values))) for _ in range(_DRAWS))
    low, high = means[int(0.025 * _DRAWS)], means[int(0.975 * _DRAWS)]
    return f"{statistics.fmean(values):+.3f} ({low:+.3f} .. {high:+.3f})"
