"""The rules of rest, as pure functions."""

from __future__ import annotations

from olympus.resting import verdict
from qig_core.regime import Convergence, Learned, PhiWindow, convergence

PATIENCE = 40


def _judged(values: list[float], loss_ok: bool | None = True, unimproved: int = 40) -> Convergence:
    window = PhiWindow()
    for value in values:
        window.add(value)
    return convergence(window, learned=Learned(loss_ok, unimproved=unimproved, plateau=10))


def test_converged_needs_no_patience():
    rest = verdict(_judged([0.8] * 100, unimproved=10), 10, PATIENCE)
    assert rest is not None
    assert rest.state == "converged"


def test_settled_after_patience_with_what_is_missing():
    assert verdict(_judged([0.3] * 100), 39, PATIENCE) is None
    rest = verdict(_judged([0.3] * 100), 40, PATIENCE)
    assert rest is not None
    assert rest.state == "settled"
    assert "Phi 0.300 now" in rest.reason


def test_a_kernel_that_lacks_only_measurements_goes_on():
    assert verdict(_judged([0.8] * 52), 40, PATIENCE) is None
    low, untaught = (
        verdict(_judged([0.3] * 52), 40, PATIENCE),
        verdict(_judged([0.8] * 52, loss_ok=False), 40, PATIENCE),
    )
    assert low is not None
    assert untaught is not None
    assert low.state == untaught.state == "settled"


def test_without_any_measurement_a_kernel_settles():
    rest = verdict(_judged([]), 40, PATIENCE)
    assert rest is not None
    assert rest.state == "settled"
