"""The cache says what a forward pass over the whole text says: random texts, all kinds of kernels, any cut."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from qig_core.errors import InvalidConfig, InvalidInput
from qig_core.forest import BIN_NODES, Candidate, Forest
from qig_core.incremental import Continuation, Noise
from qig_core.inference import collate, evaluate_pairs, generate, run_to_halt, speak
from qig_core.m8_kernel import KernelConfig, M8Kernel
from qig_core.phrasebook import Phrasebook
from qig_core.vocabulary import BOS, EOS, SEP, VOCAB_SIZE, encode_pair, encode_prompt

TOLERANCE = 1e-5  # absolute, on logits of order 1; measured 2e-6
KINDS: dict[str, dict[str, Any]] = {
    "core": {},
    "plain": {"core": 0},
    "n-grams": {"ngram_buckets": 512},
    "association": {"association": 16},
    "short sight": {"reach": 1, "supervision_steps": 1},
    "deep": {"supervision_steps": 4, "blocks": 1, "outer_cycles": 3, "inner_cycles": 4, "heads": 1},
}


class _Told(M8Kernel):
    """A kernel whose noise depends on place and draw only, so that two ways of computing meet the same noise."""

    draws = 0
    begin = 0

    def _noise_like(self, high: Tensor, generator: torch.Generator) -> Tensor:
        place = torch.arange(self.begin, self.begin + high.shape[1])[:, None] * 1.3
        row = torch.arange(len(high))[:, None, None] * 0.7
        unit = torch.arange(high.shape[-1]) * 0.9
        self.draws += 1
        return torch.sin(place + unit + row + self.draws)

    def at(self, begin: int) -> None:
        self.draws, self.begin = 0, begin


def _kernel(kind: str = "core", seed: int = 3, **changes: Any) -> _Told:
    """Small, with a halt head that is undecided, so that depths differ from text to text."""
    shape = {"width": 16, "hidden": 16, "context": 96, **KINDS[kind], **changes}
    kernel, generator = _Told(KernelConfig.preset("nano", **shape), seed).eval(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        if kernel.ngrams is not None:
            kernel.ngrams.table.normal_(generator=generator)
        if kernel.association is not None:  # silent in a fresh kernel
            kernel.association.out.weight.normal_(generator=generator)
        kernel.halt.weight.normal_(generator=generator)
        halts = kernel(torch.randint(256, (64, 20), generator=generator)).halt_logit
        kernel.halt.bias.sub_(halts.median())
    return kernel


def _text(drawer: random.Random, length: int) -> list[int]:
    return [drawer.randrange(256) for _ in range(length)]


@pytest.mark.parametrize("kind", KINDS)
def test_any_cut_gives_the_logits_and_depth_of_the_whole_text(kind: str) -> None:
    kernel, drawer, depths = _kernel(kind), random.Random(1), set[int]()
    for _ in range(8):
        ids = [BOS, *_text(drawer, drawer.randrange(0, 30)), SEP, *_text(drawer, drawer.randrange(4, 25))]
        read = ids.index(SEP) + 1 + drawer.randrange(3)
        text = Continuation(kernel, [ids[:read]], room=len(ids) - read)
        found, at = [text.logits[:, None]], read
        while at < len(ids):
            step = min(drawer.choice((1, 1, 2, 5)), len(ids) - at)
            found.append(text.extend(torch.tensor([ids[at : at + step]])))
            at += step
            text.check_invariants()
        whole = run_to_halt(kernel, torch.tensor([ids]))
        torch.testing.assert_close(torch.cat(found, dim=1)[0], whole.logits[0, read - 1 :], atol=TOLERANCE, rtol=1e-5)
        torch.testing.assert_close(text.basin, whole.basin, atol=TOLERANCE, rtol=0)
        assert text.depth.tolist() == whole.depth.tolist()
        depths.add(int(text.depth))
    assert len(depths) > 1 or kernel.config.supervision_steps == 1  # otherwise the halt was not tested


def test_greedy_texts_are_those_of_whole_passes() -> None:
    """The generation that knew no cache, against the one that does."""
    kernel, drawer = _kernel(), random.Random(2)
    with torch.no_grad():  # sharper, as trained kernels are, and rid of the marks
        kernel.head.weight.mul_(4)
    for _ in range(12):
        ids = encode_prompt("".join(drawer.choices("abcdefgh ", k=drawer.randrange(1, 40))), 96, 24)
        made, produced = generate(kernel, ids, 8), list[int]()
        for _ in range(8):
            scores = run_to_halt(kernel, torch.tensor([ids + produced])).logits[0, -1]
            scores[256:EOS] = -torch.inf
            symbol = int(scores.argmax())
            if symbol == EOS:
                break
            produced.append(symbol)
        assert made.ids == produced


@pytest.mark.parametrize("kind", ["n-grams", "association"])
def test_what_was_retracted_was_never_read(kind: str) -> None:
    kernel, drawer = _kernel(kind), random.Random(6)
    for _ in range(6):
        ids, wrong = [BOS, *_text(drawer, 4), SEP, *_text(drawer, 8)], _text(drawer, 5)
        text = Continuation(kernel, [ids[:6]], room=12)
        text.extend(torch.tensor([[*ids[6:9], *wrong]]))
        text.retract(5)
        logits = torch.cat((text.logits[:, None], text.extend(torch.tensor([ids[9:]]))), dim=1)
        whole = run_to_halt(kernel, torch.tensor([ids]))
        torch.testing.assert_close(logits[0], whole.logits[0, 8:], atol=TOLERANCE, rtol=1e-5)
        with pytest.raises(InvalidInput):
            text.retract(5)


def test_answers_are_the_same_whatever_was_said_before() -> None:
    """Drafts that are right, that go wrong in the middle, that are longer than there is room, and none."""
    kernel, drawer = _kernel(), random.Random(7)
    with torch.no_grad():
        kernel.head.weight.mul_(4)
    for _ in range(6):
        prompt = encode_prompt("".join(drawer.choices("abcdefgh ", k=drawer.randrange(1, 40))), 96, 24)
        plain, phrases = generate(kernel, prompt, 10), Phrasebook()
        right = plain.ids
        for said in ([], right, right[:4], [*right[:3], 7, 7], [*right, 1, 2, 3], right[:1]):
            phrases.learn(said)
            made = speak(Continuation(kernel, [prompt], 9), phrases=phrases)[0]
            assert (made.ids, made.finished, made.depth) == (plain.ids, plain.finished, plain.depth)
            assert made.mean_log_prob == pytest.approx(plain.mean_log_prob, abs=1e-5)


def test_a_phrasebook_keeps_the_latest_and_finds_what_begins_alike() -> None:
    phrases = Phrasebook(capacity=2)
    for said in (b"card_arrival", b"card_linking", b"card_arrival", b"cash"):
        phrases.learn(said)
    assert len(phrases) == 2
    assert bytes(phrases.draft(b"card_")) == b"arrival"
    assert phrases.draft(b"x") == []
    with pytest.raises(ValueError, match="at least one"):
        Phrasebook(0)


def test_without_a_separator_every_position_decides_its_own_depth() -> None:
    kernel, drawer, depths = _kernel("deep"), random.Random(3), set[int]()
    ids = _text(drawer, 30)
    text = Continuation(kernel, [ids[:4]], room=26)
    for end in range(5, 31):
        logits = text.extend(torch.tensor([ids[end - 1 : end]]))
        whole = run_to_halt(kernel, torch.tensor([ids[:end]]))
        torch.testing.assert_close(logits[0, 0], whole.logits[0, -1], atol=TOLERANCE, rtol=1e-5)
        depths.add(int(whole.depth))
    assert len(depths) > 1


@pytest.mark.parametrize("kind", ["core", "plain", "n-grams"])
def test_noise_belongs_to_row_and_position(kind: str) -> None:
    kernel = _kernel(kind, supervision_steps=2, noise=0.3)
    drawer, anything = random.Random(4), torch.Generator()
    ids = torch.tensor([[BOS, *_text(drawer, 10), SEP, *_text(drawer, 5)]]).repeat(3, 1)
    kernel.at(0)
    first = kernel(ids, noise=anything)
    second = kernel(ids, first.carry, noise=anything)
    kernel.at(0)
    text = Continuation(kernel, ids[:, :12].tolist(), room=5, noise=Noise(0.3, anything))
    kernel.at(12 + kernel.config.memory_tokens)
    logits = text.extend(ids[:, 12:])
    for row, depth in enumerate(text.depth.tolist()):
        expected = (first, second)[depth - 1].logits[row, 12:]
        torch.testing.assert_close(logits[row], expected.detach(), atol=TOLERANCE, rtol=1e-5)
    assert not torch.allclose(logits[0], logits[1], atol=1e-3)


NAMES = ["card_arrival", "card_linking", "card", "card_arrival", "", "exchange_rate", "x", "lost_or_stolen_card"]


@pytest.mark.parametrize("kind", KINDS)
def test_branches_are_judged_as_whole_pairs(kind: str) -> None:
    kernel = _kernel(kind)
    observations = ["a", "", "why was I charged twice", "where is my card please tell me now", "b c d"]
    forest = Forest.of([Candidate(tuple(name.encode())) for name in NAMES])
    scores = Continuation(kernel, [encode_prompt(text, 96) for text in observations]).branch(forest)
    for row, text in enumerate(observations):
        batch = collate([encode_pair(text, name, 96) for name in NAMES])
        nats, _ = evaluate_pairs(kernel, batch.ids, batch.loss_mask)
        torch.testing.assert_close(scores[row], -nats, atol=1e-4, rtol=1e-6)


def test_a_branch_of_a_rollout_is_its_continuation() -> None:
    """Noise in a forest is one draw per row and depth: the same as if the candidate had been read on."""
    kernel, anything = _kernel(supervision_steps=1), torch.Generator()
    prompts, actions = [encode_prompt("hello", 96)] * 2, [b"abc", b"abd", b"zzzz"]
    begin = len(prompts[0]) + kernel.config.memory_tokens
    forest = Forest.of([Candidate(tuple(action)) for action in actions])
    kernel.at(0)
    text = Continuation(kernel, prompts, noise=Noise(0.3, anything))
    kernel.at(begin)
    scores = text.branch(forest)
    for column, action in enumerate(actions):
        kernel.at(0)
        text = Continuation(kernel, prompts, room=len(action), noise=Noise(0.3, anything))
        before = text.logits[:, None]
        kernel.at(begin)
        logits = torch.cat((before, text.extend(torch.tensor([list(action)] * 2))), dim=1).log_softmax(-1)
        expected = logits[:, range(len(action) + 1), [*action, EOS]].sum(1).double()
        torch.testing.assert_close(scores[:, column], expected, atol=1e-4, rtol=1e-6)


def test_a_forest_is_a_trie_in_every_bin() -> None:
    drawer = random.Random(5)
    names = [bytes(drawer.choices(b"abc", k=drawer.randrange(0, 30))) for _ in range(80)]
    forest = Forest.of([Candidate(tuple(name)) for name in names])
    forest.check_invariants()
    assert forest.source.shape[1] <= BIN_NODES
    alone = sum(len(name) for name in names)
    assert forest.nodes < alone + BIN_NODES  # sharing pays for the padding
    uniform = torch.full((1, *forest.source.shape, VOCAB_SIZE), -1.0)
    scores = forest.score(torch.full((1, VOCAB_SIZE), -1.0), uniform)[0]
    assert scores.tolist() == [-(len(name) + 1.0) for name in names]


def test_a_cropped_candidate_is_judged_without_its_end() -> None:
    forest = Forest.of([Candidate((1, 2)), Candidate((1, 2), ends=False)])
    ones = torch.full((1, *forest.source.shape, VOCAB_SIZE), -1.0)
    assert forest.score(torch.full((1, VOCAB_SIZE), -1.0), ones).tolist() == [[-3.0, -2.0]]


def test_impossible_continuations_are_errors() -> None:
    kernel = _kernel()
    for texts, room in (([], 0), ([[]], 0), ([[1] * 97], 0), ([[1] * 90], 7), ([[1]], -1)):
        with pytest.raises(InvalidInput):
            Continuation(kernel, texts, room)
    text = Continuation(kernel, [[1, 2], [1]], room=3)
    with pytest.raises(InvalidInput, match="one length"):
        text.extend(torch.ones(2, 1, dtype=torch.int64))
    text = Continuation(kernel, [[1, 2]], room=3)
    with pytest.raises(InvalidInput, match="1 to 3"):
        text.extend(torch.ones(1, 4, dtype=torch.int64))
    with pytest.raises(InvalidConfig):
        Noise(1.5, torch.Generator())
    with pytest.raises(InvalidInput, match="eval"):
        Continuation(_kernel().train(), [[1]])
