"""The M8 kernel: a tiny causal network over bytes that thinks by recursion instead of depth.

Two small blocks are shared by all loops (TRM, Jolicoeur-Martineau 2025, arXiv 2510.04871, figure 3):

    z_L <- f(z_L + z_H + x)    n times      (inner: reason, the input x is injected again at every loop)
    z_H <- f(z_H + z_L)        once         (outer: revise the answer)

That is one outer cycle; T of them make one pass. The first T - 1 cycles run without gradient, the last with the full
gradient through all of its n + 1 applications of f. Further passes continue from the detached carry (z_H, z_L); how
many are worth it is what the halt head learns (``learning.py``, ``inference.py``).

The input x of a position is its byte's embedding plus a learned view of the few bytes before it (``reach``), so that
the recursion starts from letters in their words; without it the same kernel needs twice the steps.

Causal: memory tokens are a learned prefix, attention looks only back, so editing byte t leaves all earlier logits
bit-equal, and right padding is invisible to what precedes it. The state is read at the SEP mark, where the observation
is complete and the action not begun (at the last valid id where there is none): that is the state of the halt
decision and of the basin, and it is the same at training time and at query time.

What it does not do: train itself, sample, or remember keys and values (``incremental.py`` does).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qig_core.association import Association
from qig_core.basin_embedding import BasinEmbedding
from qig_core.core import MIXINGS, IntegratingCore
from qig_core.errors import InvalidConfig, InvalidInput
from qig_core.ngrams import LOOK_BACK, NgramEmbedding
from qig_core.vocabulary import MIN_CONTEXT, PAD, SEP, VOCAB_SIZE

Carry = tuple[Tensor, Tensor]
#: Rotated queries and keys, and values, each [B, H, S, d] -> what was looked up, [B, H, S, d].
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

_PRESETS: dict[str, dict[str, Any]] = {
    "nano": {"width": 48, "hidden": 128, "heads": 2, "outer_cycles": 2, "context": 256, "ngram_buckets": 2048},
    "micro": {"width": 96, "hidden": 256, "heads": 3, "outer_cycles": 3, "context": 384, "ngram_buckets": 4096},
    "small": {"width": 192, "hidden": 512, "heads": 6, "outer_cycles": 3, "context": 512},
}
_PRESETS = {name: {**options, "core": 8} for name, options in _PRESETS.items()}

# A kernel is a small specialist; these also keep a spawn request from asking for more memory than a machine has.
_AT_MOST = {
    "width": 512, "hidden": 2048, "blocks": 4, "heads": 32, "outer_cycles": 16, "inner_cycles": 16,
    "supervision_steps": 16, "memory_tokens": 128, "context": 4096, "basin_dim": 1024, "reach": 32,
    "ngram_buckets": 65_536, "association": 512,
}  # fmt: skip

_EPSILON = torch.finfo(torch.float32).eps
_BRANCH_SCALE = 0.2  # fresh residual branches are small, so that a dozen shared applications start near the identity


@dataclass(frozen=True)
class KernelConfig:
    """Shape of a kernel. One that exists is valid; make it with ``KernelConfig.preset`` or ``from_dict``."""

    preset_name: str = "nano"  # the preset it was made from; a label only
    width: int = 48
    hidden: int = 128  # inner width of the SwiGLU
    blocks: int = 2
    heads: int = 2
    outer_cycles: int = 2  # T: revisions of z_H per pass
    inner_cycles: int = 3  # n: revisions of z_L per outer cycle
    supervision_steps: int = 2  # passes at most, in training and at inference
    memory_tokens: int = 8
    context: int = 256  # ids, memory tokens not counted
    basin_dim: int = 64
    reach: int = 5  # bytes back that the input sees at once: words from their letters, before any recursion
    halt_bias: float = -3.0  # "deep start": untrained kernels do not stop early
    dropout: float = 0.0  # on the injected input, one mask for all loops of a pass
    association: int = 0  # rank of the linear path from the observation's n-grams to the logits; 0: none
    ngram_buckets: int = 0  # rows of the hashed n-gram embedding added to the bytes'; 0: none
    core: int = 0  # units that carry all that passes from one outer cycle to the next; 0: the whole width does
    core_mixing: str = "orthogonal"  # how the core's units act on each other between cycles; "identity": not at all
    core_gate: float = 0.3  # how much a fresh core takes in per cycle, against 1 that it holds
    noise: float = 0.0  # deviation of Gaussian noise on z_H after each cycle, where a generator is given

    def __post_init__(self) -> None:
        for name in ("width", "hidden", "blocks", "heads", "basin_dim", "reach", "supervision_steps"):
            self._need(name, getattr(self, name) >= 1, "at least 1")
        for name, most in _AT_MOST.items():
            self._need(name, getattr(self, name) <= most, f"at most {most}")
        self._need("width", self.width % self.heads == 0, f"a multiple of heads={self.heads}")
        self._need("width", (self.width // max(self.heads, 1)) % 2 == 0, "even per head, for rotary positions")
        self._need("outer_cycles", self.outer_cycles >= 2, "at least 2: Phi compares two consecutive outer states")
        self._need("inner_cycles", self.inner_cycles >= 3, "at least 3, the minimum recursion depth")
        self._need("memory_tokens", self.memory_tokens >= 8, "at least 8; fewer make recursive training unstable")
        self._need("context", self.context >= MIN_CONTEXT, f"at least {MIN_CONTEXT}")
        self._need("dropout", 0.0 <= self.dropout < 1.0, "in [0, 1)")
        self._need("ngram_buckets", self.ngram_buckets >= 0, "at least 0")
        self._need("association", self.association >= 0, "at least 0")
        self._need("core", self.core in (0, 2, 4, 8), "0 (none), 2, 4 or 8")
        self._need("core", self.core <= self.width, f"at most width={self.width}: its units are read-outs of the state")
        self._need("core_mixing", self.core_mixing in MIXINGS, f"one of {', '.join(MIXINGS)}")
        self._need("core_gate", 0.0 < self.core_gate < 1.0, "in (0, 1)")
        self._need("noise", 0.0 <= self.noise <= 1.0, "in [0, 1]")
        self._need("halt_bias", math.isfinite(self.halt_bias), "a finite number")

    def _need(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise InvalidConfig(f"kernel option {name}={getattr(self, name)} must be {rule}")

    @property
    def look_back(self) -> int:
        """How many ids before a position its input depends on."""
        return max(self.reach - 1, LOOK_BACK if self.ngram_buckets else 0)

    @classmethod
    def preset_names(cls) -> tuple[str, ...]:
        return tuple(_PRESETS)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> KernelConfig:
        """``nano`` (~200 k parameters), ``micro`` (~700 k) or ``small`` (~1.2 M), with single options replaced."""
        if name not in _PRESETS:
            raise InvalidConfig(f"unknown preset {name!r}; choose one of {', '.join(_PRESETS)}")
        return cls.from_dict({"preset_name": name, **_PRESETS[name], **overrides})

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> KernelConfig:
        """Inverse of ``to_dict``; missing keys take their defaults, an unknown key or a wrong type is InvalidConfig."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        clean: dict[str, Any] = {}
        for key, value in values.items():
            if key not in fields:
                raise InvalidConfig(f"unknown kernel option {key!r}; known are {', '.join(fields)}")
            kind = type(fields[key].default)
            if kind is float and isinstance(value, int) and not isinstance(value, bool):
                value = float(value)
            if type(value) is not kind:
                raise InvalidConfig(f"kernel option {key}={value!r} must be of type {kind.__name__}")
            clean[key] = value
        return cls(**clean)


@dataclass(frozen=True)
class KernelOutput:
    """What one pass says. ``carry`` is detached; give it to the next pass over the same ids."""

    logits: Tensor  # [B, T, V]; logits[:, t] predicts ids[:, t + 1]
    halt_logit: Tensor  # [B]; positive: another pass is not expected to help
    carry: Carry  # z_H and z_L, each [B, M + T, D]
    pooled: Tensor  # [B, D], the state where the observation is complete
    basin: Tensor  # [B, basin_dim], a distribution
    loops: list[Tensor] = dataclasses.field(default_factory=list)  # z_H [B, T, D] after each cycle, detached


def _norm(z: Tensor) -> Tensor:
    """RMSNorm without weights. As ``F.rms_norm``, in two thirds of its time on a CPU, where that is six calls."""
    return z * z.square().mean(dim=-1, keepdim=True).add_(_EPSILON).rsqrt()


def _rotate(z: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021) on z [..., B, H, S, d]; the tables, [S, d] or [B, 1, S, d], carry the signs.

    Written as z cos + swap(z) sin: half the calls of rotating both halves, and half the time (CPU, with gradient).
    """
    return torch.addcmul(z * cos, z.roll(z.shape[-1] // 2, dims=-1), sin)


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Block(nn.Module):
    """Causal attention and SwiGLU, each followed by RMSNorm after the residual, so that recursion stays bounded."""

    def __init__(self, config: KernelConfig, generator: torch.Generator):
        super().__init__()
        self.heads = config.heads
        self.qkv = _linear(config.width, 3 * config.width, generator)
        self.out = _linear(config.width, config.width, generator, _BRANCH_SCALE)
        self.gate_up = _linear(config.width, 2 * config.hidden, generator)
        self.down = _linear(config.hidden, config.width, generator, _BRANCH_SCALE)

    def forward(self, z: Tensor, cos: Tensor, sin: Tensor, attend: Attend = _causal) -> Tensor:
        """z [B, S, D] -> [B, S, D]. ``attend``: what the positions look at; other than themselves, where some are kept.

        Cosine and sine (``_rotary_table``) are [S, d], or [B, 1, S, d] where rows stand at different positions.
        """
        batch, length, width = z.shape
        qkv = self.qkv(z).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # [3, B, H, S, d]
        q, k = _rotate(qkv[:2], cos, sin)
        mixed = attend(q, k, qkv[2])
        z = _norm(z + self.out(mixed.transpose(1, 2).reshape(batch, length, width)))
        gate, up = self.gate_up(z).chunk(2, dim=-1)
        return _norm(z + self.down(F.silu(gate) * up))


def _core(config: KernelConfig, generator: torch.Generator) -> IntegratingCore | None:
    if config.core == 0:
        return None
    return IntegratingCore(
        config.core, config.width, config.core_mixing, config.outer_cycles, config.core_gate, generator
    )


def _linear(fan_in: int, fan_out: int, generator: torch.Generator, scale: float = 1.0) -> nn.Linear:
    """Bias-free linear layer, LeCun normal initialisation truncated at two deviations."""
    layer = nn.Linear(fan_in, fan_out, bias=False)
    std = scale / math.sqrt(fan_in)
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std, generator=generator)
    return layer


class M8Kernel(nn.Module):
    """See the module docstring. ``seed`` fixes the initial weights without touching torch's global generator."""

    cos: Tensor
    sin: Tensor
    start_high: Tensor
    start_low: Tensor
    basin_map: Tensor

    def __init__(self, config: KernelConfig, seed: int = 0):
        super().__init__()
        self.config = config
        generator = torch.Generator().manual_seed(seed)
        self.embedding = BasinEmbedding(VOCAB_SIZE, config.basin_dim, config.width, generator)
        self.window = _linear(config.reach * config.width, config.width, generator)
        self.memory = nn.Parameter(torch.randn(config.memory_tokens, config.width, generator=generator))
        self.blocks = nn.ModuleList(Block(config, generator) for _ in range(config.blocks))
        self.head = _linear(config.width, VOCAB_SIZE, generator, scale=0.5)
        self.halt = nn.Linear(config.width, 1)
        nn.init.zeros_(self.halt.weight)
        nn.init.constant_(self.halt.bias, config.halt_bias)
        self.ngrams = NgramEmbedding(config.ngram_buckets, config.width) if config.ngram_buckets else None
        self.core = _core(config, generator)
        self.register_buffer("start_high", torch.randn(config.width, generator=generator))
        self.register_buffer("start_low", torch.randn(config.width, generator=generator))
        self.register_buffer("basin_map", _orthogonal(config.basin_dim, config.width, generator))
        self.association = Association(config.association, generator) if config.association else None
        cos, sin = _rotary_table(config.memory_tokens + config.context, config.width // config.heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(
        self,
        ids: Tensor,
        carry: Carry | None = None,
        state_loops: bool = False,
        noise: torch.Generator | None = None,
    ) -> KernelOutput:
        """One pass of T outer cycles over ids [B, T], padded with PAD on the right.

        ``carry``: the previous pass's, for the same ids. ``state_loops``: also return z_H after each outer cycle.
        ``noise``: draws the recursion's noise (on the kernel's device); without it the pass is deterministic.
        Raises InvalidInput for ids that do not fit the context or the carry.
        """
        self._check(ids, carry)
        x = self._input(ids)  # [B, M + T, D]
        high, low = carry if carry is not None else self._start(x)
        cos, sin = self.cos[: x.shape[1]], self.sin[: x.shape[1]]
        skip = self.config.memory_tokens
        loops: list[Tensor] = []
        with torch.no_grad():
            for _ in range(self.config.outer_cycles - 1):
                _, high, low = self._cycle(high, low, x, cos, sin, noise)
                if state_loops:
                    loops.append(high[:, skip:])
        answer, high, low = self._cycle(high, low, x, cos, sin, noise)
        state = answer[:, skip:]  # [B, T, D]
        if state_loops:
            loops.append(high[:, skip:].detach())
        pooled = state[torch.arange(len(ids), device=ids.device), read_position(ids)]  # [B, D]
        return KernelOutput(
            logits=self.head(state) if self.association is None else self.head(state) + self.association(ids),
            halt_logit=self.halt(pooled).squeeze(-1),
            carry=(high.detach(), low.detach()),
            pooled=pooled,
            basin=self.basin_of(pooled),
            loops=loops,
        )

    def basin_of(self, pooled: Tensor) -> Tensor:
        """Pooled states [..., D] -> points of the simplex [..., basin_dim], by a fixed orthogonal read-out.

        The read-out is fixed, so what basins know about similarity is what the recursion has learned.
        """
        return torch.softmax(pooled @ self.basin_map.T, dim=-1)

    def _check(self, ids: Tensor, carry: Carry | None) -> None:
        if ids.dim() != 2 or not 1 <= ids.shape[1] <= self.config.context:
            raise InvalidInput(f"ids must be [B, T] with 1 <= T <= {self.config.context}, got {list(ids.shape)}")
        expected = (ids.shape[0], ids.shape[1] + self.config.memory_tokens, self.config.width)
        if carry is not None and tuple(carry[0].shape) != expected:
            raise InvalidInput(f"the carry is {list(carry[0].shape)}, these ids need {list(expected)}")

    def _input(self, ids: Tensor) -> Tensor:
        memory = _norm(self.memory).expand(ids.shape[0], -1, -1)
        x = torch.cat((memory, self._local(self.embedding(ids), ids)), dim=1)  # [B, M + T, D]
        return F.dropout(x, self.config.dropout, self.training)

    def _local(self, bytes_: Tensor, ids: Tensor) -> Tensor:
        """What a position sees before any recursion: its byte [B, T, D] and the ``look_back`` before it."""
        reach = self.config.reach
        padded = F.pad(bytes_, (0, 0, reach - 1, 0))  # a window looks back only
        windows = padded.unfold(1, reach, 1).transpose(2, 3).flatten(2)  # [B, T, reach * D]
        local = bytes_ + F.silu(self.window(windows))
        if self.ngrams is not None:
            local = local + self.ngrams(ids)
        return _norm(local)

    def _start(self, x: Tensor) -> Carry:
        low = self.start_low.expand_as(x)
        if self.core is None:
            return self.start_high.expand_as(x), low
        with torch.no_grad():
            return self.core.start(x), low

    def _cycle(
        self,
        high: Tensor,
        low: Tensor,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        noise: torch.Generator | None,
        attend: Attend = _causal,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One outer cycle: what is answered from, z_H and z_L. Without a core the answer is z_H itself."""
        for _ in range(self.config.inner_cycles):
            low = self._think(low + high + x, cos, sin, attend)
        answer = self._think(high + low, cos, sin, attend)
        if self.core is not None:
            high = self.core(high, answer)
            low = self.start_low.expand_as(x)
            answer = answer + high
        else:
            high = answer
        if noise is not None and self.config.noise > 0:
            high = high + self.config.noise * self._noise_like(high, noise)
        return answer, high, low

    def _noise_like(self, high: Tensor, generator: torch.Generator) -> Tensor:
        """Gaussian noise of unit variance on z_H; where there is a core, on its units, for z_H is nothing else."""
        if self.core is None:
            return torch.randn(high.shape, generator=generator, device=high.device)
        units = (*high.shape[:-1], self.core.units)
        return self.core.lift(torch.randn(units, generator=generator, device=high.device))

    def _think(self, z: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        for block in self.blocks:
            z = block(z, cos, sin, attend)
        return z


def read_position(ids: Tensor) -> Tensor:
    """[B]: index of SEP in each row of ids [B, T]; where there is none, of the last id that is not PAD."""
    separator = ids == SEP
    last = (ids != PAD).sum(dim=1).clamp_min(1) - 1
    return torch.where(separator.any(dim=1), separator.int().argmax(dim=1), last)


def _rotary_table(length: int, dim: int) -> tuple[Tensor, Tensor]:
    frequency = 10_000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency)  # [S, d/2]
    cos, sin = angle.cos().float(), angle.sin().float()
    return torch.cat((cos, cos), dim=1), torch.cat((-sin, sin), dim=1)  # each [S, d], see _rotate


def _orthogonal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    matrix = torch.empty(rows, columns)
    nn.init.orthogonal_(matrix, generator=generator)
    return matrix
