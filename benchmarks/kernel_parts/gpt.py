"""A plain byte-level GPT, the rival of the kernel in ``language.py``: nanoGPT's recipe, nothing left out that helps.

Pre-LayerNorm without biases, learned positions, GELU of four times the width, the head tied to the embedding, residual
projections initialised with 0.02 / sqrt(2 layers) (Radford et al. 2019; karpathy/nanoGPT ``model.py``). Decay on
matrices only, betas (0.9, 0.99), gradient norm clipped at 1 (nanoGPT ``config/train_shakespeare_char.py``).

What it does not do: generate. It is here to be beaten, or not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BYTES = 256
GRADIENT_CLIP = 1.0


@dataclass(frozen=True)
class GptConfig:
    """``layers`` x ``width``; windows of at most ``context`` bytes."""

    layers: int
    width: int
    heads: int
    context: int

    def __post_init__(self) -> None:
        if min(self.layers, self.width, self.heads, self.context) < 1 or self.width % self.heads:
            raise ValueError(f"{self} needs positive sizes and a width that is a multiple of its heads")


class GptBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GptConfig):
        super().__init__()
        self.heads = config.heads
        self.norm_attention = nn.LayerNorm(config.width, bias=False)
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        self.norm_mlp = nn.LayerNorm(config.width, bias=False)
        self.up = nn.Linear(config.width, 4 * config.width, bias=False)
        self.down = nn.Linear(4 * config.width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> [B, T, D]."""
        batch, length, width = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, T, d]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        hidden: Tensor = self.down(F.gelu(self.up(self.norm_mlp(x))))
        return x + hidden


class Gpt(nn.Module):
    """See the module docstring. ``seed`` fixes the initial weights without touching torch's global generator."""

    def __init__(self, config: GptConfig, seed: int = 0):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(BYTES, config.width)  # the head as well
        self.position = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(GptBlock(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, bias=False)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("out.weight", "down.weight"))
                std = 0.02 / math.sqrt(2 * config.layers) if residual else 0.02
                nn.init.normal_(parameter, std=std, generator=generator)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B, T], bytes -> logits [B, T, 256]; logits[:, t] predicts ids[:, t + 1]. Causal."""
        x = self.embedding(ids) + self.position.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embedding.weight)

    def optimizer(self, lr: float, weight_decay: float = 0.1) -> torch.optim.AdamW:
        """Fused AdamW with nanoGPT's groups and betas."""
        matrices = [p for p in self.parameters() if p.dim() == 2]
        vectors = [p for p in self.parameters() if p.dim() != 2]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), fused=True)


def parameter_count(module: nn.Module) -> int:
    """Trainable numbers, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())
