"""The integrating core: everything passes through it, nothing brings it to rest, and turning it is what integrates."""

from __future__ import annotations

import pytest
import torch

from qig_core.core import mixer
from qig_core.errors import InvalidConfig
from qig_core.integration import kernel_states, measure_integration
from qig_core.m8_kernel import KernelConfig, M8Kernel
from qig_core.read_out import projection


def _kernel(**options: object) -> M8Kernel:
    return M8Kernel(KernelConfig.preset("nano", core=8, **options), seed=3).eval()


def _ids(rows: int = 3, length: int = 40, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("cycles", [2, 3, 4, 5, 6, 7, 12])
@pytest.mark.parametrize("units", [2, 4, 8])
def test_the_mixer_is_orthogonal_even_and_comes_round_in_one_pass(units: int, cycles: int):
    turn, one = mixer(units, cycles).double(), torch.eye(units, dtype=torch.float64)
    torch.testing.assert_close(turn @ turn.T, one, atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.linalg.matrix_power(turn, cycles), one, atol=1e-5, rtol=0)
    across = turn.abs()[~torch.eye(units, dtype=torch.bool)]
    torch.testing.assert_close(across, across[:1].expand_as(across), atol=1e-6, rtol=0)
    kept = float(turn.diagonal().square().mean())  # the share of a unit that stays with it
    assert kept <= max(1 / units, 0.26)


def test_a_state_between_cycles_is_its_core_and_nothing_else():
    kernel = _kernel()
    output = kernel(_ids(), state_loops=True)
    outside = torch.eye(48, dtype=torch.float64) - projection(48, 8) @ projection(48, 8).T
    for state in (*output.loops, output.carry[0]):
        assert (state.double() @ outside).abs().max() < 1e-5
    assert kernel.core is not None
    units = torch.randn(5, 8, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(kernel.core.units_of(kernel.core.lift(units)), units)


@pytest.mark.parametrize("width", [8, 20])
def test_a_kernel_without_weights_spoils_no_later_one(width: int):
    """All kernels of a width share one read-out, which the first of them makes."""
    config = KernelConfig.preset("nano", core=8, width=width)
    projection.cache_clear()
    expected = M8Kernel(config, seed=3)(_ids()).logits
    projection.cache_clear()
    with torch.device("meta"):
        M8Kernel(config)
    kernel = M8Kernel(config, seed=3)
    assert {buffer.device.type for buffer in kernel.buffers()} == {"cpu"}
    assert torch.equal(kernel(_ids()).logits, expected)
    assert projection(width, 8).device.type == "cpu"


def test_what_a_cycle_leaves_outside_the_core_is_gone():
    """The second pass from a core alone equals the second pass from the whole carry: there is no other channel."""
    kernel = _kernel()
    first = kernel(_ids())
    high = first.carry[0]
    assert kernel.core is not None
    rebuilt = kernel.core.lift(kernel.core.units_of(high))
    low = kernel.start_low.expand_as(high)
    torch.testing.assert_close(kernel(_ids(), (rebuilt, low)).logits, kernel(_ids(), first.carry).logits)


def test_causal_with_a_core_and_ngrams():
    kernel = _kernel(ngram_buckets=512)
    with torch.no_grad():
        assert kernel.ngrams is not None
        kernel.ngrams.table.normal_(generator=torch.Generator().manual_seed(0))
    ids = _ids()
    edited = ids.clone()
    edited[:, 25] = (edited[:, 25] + 1) % 256
    before, after = kernel(ids), kernel(edited)
    assert torch.equal(before.logits[:, :25], after.logits[:, :25])
    assert not torch.equal(before.logits[:, 25:], after.logits[:, 25:])


def test_turning_integrates_and_the_identity_does_not():
    """Untrained: the measure tells a coupled core from one in which each unit remembers itself."""
    ids = _ids(16, 120)
    phi = {}
    for mixing in ("orthogonal", "identity"):
        found = measure_integration(*kernel_states(_kernel(core_mixing=mixing), ids)).phi
        assert found is not None
        phi[mixing] = found
    assert phi["orthogonal"] > 0.8
    assert phi["identity"] < 0.5  # not nothing: the blocks read all units, and each answers to what they found


def test_noise_needs_a_generator_and_repeats_with_it():
    for options in ({"core": 8}, {"core": 0}):
        kernel = M8Kernel(KernelConfig.preset("nano", noise=0.2, **options), seed=3).eval()
        quiet = kernel(_ids()).logits
        assert torch.equal(quiet, kernel(_ids()).logits)
        one, two, three = (kernel(_ids(), noise=torch.Generator().manual_seed(s)).logits for s in (1, 1, 2))
        assert torch.equal(one, two)
        assert not torch.equal(one, three)
        assert not torch.equal(one, quiet)
    silent = M8Kernel(KernelConfig.preset("nano", noise=0.0), seed=3).eval()
    assert torch.equal(silent(_ids()).logits, silent(_ids(), noise=torch.Generator().manual_seed(1)).logits)


@pytest.mark.parametrize(
    "options", [{"core": 3}, {"core": 16}, {"core_mixing": "none"}, {"core_gate": 1.0}, {"noise": -0.1}]
)
def test_impossible_options_are_refused(options: dict[str, object]):
    with pytest.raises(InvalidConfig):
        KernelConfig.preset("nano", **options)
