"""The linear path: causal, silent before SEP and at first, exact when read on, and quick to learn."""

from __future__ import annotations

import torch

from qig_core.association import LR_FACTOR, Association
from qig_core.inference import collate, evaluate_pairs, generate, rank_candidates, run_to_halt
from qig_core.learning import TrainingDefaults
from qig_core.m8_kernel import KernelConfig, M8Kernel
from qig_core.vocabulary import PAD, SEP, encode_pair, encode_prompt

WORDS = {"red": "stop", "green": "go on", "amber": "go slowly", "blue": "stop there"}


def path(loud: bool = True) -> Association:
    generator = torch.Generator().manual_seed(3)
    made = Association(16, generator)
    if loud:
        torch.nn.init.normal_(made.out.weight, generator=generator)
    return made.requires_grad_(False)


def test_a_fresh_path_says_nothing() -> None:
    ids = torch.tensor([encode_pair("is it red", "yes", 64).ids])
    assert not path(loud=False)(ids).any()


def test_it_speaks_from_sep_on() -> None:
    pair = encode_pair("is it red", "yes", 64).ids
    logits = path()(torch.tensor([pair]))
    at = pair.index(SEP)
    assert not logits[0, :at].any()
    assert logits[0, at:].abs().amax(dim=-1).min() > 0
    assert not path()(torch.tensor([[5, 6, 7]])).any()


def test_later_ids_change_nothing_before_them() -> None:
    ids = torch.tensor([encode_pair("is it red", "yes indeed", 64).ids])
    before = path()(ids)
    for position in range(ids.shape[1]):
        edited = ids.clone()
        edited[0, position] = 33
        if int(ids[0, position]) == SEP:
            continue
        assert torch.equal(path()(edited)[0, :position], before[0, :position])


def test_padding_and_neighbours_change_nothing() -> None:
    pairs = [encode_pair("is it red", "yes", 64), encode_pair("or is it rather a dark green", "no idea", 64)]
    both = path()(collate(pairs).ids)
    for row, pair in enumerate(pairs):
        alone = path()(torch.tensor([pair.ids]))
        torch.testing.assert_close(both[row, : len(pair.ids)], alone[0])


def test_letter_case_of_the_observation_does_not_matter_and_its_order_does() -> None:
    first, second, other = (
        path().recall(torch.tensor([encode_prompt(text, 64)])).bag for text in ("Red Card", "red card", "card red")
    )
    assert torch.equal(first, second)
    assert not torch.allclose(first, other, atol=0.05)


def test_reading_on_is_exact() -> None:
    texts = [encode_prompt("is it red", 64), encode_prompt("or is it rather a dark green", 64)]
    action = [104, 101, 121, 33]
    longest = max(map(len, texts))
    recall = path().recall(torch.tensor([text + [PAD] * (longest - len(text)) for text in texts]))
    logits, then = path().follow(recall, torch.tensor([action] * 2))
    for row, text in enumerate(texts):
        whole = path()(torch.tensor([text + action]))[0]
        torch.testing.assert_close(path().after(recall)[row], whole[len(text) - 1])
        torch.testing.assert_close(logits[row], whole[len(text) :])
        torch.testing.assert_close(path().after(then)[row], whole[-1])
        torch.testing.assert_close(path().after(recall.take(torch.tensor([row])))[0], whole[len(text) - 1])


def test_beginnings_of_actions_do_not_collide() -> None:
    texts = [encode_prompt("x", 64) + list(action.encode()) for action in ("ab", "ba", "aab", "abb", "aba", "baa", "")]
    longest = max(map(len, texts))
    recall = path().recall(torch.tensor([text + [PAD] * (longest - len(text)) for text in texts]))
    assert len(set(recall.code.tolist())) == len(texts)


def test_it_learns_a_lookup_in_a_few_steps() -> None:
    generator = torch.Generator().manual_seed(0)
    subject = Association(16, generator)
    batch = collate(
        [encode_pair(f"the {word} light no {n}", action, 64) for word, action in WORDS.items() for n in "12"]
    )
    target, mask = batch.ids[:, 1:], batch.loss_mask[:, 1:]
    optimizer = torch.optim.Adam(subject.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(subject(batch.ids)[:, :-1][mask], target[mask]).backward()
        optimizer.step()
    fresh = collate([encode_pair(f"a {word} light it is", action, 64) for word, action in WORDS.items()])
    said = subject(fresh.ids)[:, :-1].argmax(-1)
    assert bool((said == fresh.ids[:, 1:])[fresh.loss_mask[:, 1:]].all())


def a_kernel() -> M8Kernel:
    kernel = M8Kernel(KernelConfig.preset("nano", width=16, hidden=16, heads=2, context=64, association=12), seed=2)
    assert kernel.association is not None
    torch.nn.init.normal_(kernel.association.out.weight, generator=torch.Generator().manual_seed(0))
    return kernel.eval()


def test_the_kernels_answers_hold_it_however_they_are_computed() -> None:
    """Ranking by the forest and generation by the cache agree with forward passes over the whole texts."""
    kernel = a_kernel()
    candidates = ["stop", "stop there", "go", "", "go slowly, please"]
    for observation in ("is it red", "or is it rather a dark green"):
        ranked = dict(rank_candidates(kernel, observation, candidates))
        pairs = [encode_pair(observation, candidate, 64) for candidate in candidates]
        batch = collate(pairs)
        nats, _ = evaluate_pairs(kernel, batch.ids, batch.loss_mask)
        torch.testing.assert_close(
            torch.tensor([ranked[candidate] for candidate in candidates]), -nats.float(), rtol=1e-4, atol=1e-4
        )
        said = generate(kernel, encode_prompt(observation, 64, 8), 8)
        ids = encode_prompt(observation, 64, 8)
        for symbol in said.ids:
            logits = run_to_halt(kernel, torch.tensor([ids])).logits[0, -1]
            assert int(logits[:256].argmax()) == symbol
            ids.append(symbol)


def test_without_it_nothing_changes_and_with_it_the_recursion_begins_alike() -> None:
    plain = M8Kernel(KernelConfig.preset("nano"), seed=2)
    with_path = M8Kernel(KernelConfig.preset("nano", association=8), seed=2)
    ids = collate([encode_pair("is it red", "yes", 64)]).ids
    assert plain.association is None
    assert torch.equal(plain(ids).logits, with_path(ids).logits)


def test_it_learns_with_larger_steps() -> None:
    kernel = a_kernel()
    defaults = TrainingDefaults(lr=1e-3, warmup_steps=0)
    optimizer = defaults.optimizer(kernel)
    defaults.set_lr(optimizer, step=5, scale=0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [5e-4, 5e-4, 5e-4 * LR_FACTOR]
    held = sum(len(group["params"]) for group in optimizer.param_groups)
    assert held == len(list(kernel.parameters()))
