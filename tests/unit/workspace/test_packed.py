"""Attention of one token: every way of computing it gives the same, and tells the same log-sum-exp."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.architectures import hooked_model, segments
from workspace import packed as module
from workspace.context import Context
from workspace.forward import Forward, Row
from workspace.packed import packed, packed_attention, packed_lse

SCALING = 0.3


def example(tokens: int, queries: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Query [1, 2, G, 16], keys and values [1, 2, N, 16]: views of a buffer that has room behind them."""
    torch.manual_seed(tokens + queries)
    query = torch.randn(1, 2, queries, 16)
    keys, values = (torch.randn(1, 2, tokens + 100, 16)[:, :, :tokens] for _ in range(2))
    return tuple(x.to(dtype) for x in (query, keys, values))


def wanted(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scores = query.double() @ key.double().transpose(2, 3) * SCALING
    return torch.softmax(scores, -1) @ value.double(), torch.logsumexp(scores, -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [1, 3, 16, 17])
@pytest.mark.parametrize("tokens", [1, 639, 640, 900])
@torch.inference_mode()
def test_both_ways_give_the_same(tokens: int, queries: int, dtype: torch.dtype) -> None:
    query, key, value = example(tokens, queries, dtype)
    output, lse = packed_lse(query, key, value, SCALING)
    right, right_lse = wanted(query, key, value)
    bound = 1e-5 if dtype == torch.float32 else 0.02
    assert output.dtype == dtype
    assert output.shape == (1, 2, queries, 16)
    assert (output.double() - right).norm() <= bound * right.norm()
    torch.testing.assert_close(lse.double(), right_lse, atol=3 * bound, rtol=0)
    assert torch.equal(packed(query, key, value, SCALING), output), "the same to the bit, with and without it"
    stock, weights = packed_attention(None, query.reshape(1, 2 * queries, 1, 16), key, value, None, scaling=SCALING)
    assert weights is None
    assert torch.equal(stock, output.reshape(1, 1, 2 * queries, 16))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("compiled", [False, True])
@torch.inference_mode()
def test_a_long_row_is_to_the_bit_what_it_is_beside_virtual_tokens_without_weight(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    scores = module._scores
    monkeypatch.setattr(module, "_scores", lambda *args: calls.append(1) or scores(*args))
    hooked = hooked_model("llama", "sdpa", torch.bfloat16)
    backend: Any = {"backend": "eager"}
    forward = Forward(hooked.loaded, backend if compiled else None)
    assert forward.rows_agree()
    unseen = Context(segments(hooked, bias=torch.full((1, 2, 5), -1e4)))
    seen = Context(segments(hooked, bias=torch.full((1, 2, 5), 8.0)))
    found = []
    for context in (None, unseen, seen):
        cache = forward.new_cache()
        forward([number % 90 for number in range(700)], cache, 0, {})
        found.append(forward.together([Row(5, 700, cache, context)])[0].clone())
    assert len(calls) == 3 * 4, "every layer of every pass"
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
