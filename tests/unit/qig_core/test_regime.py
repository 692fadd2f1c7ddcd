"""Regimes, the window of measured Phi, and the convergence conditions with their reasons."""

from __future__ import annotations

import math

import pytest

from qig_core.errors import InvalidInput
from qig_core.regime import Learned, PhiWindow, convergence, regime


def _window(values: list[float], size: int = 100) -> PhiWindow:
    window = PhiWindow(size)
    for value in values:
        window.add(value)
        window.check_invariants()
    return window


@pytest.mark.parametrize(
    ("phi", "loss_ok", "diverging", "expected"),
    [
        (0.44, True, False, "linear"),
        (0.45, False, False, "geometric"),
        (0.79, None, False, "geometric"),
        (0.80, False, False, "breakdown"),
        (0.80, None, False, "breakdown"),
        (0.80, True, False, "geometric"),
        (0.10, True, True, "breakdown"),
        (None, True, False, "linear"),
        (None, None, True, "breakdown"),
    ],
)
def test_regime_table(phi: float | None, loss_ok: bool | None, diverging: bool, expected: str):
    assert regime(phi, loss_ok, diverging) == expected


def test_a_kernel_that_still_improves_is_not_in_breakdown():
    assert regime(0.9, False, False, improving=True) == "geometric"
    assert regime(0.9, False, True, improving=True) == "breakdown"


def test_window_keeps_the_newest_and_uses_the_population_deviation():
    window = _window([0.0, 0.2, 0.4, 0.6], size=3)
    assert len(window) == 3
    assert window.last == 0.6
    assert window.mean() == pytest.approx(0.4)
    assert window.std() == pytest.approx(math.sqrt(0.08 / 3))


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.01, 1.01])
def test_window_refuses_what_is_not_a_phi(value: float):
    with pytest.raises(InvalidInput):
        PhiWindow().add(value)


def test_window_round_trip():
    window = _window([0.1, 0.9, 0.5])
    other = PhiWindow()
    other.load_state_dict(window.state_dict())
    assert other.state_dict() == window.state_dict()
    with pytest.raises(InvalidInput):
        PhiWindow(5).load_state_dict(window.state_dict())


def test_convergence_needs_every_condition():
    good = _window([0.75] * 100)
    assert convergence(good, learned=Learned(True)).converged
    assert convergence(good, learned=Learned(True)).reason == "all conditions hold"
    assert not convergence(good, learned=Learned(False)).converged
    assert not convergence(good, learned=Learned(None)).converged
    assert "baseline" in convergence(good, learned=Learned(False)).reason
    assert convergence(good, learned=Learned(False), gate=False).converged


def test_ninety_nine_values_have_not_converged():
    verdict = convergence(_window([0.75] * 99), learned=Learned(True))
    assert not verdict.converged
    assert verdict.steps_in_window == 99
    assert "99 of 100" in verdict.reason


def test_low_and_unstable_phi_have_not_converged():
    low = convergence(_window([0.7] * 100), learned=Learned(True))
    assert (low.phi_ok, low.stable_ok, low.converged) == (False, True, False)
    unstable = convergence(_window([0.72, 0.98] * 50), learned=Learned(True))
    assert (unstable.phi_ok, unstable.stable_ok, unstable.converged) == (True, False, False)
    assert "std(Phi) 0.130" in unstable.reason


def test_a_loss_that_still_falls_has_not_converged():
    good = _window([0.75] * 100)
    falling = convergence(good, learned=Learned(True, 0.2, 0.5, "", unimproved=3, plateau=10))
    assert (falling.plateau_ok, falling.converged) == (False, False)
    assert "in 3 examinations, needs 10" in falling.reason
    assert convergence(good, learned=Learned(True, unimproved=10, plateau=10)).converged


def test_each_condition_is_listed_with_its_number():
    verdict = convergence(_window([0.75] * 100), learned=Learned(True, 0.2, 0.5, "", 12, 10))
    listed = {item.name: (item.ok, item.value, item.threshold) for item in verdict.conditions}
    assert listed["window"] == (True, 100, 100)
    assert listed["phi"] == (True, pytest.approx(0.75), 0.7)
    assert listed["stable"] == (True, pytest.approx(0.0), 0.05)
    assert listed["learned"] == (True, 0.2, 0.5)
    assert listed["plateau"] == (True, 12, 10)
    assert all(item.reason for item in verdict.conditions)
    assert [item.name for item in convergence(PhiWindow(), gate=False).conditions] == ["window", "phi", "stable"]


def test_an_empty_window_says_so():
    verdict = convergence(PhiWindow(), learned=Learned(True))
    assert verdict.phi_now is verdict.phi_mean is verdict.phi_std is None
    assert "not measured" in verdict.reason
