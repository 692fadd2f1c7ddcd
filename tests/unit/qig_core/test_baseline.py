"""The context-free baseline against brute force, and the gate's arithmetic."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch

from qig_core.baseline import ContextFreeBaseline, learning_gate, uniform_nats
from qig_core.errors import InvalidInput


def _leave_one_out(actions: list[str], weight: float, alpha: float = 0.5) -> float:
    """Log-likelihood of each action under the counts of all others, by brute force."""
    total = 0.0
    for i, action in enumerate(actions):
        rest = actions[:i] + actions[i + 1 :]
        symbols = Counter(s for a in rest for s in [*a.encode(), 256])
        size = sum(symbols.values()) + alpha * 257
        unigram = math.prod((symbols[s] + alpha) / size for s in [*action.encode(), 256])
        total += math.log(weight * rest.count(action) / len(rest) + (1 - weight) * unigram)
    return total


def test_labels_are_predicted_by_their_frequency():
    actions = ["card_arrival"] * 60 + ["exchange_rate"] * 40
    baseline = ContextFreeBaseline().fit(actions)
    assert baseline.nats("card_arrival") == pytest.approx(-math.log(0.6), abs=0.03)
    assert baseline.nats("exchange_rate") == pytest.approx(-math.log(0.4), abs=0.03)
    assert baseline.nats("never seen") > 20


def test_free_text_is_predicted_by_its_bytes():
    generator = random.Random(0)
    texts = ["".join(generator.choices("abcde", k=12)) for _ in range(200)]
    baseline = ContextFreeBaseline().fit(texts[:100])
    per_symbol = sum(baseline.nats(t) for t in texts[100:]) / (100 * 13)
    assert baseline.weight < 0.02
    # entropy: 12/13 of the symbols are one of five letters, 1/13 is the end
    entropy = -(12 / 13) * math.log(12 / 65) - math.log(1 / 13) / 13
    assert per_symbol == pytest.approx(entropy, abs=0.1)
    assert per_symbol < uniform_nats(texts[0]) / 13 / 2


def test_the_weight_maximises_the_leave_one_out_likelihood():
    actions = ["ab", "ab", "ab", "ba", "ba", "cab", "abc", "bb", "b", "a", "aa", "b"]
    weight = ContextFreeBaseline().fit(actions).weight
    # the fit has one imaginary action of each kind: the penalty log(w) + log(1 - w)
    grid = [i / 1000 for i in range(1, 1000)]
    best = max(grid, key=lambda w: _leave_one_out(actions, w) + math.log(w) + math.log(1 - w))
    assert weight == pytest.approx(best, abs=2e-3)


def test_it_is_a_distribution():
    """Over all strings of a two-letter alphabet the probabilities sum to at most 1, and to nearly 1 when fitted."""
    baseline = ContextFreeBaseline(alpha=1e-6).fit(["a", "b", "ab", "a", "a"])
    strings = ["".join("ab"[(n >> i) & 1] for i in range(length)) for length in range(11) for n in range(2**length)]
    total = sum(math.exp(-baseline.nats(s)) for s in strings)
    assert 0.98 < total <= 1 + 1e-9


def test_incremental_equals_batch_and_survives_a_round_trip():
    actions = ["x", "yy", "x", "", "ß", "x"]
    batch, steps = ContextFreeBaseline().fit(actions), ContextFreeBaseline()
    for action in actions:
        steps.add(action)
        steps.check_invariants()
    restored = ContextFreeBaseline()
    restored.load_state_dict(steps.state_dict())
    for action in [*actions, "other"]:
        assert batch.nats(action) == steps.nats(action) == restored.nats(action)


def test_without_experience_it_is_uniform():
    assert ContextFreeBaseline().nats("abc") == pytest.approx(uniform_nats("abc"))
    assert uniform_nats("abc") == pytest.approx(4 * math.log(257))


def _gate(gain: float, spread: float, items: int = 50):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(items, generator=generator, dtype=torch.float64)
    noise = (noise - noise.mean()) / noise.std()
    base = torch.full((items,), 10.0, dtype=torch.float64)
    return learning_gate(base - gain - spread * noise, base, torch.full((items,), 5))


def test_gate_passes_a_clear_gain_and_reports_it_per_byte():
    result = _gate(1.0, 1.0)
    assert result.ok
    assert result.mean_gain_per_byte == pytest.approx(0.2)
    assert result.standard_error == pytest.approx(1 / math.sqrt(50))


def test_gate_refuses_gains_within_two_standard_errors_or_two_percent():
    assert not _gate(0.27, 1.0).ok  # 2 SE = 0.283
    assert _gate(0.30, 1.0).ok
    assert not _gate(0.19, 0.01).ok  # 2 % of 10 nats
    assert _gate(0.21, 0.01).ok
    assert not _gate(-1.0, 0.1).ok


def test_gate_needs_twenty_finite_items():
    assert not _gate(5.0, 0.1, items=19).ok
    assert "needs 20" in _gate(5.0, 0.1, items=19).reason
    assert not learning_gate([math.nan] * 30, [1.0] * 30, [1] * 30).ok
    with pytest.raises(InvalidInput):
        learning_gate([1.0] * 30, [1.0] * 29, [1] * 30)
