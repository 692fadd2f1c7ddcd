"""Writes a gpt-oss in the format in which OpenAI publishes it: experts as MXFP4, the rest in bfloat16.

MXFP4 (OCP Microscaling Formats 1.0): blocks of 32 numbers along the input dimension; each number is E2M1 in four bits,
the first of two in a byte in the low half; each block has a power of two as its scale, an exponent with bias 127.
Written from that document, independently of transformers' reader, which is under test.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

BLOCK = 32
BIAS = 127
#: E2M1 without its sign; the code of a negative number is 8 higher.
MAGNITUDES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
NOT_CONVERTED = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]


def pack(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``weight`` [E, in, out] to blocks [E, out, in / 32, 16] of bytes and scales [E, out, in / 32]."""
    grouped = weight.float().transpose(1, 2).unflatten(-1, (-1, BLOCK))  # [E, out, G, 32]
    largest = grouped.abs().amax(dim=-1)
    exponent = torch.where(largest > 0, largest.log2().floor(), 0.0) - 2  # 6 = 1.5 * 2**2 is the largest magnitude
    scaled = grouped / exponent.exp2()[..., None]
    code = (scaled.abs()[..., None] - MAGNITUDES).abs().argmin(dim=-1)  # to the nearest
    code = (code + 8 * (scaled < 0)).to(torch.uint8)
    return code[..., 0::2] | code[..., 1::2] << 4, (exponent + BIAS).to(torch.uint8)


def unpack(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The numbers that ``blocks`` and ``scales`` stand for, [E, in, out] in float32."""
    codes = torch.stack([blocks & 0x0F, blocks >> 4], dim=-1).flatten(-2).long()  # [E, out, G, 32]
    numbers = torch.where(codes >= 8, -1.0, 1.0) * MAGNITUDES[codes % 8]
    return (numbers * (scales.float() - BIAS).exp2()[..., None]).flatten(-2).transpose(1, 2).contiguous()


def save_mxfp4(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """Write ``model`` (a GptOss) into ``folder``; returns the experts' weights as a reader must find them."""
    folder.mkdir(parents=True, exist_ok=True)
    stored: dict[str, torch.Tensor] = {}
    expected: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            blocks, scales = pack(value)
            stored[f"{name}_blocks"], stored[f"{name}_scales"] = blocks.contiguous(), scales.contiguous()
            expected[name] = unpack(blocks, scales)
        else:
            stored[name] = value.to(torch.bfloat16).contiguous()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {"architectures": ["GptOssForCausalLM"], "dtype": "bfloat16"}
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": NOT_CONVERTED}
    (folder / "config.json").write_text(json.dumps(config))
    model.generation_config.save_pretrained(folder)
    return expected
