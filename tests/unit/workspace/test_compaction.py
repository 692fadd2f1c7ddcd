"""Compaction by attention matching: exact where it can be, better than selection where it cannot, differentiable."""

from __future__ import annotations

import itertools
from typing import Literal

import pytest
import torch
from torch import Tensor

from workspace.compaction import (
    CompactionSettings,
    attention_shares,
    choose_by_mass,
    choose_by_matching,
    compact,
    fit_mass,
    fit_values,
    log_mass,
)
from workspace.errors import InvalidWorkspace

SCALING = 8**-0.5
SELECTION = CompactionSettings(choice="mass", match_mass=False, match_values=False)


def make_problem(tokens: int = 40, queries: int = 64, kept: int = 12, seed: int = 0) -> dict[str, Tensor]:
    """Two layers, three heads of size 8; queries are correlated, as those of neighbouring tokens are."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(2, 3, *shape, generator=random)

    return {
        "keys": draw(tokens, 8) * 1.5,
        "values": draw(tokens, 8),
        "bias": torch.zeros(2, 3, tokens),
        "queries": draw(1, 8) + draw(queries, 8),
        "kept_keys": draw(kept, 8),
        "kept_values": draw(kept, 8),
    }


def attend(problem: dict[str, Tensor], queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    """Attention of ``queries`` over the kept tokens and the given ones."""
    everything = torch.cat((keys, problem["kept_keys"]), dim=-2)
    biases = torch.cat((bias, torch.zeros(problem["kept_keys"].shape[:-1])), dim=-1)
    weights = attention_shares(queries, everything, biases, None, SCALING)
    return weights @ torch.cat((values, problem["kept_values"]), dim=-2)


def error(
    problem: dict[str, Tensor], budget: int, settings: CompactionSettings, queries: Tensor | None = None
) -> float:
    """Mean squared error of the attention output after compaction, for ``queries`` (the reference ones if None)."""
    others = log_mass(problem["queries"], problem["kept_keys"], SCALING)
    evicted = problem["keys"], problem["values"], problem["bias"]
    done = compact(*evicted, problem["queries"], budget, scaling=SCALING, others=others, settings=settings)
    asked = problem["queries"] if queries is None else queries
    found = attend(problem, asked, done.keys, done.values, done.bias)
    return float((found - attend(problem, asked, *evicted)).square().mean())


def test_a_budget_for_all_tokens_changes_nothing() -> None:
    problem = make_problem()
    done = compact(
        problem["keys"], problem["values"], problem["bias"], problem["queries"], 40, scaling=SCALING, others=None
    )
    assert torch.equal(done.keys, problem["keys"])
    assert torch.equal(done.values, problem["values"])
    assert torch.equal(done.bias, problem["bias"])
    assert done.chosen[0, 0].tolist() == list(range(40))


def test_equal_keys_are_merged_without_loss() -> None:
    problem = make_problem(tokens=4)
    problem = problem | {name: problem[name].repeat_interleave(8, dim=2) for name in ("keys", "bias")}
    problem["values"] = torch.randn(2, 3, 32, 8, generator=torch.Generator().manual_seed(3))
    settings = CompactionSettings(ridge=1e-6, iterations=2000)
    assert error(problem, 4, settings) < 1e-6 < error(problem, 4, SELECTION)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("choice", ["mass", "matching"])
def test_fitting_beats_selection(seed: int, choice: Literal["mass", "matching"]) -> None:
    problem = make_problem(seed=seed)
    assert error(problem, 8, CompactionSettings(choice=choice)) < 0.5 * error(problem, 8, SELECTION)


def test_matching_sees_that_two_keys_do_the_same() -> None:
    problem = make_problem(tokens=20)
    problem["keys"] = torch.cat((problem["keys"][:, :, :1].expand(-1, -1, 8, -1) * 2, problem["keys"]), dim=2)
    problem["values"] = torch.cat((problem["values"][:, :, :1].expand(-1, -1, 8, -1), problem["values"]), dim=2)
    problem["bias"] = torch.cat((torch.zeros(2, 3, 8), problem["bias"]), dim=2)
    mass, matching = (error(problem, 8, CompactionSettings(choice=choice)) for choice in ("mass", "matching"))
    assert matching < 0.7 * mass, (matching, mass)


def test_the_mass_on_evicted_tokens_is_kept() -> None:
    problem = make_problem()
    others = log_mass(problem["queries"], problem["kept_keys"], SCALING)
    evicted = problem["keys"], problem["values"], problem["bias"]

    def mass_of(keys: Tensor, bias: Tensor) -> Tensor:
        """Share of the attention that goes to the given tokens."""
        return (log_mass(problem["queries"], keys, SCALING, bias) - others).sigmoid()

    truth = mass_of(problem["keys"], problem["bias"])
    errors = []
    for match_mass in (False, True):
        settings = CompactionSettings(match_mass=match_mass)
        done = compact(*evicted, problem["queries"], 8, scaling=SCALING, others=others, settings=settings)
        errors.append(float((mass_of(done.keys, done.bias) - truth).abs().mean()))
    assert errors[1] < 0.4 * errors[0], errors


def test_it_holds_for_queries_that_were_not_references() -> None:
    problem = make_problem(queries=128)
    new = problem["queries"][..., 64:, :]
    problem["queries"] = problem["queries"][..., :64, :]
    assert error(problem, 12, CompactionSettings(), new) < 0.7 * error(problem, 12, SELECTION, new)


def test_more_budget_is_better() -> None:
    problem = make_problem()
    errors = [error(problem, budget, CompactionSettings()) for budget in (2, 4, 8, 16, 32)]
    assert all(later < earlier for earlier, later in itertools.pairwise(errors)), errors


def test_what_nobody_looks_at_does_not_count() -> None:
    problem = make_problem()
    problem["bias"][..., 10:] = -40.0
    done = compact(
        problem["keys"], problem["values"], problem["bias"], problem["queries"], 10, scaling=SCALING, others=None
    )
    assert done.chosen.max() < 10


def test_a_summary_can_be_compacted_again() -> None:
    problem = make_problem(tokens=60)
    others = log_mass(problem["queries"], problem["kept_keys"], SCALING)

    def reduced(keys: Tensor, values: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return compact(keys, values, bias, problem["queries"], 12, scaling=SCALING, others=others)[:3]

    evicted = problem["keys"], problem["values"], problem["bias"]
    state = reduced(*(part[:, :, :20] for part in evicted))
    for start in (20, 40):
        block = [part[:, :, start : start + 20] for part in evicted]
        state = reduced(*(torch.cat(pair, dim=2) for pair in zip(state, block, strict=True)))
    truth = attend(problem, problem["queries"], *evicted)
    found = attend(problem, problem["queries"], *state)
    nothing = attend(problem, problem["queries"], *(part[:, :, :0] for part in evicted))
    assert (found - truth).square().mean() < 0.2 * (nothing - truth).square().mean()
    assert state[0].shape[2] == 12
    assert state[2].isfinite().all()


def test_mass_weights_solve_the_non_negative_least_squares() -> None:
    random = torch.Generator().manual_seed(0)
    shares = torch.rand(5, 30, 6, generator=random)
    truth = torch.tensor([0.5, 1.0, 2.0, 4.0, 0.0, 0.1]).expand(5, 6)
    found = fit_mass(shares, (shares @ truth[..., None])[..., 0], iterations=4000, bounds=(1e-6, 1e3))
    assert torch.allclose(found, truth, atol=2e-3)


def test_weights_stay_within_their_bounds() -> None:
    shares = torch.rand(2, 10, 3, generator=torch.Generator().manual_seed(0))
    assert (
        fit_mass(shares, torch.zeros(2, 10), iterations=200, bounds=(0.01, 10)).tolist()
        == [[pytest.approx(0.01)] * 3] * 2
    )
    assert fit_mass(shares, shares.sum(-1) * 1e4, iterations=200, bounds=(0.01, 10)).max() <= 10


def test_values_are_a_ridge_regression() -> None:
    random = torch.Generator().manual_seed(0)
    shares, output = torch.rand(2, 20, 4, generator=random), torch.rand(2, 20, 8, generator=random)
    prior = torch.rand(2, 4, 8, generator=random)
    exact = torch.linalg.lstsq(shares, output).solution
    assert torch.allclose(fit_values(shares, output, prior, ridge=1e-7), exact, atol=1e-3)
    assert torch.allclose(fit_values(shares, output, prior, ridge=1e7), prior, atol=1e-3)


@pytest.mark.parametrize("budget", [5, 40, 70])
def test_choices_are_distinct_and_ascending(budget: int) -> None:
    shares = torch.rand(2, 50, 90, generator=torch.Generator().manual_seed(0))
    for chosen in (choose_by_mass(shares, budget), choose_by_matching(shares, shares.sum(-1, keepdim=True), budget)):
        assert chosen.shape == (2, budget)
        assert (chosen.diff() > 0).all()


def test_matching_finds_the_columns_that_make_the_target() -> None:
    shares = torch.rand(30, 20, generator=torch.Generator().manual_seed(0))
    wanted = [3, 7, 11]
    target = shares[:, wanted] @ torch.tensor([[3.0, -2.0], [-2.0, 3.0], [2.0, 2.0]])
    assert choose_by_matching(shares, target, 3).tolist() == wanted


def test_unseen_tokens_do_not_make_nan() -> None:
    problem = make_problem()
    problem["bias"][:] = -1e4
    others = log_mass(problem["queries"], problem["kept_keys"], SCALING)
    done = compact(
        problem["keys"], problem["values"], problem["bias"], problem["queries"], 8, scaling=SCALING, others=others
    )
    assert done.values.isfinite().all()
    assert done.bias.isfinite().all()


def test_gradients_reach_keys_values_bias_and_queries() -> None:
    problem = {name: part.double().requires_grad_() for name, part in make_problem(tokens=12, queries=10).items()}
    done = compact(problem["keys"], problem["values"], problem["bias"], problem["queries"], 4, scaling=SCALING)
    (done.keys.square().sum() + done.values.square().sum() + done.bias.square().sum()).backward()
    for name in ("keys", "values", "bias", "queries"):
        gradient = problem[name].grad
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
        assert gradient.abs().max() > 0, name


def test_the_gradient_is_that_of_finite_differences() -> None:
    problem = make_problem(tokens=10, queries=30)
    values = problem["values"].requires_grad_()

    def loss(values: Tensor) -> Tensor:
        done = compact(problem["keys"], values, problem["bias"], problem["queries"], 9, scaling=SCALING)
        return done.values.square().sum()

    loss(values).backward()
    step = torch.zeros_like(values)
    step[1, 2, 3, 4] = 1e-2
    with torch.no_grad():
        difference = (loss(values + step) - loss(values - step)) / 2e-2
    assert values.grad is not None
    assert float(values.grad[1, 2, 3, 4]) == pytest.approx(float(difference), rel=0.02)


@pytest.mark.parametrize("bad", [{"ridge": 0.0}, {"iterations": 0}, {"weights": (2.0, 3.0)}, {"choice": "none"}])
def test_settings_out_of_range_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(InvalidWorkspace):
        CompactionSettings(**bad)  # type: ignore[arg-type]


def test_no_budget_and_no_queries_are_refused() -> None:
    problem = make_problem()
    evicted = problem["keys"], problem["values"], problem["bias"]
    with pytest.raises(InvalidWorkspace, match="budget"):
        compact(*evicted, problem["queries"], 0, scaling=SCALING)
    with pytest.raises(InvalidWorkspace, match="queries"):
        compact(*evicted, problem["queries"][..., :0, :], 4, scaling=SCALING)
