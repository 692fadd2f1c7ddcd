"""The parts "stream" and "forgetting": every arm is asked and taught alike, and the kernel's answers are names."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.kernel_parts import forgetting, stream
from benchmarks.kernel_parts.common import MissingData, Options
from qig_core.inference import rank_candidates

INTENTS = ["card lost", "card late", "top up", "transfer failed"]
WORDS = {"card lost": "stolen", "card late": "waiting", "top up": "money", "transfer failed": "bank"}
TINY = stream.KernelRecipe(
    network={"preset_name": "nano", "width": 16, "hidden": 16, "heads": 2, "core": 0, "association": 8},
    lr=8e-3,
    steps=5,
    batch=16,
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def messages(count: int, seed: int = 0) -> list[stream.Row]:
    drawer = random.Random(seed)
    chosen = [drawer.choice(INTENTS) for _ in range(count)]
    return [(f"{WORDS[name]} again, no {number} {seed}", name) for number, name in enumerate(chosen)]


def test_a_name_is_chosen_along_the_tree() -> None:
    """With one message and no branching below the best name, greedy choice and full ranking agree."""
    arm = stream.KernelArm(TINY, INTENTS, seed=1)
    for part in range(10):
        arm.learn(messages(16, seed=part))
    kernel = arm._ema.shadow
    texts = [text for text, _ in messages(8, seed=99)]
    chosen = stream.choose(kernel, texts, arm._tree)
    assert set(chosen) <= set(INTENTS)
    assert chosen == [stream.choose(kernel, [text], arm._tree)[0] for text in texts]
    best = [rank_candidates(kernel, text, INTENTS)[0][0] for text in texts]
    assert sum(one == other for one, other in zip(chosen, best, strict=True)) >= 7


def test_a_name_that_begins_another_can_be_chosen() -> None:
    tree = stream.spelling_tree(["top", "top up"])
    kernel = stream.KernelArm(TINY, ["top", "top up"], seed=1)._ema.shadow
    assert stream.choose(kernel, ["money"], tree)[0] in ("top", "top up")


def test_every_arm_is_tested_before_it_is_taught() -> None:
    class Recorder(stream.Arm):
        log: list[str] = []  # noqa: RUF012

        def answer(self, texts: object) -> list[str]:
            self.log.append("asked")
            return [INTENTS[0]] * len(texts)  # type: ignore[arg-type]

        def learn(self, rows: object) -> None:
            self.log.append("taught")

    rows = messages(40)
    result = stream.test_then_train(Recorder(), rows, rows[:20])
    assert Recorder.log == ["asked", "taught"] * 3 + ["asked"]
    share = sum(name == INTENTS[0] for _, name in rows) / 40
    assert result.prequential == share
    assert len(result.right) == 40


def test_the_arms_learn_a_lookup() -> None:
    pytest.importorskip("sklearn")
    rows, held_out = messages(160), messages(40, seed=5)
    kernel = stream.test_then_train(stream.KernelArm(TINY, INTENTS, 1), rows, held_out)
    ngrams = stream.test_then_train(stream.NgramArm(3.0, INTENTS, 1), rows, held_out)
    frequent = stream.test_then_train(stream.FrequentArm(INTENTS), rows, held_out)
    assert ngrams.held_out == 1.0
    assert kernel.held_out > 0.9
    assert frequent.held_out < 0.5
    assert kernel.last > frequent.prequential


def test_forgetting_measures_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forgetting, "CAPACITY", 64)
    names = [INTENTS[:2], INTENTS[2:]]
    rows, held_out = messages(200), messages(60, seed=5)
    train = [[row for row in rows if row[1] in part] for part in names]
    test = [[row for row in held_out if row[1] in part] for part in names]
    domains = forgetting.Domains((train[0], train[1]), (test[0], test[1]), INTENTS)
    bare = forgetting.live_through(TINY, domains, 1, replay=False)
    replayed = forgetting.live_through(replace(TINY, der_alpha=0.1), domains, 1, replay=True)
    assert min(bare.first, bare.second, replayed.second) > 0.7
    assert replayed.kept > bare.kept


def test_without_data_the_parts_say_so() -> None:
    for part in (stream, forgetting):
        with pytest.raises(MissingData, match="not on this machine"):
            part.run(Options(data=None))


def test_both_parts_print_their_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    (tmp_path / "banking77").mkdir()
    for split, seed in (("train", 0), ("test", 1)):
        lines = [f'"{text}",{name}' for text, name in messages(64, seed)]
        (tmp_path / "banking77" / f"{split}.csv").write_text("\n".join(["text,category", *lines]), encoding="utf-8")
    for part in (stream, forgetting):
        monkeypatch.setattr(part, "KernelRecipe", partial(stream.KernelRecipe, network=TINY.network, steps=1, batch=8))
    monkeypatch.setattr(stream, "_QUICK", 32)
    monkeypatch.setattr(forgetting, "INTENTS", 2)
    monkeypatch.setattr(forgetting, "_QUICK_MESSAGES", 16)
    options = Options((1, 2), quick=True, data=tmp_path)
    told = stream.run(options)
    assert "| n-grams |" in told
    assert "Kernel / n-grams: prequential" in told
    assert "codes instead of names" in told
    told = forgetting.run(options)
    assert "| no replay |" in told
    assert "DER++ (alpha" in told
