"""What a loaded model really occupies, and whether that is what its configuration claims.

A loader can be told "4-bit", say nothing, and leave most of a model as it was: bitsandbytes does not see experts that
are fused into one tensor (bitsandbytes-foundation/bitsandbytes#1849), which for gpt-oss-20b are 38 of 42 GB. So the
bytes are counted after loading, and a claim that they contradict is an error.

Counted are parameters, buffers, and tensors that kernels keep beside them (MXFP4 experts are no parameters). Not
counted: caches, activations, and what the allocator holds in reserve.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.quantizers.quantizers_utils import should_convert_module

from workspace.errors import UnsupportedModel

#: Share of the bytes of what was to be quantised that may still be full numbers: layers of odd shapes, a router.
_TOLERATED = 0.25
_FULL_BITS = 16
_PACKED_ATTRIBUTES = ("gate_up_proj", "down_proj")  # of transformers' MXFP4 experts


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes in memory by number type; ``offloaded`` bytes are on disk and come when they are needed."""

    by_dtype: Mapping[str, int]
    offloaded: int = 0

    @property
    def resident(self) -> int:
        """Bytes in memory."""
        return sum(self.by_dtype.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{_shown(size)} {name}" for name, size in sorted(self.by_dtype.items()))
        disk = f", and {_shown(self.offloaded)} on disk" if self.offloaded else ""
        return f"{_shown(self.resident)} resident ({parts}){disk}"


@dataclass(frozen=True, slots=True)
class Claim:
    """What a quantisation configuration promises."""

    method: str
    bits: int
    exempt: tuple[str, ...] = ()  #: patterns of module names that stay as they are

    def covers(self, name: str) -> bool:
        """True when the parameter ``name`` ought to be quantised."""
        return bool(should_convert_module(name.rpartition(".")[0], list(self.exempt)))


def measure(model: Any) -> Footprint:
    """Count the bytes of ``model``; shared tensors once."""
    sizes: Counter[str] = Counter()
    offloaded = 0
    for _, tensor in _tensors(model):
        if tensor.device.type == "meta":
            offloaded += tensor.nbytes
        else:
            sizes[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
    return Footprint(dict(sizes), offloaded)


def claim_of(config: Any) -> Claim | None:
    """What the configuration of a loaded model claims; None when it claims nothing that can be checked."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None

    def option(key: str) -> Any:
        return found.get(key) if isinstance(found, Mapping) else getattr(found, key, None)

    method = str(getattr(option("quant_method"), "value", option("quant_method")))
    bits = option("bits")
    if method == "mxfp4":
        bits = None if option("dequantize") else 4
    elif option("load_in_4bit"):
        bits = 4
    elif option("load_in_8bit"):
        bits = 8
    if not isinstance(bits, int) or bits >= _FULL_BITS:
        return None
    exempt = option("modules_to_not_convert") or option("llm_int8_skip_modules") or ()
    return Claim(method, bits, tuple(exempt))


def check_claim(name: str, model: Any) -> Footprint:
    """Measure ``model`` and compare with what it claims. Raises ``UnsupportedModel`` for a false claim."""
    footprint = measure(model)
    claim = claim_of(model.config)
    if claim is None:
        return footprint
    ends = {id(layer.weight) for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer}
    full: Counter[str] = Counter()
    packed = 0
    for path, tensor in _tensors(model):
        if tensor.dim() < 2 or id(tensor) in ends or not claim.covers(path):
            continue
        if tensor.is_floating_point() and tensor.element_size() * 8 >= _FULL_BITS:
            full[path.rpartition(".")[2]] += tensor.nbytes
        else:
            packed += tensor.nbytes
    left = full.total()
    if left > _TOLERATED * (left + packed):
        largest = ", ".join(f"{leaf} ({_shown(size)})" for leaf, size in full.most_common(3))
        raise UnsupportedModel(
            f"{name} claims to be quantised to {claim.bits} bits ({claim.method}), but {_shown(left)} of the "
            f"{_shown(left + packed)} that this would concern are full numbers: {largest}. In all {footprint}. "
            "The loader left them out; use weights in another format (gpt-oss: MXFP4), or load without quantisation"
        )
    return footprint


def _tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of a model with their names, each once."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        held = {**module._parameters, **module._buffers}
        for leaf in _PACKED_ATTRIBUTES:
            held.update({f"{leaf}.{kind}": tensor for kind, tensor in _packed(module, leaf)})
        for leaf, tensor in held.items():
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield f"{path}.{leaf}" if path else leaf, tensor


def _packed(module: Any, leaf: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of transformers' MXFP4 experts: Triton's wrapper around the numbers, and their scales beside it."""
    wrapper = vars(module).get(leaf)
    scales = getattr(vars(module).get(f"{leaf}_precision_config"), "weight_scale", None)
    for kind, held in (("blocks", wrapper), ("scales", scales)):
        tensor = getattr(getattr(held, "storage", None), "data", None)
        if isinstance(tensor, torch.Tensor):
            yield kind, tensor


def _shown(size: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"
