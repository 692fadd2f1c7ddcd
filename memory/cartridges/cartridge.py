"""A cartridge in memory: the prefix, how many of its slots are frozen, and its manifest.

``make_cartridge`` describes what was trained on a loaded model; ``check_model`` refuses one on any other model.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from memory.cartridges.errors import CartridgeMismatch
from memory.cartridges.manifest import DtypeName, Manifest, digest_of_ids
from workspace.models import LoadedModel
from workspace.prefix import KVPrefix, cache_shape, check_prefix

DTYPES: dict[DtypeName, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True, eq=False)
class Cartridge:
    """Raises ``ValueError`` when prefix and manifest contradict each other.

    ``experience_ids`` are the rows of this history that it was trained on: what marks it stale when one is forgotten.
    They stay here; exports leave them out.
    """

    prefix: KVPrefix
    frozen: int
    manifest: Manifest
    experience_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        manifest, keys = self.manifest, self.prefix.keys[0]
        found = (len(self.prefix.keys), keys.shape[1], keys.shape[3], self.prefix.slots, self.frozen)
        said = (*manifest.shape, manifest.slots, manifest.frozen)
        if found != said:
            raise ValueError(
                f"the tensors have (layers, heads, head size, slots, frozen) {found}, the manifest says {said}"
            )
        if self.experience_ids and digest_of_ids(self.experience_ids) != manifest.experience_ids_sha256:
            raise ValueError("the experience ids are not those that the manifest vouches for")


def make_cartridge(
    loaded: LoadedModel,
    prefix: KVPrefix,
    *,
    domain: str,
    run_id: str | None = None,
    frozen: int = 1,
    parent: str | None = None,
    origin: str | None = None,
    init: Mapping[str, Any] | None = None,
    data_sha256: str | None = None,
    steps: int = 0,
    metrics: Mapping[str, Any] | None = None,
    experience_ids: Sequence[int] = (),
) -> Cartridge:
    """Describe ``prefix``, made for ``loaded``; it gets its id when it is registered.

    Raises ``workspace.errors.PrefixMismatch`` when it is not of the model's shape, ``ValueError`` for other numbers
    that make no sense.
    """
    check_prefix(loaded, prefix)
    ids = tuple(sorted(set(experience_ids)))
    manifest = Manifest(
        domain=domain,
        run_id=run_id,
        parent=parent,
        origin=origin,
        slots=prefix.slots,
        frozen=frozen,
        dtype=dtype_name(prefix.keys[0].dtype),
        init=dict(init or {}),
        data_sha256=data_sha256,
        steps=steps,
        metrics=dict(metrics or {}),
        experience_ids_sha256=digest_of_ids(ids),
        created_at=time.time(),
        **describe_model(loaded),
    )
    return Cartridge(prefix, frozen, manifest, ids)


def describe_model(loaded: LoadedModel) -> dict[str, Any]:
    """The fields of a manifest that the model decides."""
    config, shape = loaded.model.config.get_text_config(), cache_shape(loaded.model)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    layer_types = tuple(getattr(config, "layer_types", None) or ())
    sliding = "sliding_attention" in layer_types
    return {
        "model": loaded.name,
        "model_fingerprint": loaded.fingerprint,
        "tokenizer_sha256": _tokenizer_sha256(loaded.tokenizer),
        "template_sha256": template_sha256(loaded),
        "layers": shape.layers,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "rope": json.loads(json.dumps(dict(rope), default=str)),
        "layer_types": layer_types if len(layer_types) == shape.layers else (),
        "sliding_window": getattr(config, "sliding_window", None) if sliding else None,
    }


def template_sha256(loaded: LoadedModel) -> str | None:
    """Of the chat template: text rendered with another one is not what the cartridge learned to read."""
    template = getattr(loaded.tokenizer, "chat_template", None)
    return None if template is None else hashlib.sha256(str(template).encode()).hexdigest()


def check_model(manifest: Manifest, loaded: LoadedModel) -> None:
    """Raise ``CartridgeMismatch`` unless the cartridge was made for exactly this model, in this dtype."""
    if manifest.model_fingerprint != loaded.fingerprint:
        raise CartridgeMismatch(
            f"the cartridge {manifest.id or manifest.domain} was made for the model {manifest.model} "
            f"(fingerprint {manifest.model_fingerprint[:12]}), but {loaded.name} "
            f"(fingerprint {loaded.fingerprint[:12]}) is loaded; load that model, or distil one for this model. "
            "A model in another dtype has another fingerprint: import the cartridge again to declare it fit"
        )


def dtype_name(dtype: torch.dtype) -> DtypeName:
    """``torch.bfloat16`` as ``bfloat16``. Raises ``ValueError`` for what a cartridge cannot be stored in."""
    for name, known in DTYPES.items():
        if known == dtype:
            return name
    raise ValueError(f"a cartridge is stored in {', '.join(DTYPES)}, not in {str(dtype).removeprefix('torch.')}")


def _tokenizer_sha256(tokenizer: Any) -> str | None:
    if tokenizer is None:
        return None
    digest = hashlib.sha256()
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        digest.update(f"{number}:{token}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
