"""Tokasaurus' packed fingerprint: exact token ids and log-probabilities in ``system_fingerprint``, both directions.

A JSON string with four keys, each a list with one entry per choice: ``completion_ids`` (ids, the ending token
included), ``packed_chosen_logprobs`` (base64 of little-endian float32 [T]), ``packed_topk_indices`` (int32 [T * K]) and
``packed_topk_logprobs`` (float32 [T * K], most probable first). The last three are null when they were not asked for.
Source: ScalingIntelligence/tokasaurus, branch geoff/cartridges. Reading is strict: a trace that is almost right would
teach almost the right thing.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lm.errors import InvalidResponse
from lm.types import Trace

_KEYS = ("completion_ids", "packed_chosen_logprobs", "packed_topk_indices", "packed_topk_logprobs")


def pack(traces: Sequence[Trace], chosen_logprobs: Sequence[Sequence[float]]) -> str:
    """The fingerprint of one answer with a trace (and the chosen tokens' log-probabilities) per choice."""
    return json.dumps(
        {
            "completion_ids": [list(trace.token_ids) for trace in traces],
            "packed_chosen_logprobs": [_base64(np.asarray(row, dtype="<f4")) for row in chosen_logprobs],
            "packed_topk_indices": [_base64(trace.topk_token_ids.astype("<i4")) for trace in traces],
            "packed_topk_logprobs": [_base64(trace.topk_logprobs.astype("<f4")) for trace in traces],
        }
    )


def unpack(fingerprint: object, top_logprobs: int) -> Trace:
    """The trace of the only choice, with ``top_logprobs`` candidates a row. Raises ``InvalidResponse``."""
    found = _parse(fingerprint)
    completions = _only(found["completion_ids"], "completion_ids")
    if not isinstance(completions, list) or not all(type(item) is int and item >= 0 for item in completions):
        raise InvalidResponse("the fingerprint's completion_ids are not token ids")
    length = len(completions)
    ids = _array(found["packed_topk_indices"], "packed_topk_indices", "<i4", length * top_logprobs)
    values = _array(found["packed_topk_logprobs"], "packed_topk_logprobs", "<f4", length * top_logprobs)
    if found["packed_chosen_logprobs"] is not None:  # not needed, but of another length it belongs to another answer
        _array(found["packed_chosen_logprobs"], "packed_chosen_logprobs", "<f4", length)
    shape = (length, top_logprobs)
    return Trace(
        tuple(completions), ids.reshape(shape).astype(np.int32), values.reshape(shape).astype(np.float32, copy=False)
    )


def _parse(fingerprint: object) -> dict[str, Any]:
    if not isinstance(fingerprint, str):
        raise InvalidResponse(f"system_fingerprint must be text, got {type(fingerprint).__name__}")
    try:
        found = json.loads(fingerprint)
    except json.JSONDecodeError:
        raise InvalidResponse(
            f"system_fingerprint holds no packed log-probabilities ({fingerprint[:40]!r}); "
            "is this a Tokasaurus server, started with max_topk_logprobs?"
        ) from None
    if not isinstance(found, dict) or sorted(found) != sorted(_KEYS):
        raise InvalidResponse(f"the fingerprint must have exactly the keys {', '.join(_KEYS)}")
    return found


def _only(entries: object, name: str) -> Any:
    if not isinstance(entries, list) or len(entries) != 1:
        raise InvalidResponse(f"the fingerprint's {name} must have one entry, for the one answer that was asked for")
    return entries[0]


def _array(entries: object, name: str, dtype: str, count: int) -> NDArray[Any]:
    text = _only(entries, name)
    if not isinstance(text, str):
        raise InvalidResponse(f"the fingerprint's {name} is {type(text).__name__}, expected base64")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidResponse(f"the fingerprint's {name} is not base64") from None
    if len(data) != count * np.dtype(dtype).itemsize:
        wanted = count * np.dtype(dtype).itemsize
        raise InvalidResponse(f"the fingerprint's {name} has {len(data)} bytes, its answer needs {wanted}")
    return np.frombuffer(data, dtype=dtype)


def _base64(array: NDArray[Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")
