"""A tiny random gpt-oss, and a way to make it say what a test wants.

Everything is real but the size: architecture, vocabulary size, sinks, YaRN, sliding windows, experts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, GptOssConfig, GptOssForCausalLM

from tests.support.harmony import CALL, RETURN

VOCABULARY = 201_088
END_OF_TEXT = 199_999


def build_gpt_oss(*, vocabulary: int = VOCABULARY, hidden: int = 64, **changes: Any) -> GptOssForCausalLM:
    """Two layers (one sliding, one full), four experts. The same weights for the same arguments."""
    torch.manual_seed(7)
    config = GptOssConfig(
        **{
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "intermediate_size": hidden,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
            "max_position_embeddings": 4096,
            "eos_token_id": RETURN,
            "pad_token_id": END_OF_TEXT,
            "attn_implementation": "eager",
            **changes,
        }
    )
    model = GptOssForCausalLM(config)
    if vocabulary == VOCABULARY:  # as openai/gpt-oss-20b has it
        model.generation_config = GenerationConfig(eos_token_id=[RETURN, END_OF_TEXT, CALL], pad_token_id=END_OF_TEXT)
    return model


@contextlib.contextmanager
def scripted(model: Any, *answers: Sequence[int]) -> Iterator[None]:
    """While this lasts, the next generations say ``answers``, one after the other and each to its end.

    One generation at a time, prompts of one prefill chunk.
    """
    tokens = [token for answer in answers for token in answer]
    places = iter(range(len(tokens)))

    def force(_module: Any, _inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        place = next(places, None)
        if place is not None:
            logits = torch.full_like(logits, -1e4)
            logits[..., tokens[place]] = 1e4
        return logits

    handle = model.lm_head.register_forward_hook(force)
    try:
        yield
    finally:
        handle.remove()
