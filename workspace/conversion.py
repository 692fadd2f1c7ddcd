"""GGUF to safetensors, once: dequantised float32 weights, tokenizer.json, chat template and configurations.

Weights are kept in float32, which represents every dequantised value exactly; the dtype to compute in is chosen when
the result is loaded. The work is done by transformers' own GGUF reader; what it leaves out is completed here (the
digit splitting of SmolLM2's tokenizer, the tokenizer's context length). GGUF is only an input format: nothing here
runs a model from it, and neither downloads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

#: Raise it when the conversion's result changes: caches are keyed by it, so that old ones are made again.
CONVERSION_VERSION = 1


def convert_gguf(gguf: Path, target: Path) -> None:
    """Write a ``from_pretrained`` directory for ``gguf`` into the existing directory ``target``.

    ``dequantize=True`` keeps transformers from replacing linears by packed ones (neither trainable nor saveable) and
    from asking the hub for kernels; ``local_files_only`` keeps it off the network altogether.
    """
    where: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True, "trust_remote_code": False}
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        dtype=torch.float32,
        attn_implementation="eager",
        quantization_config=GgufConfig(dequantize=True),
        **where,
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **where)
    tokenizer.model_max_length = model.config.max_position_embeddings
    _restore_pre_tokenizer(tokenizer, gguf)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _restore_pre_tokenizer(tokenizer: Any, gguf: Path) -> None:
    """Split digits one by one where the GGUF file says so.

    llama.cpp's pre-tokenizer "smollm" isolates each digit before GPT-2's pattern applies, as SmolLM2 was trained;
    transformers 5.23 converts every "gpt2" vocabulary without it, which changes the tokens of "in  2024".
    """
    field = GGUFReader(gguf).get_field("tokenizer.ggml.pre")
    if field is not None and field.contents() == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
