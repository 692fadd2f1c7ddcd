"""Content space and back, with the model's own rotary modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    Cohere2Config,
    DynamicCache,
    LlamaConfig,
    StableLmConfig,
)
from transformers.models.cohere2.modeling_cohere2 import Cohere2RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.stablelm.modeling_stablelm import StableLmRotaryEmbedding

from tests.support.architectures import ARCHITECTURES, hooked_model
from workspace.errors import UnsupportedModel
from workspace.rope import RopeHandle

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_cached_keys_come_back_to_one_content_wherever_they_stood(name: str) -> None:
    """The same token alone at two positions: its cached keys differ, their contents do not."""
    hooked = hooked_model(name)
    contents, cached = [], []
    for position in (0, 700):
        cache, at = DynamicCache(config=hooked.loaded.model.config), torch.tensor([[position]])
        with torch.inference_mode():
            hooked.loaded.model(torch.tensor([[7]]), position_ids=at, past_key_values=cache)
        keys = [cache.layers[layer].keys for layer in range(4)]
        contents.append([hooked.rope.derotate(keys[layer], at, layer) for layer in range(4)])
        cached.append(keys)
        for layer in range(4):
            torch.testing.assert_close(hooked.rope.rotate(contents[-1][layer], at, layer), keys[layer])
    for layer in range(4):
        torch.testing.assert_close(contents[0][layer], contents[1][layer], atol=2e-4, rtol=1e-3)
        assert not torch.allclose(cached[0][layer], cached[1][layer], atol=1e-2)


def test_half_precision_comes_back_to_what_it_was() -> None:
    rope = hooked_model("gpt_oss", dtype=torch.bfloat16).rope
    content = torch.randn(2, 2, 5, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    positions = torch.tensor([[0, 3, 90, 4000, 100000]])
    back = rope.derotate(rope.rotate(content, positions, 1), positions, 1)
    # Two roundings to 8 bits, and none from cosine and sine.
    torch.testing.assert_close(back, content, atol=0.02, rtol=0.01)


def test_yarn_scales_queries_and_keys() -> None:
    hooked = hooked_model("gpt_oss")
    assert hooked.rope.attention_scaling(1) == pytest.approx(1.34657, abs=1e-4)
    content = torch.randn(1, 2, 3, 8)
    rotated = hooked.rope.rotate(content, torch.arange(3)[None], 1)
    torch.testing.assert_close(rotated.norm(dim=-1), 1.34657 * content.norm(dim=-1), atol=1e-4, rtol=1e-4)
    turned = hooked.rope.of(1).shift(content, 5)
    torch.testing.assert_close(turned.norm(dim=-1), content.norm(dim=-1))


def test_each_type_of_layer_has_its_own_frequencies() -> None:
    rope = hooked_model("gemma3").rope
    assert rope.of(0) is rope.of(2)
    assert rope.of(1) is rope.of(3)
    content, at = torch.randn(1, 2, 1, 8), torch.tensor([[50]])
    assert not torch.allclose(rope.rotate(content, at, 0), rope.rotate(content, at, 1), atol=0.01)


def test_shifts_compose_and_take_one_offset_or_one_for_each_token() -> None:
    rope = hooked_model("llama").rope.of(0)
    content = torch.randn(1, 2, 4, 8, dtype=torch.float64)
    torch.testing.assert_close(rope.shift(rope.shift(content, 9), -9), content)
    torch.testing.assert_close(rope.shift(rope.shift(content, 2), 5), rope.shift(content, 7))
    each = rope.shift(content, torch.tensor([0, 1, 2, 3]))
    assert torch.equal(each[:, :, :1], content[:, :, :1])
    torch.testing.assert_close(each[:, :, 3:], rope.shift(content[:, :, 3:], 3))
    at = torch.tensor([[11]])
    torch.testing.assert_close(rope.rotate(content[:, :, :1].float(), at), rope.shift(content[:, :, :1].float(), 11))


def test_dimensions_that_are_not_rotated_stay() -> None:
    config = StableLmConfig(
        hidden_size=32,
        num_attention_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
    )
    handle = RopeHandle(StableLmRotaryEmbedding(config), ("full_attention",), 16)
    content, at = torch.randn(1, 2, 3, 16), torch.tensor([[1, 2, 3]])
    rotated = handle.rotate(content, at, 0)
    assert handle.of(0).width == 4
    assert torch.equal(rotated[..., 4:], content[..., 4:])
    assert not torch.allclose(rotated[..., :4], content[..., :4], atol=0.1)
    torch.testing.assert_close(handle.derotate(rotated, at, 0), content)
    torch.testing.assert_close(handle.of(0).shift(content, 3)[:, :, :1], handle.rotate(content, at + 2, 0)[:, :, :1])


@pytest.mark.parametrize("parameters", [{"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}])
def test_frequencies_that_change_with_the_length_are_refused(parameters: dict[str, Any]) -> None:
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, rope_parameters=parameters)
    with pytest.raises(UnsupportedModel, match="'dynamic', whose frequencies change"):
        RopeHandle(LlamaRotaryEmbedding(config), ("full_attention",), 8)


def test_interleaved_pairs_are_refused() -> None:
    config = Cohere2Config(hidden_size=32, num_attention_heads=4)
    with pytest.raises(UnsupportedModel, match="does not rotate dimension i with i \\+ 4"):
        RopeHandle(Cohere2RotaryEmbedding(config), ("full_attention",), 8)


def test_static_scalings_are_accepted() -> None:
    for parameters in (YARN, {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}):
        config = LlamaConfig(hidden_size=32, num_attention_heads=4, rope_parameters=parameters)
        handle = RopeHandle(LlamaRotaryEmbedding(config), ("full_attention",), 8)
        content, at = torch.randn(1, 2, 3, 8), torch.tensor([[1, 60, 500]])
        torch.testing.assert_close(handle.derotate(handle.rotate(content, at, 0), at, 0), content, atol=1e-5, rtol=1e-4)
