"""Nothing carried, nothing changed: the same bits as stock for every architecture, base implementation and dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

from tests.support.architectures import (
    HIDDEN,
    VARIANTS,
    hooked_model,
    padded_batch,
    segments,
    stock_model,
)
from workspace.attention import NAMES, adopt_attention
from workspace.context import Context, Delta, Recorder
from workspace.hooking import HookedModel

CASES = [(name, base, dtype) for name, base in VARIANTS for dtype in (torch.float32, torch.bfloat16)]


def passes(model: Any, **kwargs: Any) -> list[torch.Tensor]:
    """Logits of a padded batch: its prefill and four decoding steps, the windows of sliding layers passed."""
    ids, mask, positions = padded_batch()
    cache = DynamicCache(config=model.config)
    found = []
    with torch.inference_mode():
        for _ in range(5):
            logits = model(
                ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, **kwargs
            ).logits
            found.append(logits)
            ids = logits[:, -1:].argmax(-1)
            mask = torch.cat((mask, torch.ones(3, 1, dtype=mask.dtype)), dim=1)
            positions = positions[:, -1:] + 1
    return found


def carriers(hooked: HookedModel) -> dict[str, Callable[[], dict[str, Any]]]:
    """Ways to carry nothing."""
    somewhere = Delta(torch.randn(1, HIDDEN), torch.tensor([10**6]))
    nobody = torch.zeros(3, 5, dtype=torch.bool)
    return {
        "no keyword": dict,
        "None": lambda: {"workspace": None},
        "empty": lambda: {"workspace": Context()},
        "a recorder": lambda: {"workspace": Context(recorder=Recorder(hooked.layers, queries=True, mass=True))},
        "unborn": lambda: {"workspace": Context(segments(hooked, birth=10**6))},
        "masked": lambda: {"workspace": Context(segments(hooked, mask=nobody))},
        "delta to come": lambda: {"workspace": Context(deltas=dict.fromkeys(hooked.layers, somewhere))},
    }


@pytest.mark.parametrize(("name", "base", "dtype"), CASES)
def test_a_pass_that_carries_nothing_is_the_stock_pass(name: str, base: str, dtype: torch.dtype) -> None:
    expected = passes(stock_model(name, base, dtype))
    assert all(logits.isfinite().all() for logits in expected)
    hooked = hooked_model(name, base, dtype)
    model = hooked.loaded.model
    assert model.config._attn_implementation == NAMES[base]  # type: ignore[index]
    for what, kwargs in carriers(hooked).items():
        for step, (ours, stock) in enumerate(zip(passes(model, **kwargs()), expected, strict=True)):
            assert ours.dtype == dtype
            assert torch.equal(ours, stock), (what, step)
    # What is compared above can differ: the same segments, visible, change every pass.
    for ours, stock in zip(passes(model, workspace=Context(segments(hooked))), expected, strict=True):
        assert (ours - stock).abs().max() > 0.1
    hooked.remove()
    assert all(map(torch.equal, passes(model), expected))


@pytest.mark.parametrize(("name", "base"), VARIANTS)
def test_positions_before_a_birth_keep_their_bits(name: str, base: str) -> None:
    hooked = hooked_model(name, base)
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        stock = hooked.loaded.model(ids).logits
        ours = hooked.loaded.model(ids, workspace=Context(segments(hooked, birth=12))).logits
    assert torch.equal(ours[:, :12], stock[:, :12])
    assert ((ours - stock)[:, 12:].abs().amax(-1) > 1e-3).all()


def test_rows_without_virtual_tokens_keep_their_bits() -> None:
    hooked = hooked_model("gpt_oss")
    ids, mask, positions = padded_batch()
    seen = torch.tensor([True, False, True])[:, None].expand(3, 5)
    with torch.inference_mode():
        arguments = {"attention_mask": mask, "position_ids": positions}
        stock = hooked.loaded.model(ids, **arguments).logits
        ours = hooked.loaded.model(ids, **arguments, workspace=Context(segments(hooked, mask=seen))).logits
    assert torch.equal(ours[1], stock[1])
    assert not torch.allclose(ours[0], stock[0], atol=0.1)


@pytest.mark.parametrize("base", ["eager", "sdpa"])
def test_generate_of_transformers_still_works_and_says_the_same(base: str) -> None:
    stock, ours = stock_model("llama", base), hooked_model("llama", base).loaded.model
    ids, mask, _ = padded_batch()
    settings = {"attention_mask": mask, "max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(stock.generate(ids, **settings), ours.generate(ids, **settings))


def test_the_names_trigger_none_of_transformers_checks_and_have_masks() -> None:
    for name in NAMES.values():
        assert not any(word in name for word in ("sdpa", "flash", "flex", "paged"))
        assert name in AttentionInterface().valid_keys()
        assert name in AttentionMaskInterface().valid_keys()


def test_adopting_twice_changes_nothing_and_other_implementations_are_left_alone() -> None:
    model = stock_model("llama", "sdpa")
    assert adopt_attention(model)
    assert adopt_attention(model)
    assert model.config._attn_implementation == "workspace_fused"
    model.set_attn_implementation("flex_attention")
    assert not adopt_attention(model)
    assert model.config._attn_implementation == "flex_attention"
