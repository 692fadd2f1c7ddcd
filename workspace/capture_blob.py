"""One captured text: what the frozen model saw of it and what it would say next, as one safetensors file.

A text is N tokens; the first ``prompt_tokens`` are its prompt, the other T its answer (or continuation). Tensors:

    input_ids, attention_mask  [N]          the mask is all ones: one text, no padding
    probe_positions            [P]          where the residuals were read, rising
    residuals.<layer>          [P, hidden]  residual stream after attention, before the workspace, in the model's dtype
    top_ids, top_logprobs      [T, k]       the k most probable tokens for each answer token, natural logarithms
    logsumexp                  [T]          so that logit = log-probability + logsumexp
    logits                     [T, V]       instead of those three, where all logits were asked for
    statistics                 [T, 4]       entropy, best probability, its lead, surprise of the true token (signals.py)
    births                     [B]          positions from which a broadcast was visible: the first is the prompt's end
    updates                    [U]          positions before which the slots were written
    slots                      [S, W]       after the prompt, by the modules that captured
    plan_energy                [L, 2]       mean norms of the virtual keys and values of the first broadcast

Everything else is JSON in the header. Logits are those of the model without its workspace. There is no pickle in it;
blobs of other programs may be ``.pt`` files with the same names (``residuals`` a dict by layer, ``metadata`` a dict),
which are read by torch's ``weights_only`` loader. Every error names the file.

Not here: making a blob (``capture.py``) and which blobs there are (``capture_folder.py``).
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Never

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from workspace.errors import BlobDamaged

SCHEMA = 1
_KEY = "olympus.capture"
_RESIDUALS = "residuals."
#: Tokens kept of each distribution by default: a file then holds 6 bytes for each instead of 98 kB for all.
TOP_K = 64


class BlobMetadata(BaseModel):
    """What the tensors do not say."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    version: int = Field(SCHEMA, alias="schema")
    prompt: str = ""
    seed: int | None = None
    toggles: dict[str, Any] = Field(default_factory=dict)
    prompt_tokens: int = Field(ge=1)
    kind: str = "text"
    model: str = ""
    fingerprint: str | None = None
    delta_first: int | None = Field(None, description="Position from which deltas acted; none: they did not.")


@dataclass(frozen=True, slots=True, eq=False)
class Teacher:
    """What the model would have said at each answer token, with its whole context: the k most probable tokens."""

    ids: Tensor  #: [T, k] int64, most probable first
    logprobs: Tensor  #: [T, k] float32
    logsumexp: Tensor  #: [T] float32


@dataclass(frozen=True, slots=True, eq=False)
class Blob:
    """A captured text; one that exists is whole and finite. Shapes: see the module docstring."""

    metadata: BlobMetadata
    input_ids: Tensor  #: [N] int64
    probe_positions: Tensor  #: [P] int64
    residuals: dict[int, Tensor]  #: layer -> [P, hidden]
    teacher: Teacher | None = None
    statistics: Tensor | None = None  #: [T, 4] float32
    births: Tensor | None = None  #: [B] int64
    updates: Tensor | None = None  #: [U] int64
    slots: Tensor | None = None  #: [S, W]
    plan_energy: Tensor | None = None  #: [L, 2]

    @property
    def tokens(self) -> int:
        """N"""
        return int(self.input_ids.shape[0])

    @property
    def prompt_tokens(self) -> int:
        """Tokens before the answer."""
        return self.metadata.prompt_tokens


def encode_blob(metadata: BlobMetadata, tensors: Mapping[str, Tensor]) -> bytes:
    """The file's bytes. ``tensors`` as in the module docstring, in their small dtypes; equal blobs give equal bytes."""
    return save(
        {name: tensor.contiguous() for name, tensor in sorted(tensors.items())},
        metadata={_KEY: metadata.model_dump_json(by_alias=True)},
    )


def decode_blob(data: bytes, source: str, *, pickled: bool = False) -> Blob:
    """The blob in ``data``; ``pickled``: a ``.pt`` of another program. Raises ``BlobDamaged`` naming ``source``."""
    tensors, metadata = _from_pt(data, source) if pickled else _from_safetensors(data, source)
    try:
        described = BlobMetadata.model_validate(metadata)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise BlobDamaged(f"{source}: its metadata is wrong at {where}: {first['msg']}; capture it again") from None
    if described.version != SCHEMA:
        raise BlobDamaged(f"{source}: schema {described.version}, this version reads {SCHEMA}; capture it again")
    return _Reader(source, tensors, described).blob()


def _from_safetensors(data: bytes, source: str) -> tuple[dict[str, Tensor], Any]:
    try:
        tensors: dict[str, Tensor] = load(data)
        # safetensors has checked this frame but does not hand out the metadata of bytes.
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
        return tensors, json.loads(header[_KEY])
    except (SafetensorError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise BlobDamaged(f"{source} is no captured text ({error!r}); capture it again") from None


def _from_pt(data: bytes, source: str) -> tuple[dict[str, Tensor], Any]:
    try:
        value = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        tensors = {name: item for name, item in value.items() if isinstance(item, Tensor)}
        tensors |= {f"{_RESIDUALS}{layer}": item for layer, item in value["residuals"].items()}
        return tensors, {"prompt_tokens": 0, **value["metadata"]}
    except Exception as error:  # the loader raises whatever the bytes provoke
        said = f"{type(error).__name__}: {error}".split("\n")[0][:160]
        raise BlobDamaged(
            f"{source} is no captured text ({said}); it must be a dict with tensors, residuals by layer and metadata "
            "that holds prompt_tokens"
        ) from None


class _Reader:
    """Checks one file's tensors against each other."""

    def __init__(self, source: str, tensors: Mapping[str, Tensor], metadata: BlobMetadata):
        self._source, self._tensors, self._metadata = source, tensors, metadata

    def blob(self) -> Blob:
        for name, tensor in self._tensors.items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                self._refuse(f"{name} holds NaN or infinity")
        ids = self._integers("input_ids", 1)
        tokens, prompt = ids.shape[0], self._metadata.prompt_tokens
        if prompt >= tokens:
            self._refuse(f"{tokens} tokens with a prompt of {prompt} leave no answer")
        if int(ids.min()) < 0:
            self._refuse("input_ids holds a negative number")
        mask = self._tensors.get("attention_mask")
        if mask is not None and (mask.shape != ids.shape or not bool((mask != 0).all())):
            self._refuse("attention_mask must be ones, as many as tokens: one text without padding")
        residuals = self._residuals()
        count = next(iter(residuals.values())).shape[0]
        return Blob(
            metadata=self._metadata,
            input_ids=ids,
            probe_positions=self._places(count, tokens),
            residuals=residuals,
            teacher=self._teacher(tokens - prompt),
            statistics=self._statistics(tokens - prompt),
            births=self._schedule("births"),
            updates=self._schedule("updates"),
            slots=self._tensors.get("slots"),
            plan_energy=self._tensors.get("plan_energy"),
        )

    def _residuals(self) -> dict[int, Tensor]:
        names = [name for name in self._tensors if name.startswith(_RESIDUALS)]
        found: dict[int, Tensor] = {}
        for name in names:
            layer, tensor = name.removeprefix(_RESIDUALS), self._tensors[name]
            if not layer.isdecimal() or tensor.ndim != 2 or not tensor.is_floating_point() or not tensor.shape[0]:
                self._refuse(f"{name} is {tensor.dtype} {list(tensor.shape)}, not floating point [probes, hidden]")
            found[int(layer)] = tensor
        if not found:
            self._refuse("it has no residuals")
        if len({tensor.shape for tensor in found.values()}) > 1:
            self._refuse("the residuals of its layers have different shapes")
        return dict(sorted(found.items()))

    def _places(self, count: int, tokens: int) -> Tensor:
        """Probe positions; without them, a probe at each token."""
        if "probe_positions" not in self._tensors and count == tokens:
            return torch.arange(tokens)
        places = self._integers("probe_positions", 1)
        rising = bool((places[1:] > places[:-1]).all())
        if places.shape[0] != count or not rising or int(places[0]) < 0 or int(places[-1]) >= tokens:
            self._refuse(f"probe_positions must be {count} rising positions below {tokens}")
        if int(places[0]) >= self._metadata.prompt_tokens:
            self._refuse("no residual was read in the prompt, so there is nothing to broadcast at its end")
        return places

    def _teacher(self, answers: int) -> Teacher | None:
        if "logits" in self._tensors:
            logits = self._tensors["logits"]
            if logits.ndim != 2 or logits.shape[0] != answers:
                self._refuse(f"logits is {list(logits.shape)}, not [{answers}, vocabulary]")
            total = logits.float().logsumexp(dim=-1)  # [T]
            best, ids = logits.float().topk(min(TOP_K, logits.shape[1]), dim=-1)
            return Teacher(ids, best - total[:, None], total)
        if "top_ids" not in self._tensors:
            return None
        ids, logprobs = self._integers("top_ids", 2), self._floats("top_logprobs", 2)
        total = self._floats("logsumexp", 1)
        if ids.shape != logprobs.shape or ids.shape[0] != answers or total.shape[0] != answers:
            self._refuse(f"top_ids {list(ids.shape)}, top_logprobs and logsumexp must have a row for {answers} tokens")
        if bool((logprobs.exp().sum(dim=-1) > 1.01).any()):
            self._refuse("top_logprobs sum to more than 1")
        return Teacher(ids, logprobs, total)

    def _statistics(self, answers: int) -> Tensor | None:
        if "statistics" not in self._tensors:
            return None
        found = self._floats("statistics", 2)
        if found.shape != (answers, 4):
            self._refuse(f"statistics is {list(found.shape)}, not [{answers}, 4]")
        return found

    def _schedule(self, name: str) -> Tensor | None:
        return self._integers(name, 1) if name in self._tensors else None

    def _integers(self, name: str, dimensions: int) -> Tensor:
        tensor = self._named(name, dimensions)
        if tensor.is_floating_point() or tensor.dtype == torch.bool or tensor.is_complex():
            self._refuse(f"{name} is {tensor.dtype}, not integers")
        return tensor.long()

    def _floats(self, name: str, dimensions: int) -> Tensor:
        tensor = self._named(name, dimensions)
        if not tensor.is_floating_point():
            self._refuse(f"{name} is {tensor.dtype}, not floating point")
        return tensor.float()

    def _named(self, name: str, dimensions: int) -> Tensor:
        tensor = self._tensors.get(name)
        if tensor is None:
            self._refuse(f"it lacks {name}")
        if tensor.ndim != dimensions or not tensor.numel():
            self._refuse(f"{name} has shape {list(tensor.shape)}, not {dimensions} dimensions")
        return tensor

    def _refuse(self, problem: str) -> Never:
        raise BlobDamaged(f"{self._source}: {problem}; capture it again")
