"""The ``.pt`` files of the Cartridges library and of Tokasaurus: read without trust, written as they write it.

A dict of four lists of tensors, one per layer: ``frozen_keys``, ``frozen_values`` [1, kv_heads, f, head_dim] and
``trainable_keys``, ``trainable_values`` [1, kv_heads, p - f, head_dim]; older files and Tokasaurus say ``fixed_*``. The
frozen lists are empty where f is 0. The library itself reads f from the wrong axis (``TrainableCache.from_pretrained``:
heads); here it is dim 2. Sources: shizhehe/cartridges ``cartridges/cache.py``, ScalingIntelligence/tokasaurus
``geoff/cartridges``.

Such a file is a pickle. It is only opened with torch's restricted unpickler, which builds tensors and nothing else, and
before that its zip is looked at: no compression, no sizes beyond the file's own. Afterwards names, types, shapes and
values are checked; what is not a plain CPU tensor is refused.
"""

from __future__ import annotations

import contextlib
import threading
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter, ParameterList

from memory.cartridges.cartridge import DTYPES
from memory.cartridges.errors import CartridgeFileInvalid
from memory.cartridges.manifest import DtypeName
from storage import files

_MOST_LAYERS = 1024
_MOST_PICKLE = 8 << 20  # of the structure alone; tensors lie beside it
_PARTS = ("keys", "values")
_SPELLINGS = ("frozen", "fixed")
# torch keeps its list of allowed classes for the whole process; two readers must not undo each other's entry.
_allowing = threading.Lock()


class Slots(NamedTuple):
    """Keys and values of p slots, a tensor [1, kv_heads, p, head_dim] per layer; the first ``frozen`` are frozen."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    frozen: int


def read_torch_file(path: Path) -> Slots:
    """The slots in such a file, in its own dtype. Raises ``CartridgeFileInvalid`` naming it and what is wrong."""
    source = str(path)
    _check_zip(path, source)
    try:
        with _parameter_lists_allowed():
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except Exception as error:  # the unpickler's errors come from half a dozen libraries
        first = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        raise CartridgeFileInvalid(
            source, f"torch's restricted reader refuses it, so it holds more than tensors or is cut off: {first}"
        ) from None
    lists = _four_lists(found, source)
    trainable = {part: lists[f"trainable_{part}"] for part in _PARTS}
    frozen = {part: lists[f"frozen_{part}"] for part in _PARTS}
    layers = len(trainable["keys"])
    if not 1 <= layers <= _MOST_LAYERS or len(trainable["values"]) != layers:
        raise CartridgeFileInvalid(
            source, f"trainable_keys has {layers} layers and trainable_values {len(trainable['values'])}"
        )
    if {len(frozen["keys"]), len(frozen["values"])} not in ({layers}, {0}):
        raise CartridgeFileInvalid(
            source,
            f"frozen lists have {len(frozen['keys'])} and {len(frozen['values'])} layers; both must have {layers}, "
            "or none where nothing is frozen",
        )
    _check_tensors(lists, path.stat().st_size, source)
    count = int(frozen["keys"][0].shape[2]) if frozen["keys"] else 0
    joined = {part: _joined(frozen[part], trainable[part]) for part in _PARTS}
    return Slots(joined["keys"], joined["values"], count)


def write_torch_file(
    path: Path, keys: Sequence[Tensor], values: Sequence[Tensor], frozen: int, dtype: DtypeName = "bfloat16"
) -> None:
    """Write such a file, durably and whole. With ``frozen`` 0 the frozen lists are empty, as the library has it.

    Raises ``ValueError`` for tensors that are no prefix or not finite.
    """
    slots = keys[0].shape[2] if keys else 0
    if len(keys) != len(values) or not 0 <= frozen <= slots or slots < 1:
        raise ValueError(f"{len(keys)} layers of keys, {len(values)} of values, {slots} slots, {frozen} frozen")
    content: dict[str, ParameterList] = {}
    for part, tensors in (("keys", keys), ("values", values)):
        if any(tensor.ndim != 4 or tensor.shape != keys[0].shape or tensor.shape[0] != 1 for tensor in tensors):
            raise ValueError(f"all {part} must be {list(keys[0].shape)} with one row")
        if not all(bool(tensor.isfinite().all()) for tensor in tensors):
            raise ValueError(f"the {part} hold NaN or infinity")
        cast = [tensor.detach().to("cpu", DTYPES[dtype]) for tensor in tensors]
        fixed = [item[:, :, :frozen] for item in cast] if frozen else []
        content[f"frozen_{part}"] = _parameters(fixed, requires_grad=False)
        content[f"trainable_{part}"] = _parameters([item[:, :, frozen:] for item in cast], requires_grad=True)
    with files.publish_file(path) as partial:
        torch.save(content, partial)


def _parameters(tensors: Sequence[Tensor], *, requires_grad: bool) -> ParameterList:
    # A copy each: a slice would be saved with the whole tensor behind it.
    return ParameterList([Parameter(tensor.clone(), requires_grad=requires_grad) for tensor in tensors])


def _check_zip(path: Path, source: str) -> None:
    """A torch file is a zip of stored entries; anything else is refused before torch sees it."""
    try:
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (OSError, zipfile.BadZipFile, ValueError, EOFError, RuntimeError) as error:
        raise CartridgeFileInvalid(
            source, f"not a file that torch.save writes since version 1.6 (a zip), or cut off: {error}"
        ) from None
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CartridgeFileInvalid(source, "it holds compressed entries, which torch.save never writes")
    if sum(entry.file_size for entry in entries) > size:
        raise CartridgeFileInvalid(source, f"its entries claim more bytes than the file has ({size:,})")
    pickles = [entry for entry in entries if entry.filename.endswith("data.pkl")]
    if len(pickles) != 1 or pickles[0].file_size > _MOST_PICKLE:
        raise CartridgeFileInvalid(source, "it has no data.pkl of a reasonable size")


@contextlib.contextmanager
def _parameter_lists_allowed() -> Iterator[None]:
    with _allowing, torch.serialization.safe_globals([ParameterList]):
        yield


def _four_lists(found: Any, source: str) -> dict[str, list[Tensor]]:
    """The lists by the newer names. Raises ``CartridgeFileInvalid``."""
    if not isinstance(found, dict):
        raise CartridgeFileInvalid(source, f"it holds a {type(found).__name__}, expected a dict of four lists")
    names = {str(name)[:40] for name in found}
    for spelling in _SPELLINGS:
        if names == {f"{kind}_{part}" for kind in (spelling, "trainable") for part in _PARTS}:
            break
    else:
        raise CartridgeFileInvalid(
            source,
            f"it has {', '.join(sorted(names)[:8]) or 'nothing'}; expected trainable_keys, trainable_values, and "
            "frozen_keys and frozen_values (or fixed_*)",
        )
    return {
        f"{'frozen' if kind == spelling else kind}_{part}": _list(found[f"{kind}_{part}"], f"{kind}_{part}", source)
        for kind in (spelling, "trainable")
        for part in _PARTS
    }


def _list(value: Any, name: str, source: str) -> list[Tensor]:
    if type(value) is ParameterList:  # its own methods are not called: whoever wrote the file chose its state
        own = vars(value).get("_parameters")
        if not isinstance(own, Mapping) or not all(str(key).isdecimal() for key in own):
            raise CartridgeFileInvalid(source, f"{name} is no plain ParameterList")
        items: list[Any] = [own[key] for key in sorted(own, key=int)]
    elif type(value) in (list, tuple):
        items = list(value)
    else:
        raise CartridgeFileInvalid(source, f"{name} is a {type(value).__name__}, expected a list of tensors")
    if not all(type(item) in (Tensor, Parameter) for item in items):
        raise CartridgeFileInvalid(source, f"{name} holds something that is no tensor")
    return [item.detach() for item in items]


def _check_tensors(lists: Mapping[str, Sequence[Tensor]], size: int, source: str) -> None:
    first = lists["trainable_keys"][0]
    claimed = 0
    for name, tensors in lists.items():
        slots = tensors[0].shape[2] if tensors and tensors[0].ndim == 4 else 0
        other = lists[name.replace("keys", "values") if "keys" in name else name.replace("values", "keys")]
        for layer, tensor in enumerate(tensors):
            where = f"{name}[{layer}]"
            if tensor.device.type != "cpu" or tensor.layout != torch.strided or tensor.dtype not in DTYPES.values():
                raise CartridgeFileInvalid(
                    source, f"{where} is {tensor.dtype} on {tensor.device}; expected {', '.join(DTYPES)} on a CPU"
                )
            if tensor.ndim != 4 or tensor.shape[0] != 1 or tensor.dtype != first.dtype:
                raise CartridgeFileInvalid(
                    source,
                    f"{where} is {tensor.dtype} {list(tensor.shape)}; expected {first.dtype} [1, kv_heads, slots, "
                    "head_dim]",
                )
            if tensor.shape[1] != first.shape[1] or tensor.shape[3] != first.shape[3] or tensor.shape[2] != slots:
                raise CartridgeFileInvalid(
                    source, f"{where} is {list(tensor.shape)}, but {list(first.shape)} stands in trainable_keys[0]"
                )
            if tensor.shape != other[layer].shape:
                raise CartridgeFileInvalid(source, f"{where}: keys and values have different shapes")
            claimed += tensor.numel() * tensor.element_size()
    if claimed > size:  # views that repeat a few bytes: harmless to load, not to copy
        raise CartridgeFileInvalid(source, f"its tensors claim {claimed:,} bytes, the file has {size:,}")
    if (
        first.shape[1] < 1
        or first.shape[3] < 1
        or not any(tensors and tensors[0].shape[2] for tensors in lists.values())
    ):
        raise CartridgeFileInvalid(source, "it has no slots")
    for name, tensors in lists.items():
        for layer, tensor in enumerate(tensors):
            if not bool(tensor.isfinite().all()):
                raise CartridgeFileInvalid(source, f"{name}[{layer}] holds NaN or infinity")


def _joined(frozen: Sequence[Tensor], trainable: Sequence[Tensor]) -> tuple[Tensor, ...]:
    if not frozen:
        return tuple(tensor.contiguous() for tensor in trainable)
    return tuple(torch.cat(pair, dim=2) for pair in zip(frozen, trainable, strict=True))
