"""Tiny random models of the architectures that can be hooked, stock or adopted, and segments that fit them.

All have 4 layers, 4 query heads on 2 key-value heads of 8, and a hidden size of 32. Gemma 3 and gpt-oss alternate
sliding layers (window 8) with full ones; gpt-oss has YaRN, sinks and experts; Qwen 3 and Gemma 3 have q and k norms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from workspace.attention import adopt_attention
from workspace.context import Segment
from workspace.hooking import HookedModel, hookable_layers
from workspace.models import LoadedModel

ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral", "gemma3", "gpt_oss")
#: What each can run; gpt-oss has no fused attention in transformers.
VARIANTS = [(name, base) for name in ARCHITECTURES for base in ("eager", "sdpa") if (name, base) != ("gpt_oss", "sdpa")]
VOCABULARY, HIDDEN, HEADS, WIDTH = 100, 32, 2, 8
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": HEADS,
    "head_dim": WIDTH,
    "max_position_embeddings": 4096,
    "initializer_range": 0.4,  # spread-out logits: an error shows
}
_WINDOW = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}


def stock_model(name: str, base: str = "eager", dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """The model as transformers runs it; the same ``name`` has the same weights every time."""
    torch.manual_seed(7)
    common = {**_COMMON, "attn_implementation": base, **config}
    if name == "llama":
        model: Any = LlamaForCausalLM(LlamaConfig(**common))
    elif name == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**common))
    elif name == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**common))
    elif name == "mistral":
        model = MistralForCausalLM(MistralConfig(**{"sliding_window": None, **common}))
    elif name == "gemma3":
        model = Gemma3ForCausalLM(Gemma3TextConfig(**{**_WINDOW, **common}))
    else:
        experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"}
        model = GptOssForCausalLM(GptOssConfig(**{**_WINDOW, **experts, **common}))
    model.eval().requires_grad_(False)
    for parameter in model.parameters():  # not model.to(): that would round the frequencies of RoPE
        parameter.data = parameter.data.to(dtype)
    return model


def hooked_model(
    name: str,
    base: str = "eager",
    dtype: torch.dtype = torch.float32,
    *,
    layers: Sequence[int] | None = None,
    **config: Any,
) -> HookedModel:
    """The same weights, adopted and hooked on ``layers``; None hooks every layer that can be."""
    model = stock_model(name, base, dtype, **config)
    assert adopt_attention(model)
    hooked = HookedModel(loaded(model), layers or hookable_layers(model.config))
    hooked.check_invariants()
    return hooked


def loaded(model: Any) -> LoadedModel:
    """``model`` without a tokenizer."""
    return LoadedModel("tiny", model, None, frozenset({1}), 4096, model.dtype, torch.device("cpu"), "0" * 32)


def segment(tokens: int = 5, *, seed: int = 0, rows: int = 1, birth: torch.Tensor | int = 0, **fields: Any) -> Segment:
    """Random virtual tokens with a bias for each head; ``fields`` replace any of them."""
    random = torch.Generator().manual_seed(seed)
    made = {
        "keys": torch.randn(rows, HEADS, tokens, WIDTH, generator=random),
        "values": torch.randn(rows, HEADS, tokens, WIDTH, generator=random),
        "bias": torch.randn(rows, HEADS, tokens, generator=random),
        "birth": birth if isinstance(birth, torch.Tensor) else torch.full((rows, tokens), birth),
        "distance": 3,
    }
    return Segment(**{**made, **fields})


def segments(hooked: HookedModel, tokens: int = 5, **fields: Any) -> dict[int, Segment]:
    """A different segment for each hooked layer."""
    return {layer: segment(tokens, seed=layer, **fields) for layer in hooked.layers}


def padded_batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, attention mask and positions of three rows of 13, 9 and 12 tokens with padding on the left."""
    ids = torch.randint(0, VOCABULARY, (3, 13), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :4] = mask[2, :1] = 0
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)
