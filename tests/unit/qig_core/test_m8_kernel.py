"""The network's promises: shapes, causality to the bit, padding, gradients, configuration."""

from __future__ import annotations

import pytest
import torch

from qig_core.basin_embedding import BasinEmbedding
from qig_core.errors import InvalidConfig, InvalidInput
from qig_core.geometry import fisher_rao_distance
from qig_core.m8_kernel import KernelConfig, M8Kernel, read_position
from qig_core.vocabulary import BOS, EOS, PAD, SEP, VOCAB_SIZE


@pytest.fixture(scope="module")
def kernel() -> M8Kernel:
    return M8Kernel(KernelConfig.preset("nano"), seed=0).eval()


def _ids(rows: int = 3, length: int = 40, seed: int = 0) -> torch.Tensor:
    ids = torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))
    ids[:, 0], ids[:, 25] = BOS, SEP
    return ids


@pytest.mark.parametrize(
    ("preset", "least", "most"),
    [("nano", 150_000, 250_000), ("micro", 600_000, 800_000), ("small", 900_000, 1_200_000)],
)
def test_presets_have_their_size(preset: str, least: int, most: int):
    assert least <= M8Kernel(KernelConfig.preset(preset)).parameter_count() <= most


def test_shapes_and_simplex(kernel: M8Kernel):
    config = kernel.config
    output = kernel(_ids(), state_loops=True)
    assert output.logits.shape == (3, 40, VOCAB_SIZE)
    assert output.halt_logit.shape == (3,)
    assert output.pooled.shape == (3, config.width)
    assert torch.allclose(output.basin.sum(-1), torch.ones(3))
    assert output.basin.shape == (3, 64)
    assert [tuple(z.shape) for z in output.loops] == [(3, 40, config.width)] * config.outer_cycles
    assert all(state.shape == (3, 48, config.width) and not state.requires_grad for state in output.carry)
    assert torch.allclose(output.halt_logit, torch.full((3,), -3.0), atol=1e-5), "deep start"


@pytest.mark.parametrize("position", [1, 7, 26, 39])
def test_editing_a_byte_leaves_all_earlier_logits_bit_equal(kernel: M8Kernel, position: int):
    ids = _ids()
    edited = ids.clone()
    edited[:, position] = (ids[:, position] + 7) % 256
    before, after = kernel(ids), kernel(edited)
    assert torch.equal(before.logits[:, :position], after.logits[:, :position])
    assert not torch.equal(before.logits[:, position:], after.logits[:, position:])
    again, changed = kernel(ids, before.carry), kernel(edited, after.carry)
    assert torch.equal(again.logits[:, :position], changed.logits[:, :position])


def test_right_padding_changes_nothing_before_it(kernel: M8Kernel):
    ids = _ids()
    padded = torch.cat((ids, torch.full((3, 20), PAD)), dim=1)
    plain, wide = kernel(ids), kernel(padded)
    assert torch.allclose(plain.logits, wide.logits[:, :40], atol=1e-5)
    assert torch.allclose(plain.pooled, wide.pooled, atol=1e-5)


def test_the_state_is_read_where_the_observation_ends():
    rows = torch.tensor([[BOS, 1, SEP, 2, EOS], [BOS, 1, 2, PAD, PAD], [BOS, SEP, 3, EOS, PAD]])
    assert read_position(rows).tolist() == [2, 2, 1]


def test_the_action_does_not_change_the_basin_of_its_observation(kernel: M8Kernel):
    ids = _ids()
    other = ids.clone()
    other[:, 26:] = 65
    assert torch.equal(kernel(ids).basin, kernel(other).basin)


def test_every_trainable_tensor_has_a_gradient():
    kernel = M8Kernel(KernelConfig.preset("nano"))
    output = kernel(_ids())
    (output.logits.logsumexp(-1).mean() + output.halt_logit.mean()).backward()
    missing = [name for name, p in kernel.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []


def test_memory_is_read_by_every_position(kernel: M8Kernel):
    other = M8Kernel(kernel.config, seed=0).eval()
    with torch.no_grad():
        other.memory.add_(torch.randn(other.memory.shape, generator=torch.Generator().manual_seed(1)))
    moved = (kernel(_ids()).logits - other(_ids()).logits).abs().amax(-1)
    assert bool((moved > 1e-4).all())


def test_state_stays_bounded_over_many_passes(kernel: M8Kernel):
    carry = None
    for _ in range(10):
        output = kernel(_ids(), carry)
        carry = output.carry
        assert carry[0].square().mean(-1).max() <= 1.01
    assert output.logits.isfinite().all()


def test_a_pass_without_gradient_equals_one_with(kernel: M8Kernel):
    with torch.no_grad():
        still = kernel(_ids()).logits
    assert torch.equal(still, kernel(_ids()).logits)


def test_seed_fixes_the_weights_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    first = M8Kernel(KernelConfig.preset("nano"), seed=1).state_dict()
    torch.manual_seed(6)
    second = M8Kernel(KernelConfig.preset("nano"), seed=1).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["memory"], M8Kernel(KernelConfig.preset("nano"), seed=2).state_dict()["memory"])


def test_ids_that_do_not_fit_are_errors(kernel: M8Kernel):
    with pytest.raises(InvalidInput, match="256"):
        kernel(torch.zeros(1, 257, dtype=torch.int64))
    with pytest.raises(InvalidInput, match="carry"):
        kernel(_ids(2), kernel(_ids(3)).carry)


def test_config_round_trip_and_overrides():
    config = KernelConfig.preset("micro", supervision_steps=3, halt_bias=-2)
    assert KernelConfig.from_dict(config.to_dict()) == config
    assert (config.preset_name, config.supervision_steps, config.halt_bias) == ("micro", 3, -2.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"widht": 48}, "widht"),
        ({"width": "48"}, "type int"),
        ({"width": True}, "type int"),
        ({"width": 50, "heads": 4}, "multiple"),
        ({"width": 6, "heads": 2}, "even"),
        ({"inner_cycles": 2}, "at least 3"),
        ({"outer_cycles": 1}, "at least 2"),
        ({"memory_tokens": 7}, "at least 8"),
        ({"context": 4}, "at least 16"),
        ({"dropout": 1.0}, "in \\[0, 1\\)"),
        ({"heads": 0}, "at least 1"),
        ({"halt_bias": float("nan")}, "finite"),
        ({"width": 1_000_000}, "width=1000000 must be at most 512"),
        ({"blocks": 100_000}, "blocks=100000 must be at most 4"),
        ({"width": 4, "heads": 2, "core": 8}, "core=8 must be at most width=4"),
    ],
)
def test_impossible_configurations_are_errors(values: dict, message: str):
    with pytest.raises(InvalidConfig, match=message):
        KernelConfig.from_dict(values)


def test_unknown_preset_names_the_known_ones():
    with pytest.raises(InvalidConfig, match="nano, micro, small"):
        KernelConfig.preset("mega")


def test_basin_embedding_rows_are_distributions_with_live_gradients():
    embedding = BasinEmbedding(VOCAB_SIZE, 64, 48, torch.Generator().manual_seed(0))
    basins = embedding.basins()
    assert torch.allclose(basins.sum(-1), torch.ones(VOCAB_SIZE))
    assert basins.min() > 0, "dense: no coordinate is dead"
    away = fisher_rao_distance(basins[:-1], basins[1:])
    assert 1.5 < away.mean() < 2.2
    embedding(torch.arange(VOCAB_SIZE).unsqueeze(0)).sum().backward()
    assert embedding.logits.grad is not None
    assert (embedding.logits.grad != 0).float().mean() > 0.99
    rms = embedding.table().square().mean(-1).sqrt()
    assert torch.allclose(rms, torch.ones(VOCAB_SIZE), atol=1e-3)
