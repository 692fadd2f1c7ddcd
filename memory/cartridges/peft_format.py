"""PEFT's CARTRIDGE adapters: the same numbers in another order, both ways, without the library.

``adapter_model.safetensors`` holds one tensor ``prompt_embeddings`` [p, 2 * layers * kv_heads * head_dim]: of each slot
the keys of layer 0, its values, the keys of layer 1, and so on, heads one after the other; keys after RoPE. The rest is
in ``adapter_config.json``. Source: huggingface/peft 0.19 and later, ``src/peft/tuners/cartridge``; the test loads what
is written here with that library.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from memory.cartridges.cartridge import DTYPES, Cartridge
from memory.cartridges.errors import CartridgeFileInvalid
from memory.cartridges.torch_format import Slots
from storage import files

TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_EMBEDDINGS = "prompt_embeddings"
_MOST_CONFIG = 64 << 10
_MOST_LAYERS = 1024


def to_peft(folder: Path, cartridge: Cartridge) -> Path:
    """Publish ``cartridge`` as the adapter ``folder``; returns it. Raises ``FileExistsError``, ``OSError``."""
    manifest = cartridge.manifest
    pairs = zip(cartridge.prefix.keys, cartridge.prefix.values, strict=True)
    rows = torch.stack([tensor[0].detach().cpu() for pair in pairs for tensor in pair])  # [2L, H, p, D]
    embeddings = rows.permute(2, 0, 1, 3).reshape(manifest.slots, -1).contiguous()
    config = {
        "peft_type": "CARTRIDGE",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": manifest.model,
        "inference_mode": True,
        "num_virtual_tokens": manifest.slots,
        "num_frozen_tokens": cartridge.frozen,
        "num_layers": manifest.layers,
        "num_attention_heads": manifest.kv_heads,
        "token_dim": manifest.kv_heads * manifest.head_dim,
        "num_transformer_submodules": 1,
        "modules_to_save": None,
        "revision": None,
    }
    with files.publish_directory(folder) as partial:
        (partial / TENSORS).write_bytes(safetensors.torch.save({_EMBEDDINGS: embeddings}, metadata={"format": "pt"}))
        (partial / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return folder


def from_peft(folder: Path) -> Slots:
    """The slots of an adapter. Raises ``CartridgeFileInvalid`` naming the file."""
    config, source = _config(folder / CONFIG), str(folder / TENSORS)
    slots, layers = config["num_virtual_tokens"], config["num_layers"]
    heads, width = config["num_attention_heads"], config["token_dim"]
    try:
        tensors = safetensors.torch.load((folder / TENSORS).read_bytes())
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise CartridgeFileInvalid(source, f"no whole safetensors file: {error}") from None
    if set(tensors) != {_EMBEDDINGS}:
        raise CartridgeFileInvalid(source, f"it holds {', '.join(sorted(tensors)[:4])}, expected {_EMBEDDINGS} alone")
    found = tensors[_EMBEDDINGS]
    if tuple(found.shape) != (slots, 2 * layers * width) or found.dtype not in DTYPES.values():
        raise CartridgeFileInvalid(
            source, f"{_EMBEDDINGS} is {found.dtype} {list(found.shape)}, {CONFIG} says {[slots, 2 * layers * width]}"
        )
    if not bool(found.isfinite().all()):
        raise CartridgeFileInvalid(source, f"{_EMBEDDINGS} hold NaN or infinity")
    rows = found.reshape(slots, 2 * layers, heads, width // heads).permute(1, 2, 0, 3)  # [2L, H, p, D]
    keys = tuple(rows[2 * layer][None].contiguous() for layer in range(layers))
    values = tuple(rows[2 * layer + 1][None].contiguous() for layer in range(layers))
    return Slots(keys, values, config["num_frozen_tokens"])


def _config(path: Path) -> dict[str, int]:
    source = str(path)
    try:
        if path.stat().st_size > _MOST_CONFIG:
            raise CartridgeFileInvalid(source, f"larger than {_MOST_CONFIG:,} bytes")
        value: Any = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, CartridgeFileInvalid):
            raise
        raise CartridgeFileInvalid(source, f"no JSON: {error}") from None
    if not isinstance(value, dict) or value.get("peft_type") != "CARTRIDGE":
        kind = value.get("peft_type") if isinstance(value, dict) else type(value).__name__
        raise CartridgeFileInvalid(source, f"peft_type is {kind!r}, expected 'CARTRIDGE'")
    value = {"num_frozen_tokens": 1, **value}  # what the library takes where nothing is said
    limits = {
        "num_virtual_tokens": (1, 1 << 20),
        "num_frozen_tokens": (0, 1 << 20),
        "num_layers": (1, _MOST_LAYERS),
        "num_attention_heads": (1, 4096),
        "token_dim": (1, 1 << 24),
    }
    for name, (least, most) in limits.items():
        if type(value.get(name)) is not int or not least <= value[name] <= most:
            raise CartridgeFileInvalid(source, f"{name} is {value.get(name)!r}, expected a number up to {most}")
    if value["token_dim"] % value["num_attention_heads"]:
        raise CartridgeFileInvalid(source, "token_dim is no multiple of num_attention_heads")
    if value["num_frozen_tokens"] > value["num_virtual_tokens"]:
        raise CartridgeFileInvalid(source, "num_frozen_tokens is more than num_virtual_tokens")
    return {name: int(value[name]) for name in limits}
