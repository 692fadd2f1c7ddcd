"""Sampling: each definition against an independent computation, and independence from everything global."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workspace.errors import InvalidSampling
from workspace.sampling import Sampler, SamplingParams


def draws(params: SamplingParams, logits: torch.Tensor, count: int, prompt: list[int] | None = None) -> list[int]:
    sampler = Sampler(params, prompt or [])
    return [sampler.choose(logits).token_id for _ in range(count)]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("frequency_penalty", 2.1),
        ("presence_penalty", -2.1),
        ("seed", 1 << 64),
        ("stop", ("",)),
        ("stop", "END"),
        ("top_logprobs", 21),
        ("logit_bias", ((1, 100.5),)),
        ("logit_bias", ((1, math.nan),)),
        ("logit_bias", ((-1, 1.0),)),
        ("logit_bias", ((1, 1.0), (1, 2.0))),
        ("top_logprobs", 3),  # without logprobs
    ],
)
def test_what_is_out_of_range_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(InvalidSampling, match=field) as caught:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert caught.value.param == field


def test_temperature_zero_is_argmax() -> None:
    logits = torch.tensor([0.1, 3.0, 2.9])
    assert draws(SamplingParams(temperature=0), logits, 5) == [1] * 5


def test_biases_are_added_before_the_penalties_and_leave_the_logits_alone() -> None:
    logits = torch.tensor([0.5, 3.0, 2.0, -1.0])
    before = logits.clone()
    params = SamplingParams(
        temperature=0, logit_bias=((1, -2.0), (3, 5.5)), repetition_penalty=2.0, logprobs=True, top_logprobs=1
    )
    sampler = Sampler(params, [2])
    # With biases 0.5, 1, 2, 4.5; then token 2 was said in the prompt, and each chosen token is.
    assert [sampler.choose(logits).token_id for _ in range(3)] == [3, 3, 3]
    chosen = Sampler(params, [2, 3]).choose(logits)
    assert chosen.token_id == 3, "(-1 + 5.5) / 2 is the greatest, -1 * 2 + 5.5 would be, too"
    assert chosen.logprob == pytest.approx(float(torch.log_softmax(before, 0)[3]))
    assert torch.equal(logits, before)
    assert set(draws(SamplingParams(temperature=1.0, seed=3, logit_bias=((1, -100.0),)), logits, 500)) == {0, 2, 3}


def test_a_tiny_temperature_does_not_overflow() -> None:
    assert draws(SamplingParams(temperature=1e-30, seed=1), torch.tensor([500.0, 499.0, -500.0]), 5) == [0] * 5


def test_frequencies_follow_the_softmax_at_the_temperature() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    counts = Counter(draws(SamplingParams(temperature=1.7, seed=11), logits, 20_000))
    wanted = torch.softmax(logits / 1.7, dim=0)
    for token, probability in enumerate(wanted.tolist()):
        assert counts[token] / 20_000 == pytest.approx(probability, abs=0.012)  # 3.4 standard deviations


def test_top_k_keeps_the_k_most_probable() -> None:
    logits = torch.tensor([0.0, 3.0, 1.0, 2.0, -1.0])
    assert set(draws(SamplingParams(top_k=2, seed=3), logits, 400)) == {1, 3}


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert set(draws(SamplingParams(top_p=0.5, seed=3), logits, 400)) == {0}
    assert set(draws(SamplingParams(top_p=0.51, seed=3), logits, 400)) == {0, 1}
    assert set(draws(SamplingParams(top_p=0.9, seed=3), logits, 400)) == {0, 1, 2}


def test_top_p_counts_the_mass_of_what_top_k_left() -> None:
    logits = torch.tensor([0.4, 0.2, 0.2, 0.2]).log()
    # Of the two that top_k keeps the first holds 2/3, so a nucleus of 0.6 is that one alone.
    assert set(draws(SamplingParams(top_k=2, top_p=0.6, seed=3), logits, 300)) == {0}


def test_min_p_is_relative_to_the_most_probable() -> None:
    logits = torch.tensor([0.5, 0.26, 0.24, 1e-9]).log()
    assert set(draws(SamplingParams(min_p=0.5, seed=3), logits, 400)) == {0, 1}


@given(seed=st.integers(0, 2**32), size=st.sampled_from([5, 300, 2000]), top_p=st.floats(0.05, 0.999))
def test_the_short_cut_for_top_p_equals_a_full_sort(seed: int, size: int, top_p: float) -> None:
    logits = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 2
    probabilities = torch.softmax(logits.double(), dim=0)
    values, ids = probabilities.sort(descending=True)
    before = values.cumsum(0) - values
    nucleus = set(ids[before < top_p].tolist())
    assert set(draws(SamplingParams(top_p=top_p, seed=seed), logits, 20)) <= nucleus
    if top_p < 0.5:  # and it is not too small: the least probable member is reachable
        kept = Sampler(SamplingParams(top_p=top_p, seed=0), [])
        seen = {kept.choose(logits).token_id for _ in range(50 * min(len(nucleus), 8))}
        assert len(nucleus) > 8 or seen == nucleus or values[len(nucleus) - 1] < 0.02


def test_frequency_and_presence_count_generated_tokens_only() -> None:
    logits = torch.tensor([1.0, 0.9, 0.0])
    # Presence 0.5: after token 0 once it drops to 0.5, then token 1 (0.9 -> 0.4), then 0 and 1 alternate in value.
    assert draws(SamplingParams(temperature=0, presence_penalty=0.5), logits, 3, prompt=[0, 0]) == [0, 1, 0]
    # Frequency 0.5: 0 (1.0), 1 (0.9), 0 (0.5), 1 (0.4), then token 2 at 0.0 ties with 0 at 0.0 -> first.
    assert draws(SamplingParams(temperature=0, frequency_penalty=0.5), logits, 4, prompt=[0]) == [0, 1, 0, 1]


def test_repetition_penalty_covers_the_prompt_and_treats_signs_apart() -> None:
    logits = torch.tensor([2.0, 1.5, -1.0])
    assert draws(SamplingParams(temperature=0, repetition_penalty=1.5), logits, 1, prompt=[0]) == [1]
    logits = torch.tensor([-1.0, -1.2])
    assert draws(SamplingParams(temperature=0, repetition_penalty=1.5), logits, 1, prompt=[0]) == [1]


def test_logprobs_are_those_of_the_unmodified_model() -> None:
    logits = torch.tensor([2.0, 1.0, 0.5])
    params = SamplingParams(
        temperature=0, repetition_penalty=50, presence_penalty=2, logprobs=True, top_logprobs=2, top_k=1
    )
    chosen = Sampler(params, [0, 1]).choose(logits)
    wanted = torch.log_softmax(logits, dim=0)
    assert chosen.token_id == 2
    assert chosen.logprob == pytest.approx(float(wanted[2]))
    assert [(item.token_id, pytest.approx(item.logprob)) for item in chosen.top_logprobs] == [
        (0, float(wanted[0])),
        (1, float(wanted[1])),
    ]


def test_equal_seeds_give_equal_tokens_whatever_the_global_generator_does() -> None:
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    first = draws(SamplingParams(seed=42), logits, 30)
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    assert draws(SamplingParams(seed=42), logits, 30) == first
    assert torch.equal(torch.random.get_rng_state(), before)
    assert draws(SamplingParams(seed=43), logits, 30) != first


def test_without_a_seed_two_requests_differ() -> None:
    logits = torch.zeros(1000)
    assert draws(SamplingParams(), logits, 20) != draws(SamplingParams(), logits, 20)


@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_no_numbers_are_an_error(temperature: float) -> None:
    with pytest.raises(FloatingPointError):
        Sampler(SamplingParams(temperature=temperature), []).choose(torch.tensor([0.0, math.nan]))


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.full((50,), -math.inf)
    logits[[3, 49]] = 0.0
    assert set(draws(SamplingParams(seed=5), logits, 300)) == {3, 49}
