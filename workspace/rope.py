"""RoPE by the model's own rotary module: from content space to the rotated space of the cache, and back.

Content space is a key or query before RoPE and before the model's ``attention_scaling`` s (YaRN multiplies cosine and
sine by it, so a cached key is s R(position) content and a score carries s squared). Everything here uses the cosine
and sine that the model itself would use, rounded to its dtype, so that going back undoes its rounding as well.

Only rotations that pair dimension i with i + width/2 and depend on the position alone are known; anything else
(interleaved pairs, "dynamic" and "longrope" frequencies, ALiBi) is refused when the handle is made. Layers of one type
share a rotary embedding (Gemma 3 has one for sliding and one for full attention).

Shapes: R rows or 1, H heads, T positions, D head size, W <= D rotated dimensions.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor

from workspace.errors import UnsupportedModel

_STATIC_TYPES = ("default", "linear", "llama3", "yarn", "proportional")


class LayerRope:
    """The rotary embedding of one layer type. No method ``to``: it travels as a keyword argument."""

    def __init__(self, rotary: Any, layer_type: str | None, head_dim: int):
        self._rotary = rotary
        self._arguments = {} if layer_type is None else {"layer_type": layer_type}
        prefix = "" if layer_type is None else f"{layer_type}_"
        self._buffer = f"{prefix}inv_freq"
        self.attention_scaling = float(getattr(rotary, f"{prefix}attention_scaling", 1.0))
        self.head_dim = head_dim
        self.width = 2 * int(self.frequencies.shape[0])  #: W

    @property
    def frequencies(self) -> Tensor:
        """Radians per token, [W/2]; read anew each time, because moving a model replaces its buffers."""
        found: Tensor = getattr(self._rotary, self._buffer)
        return found

    def cos_sin(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine as the model computes them for ``positions`` [R, T], each [R, T, W] or [R, T, W/2]."""
        like = torch.empty((), dtype=dtype, device=positions.device)
        cos, sin = self._rotary(like, positions, **self._arguments)
        return cos, sin

    def factors(self, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """The model's [R, T, W] (twice the same half) or [R, T, W/2] as the two factors [R, 1, T, W] of ``turn``.

        ``inverse`` turns the other way, by the transposed matrix: scaled again, not divided.
        """
        half = self.width // 2
        cos, sin = cos[..., :half].unsqueeze(1), sin[..., :half].unsqueeze(1)
        signed = (sin, -sin) if inverse else (-sin, sin)
        return torch.cat((cos, cos), dim=-1), torch.cat(signed, dim=-1)

    def turn(self, x: Tensor, factors: tuple[Tensor, Tensor]) -> Tensor:
        """Rotate the first W dimensions of ``x`` [R, H, T, D] by ``factors``; the rest stays, unscaled too."""
        half = self.width // 2
        first, second = x[..., :half], x[..., half : self.width]
        turned = torch.addcmul(x[..., : self.width] * factors[0], torch.cat((second, first), dim=-1), factors[1])
        return turned if self.width == self.head_dim else torch.cat((turned, x[..., self.width :]), dim=-1)

    def rotate(self, content: Tensor, positions: Tensor) -> Tensor:
        """``content`` [R, H, T, D] as the model would have it in its cache at ``positions`` [R|1, T]."""
        work = torch.promote_types(content.dtype, torch.float32)
        cos, sin = self.cos_sin(positions, content.dtype)
        return self.turn(content.to(work), self.factors(cos.to(work), sin.to(work))).to(content.dtype)

    def derotate(self, rotated: Tensor, positions: Tensor) -> Tensor:
        """The content of ``rotated`` [R, H, T, D], which stood at ``positions`` [R|1, T]: undoes ``rotate``."""
        return self.content(rotated, self.back(*self.cos_sin(positions, rotated.dtype)))

    def back(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Factors [R|1, 1, T, W] in float32 at least that turn rotated vectors back, scaled by s once more.

        ``cos`` and ``sin`` are as the model passes them to its layers.
        """
        work = torch.promote_types(cos.dtype, torch.float32)
        return self.factors(cos.to(work), sin.to(work), inverse=True)

    def content(self, rotated: Tensor, back: tuple[Tensor, Tensor]) -> Tensor:
        """``derotate`` with the factors at hand."""
        squares = back[0] * back[0] + back[1] * back[1]  # s squared, up to rounding
        exact = (back[0] / squares, back[1] / squares)
        return self.turn(rotated.to(squares.dtype), exact).to(rotated.dtype)

    def shift(self, content: Tensor, offset: Tensor | int) -> Tensor:
        """``content`` [R, H, M, D] turned to the relative position ``offset`` (an int or [M]), not scaled by s."""
        work = torch.promote_types(content.dtype, torch.float32)
        offsets = torch.as_tensor(offset, device=content.device).to(work).reshape(1, -1, 1)  # [1, M|1, 1]
        angles = offsets * self.frequencies.to(device=content.device, dtype=work)  # [1, M|1, W/2]
        return self.turn(content.to(work), self.factors(angles.cos(), angles.sin())).to(content.dtype)


class RopeHandle:
    """The rotary embeddings of a whole model. Raises ``UnsupportedModel`` where one cannot be inverted."""

    def __init__(self, rotary: Any, layer_types: tuple[str, ...], head_dim: int):
        per_type = "layer_type" in inspect.signature(rotary.forward).parameters
        kinds = {kind: kind if per_type else None for kind in layer_types}
        self._layer_types = layer_types
        self._by_type = {}
        for kind, argument in kinds.items():
            if argument is not None and argument not in rotary.rope_type:
                continue  # a kind of layer without RoPE
            rope_type = rotary.rope_type if argument is None else rotary.rope_type[argument]
            if rope_type not in _STATIC_TYPES:
                raise UnsupportedModel(
                    f"its RoPE is of type {rope_type!r}, whose frequencies change with the length of the text; virtual "
                    f"keys need one of {', '.join(_STATIC_TYPES)}"
                )
            self._by_type[kind] = LayerRope(rotary, argument, head_dim)
            _check_pairs(self._by_type[kind], rotary)

    def of(self, layer: int) -> LayerRope:
        """The rotary embedding that ``layer`` uses."""
        return self._by_type[self._layer_types[layer]]

    def rotate(self, content: Tensor, positions: Tensor, layer: int) -> Tensor:
        """Content [R, H, T, D] as the cache of ``layer`` would hold it at ``positions`` [R|1, T]."""
        return self.of(layer).rotate(content, positions)

    def derotate(self, rotated: Tensor, positions: Tensor, layer: int) -> Tensor:
        """The content of what the cache of ``layer`` holds, [R, H, T, D], at ``positions`` [R|1, T]."""
        return self.of(layer).derotate(rotated, positions)

    def attention_scaling(self, layer: int) -> float:
        """The factor s on cosine and sine: 1 except for YaRN."""
        return self.of(layer).attention_scaling


def _check_pairs(rope: LayerRope, rotary: Any) -> None:
    """Compare with the model's own ``apply_rotary_pos_emb`` on numbers, instead of trusting names."""
    apply = getattr(sys.modules[type(rotary).__module__], "apply_rotary_pos_emb", None)
    device = rope.frequencies.device
    positions = torch.tensor([[0, 1, 5]], device=device)
    sample = torch.linspace(-1, 1, 3 * rope.head_dim, device=device).reshape(1, 1, 3, rope.head_dim)
    if apply is not None:
        with torch.inference_mode():
            rotated = sample[..., : rope.width]
            expected, _ = apply(rotated, rotated, *rope.cos_sin(positions, sample.dtype))
            if torch.allclose(rope.rotate(sample, positions)[..., : rope.width], expected, atol=1e-5):
                return
    raise UnsupportedModel(
        f"{type(rotary).__name__} does not rotate dimension i with i + {rope.width // 2}; virtual keys need that form"
    )
