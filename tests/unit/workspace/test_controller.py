"""Controller: what the signals say, when actions fire and when they must not, and what is learnt."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from workspace.controller import (
    ACTIONS,
    Controller,
    ControllerNet,
    Decision,
    heuristic_drives,
    network_inputs,
    soft_targets,
)
from workspace.signals import MOST_NATS, SignalTracker, token_statistics
from workspace.workspace_config import ControllerConfig

V = 200
SURE = torch.zeros(V).index_fill(0, torch.tensor([7]), 30.0)  # token 7, entropy 0
UNSURE = torch.zeros(V)  # entropy log 200 = 5.3
HALF = torch.zeros(V).index_fill(0, torch.arange(12), 20.0)  # 12 equal tokens, entropy 2.5


def run(controller: Controller, logits: Sequence[Tensor], tokens: Sequence[int] | None = None) -> list[Decision]:
    """Feed distributions; every chosen token is new unless ``tokens`` says otherwise."""
    decisions = []
    for step, values in enumerate(logits):
        decisions.append(controller.step(values, (step % V) if tokens is None else tokens[step]))
        controller.check_invariants()
    return decisions


def fired(decisions: Sequence[Decision], action: str) -> list[int]:
    return [step for step, decision in enumerate(decisions) if getattr(decision, action)]


# Signals.


def test_statistics_of_a_distribution() -> None:
    logits = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.25, 0.25]]).log()
    found = token_statistics(logits, torch.tensor([1, 0]))
    entropy = -(0.7 * math.log(0.7) + 0.2 * math.log(0.2) + 0.1 * math.log(0.1))
    torch.testing.assert_close(found.entropy, torch.tensor([entropy, 1.5 * math.log(2)]))
    torch.testing.assert_close(found.top1, torch.tensor([0.7, 0.5]))
    torch.testing.assert_close(found.margin, torch.tensor([0.5, 0.25]))
    torch.testing.assert_close(found.surprise, torch.tensor([-math.log(0.2), math.log(2)]))


def test_statistics_are_finite_for_masked_tokens_and_ties() -> None:
    logits = torch.full((3, V), -math.inf)
    logits[:, 3] = 1.0
    logits[2, 9] = 1.0
    found = token_statistics(logits.bfloat16(), torch.tensor([3, 4, 9]))
    torch.testing.assert_close(found.entropy, torch.tensor([0.0, 0.0, math.log(2)]), atol=1e-2, rtol=0)
    torch.testing.assert_close(found.surprise, torch.tensor([0.0, MOST_NATS, math.log(2)]), atol=1e-2, rtol=0)
    torch.testing.assert_close(found.margin, torch.tensor([1.0, 1.0, 0.0]), atol=1e-2, rtol=0)


def longest_run(tokens: Sequence[int], longest_cycle: int) -> int:
    """The definition, the slow way: at the end of ``tokens``."""
    best = 0
    for cycle in range(1, longest_cycle + 1):
        count = 0
        while len(tokens) - 1 - count - cycle >= 0 and tokens[-1 - count] == tokens[-1 - count - cycle]:
            count += 1
        best = max(best, count)
    return best


@settings(max_examples=100, deadline=None)
@given(tokens=st.lists(st.integers(0, 2), min_size=1, max_size=60), longest=st.integers(1, 9))
def test_repetition_is_the_longest_run_of_a_cycle(tokens: list[int], longest: int) -> None:
    tracker = SignalTracker(ControllerConfig(longest_cycle=longest))
    for end, token in enumerate(tokens, start=1):
        signals = tracker.take(1.0, 0.5, 0.1, 1.0, token)
        tracker.check_invariants()
        assert signals.repetition == longest_run(tokens[:end], longest)
        assert (signals.cycle > 0) is (signals.repetition > 0)


def test_a_cycle_is_named_by_its_shortest_length() -> None:
    tracker = SignalTracker(ControllerConfig())
    for token in [1, 2, 3] * 20:
        signals = tracker.take(1.0, 0.5, 0.1, 1.0, token)
    assert (signals.repetition, signals.cycle) == (57, 3)


def test_smoothing_begins_with_the_first_token() -> None:
    tracker = SignalTracker(ControllerConfig(smoothing=0.5, trend_smoothing=0.1))
    first = tracker.take(4.0, 0.5, 0.1, 2.0, 1)
    assert (first.smoothed_entropy, first.smoothed_surprise, first.trend) == (4.0, 2.0, 0.0)
    second = tracker.take(6.0, 0.5, 0.1, 4.0, 2)
    assert (second.smoothed_entropy, second.smoothed_surprise) == (5.0, 3.0)
    assert second.trend == pytest.approx(5.0 - 4.2)


def test_numbers_known_already_give_the_same_signals() -> None:
    """Training computes the statistics of a whole text at once."""
    logits = torch.randn(12, V, generator=torch.Generator().manual_seed(0)) * 3
    chosen = torch.arange(12)
    statistics = token_statistics(logits, chosen)
    one, many = SignalTracker(ControllerConfig()), SignalTracker(ControllerConfig())
    for step in range(12):
        direct = one.observe(logits[step], int(chosen[step]))
        numbers = [float(column[step]) for column in statistics]
        known = many.take(numbers[0], numbers[1], numbers[2], numbers[3], step)
        assert direct.smoothed_entropy == pytest.approx(known.smoothed_entropy, rel=1e-5)
        assert direct.smoothed_surprise == pytest.approx(known.smoothed_surprise, rel=1e-5)


# Heuristics.


def test_a_sure_model_is_left_alone() -> None:
    decisions = run(Controller(ControllerConfig()), [SURE] * 60, [7, *range(100, 159)])
    assert not any(decision.broadcast or decision.retrieve or decision.halt for decision in decisions)


def test_uncertainty_broadcasts_and_retrieves_once_until_it_has_passed() -> None:
    config = ControllerConfig()
    decisions = run(Controller(config), [SURE] * 4 + [UNSURE] * 100)
    assert len(fired(decisions, "broadcast")) == 1
    assert len(fired(decisions, "retrieve")) == 1
    again = run(Controller(config), ([SURE] * 30 + [UNSURE] * 30) * 4)
    assert len(fired(again, "broadcast")) == 4


def test_rising_uncertainty_broadcasts_below_the_level() -> None:
    decisions = run(Controller(ControllerConfig()), [SURE] * 20 + [HALF] * 10)
    assert len(fired(decisions, "broadcast")) == 1
    assert max(decision.numbers["smoothed_entropy"] for decision in decisions) < ControllerConfig().broadcast_entropy
    assert not fired(decisions, "retrieve")


def test_surprise_writes() -> None:
    decisions = run(Controller(ControllerConfig()), [SURE] * 40, [7] * 20 + [8 + step for step in range(20)])
    assert fired(decisions, "write") == [20]


def test_only_degenerate_repetition_halts() -> None:
    config = ControllerConfig()
    loop = run(Controller(config), [SURE] * 200, [5, 6, 7, 8] * 50)
    assert fired(loop, "halt") == [config.halt_run + 4 - 1]
    # A passage of 30 tokens that is repeated three times is a refrain, not a loop: 4 full repeats are needed.
    song = run(Controller(config), [SURE] * 120, list(range(30)) * 4)
    assert not fired(song, "halt")
    assert fired(run(Controller(config), [SURE] * 151, list(range(30)) * 5 + [0]), "halt") == [149]
    off = run(Controller(ControllerConfig(halt_on_repetition=False)), [SURE] * 200, [5] * 200)
    assert not fired(off, "halt")


@settings(max_examples=60, deadline=None)
@given(
    levels=st.lists(st.sampled_from([SURE, HALF, UNSURE]), min_size=1, max_size=150),
    gaps=st.tuples(st.integers(2, 9), st.integers(2, 9), st.integers(2, 9)),
    smoothing=st.sampled_from([0.1, 0.6, 1.0]),
)
def test_no_action_fires_before_its_gap_has_passed(
    levels: list[Tensor], gaps: tuple[int, int, int], smoothing: float
) -> None:
    config = ControllerConfig(
        broadcast_gap=gaps[0], retrieve_gap=gaps[1], write_gap=gaps[2], smoothing=smoothing, release=0.99
    )
    decisions = run(Controller(config), levels)
    for action, gap in zip(ACTIONS, gaps, strict=False):
        steps = fired(decisions, action)
        assert all(later - earlier >= gap for earlier, later in itertools.pairwise(steps)), action


def test_equal_inputs_give_equal_decisions() -> None:
    logits = torch.randn(80, V, generator=torch.Generator().manual_seed(1)) * 2
    first, second = (run(Controller(ControllerConfig()), list(logits)) for _ in range(2))
    assert first == second
    assert any(decision.acts for decision in first)


def test_numbers_are_finite_and_fit_json() -> None:
    broken = torch.full((V,), math.nan)
    masked = torch.full((V,), -math.inf).index_fill(0, torch.tensor([3]), 0.0)
    decisions = run(Controller(ControllerConfig()), [UNSURE, broken, masked, SURE])
    for decision in decisions:
        restored = json.loads(json.dumps(decision.numbers, allow_nan=False))
        assert restored == decision.numbers
        assert {f"{action}_drive" for action in ACTIONS} <= restored.keys()
    assert decisions[0].numbers["entropy"] == pytest.approx(math.log(V))


def test_the_numbers_explain_the_decision() -> None:
    for decision in run(Controller(ControllerConfig()), [SURE] * 5 + [UNSURE] * 20):
        for action in ACTIONS:
            assert not getattr(decision, action) or decision.numbers[f"{action}_drive"] >= 1


# The network.


def test_an_untrained_network_does_not_act() -> None:
    torch.manual_seed(0)
    net = ControllerNet(16)
    logits = net(torch.randn(50, 6) * 3, torch.randn(50, 4, 16))
    assert logits.shape == (50, 4)
    assert (logits.sigmoid() < 0.25).all()


def test_every_parameter_of_the_network_is_trained() -> None:
    torch.manual_seed(0)
    net = ControllerNet(16)
    targets = torch.rand(8, 4)
    torch.nn.functional.binary_cross_entropy_with_logits(
        net(torch.randn(8, 6), torch.randn(8, 4, 16)), targets
    ).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_the_network_learns_from_its_heuristic_teacher() -> None:
    torch.manual_seed(2)
    config = ControllerConfig()
    tracker, rows, targets = SignalTracker(config), [], []
    for step in range(400):
        scale = float(torch.rand(()) * 6)
        signals = tracker.observe(torch.randn(V) * scale, step % V)
        rows.append(network_inputs(signals, step % 40))
        targets.append(soft_targets(heuristic_drives(signals, config)))
    inputs, wanted, slots = torch.tensor(rows), torch.tensor(targets), torch.zeros(400, 4, 16)
    net = ControllerNet(16)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    losses = []
    for _ in range(150):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(net(inputs, slots), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def forced(outputs: Sequence[float]) -> ControllerNet:
    """A network that always says the same."""
    net = ControllerNet(16)
    with torch.no_grad():
        net.layers[-1].weight.zero_()
        net.layers[-1].bias.copy_(torch.tensor(outputs))
    return net


def test_a_trained_network_decides_within_the_same_gaps() -> None:
    eager = Controller(ControllerConfig(), forced([9.0, -9.0, 9.0, 9.0]))
    slots = torch.zeros(1, 4, 16)
    decisions = [eager.step(SURE, step, slots) for step in range(40)]
    assert fired(decisions, "broadcast") == [0]  # its drive never falls, so it never fires again
    assert fired(decisions, "write") == [0]
    assert not fired(decisions, "retrieve")
    assert not fired(decisions, "halt"), "halting is left to repetition unless learned_halt allows it"
    assert all(decision.numbers["learned"] == 1 for decision in decisions)
    allowed = Controller(ControllerConfig(learned_halt=True), forced([-9.0, -9.0, -9.0, 9.0]))
    assert allowed.step(SURE, 0, slots).halt


def test_without_slots_a_trained_controller_uses_its_heuristics() -> None:
    controller = Controller(ControllerConfig(), forced([9.0, 9.0, 9.0, 9.0]))
    decision = controller.step(SURE, 7)
    assert not decision.acts
    assert decision.numbers["learned"] == 0


def test_soft_targets_are_half_at_the_threshold() -> None:
    low, middle, high = soft_targets([-1e6, 1.0, 1e6])
    assert (round(low, 6), middle, round(high, 6)) == (0.0, 0.5, 1.0)
