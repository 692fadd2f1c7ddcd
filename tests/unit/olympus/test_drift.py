"""Drift: rises are noticed, falls and noise are not, and a restart changes nothing."""

from __future__ import annotations

import json
import random
import subprocess
import sys

from olympus.drift import MEMORY, DriftDetector


def losses(count: int, mean: float, seed: int) -> list[float]:
    drawer = random.Random(seed)
    return [abs(drawer.gauss(mean, mean / 2)) for _ in range(count)]


def test_a_rise_is_noticed_within_a_hundred() -> None:
    detector = DriftDetector()
    detector.begin(losses(64, 0.2, seed=0))
    for loss in losses(200, 0.2, seed=1):
        assert detector.add(loss, step=7) is None
        detector.check_invariants()
    noticed = None
    for loss in losses(60, 1.0, seed=2):
        noticed = detector.add(loss, step=7)
        detector.check_invariants()
        if noticed is not None:
            break
    assert noticed is not None
    assert noticed.step == 7
    assert noticed.before < 0.3 < noticed.after
    assert "0." in noticed.reason
    assert detector.detections == 1
    assert detector.last == noticed


def test_noise_is_no_drift() -> None:
    alarms = 0
    for seed in range(10):
        detector = DriftDetector()
        for loss in losses(1500, 0.4, seed):
            alarms += detector.add(loss, 0) is not None
        detector.check_invariants()
        assert len(detector) <= MEMORY
    assert alarms == 0


def test_learning_is_no_drift_but_the_old_losses_are_forgotten() -> None:
    detector = DriftDetector()
    for number in range(400):
        assert detector.add(3.0 / (1 + number / 40), 0) is None
    assert detector.mean is not None
    assert detector.mean < 1.5


def test_a_loss_that_is_no_number_counts_as_the_worst() -> None:
    detector = DriftDetector()
    detector.begin(losses(64, 0.2, seed=0))
    assert any(detector.add(float("nan"), 0) is not None for _ in range(60))
    detector.check_invariants()


def test_a_restored_detector_notices_the_same() -> None:
    stream = losses(150, 0.2, seed=3) + losses(80, 0.9, seed=4) + losses(700, 0.3, seed=5)
    live = DriftDetector()
    resumed = DriftDetector()
    for number, loss in enumerate(stream):
        expected = live.add(loss, number)
        if number % 37 == 0:
            saved = json.loads(json.dumps(resumed.state_dict(), allow_nan=False))
            resumed = DriftDetector()
            resumed.load_state_dict(saved)
        assert resumed.add(loss, number) == expected
    assert resumed.state_dict() == live.state_dict()
    assert live.detections >= 1


def test_importing_the_module_does_not_import_river() -> None:
    code = "import sys, olympus.drift; sys.exit('river' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
