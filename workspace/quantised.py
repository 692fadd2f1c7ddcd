"""Weight-only quantised linears for the steps of decoding on a CPU; everything else keeps the full weights.

A step of one token reads every weight once, so its time is that of the bytes. ``quantise`` gives the model's linears a
second, packed copy of their weights (4 bits in groups of 32, with a scale and a zero point each) which passes of few
rows use; passes of many rows (prompts) and passes with gradients (training) use the weights as they were loaded, which
are not touched: parameters, state dict and fingerprint stay as they are. Modules keep their names and their place, so
hooks, the registered attention and virtual tokens see what they saw before.

The products are torch's own (``aten::_weight_int4pack_mm_for_cpu``, the kernel behind gpt-fast and torchao's CPU
layout). Eight bits are two of four: a code c = 16 h + l is a product with h and one with l. That is exact, and for one
row as quick as ``aten::_weight_int8pack_mm``, which has one scale per row of the matrix and not per group.

Shapes: N outputs, K inputs, G = K / 32 groups.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional

from workspace.errors import UnsupportedModel

logger = logging.getLogger(__name__)

#: auto: as many bits as lose nothing, for a model whose weights have 4 bits already; exact: none; int8, int4: all.
WeightsName = Literal["auto", "exact", "int8", "int4"]
Bits = Literal[4, 8]

GROUP = 32
_OUTPUTS = 16  # the kernel takes multiples of this
_BLOCK = 64  # and interleaves this many: matrices packed in such blocks can be joined
_AT_ONCE = 1 << 20  # weights packed at once
#: Most rows for which the packed product is the quicker one, by bits. Measured: docs/decoding.md.
_MOST_ROWS: dict[Bits, int] = {4: 16, 8: 4}
#: Relative error (Frobenius) up to which ``auto`` packs a matrix. Weights that lie on a 4-bit grid, as those of a Q4
#: file do, come back with 0.004 to 0.005, which is the rounding of scales to bfloat16; any others lose 0.07 to 0.1.
_LOSSLESS = 0.01
_SAMPLE = 128  # rows of a matrix by which that is judged
#: ``auto`` leaves the model as it is where the copies would take more than this share of the memory that is free.
_SHARE_OF_FREE = 0.5

_product: Callable[[Tensor, Tensor, int, Tensor], Tensor] = torch.ops.aten._weight_int4pack_mm_for_cpu.default


class QuantisedLinear(nn.Linear):
    """A linear with a packed copy of its frozen weight: bytes [N, K / 2], and scales with zero points [G, N, 2].

    Without gradients and up to ``most_rows`` rows the product is the packed one; otherwise it is the plain one. The
    copy is no buffer: it is not part of a state dict, and a module finds its buffers so slowly that it would show.
    """

    joined: Joined | None = None  #: with others that get the same input
    _place = 0, 0  # among their outputs

    def __init__(self, linear: nn.Linear, packed: Tensor, scales: Tensor, bits: Bits):
        nn.Module.__init__(self)  # not nn.Linear's, which would allocate a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias  # the same parameters: tied ones stay tied
        self.bits = bits
        self.most_rows = _MOST_ROWS[bits]
        self.packed, self.scales = packed, scales
        self._biased = linear.bias is not None
        self.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] to [..., N]."""
        shape = input.shape
        rows = input.reshape(-1, shape[-1])
        if rows.shape[0] > self.most_rows or (input.requires_grad and torch.is_grad_enabled()):
            return functional.linear(input, self.weight, self.bias)
        if self.joined is not None:
            out = self.joined(input, rows).narrow(1, *self._place)
        else:
            if self.bits == 8:
                rows = torch.cat((rows, rows), dim=1)
            out = _product(rows, self.packed, GROUP, self.scales)
        if self._biased:
            out = out + self.bias
        return out.reshape(*shape[:-1], out.shape[-1])

    def join(self, joined: Joined, begin: int) -> None:
        """From now on the outputs from ``begin`` on of ``joined`` are what this linear computes."""
        self.joined, self._place = joined, (begin, self.out_features)
        self.packed, self.scales = joined.packed, joined.scales

    def extra_repr(self) -> str:
        """As nn.Linear's, with the bits."""
        return f"{super().extra_repr()}, bits={self.bits}"


class Joined:
    """The product of several linears of one input, computed once: for the first that asks, and kept for the others.

    They are called one after the other with the same tensor (query, key and value; gate and up); whoever is called with
    another one than the first was, because threads or hooks came between, computes anew.
    """

    def __init__(self, packed: Tensor, scales: Tensor, count: int):
        self.packed, self.scales = packed, scales
        self._count = count
        self._last: tuple[Tensor, Tensor, int] | None = None  # input, product, and how often it is still wanted

    def __call__(self, input: Tensor, rows: Tensor) -> Tensor:
        """All outputs [R, N] for ``rows`` [R, K], which are those of ``input``."""
        last = self._last
        if last is not None and last[0] is input:
            self._last = (input, last[1], last[2] - 1) if last[2] > 1 else None
            return last[1]
        product = _product(rows, self.packed, GROUP, self.scales)
        self._last = input, product, self._count - 1
        return product


@dataclass(frozen=True, slots=True)
class Quantised:
    """What ``quantise`` did: how many matrices have a packed copy of 4 and of 8 bits, and how many have none."""

    four: int
    eight: int
    plain: int
    bytes: int  #: of all copies

    def __str__(self) -> str:
        if not self.four + self.eight:
            return "no linear has quantised weights"
        return (
            f"{self.four} linears decode with 4-bit weights, {self.eight} with 8-bit ones and {self.plain} with their "
            f"own; the copies take {self.bytes / 1e6:.0f} MB"
        )


@torch.no_grad()
def quantise(name: str, model: Any, weights: WeightsName) -> Quantised:
    """Replace linears of ``model`` by quantised ones, in place, as ``weights`` says; see the module docstring.

    ``auto`` packs models of bfloat16 on a CPU of which at least half the linears have 4-bit weights already (those of a
    Q4 file); the others of such a model (its head) take 8 bits. Raises ``UnsupportedModel`` where ``int8`` or ``int4``
    was asked for and cannot be.
    """
    found = [(path, module) for path, module in model.named_modules() if type(module) is nn.Linear]
    usable = [(path, module) for path, module in found if _usable(module)]
    if weights == "exact" or (weights == "auto" and not _fits(usable)):
        return Quantised(0, 0, len(found), 0)
    if weights != "auto" and not usable:
        raise UnsupportedModel(
            f"{name}: model.weights {weights} needs bfloat16 linears on a CPU, whose sizes divide by {GROUP}, and this "
            f"model ({model.dtype} on {model.device}) has none; set model.dtype to bfloat16, or model.weights to exact"
        )
    chosen = [(path, module, _bits(module, weights)) for path, module in usable]
    if weights == "auto" and 2 * sum(bits == 4 for _, _, bits in chosen) < len(found):
        return Quantised(0, 0, len(found), 0)
    done: Counter[int] = Counter()
    size = 0
    for path, module, bits in chosen:
        if bits is not None:
            packed, scales = pack(module.weight, bits)
            model.set_submodule(path, QuantisedLinear(module, packed, scales, bits))
            done[bits] += 1
            size += packed.nbytes + scales.nbytes
    _join(model)
    return Quantised(done[4], done[8], len(found) - done.total(), size)


#: Linears of one module that get the same input, in the order in which they are called.
_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def _join(model: Any) -> None:
    """One product instead of two or three where it can be: calls cost, and short matrices are multiplied slower."""
    for module in model.modules():
        for names in _SIBLINGS:
            found = [getattr(module, name, None) for name in names]
            linears = [one for one in found if isinstance(one, QuantisedLinear) and one.bits == 4]
            whole = all(one.out_features % _BLOCK == 0 for one in linears)
            if len(linears) < len(names) or not whole or len({one.in_features for one in linears}) > 1:
                continue
            packed = torch.cat([one.packed for one in linears])
            joined = Joined(packed, torch.cat([one.scales for one in linears], dim=1).contiguous(), len(linears))
            begin = 0
            for one in linears:
                one.join(joined, begin)
                begin += one.out_features


def _usable(linear: nn.Linear) -> bool:
    weight = linear.weight
    placed_elsewhere = hasattr(linear, "_hf_hook")  # accelerate brings the weight when it is needed
    whole = weight.shape[0] % _OUTPUTS == 0 and weight.shape[1] % GROUP == 0
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and whole and not placed_elsewhere


def _fits(usable: list[tuple[str, nn.Linear]]) -> bool:
    needed = sum(_packed_bytes(module.weight) for _, module in usable)
    return needed < _SHARE_OF_FREE * psutil.virtual_memory().available


def _packed_bytes(weight: Tensor) -> int:
    """Of 4 bits: the codes, and two bfloat16 numbers for each group."""
    return weight.numel() // 2 + 4 * weight.numel() // GROUP


def _bits(linear: nn.Linear, weights: WeightsName) -> Bits | None:
    """What was asked for; for ``auto`` the fewest that lose next to nothing."""
    asked: dict[WeightsName, Bits] = {"int4": 4, "int8": 8}
    if weights != "auto":
        return asked.get(weights)
    possible: tuple[Bits, ...] = (4, 8)
    return next((bits for bits in possible if relative_error(linear.weight[:_SAMPLE], bits) <= _LOSSLESS), None)


def pack(weight: Tensor, bits: Bits) -> tuple[Tensor, Tensor]:
    """The kernel's form of ``weight`` [N, K]: bytes [N, K / 2], and scales and zero points as bfloat16 [G, N, 2].

    For 8 bits those of twice the inputs, high nibbles and then low ones. Rows are worked on in blocks, because the head
    of a large vocabulary would take many times its size on the way.
    """
    rows = max(_BLOCK, _AT_ONCE // weight.shape[1] // _BLOCK * _BLOCK)
    packed, scales = list[Tensor](), list[Tensor]()
    for begin in range(0, len(weight), rows):
        codes, scale, zero = to_codes(weight[begin : begin + rows], bits)
        if bits == 8:  # (16 h + l - 128) s + z = (h - 8) 16 s + (l - 8) s + (z + 8 s)
            codes = torch.cat((codes >> 4, codes & 15), dim=1)
            zero = torch.cat((torch.zeros_like(zero), zero + 8 * scale), dim=1)
            scale = torch.cat((16 * scale, scale), dim=1)
        packed.append(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.flatten(1), 1))
        scales.append(torch.cat((scale, zero), dim=-1).transpose(0, 1).to(torch.bfloat16))  # [G, N, 2]
    return torch.cat(packed), torch.cat(scales, dim=1).contiguous()


def to_codes(weight: Tensor, bits: Bits) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [N, G, 32] (int32) and, per group, scale and zero point [N, G, 1] as bfloat16 holds them (float32).

    A weight is (code - half) scale + zero, with half = 8 or 128. Scale and zero point are rounded before codes are
    chosen, so that the codes make up for the rounding.
    """
    groups = weight.detach().float().reshape(len(weight), -1, GROUP)  # [N, G, 32]
    low, high = groups.amin(dim=-1, keepdim=True), groups.amax(dim=-1, keepdim=True)
    top, half = (1 << bits) - 1, 1 << (bits - 1)
    scale = _rounded(((high - low) / top).clamp_min(1e-9))
    zero = _rounded(low + half * scale)
    codes = ((groups - zero) / scale + half).round_().clamp_(0, top)
    return codes.to(torch.int32), scale, zero


def from_codes(codes: Tensor, scale: Tensor, zero: Tensor, bits: Bits) -> Tensor:
    """The weights [N, K] that these codes stand for, in float32."""
    return ((codes - (1 << (bits - 1))) * scale + zero).flatten(1)


def relative_error(weight: Tensor, bits: Bits) -> float:
    """Frobenius norm of what the codes lose of ``weight``, as a part of its own; 0 for a matrix of zeros."""
    exact = weight.detach().float()
    norm = float(exact.norm())
    return float((from_codes(*to_codes(weight, bits), bits) - exact).norm()) / norm if norm else 0.0


def _rounded(values: Tensor) -> Tensor:
    return values.to(torch.bfloat16).float()
