"""From slots to what the model feels: virtual keys and values, residual deltas, and static virtual tokens.

- **Virtual KV.** Each slot becomes ``tokens_per_slot`` virtual tokens in every hooked layer. Keys are content keys:
  before RoPE, after the model's key norm. Each projected vector gets the length that real keys (values) of its head
  have on average in its layer, times a learnt gain that begins at 1, times ``kv_plan_scale`` (``kv_projection_scale``):
  so an untrained or drifting projection points anywhere, but never shouts.
- **Bias.** ``kv_plan_bias`` plus a learnt offset that begins at 0 is added to the virtual tokens' scores. -16 is off:
  beside one real token that matches equally well, 16 virtual ones then take 2e-6 of the attention.
- **Delta.** LoReFT (Wu et al. 2024): ``R^T (W h + b(slots) - R h)`` with orthonormal rows of R, here with the residual
  h in units of its root mean square, so that b means the same in every layer. Its gate begins at 0: an untrained delta
  is exactly zero. It is never longer than ``delta_cap`` times the residual.
- **Static tokens** (Cartridges, Eyuboglu et al. 2025): keys and values that are trained themselves and depend on no
  input. Their values begin at zero, so that untrained ones can only dilute attention, never add noise.

Not here: storing any of it (``virtual_kv.py``), applying it (``attention.py``, ``residuals.py``), or what to do without
trained weights (``heuristic_kv.py``). Everything is float32; the attention function casts to the model's dtype.
Shapes: R rows, S slots, W slot width, L hooked layers, H kv heads, M virtual tokens, D head_dim, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from workspace.workspace_config import WorkspaceConfig

#: ``layer -> (keys, values, bias)``: [R|1, H, M, D] twice and [1, H, M].
LayerKV = dict[int, tuple[Tensor, Tensor, Tensor]]

#: Weight of a new observation in the running norms.
NORM_MOMENTUM = 0.05


@dataclass(frozen=True, slots=True)
class ModuleShape:
    """What the trainable parts have to know of a model: its sizes and its hooked layers, in rising order."""

    hidden_size: int
    kv_heads: int
    head_dim: int
    layers: tuple[int, ...]

    @classmethod
    def of(cls, hooked: HasShape) -> ModuleShape:
        """The shape of a hooked model."""
        return cls(hooked.hidden_size, hooked.kv_heads, hooked.head_dim, hooked.layers)

    def __post_init__(self) -> None:
        if min(self.hidden_size, self.kv_heads, self.head_dim) < 1:
            raise ValueError(f"sizes of a model are positive, got {self}")
        if not self.layers or list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0:
            raise ValueError(f"layers must be distinct, rising and not negative, and at least one, got {self.layers}")


class HasShape(Protocol):
    """A hooked model, as far as shapes go."""

    layers: tuple[int, ...]
    hidden_size: int
    kv_heads: int
    head_dim: int


class Projector(nn.Module):
    """Slots (and residuals) -> virtual KV and deltas of every hooked layer of one model shape."""

    key_norms: Tensor  # [L, H] running mean length of real content keys
    value_norms: Tensor  # [L, H] the same of real values
    observations: Tensor  # [L] how many were taken in; 0: the norms are 1 and mean nothing

    def __init__(self, shape: ModuleShape, config: WorkspaceConfig):
        super().__init__()
        layers, heads, size, width = len(shape.layers), shape.kv_heads, shape.head_dim, config.slot_width
        self.shape, self.config = shape, config
        tokens, rank = config.tokens_per_slot, config.delta_rank
        if rank > shape.hidden_size:
            raise ValueError(f"delta_rank ({rank}) exceeds the model's hidden size ({shape.hidden_size}); lower it")
        self.register_buffer("key_norms", torch.ones(layers, heads))
        self.register_buffer("value_norms", torch.ones(layers, heads))
        self.register_buffer("observations", torch.zeros(layers, dtype=torch.int64))
        self.norm = nn.LayerNorm(width)
        out = tokens * heads * 2 * size  # keys and values in one product
        self.weight = nn.Parameter(torch.randn(layers, width, out) * width**-0.5)  # [L, W, out]
        self.offset = nn.Parameter(torch.zeros(layers, 1, out))
        self.gain = nn.Parameter(torch.zeros(layers, 2, heads, config.virtual_tokens))  # log; keys, values
        self.bias = nn.Parameter(torch.zeros(layers, heads, config.virtual_tokens))  # added to kv_plan_bias
        # Delta. Both matrices begin different, or the gate would get no gradient.
        bases = [nn.init.orthogonal_(torch.empty(rank, shape.hidden_size)) for _ in shape.layers]
        self.basis = nn.Parameter(torch.stack(bases))  # [L, r, hidden], R before it is made orthonormal
        self.read = nn.Parameter(torch.randn(layers, rank, shape.hidden_size) * shape.hidden_size**-0.5)  # W
        self.read_slots = nn.Parameter(torch.randn(layers, width, rank) * width**-0.5)  # b(slots)
        self.read_offset = nn.Parameter(torch.zeros(layers, 1, rank))
        self.gate = nn.Parameter(torch.zeros(layers, 1, 1))
        if config.static_tokens:
            keys = functional.normalize(torch.randn(layers, heads, config.static_tokens, size), dim=-1)
            self.static_keys = nn.Parameter(keys)
            self.static_values = nn.Parameter(torch.zeros_like(keys))
            self.static_bias = nn.Parameter(torch.zeros(layers, heads, config.static_tokens))

    @property
    def calibrated(self) -> bool:
        """True when every hooked layer's real keys and values were seen: ``kv`` is norm-matched from then on."""
        return bool((self.observations > 0).all())

    # Virtual KV.

    def kv(self, slots: Tensor) -> LayerKV:
        """``slots`` [R, S, W] -> per layer keys and values [R, H, M, D] and bias [1, H, M].

        Token ``s * tokens_per_slot + t`` comes from slot s.
        """
        shape, config = self.shape, self.config
        rows, count, width = slots.shape
        layers, heads, size = len(shape.layers), shape.kv_heads, shape.head_dim
        seen = self.norm(slots.to(self.weight)).reshape(1, rows * count, width).expand(layers, -1, -1)
        made = torch.baddbmm(self.offset, seen, self.weight)  # [L, R * S, tokens * H * 2 * D]
        made = made.view(layers, rows, count * config.tokens_per_slot, heads, 2, size)
        made = made.permute(0, 4, 1, 3, 2, 5)  # [L, 2, R, H, M, D]
        lengths = torch.stack([self.key_norms * config.kv_plan_scale, self.value_norms * config.kv_projection_scale], 1)
        lengths = lengths[..., None] * self.gain.exp()  # [L, 2, H, M]
        made = functional.normalize(made, dim=-1) * lengths[:, :, None, :, :, None]
        bias = self.bias + config.kv_plan_bias  # [L, H, M]
        return {layer: (made[i, 0], made[i, 1], bias[i : i + 1]) for i, layer in enumerate(shape.layers)}

    def static(self) -> LayerKV:
        """Static tokens per layer: keys and values [1, H, M, D], bias [1, H, M]; empty without ``static_tokens``."""
        config = self.config
        if not config.static_tokens:
            return {}
        keys = self.static_keys * config.kv_plan_scale
        values = self.static_values * config.kv_projection_scale
        bias = self.static_bias + config.kv_plan_bias
        return {
            layer: (keys[i : i + 1], values[i : i + 1], bias[i : i + 1]) for i, layer in enumerate(self.shape.layers)
        }

    @torch.no_grad()
    def begin_static(self, real: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        """Start the static tokens from real content keys and values, ``layer -> `` [H, static_tokens, D] twice.

        Real prefixes are the better start (Cartridges; on SmolLM2 they beat random ones on held-out text).
        """
        for i, layer in enumerate(self.shape.layers):
            keys, values = real[layer]
            if keys.shape != self.static_keys.shape[1:] or values.shape != keys.shape:
                raise ValueError(
                    f"layer {layer}: static tokens have shape {tuple(self.static_keys.shape[1:])}, "
                    f"got keys {tuple(keys.shape)} and values {tuple(values.shape)}"
                )
            self.static_keys[i].copy_(keys)
            self.static_values[i].copy_(values)

    @torch.no_grad()
    def observe(self, layer: int, keys: Tensor, values: Tensor, attention_scaling: float = 1.0) -> None:
        """Take real keys and values [R, H, T, D] of a hooked layer into its running norms.

        Rotated keys will do: RoPE keeps lengths, apart from the model's ``attention_scaling``, which is divided out.
        """
        i = self.shape.layers.index(layer)
        weight = 1.0 if self.observations[i] == 0 else NORM_MOMENTUM
        lengths = keys.float().norm(dim=-1).mean(dim=(0, 2)) / attention_scaling  # [H]
        self.key_norms[i].lerp_(lengths.to(self.key_norms), weight)
        self.value_norms[i].lerp_(values.float().norm(dim=-1).mean(dim=(0, 2)).to(self.value_norms), weight)
        self.observations[i] += 1

    # Residual deltas.

    def delta(self, slots: Tensor, residuals: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """``slots`` [R, S, W] and the last token's ``residuals[layer]`` [R, hidden] -> delta per layer [R, hidden]."""
        layers = self.shape.layers
        hidden = torch.stack([residuals[layer].to(self.read) for layer in layers])  # [L, R, hidden]
        size = hidden.square().mean(dim=-1, keepdim=True).sqrt()  # [L, R, 1]
        unit = hidden / size.clamp_min(1e-12)
        basis = self.orthonormal_basis()  # [L, r, hidden]
        pooled = self.norm(slots.to(self.read)).mean(dim=1)  # [R, W]
        read = torch.baddbmm(self.read_offset, pooled.expand(len(layers), -1, -1), self.read_slots)  # [L, R, r]
        read = read + unit @ (self.read - basis).transpose(1, 2)  # W h + b - R h
        change = self.gate * (read @ basis)  # [L, R, hidden], in units of the residual's root mean square
        longest = self.config.delta_cap * hidden.shape[-1] ** 0.5  # the residual's own length is sqrt(hidden)
        length = change.norm(dim=-1, keepdim=True)
        change = change * (size * (longest / length.clamp_min(longest)))
        return dict(zip(layers, change.unbind(0), strict=True))

    def orthonormal_basis(self) -> Tensor:
        """R [L, r, hidden]: the rows of ``basis`` orthonormalised, differentiably (QR by way of Cholesky)."""
        triangle, _ = torch.linalg.cholesky_ex(self.basis @ self.basis.transpose(1, 2))  # [L, r, r]
        rows: Tensor = torch.linalg.solve_triangular(triangle, self.basis, upper=False)
        return rows

    def check_invariants(self) -> None:
        """Raise ``AssertionError`` if a norm is not a length or the basis has lost its rank."""
        for name in ("key_norms", "value_norms"):
            norms = getattr(self, name)
            assert bool((norms.isfinite() & (norms >= 0)).all()), f"{name} holds what no length can be: {norms}"
        basis = self.orthonormal_basis()
        identity = torch.eye(self.config.delta_rank, device=basis.device)
        assert bool(((basis @ basis.transpose(1, 2) - identity).abs() < 1e-3).all()), "the delta's basis lost its rank"
