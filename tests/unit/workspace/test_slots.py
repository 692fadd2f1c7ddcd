"""Slots: shapes, who gets a gradient, competition, and that they learn to bind groups."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from workspace.slots import ProbeFeatures, SlotWorkspace

R, N, F, S, W = 3, 7, 12, 4, 16


def make(seed: int = 0, **options: object) -> SlotWorkspace:
    torch.manual_seed(seed)
    sizes = {"features": F, "slots": S, "width": W, "iterations": 3, **options}
    return SlotWorkspace(**sizes)  # type: ignore[arg-type]


def inputs(seed: int = 1, rows: int = R) -> Tensor:
    return torch.randn(rows, N, F, generator=torch.Generator().manual_seed(seed))


def probe(seed: int = 0) -> ProbeFeatures:
    torch.manual_seed(seed)
    return ProbeFeatures((1, 4), hidden_size=10, embedding_width=6, width=F)


# Features.


def test_features_of_last_tokens_whole_texts_and_memories() -> None:
    features = probe()
    last = {1: torch.randn(R, 10), 4: torch.randn(R, 10)}
    assert features(last).shape == (R, 2, F)
    assert features(last, torch.randn(R, 3, 6)).shape == (R, 5, F)
    whole = {layer: torch.stack([residual, residual * 2], dim=1) for layer, residual in last.items()}  # [R, 2, 10]
    seen = features(whole)
    assert seen.shape == (R, 4, F)
    torch.testing.assert_close(seen[:, ::2], features(last))  # layer after layer, token after token
    torch.testing.assert_close(seen[:, 1::2], seen[:, ::2])  # scale does not matter, direction does


def test_features_accept_bfloat16_and_refuse_a_missing_layer() -> None:
    residuals = {1: torch.randn(R, 10).bfloat16(), 4: torch.randn(R, 10).bfloat16()}
    assert probe()(residuals).dtype == torch.float32
    with pytest.raises(KeyError, match="4"):
        probe()({1: residuals[1]})


# Slots.


def test_shapes_and_that_attention_is_shared_out_over_slots() -> None:
    update = make()(inputs())
    assert update.slots.shape == (R, S, W)
    assert update.write.shape == (R, S)
    assert update.attention.shape == (R, S, N)
    torch.testing.assert_close(update.attention.sum(dim=1), torch.ones(R, N))


def test_it_is_slot_attention_as_the_paper_writes_it() -> None:
    """Algorithm 1 of Locatello et al. (2020), literally: the module multiplies in another order."""
    module, features = make(iterations=2), inputs()
    keys, values = module.to_key_value(module.norm_inputs(features)).chunk(2, dim=-1)
    slots = module.start(R)
    for _ in range(2):
        queries = module.to_query(module.norm_slots(slots))
        attention = torch.softmax(queries @ keys.transpose(1, 2) / W**0.5, dim=1)
        weights = attention + 1e-8
        updates = (weights / weights.sum(dim=-1, keepdim=True)) @ values
        slots = module.gru(updates.reshape(-1, W), slots.reshape(-1, W)).view(R, S, W)
        slots = slots + module.mlp(module.norm_mlp(slots))
    update = module(features)
    torch.testing.assert_close(update.slots, slots, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(update.attention, attention, atol=1e-5, rtol=1e-5)


def test_equal_inputs_give_equal_slots() -> None:
    first, second = make()(inputs()), make()(inputs())
    assert torch.equal(first.slots, second.slots)


def test_the_order_of_inputs_does_not_matter() -> None:
    module, features = make(), inputs()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(3))
    plain, permuted = module(features), module(features[:, order])
    torch.testing.assert_close(permuted.slots, plain.slots, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(permuted.attention, plain.attention[..., order], atol=1e-6, rtol=1e-5)


def test_slots_are_permuted_with_their_start() -> None:
    module, features = make(), inputs()
    start = torch.randn(R, S, W)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(module(features, start[:, order]).slots, module(features, start).slots[:, order])


def test_rows_do_not_see_each_other() -> None:
    module, features = make(), inputs()
    torch.testing.assert_close(module(features[1:2]).slots, module(features).slots[1:2])


def test_masked_inputs_have_no_effect_and_a_row_without_inputs_keeps_its_slots() -> None:
    module, features = make(), inputs()
    mask = torch.ones(R, N, dtype=torch.bool)
    mask[0, 4:], mask[2] = False, False
    start = torch.randn(R, S, W)
    masked = module(features, start, mask)
    noisy = module(torch.where(mask[..., None], features, torch.full_like(features, 7.0)), start, mask)
    torch.testing.assert_close(masked.slots, noisy.slots)
    torch.testing.assert_close(masked.slots[0], module(features[:1, :4], start[:1]).slots[0])
    assert torch.equal(masked.slots[2], start[2])
    assert masked.slots.isfinite().all()


def test_only_the_winners_are_written() -> None:
    module, features, start = make(write_slots=2), inputs(), torch.randn(R, S, W)
    update = module(features, start)
    changed = (update.slots != start).any(dim=-1)  # [R, S]
    assert torch.equal(update.write, changed.float())
    assert torch.equal(update.write.sum(dim=1), torch.full((R,), 2.0))
    share = update.attention.mean(dim=-1)
    assert (share[changed].view(R, 2).min(dim=1).values >= share[~changed].view(R, 2).max(dim=1).values).all()


@pytest.mark.parametrize("options", [{"slots": 1}, {"iterations": 0}, {"write_slots": 5}, {"write_slots": 0}])
def test_what_cannot_compete_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 2 slots, 1 iteration"):
        make(**options)


# Gradients.


def test_the_learnt_start_gets_its_gradient_by_straight_through_only() -> None:
    trained, plain = make(), make(straight_through=False)
    results = {module: module(inputs()).slots for module in (trained, plain)}
    assert torch.equal(results[trained], results[plain]), "the trick changes the gradient, not the value"
    for result in results.values():
        result.square().sum().backward()
    assert plain.first.grad is None
    assert trained.first.grad is not None
    assert (trained.first.grad.abs().amax(dim=1) > 0).all(), "each first slot is trained"


def test_the_gradient_flows_through_earlier_updates() -> None:
    module = make(write_slots=2)
    slots = module(inputs(1)).slots
    module(inputs(2), slots).slots.square().sum().backward()
    assert module.first.grad is not None
    assert (module.first.grad != 0).any()


@pytest.mark.parametrize("write_slots", [2, S])
def test_every_parameter_is_trained(write_slots: int) -> None:
    features, module = probe(), make(write_slots=write_slots)
    residuals = {1: torch.randn(R, 10), 4: torch.randn(R, 10)}
    target = torch.randn(R, S, W)
    update = module(features(residuals, torch.randn(R, 2, 6)))
    (update.slots - target).square().sum().backward()
    for name, parameter in (*features.named_parameters(), *module.named_parameters()):
        assert parameter.grad is not None, name
        assert (parameter.grad != 0).any(), name


def test_earlier_rounds_keep_nothing_for_the_backward_pass() -> None:
    """The implicit form costs the memory of one round, whatever the number of rounds."""

    def saved(iterations: int) -> int:
        total = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.numel()
            return tensor

        module, features = make(iterations=iterations), inputs()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            module(features)
        return total

    assert saved(5) == saved(1) > 0


# Learning.


def two_groups(generator: torch.Generator, rows: int, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Eight inputs, each near one of two centres drawn for its row: [rows, 8, F] and who belongs to whom."""
    pairs = torch.stack([torch.randperm(len(centres), generator=generator)[:2] for _ in range(rows)])  # [rows, 2]
    groups = torch.stack([torch.randperm(8, generator=generator) % 2 for _ in range(rows)])  # [rows, 8]
    chosen = centres[pairs.gather(1, groups)]
    return chosen + 0.1 * torch.randn(chosen.shape, generator=generator), groups


def test_slots_learn_to_bind_two_groups() -> None:
    generator = torch.Generator().manual_seed(11)
    centres = torch.randn(10, F, generator=generator)
    torch.manual_seed(5)
    module = SlotWorkspace(features=F, slots=2, width=32, iterations=3)
    decoder = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, F))
    optimizer = torch.optim.Adam([*module.parameters(), *decoder.parameters()], lr=4e-3)

    def loss_and_binding(rows: int) -> tuple[Tensor, float]:
        seen, groups = two_groups(generator, rows, centres)
        update = module(seen)
        rebuilt = update.attention.transpose(1, 2) @ decoder(update.slots)  # each input by the slots that claim it
        owner = update.attention.argmax(dim=1)  # [rows, 8]
        right = (owner == groups).float().mean(dim=1)
        return (rebuilt - seen).square().mean(), float(torch.maximum(right, 1 - right).mean())

    with torch.no_grad():
        before, _ = loss_and_binding(256)
    for _ in range(400):
        loss, _ = loss_and_binding(64)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        after, binding = loss_and_binding(256)
    assert after < 0.05 * before, f"loss {float(before):.3f} -> {float(after):.3f}"
    assert binding > 0.97, f"only {binding:.2f} of the inputs are with their group"
