"""Halting, generation and ranking against what a plain forward pass says."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from qig_core.errors import InvalidInput
from qig_core.learning import (
    basin_of_texts,
    by_length,
    candidate_confidences,
    collate,
    evaluate_pairs,
    generate,
    rank_candidates,
    run_to_halt,
)
from qig_core.m8_kernel import KernelConfig, M8Kernel
from qig_core.vocabulary import EOS, PAD, encode_pair, encode_prompt


def _kernel(**overrides: object) -> M8Kernel:
    return M8Kernel(KernelConfig.preset("nano", **overrides), seed=3).eval()


@pytest.fixture(scope="module")
def kernel() -> M8Kernel:
    return _kernel(supervision_steps=1)


def _pairs() -> list[tuple[str, str]]:
    return [("a short one", "yes"), ("something that is quite a bit longer", "no"), ("mid length text", "perhaps")]


def test_collate_pads_on_the_right():
    batch = collate([encode_pair(o, a, 64) for o, a in _pairs()])
    assert batch.ids.shape == batch.loss_mask.shape == (3, 41)
    assert bool((batch.ids[0, 17:] == PAD).all())
    assert not batch.loss_mask[0, 17:].any()
    with pytest.raises(InvalidInput):
        collate([])


def test_groups_by_length_are_a_partition():
    ids = collate([encode_pair("x" * n, "y", 64) for n in (5, 50, 20, 1, 33)]).ids
    groups = by_length(ids, 2)
    assert sorted(i for index, _ in groups for i in index.tolist()) == [0, 1, 2, 3, 4]
    assert [length for _, length in groups] == [24, 54]


def test_evaluation_equals_a_forward_pass_row_by_row(kernel: M8Kernel):
    batch = collate([encode_pair(o, a, 64) for o, a in _pairs()])
    nats, symbols = evaluate_pairs(kernel, batch.ids, batch.loss_mask, batch_size=2)
    for row, (observation, action) in enumerate(_pairs()):
        ids = torch.tensor([encode_pair(observation, action, 64).ids])
        logits = kernel(ids).logits[0, -len(action) - 2 : -1]
        expected = F.cross_entropy(logits, ids[0, -len(action) - 1 :], reduction="sum").item()
        assert nats[row].item() == pytest.approx(expected, abs=1e-3)
        assert symbols[row] == len(action) + 1


def test_evaluation_restores_the_training_mode(kernel: M8Kernel):
    kernel.train()
    batch = collate([encode_pair("a", "b", 64)])
    evaluate_pairs(kernel, batch.ids, batch.loss_mask)
    assert kernel.training
    kernel.eval()


@pytest.mark.parametrize(("bias", "depth"), [(-3.0, 4), (3.0, 1)])
def test_the_halt_decides_the_depth(bias: float, depth: int):
    kernel = _kernel(supervision_steps=4, halt_bias=bias)
    answer = run_to_halt(kernel, collate([encode_pair("a", "b", 64)]).ids)
    assert answer.depth.tolist() == [depth]


def test_each_row_halts_by_itself_and_keeps_its_answer():
    kernel = _kernel(supervision_steps=3)
    ids = collate([encode_pair(o, a, 64) for o, a in _pairs()]).ids
    first = kernel(ids)
    direction = first.pooled[0] - first.pooled[1]
    with torch.no_grad():  # a halt head that lets row 0 stop and row 1 go on
        kernel.halt.weight.copy_(direction)
        kernel.halt.bias.fill_(-float((first.pooled[:2] @ direction).mean()))
    answer = run_to_halt(kernel, ids)
    assert answer.depth[0] == 1
    assert answer.depth[1] > 1
    assert torch.equal(answer.logits[0], first.logits[0])
    assert not torch.equal(answer.logits[1], first.logits[1])


def test_ranking_orders_by_the_log_probability(kernel: M8Kernel):
    names = ["yes", "no", "perhaps", "yes indeed"]
    ranked = rank_candidates(kernel, "a question", names)
    scores = [score for _, score in ranked]
    assert sorted(name for name, _ in ranked) == sorted(names)
    assert scores == sorted(scores, reverse=True)
    confidences = candidate_confidences(ranked)
    assert sum(confidences) == pytest.approx(1.0)
    assert confidences[0] / confidences[1] == pytest.approx(math.exp(scores[0] - scores[1]))
    with pytest.raises(InvalidInput):
        rank_candidates(kernel, "a question", [])


def test_greedy_generation_follows_the_argmax_and_scores_itself(kernel: M8Kernel):
    prompt = encode_prompt("hello", 64)
    made = generate(kernel, prompt, max_tokens=5)
    ids, total = list(prompt), 0.0
    for symbol in made.ids:
        scores = kernel(torch.tensor([ids])).logits[0, -1].detach()
        scores[256:EOS] = -math.inf
        assert symbol == int(scores.argmax())
        total += float(torch.log_softmax(scores, -1)[symbol])
        ids.append(symbol)
    assert len(made.ids) == 5
    assert not made.finished
    assert made.mean_log_prob == pytest.approx(total / 5, abs=1e-4)
    assert made.confidence == pytest.approx(math.exp(made.mean_log_prob))
    assert made.depth == 1


def test_sampling_is_repeatable_and_obeys_the_alphabet(kernel: M8Kernel):
    runs = [
        generate(kernel, encode_prompt("x", 64), 20, 1.0, torch.Generator().manual_seed(4), allowed=b"abc")
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
    assert set(runs[0].text) <= set("abc")
    other = generate(kernel, encode_prompt("x", 64), 20, 1.0, torch.Generator().manual_seed(5), allowed=b"abc")
    assert other.ids != runs[0].ids


def test_generation_ends_at_eos_and_at_the_context():
    kernel = _kernel(supervision_steps=1, context=16)
    with torch.no_grad():
        kernel.head.weight[EOS] = -1e3 * kernel.head.weight[EOS].sign()
    full = generate(kernel, encode_prompt("abcdefgh", 16), max_tokens=100, allowed=b"a")
    assert len(full.ids) <= 7
    only_end = generate(kernel, encode_prompt("ab", 16), max_tokens=100, allowed=[])
    assert (only_end.ids, only_end.finished, only_end.confidence) == ([], True, 1.0)


def test_impossible_requests_are_errors(kernel: M8Kernel):
    with pytest.raises(InvalidInput):
        generate(kernel, [1], max_tokens=0)
    with pytest.raises(InvalidInput):
        generate(kernel, [1], 5, temperature=-1)
    with pytest.raises(InvalidInput):
        generate(kernel, [], 5)


def test_basins_of_texts_do_not_depend_on_their_batch(kernel: M8Kernel):
    prompts = [encode_prompt(o, 64) for o, _ in _pairs()]
    together = basin_of_texts(kernel, prompts)
    assert together.shape == (3, 64)
    for row, prompt in enumerate(prompts):
        assert torch.allclose(together[row], basin_of_texts(kernel, [prompt])[0], atol=1e-5)
