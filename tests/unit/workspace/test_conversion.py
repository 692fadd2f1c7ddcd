"""The conversion on a tiny GGUF file written here: the same logits, tokenizer and template come out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from workspace.conversion import convert_gguf

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(name: str) -> str:
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem = name.removesuffix(".weight")
    if stem in whole:
        return f"{whole[stem]}.weight"
    layer, part = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{NAMES[part]}.weight"


def permuted(name: str, value: np.ndarray, config: LlamaConfig) -> np.ndarray:
    """GGUF keeps the rows of q and k in the order of the original, interleaved RoPE."""
    if "q_proj" in name or "k_proj" in name:
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        rows, columns = value.shape
        value = value.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
    return np.ascontiguousarray(value)


def write_gguf(path: Path, model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    config = model.config
    writer = GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = sorted(state["model"]["vocab"], key=state["model"]["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in state["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokenizer.chat_template)
    for name, value in model.state_dict().items():
        writer.add_tensor(gguf_name(name), permuted(name, value.numpy(), config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def original(make_tokenizer: Callable[[], PreTrainedTokenizerFast]) -> tuple[Any, PreTrainedTokenizerFast]:
    torch.manual_seed(3)
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        initializer_range=0.4,
    )
    return LlamaForCausalLM(config).eval(), tokenizer


def test_logits_tokens_template_and_ends_survive(original: tuple[Any, PreTrainedTokenizerFast], tmp_path: Path) -> None:
    model, tokenizer = original
    write_gguf(tmp_path / "tiny.gguf", model, tokenizer)
    target = tmp_path / "converted"
    target.mkdir()
    convert_gguf(tmp_path / "tiny.gguf", target)

    assert {path.name for path in target.iterdir()} >= {"model.safetensors", "config.json", "tokenizer.json"}
    again = AutoModelForCausalLM.from_pretrained(target, use_safetensors=True, local_files_only=True).eval()
    converted = AutoTokenizer.from_pretrained(target, local_files_only=True)
    ids = torch.randint(2, 300, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    assert again.dtype == torch.float32
    assert again.generation_config.eos_token_id == 1
    assert converted.eos_token == "<|im_end|>"
    assert converted.model_max_length == 512
    assert converted.chat_template == tokenizer.chat_template
    text = "The quick brown fox — naïve café"
    assert converted.encode(text) == tokenizer.encode(text, add_special_tokens=False)
    assert converted.decode(converted.encode(text)) == text
    split = converted.backend_tokenizer.pre_tokenizer.pre_tokenize_str("in  42")
    assert [piece.replace("Ġ", " ") for piece, _ in split] == ["in", "  ", "4", "2"]
