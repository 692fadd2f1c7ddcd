"""From a name to a loaded, frozen model: a packaged name, a local directory, or a hub id.

Only safetensors are read and code of a repository is never executed. The weights are not changed, and no attribute
of the model is patched; its attention runs under a registered name that can carry a workspace. What it does not do:
download packages (``packaged.py``), or decide how to decode (``engine.py``).
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import inspect
import logging
import re
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from workspace.attention import adopt_attention
from workspace.download import Progress
from workspace.errors import UnknownModel, UnsupportedModel
from workspace.footprint import check_claim
from workspace.harmony_tokens import HarmonyTokens, find_harmony_tokens
from workspace.packaged import PACKAGED, PackagedModel, ensure_packaged
from workspace.placement import DeviceMap, Placement, choose_placement, entrance, offload_dir, stored_values
from workspace.plain_chat import PLAIN_STOP, PLAIN_TEMPLATE
from workspace.quantised import WeightsName, quantise

logger = logging.getLogger(__name__)

DtypeName = Literal["auto", "float32", "bfloat16"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_CONTEXT_KEYS = ("max_position_embeddings", "max_seq_len", "seq_length", "n_positions", "n_ctx")
_SAMPLED_VALUES = 64  # per parameter, in the fingerprint


@dataclass(frozen=True, slots=True)
class ModelSource:
    """What a name stands for. Exactly one of ``packaged``, ``directory``, ``hub_id`` is set."""

    packaged: PackagedModel | None = None
    directory: Path | None = None
    hub_id: str | None = None


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A frozen model in evaluation mode, and what a decode loop has to know about it."""

    name: str
    model: Any  #: a transformers causal LM
    tokenizer: Any  #: its tokenizer, which always has a chat template
    eos_ids: frozenset[int]  #: any of these ends a generation
    context_length: int  #: prompt and answer together, in tokens
    dtype: torch.dtype
    device: torch.device
    fingerprint: str  #: identifies these weights in this dtype and this vocabulary, 32 hex digits
    chat_stop: tuple[str, ...] = ()  #: stop strings that its chat template needs (plain transcripts only)
    harmony: HarmonyTokens | None = None  #: set when it writes the Harmony format (gpt-oss)

    @property
    def vocabulary_size(self) -> int:
        """Number of rows of the embedding: every token id is below it."""
        return int(self.model.get_input_embeddings().weight.shape[0])


def resolve_model(name: str) -> ModelSource:
    """Say what ``name`` stands for without touching the network.

    A packaged name wins; then an existing directory; then anything that looks like ``org/name`` is a hub id.
    Raises ``UnknownModel`` with what is known and the nearest name.
    """
    if name in PACKAGED:
        return ModelSource(packaged=PACKAGED[name])
    path = Path(name).expanduser()
    if name.strip() and path.is_dir():
        if not (path / "config.json").is_file():
            raise UnknownModel(f"the directory {name} has no config.json, so it is not a saved transformers model")
        return ModelSource(directory=path.absolute())
    if _HUB_ID.fullmatch(name) and not path.exists():
        return ModelSource(hub_id=name)
    raise UnknownModel(_unknown(name))


def load_model(
    name: str,
    *,
    cache_dir: Path,
    dtype: DtypeName = "auto",
    weights: WeightsName = "exact",
    device: str = "auto",
    device_map: DeviceMap | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> LoadedModel:
    """Load ``name`` for inference. Packaged weights are fetched and converted below ``cache_dir`` on first use.

    ``device`` and ``device_map`` are explained in ``placement.py``. What the weights occupy is logged, and refused
    when it contradicts their quantisation (``footprint.py``). ``weights`` other than "exact" gives linears packed
    copies that steps of few tokens use (``quantised.py``).

    ``progress(stage, fraction)`` hears the stages of ``ensure_packaged`` and then "loading"; a set ``stop`` cancels a
    download. Raises a ``ModelError``: ``UnknownModel``, ``ModelDownloadFailed``, ``ChecksumMismatch`` or
    ``UnsupportedModel``.
    """
    source = resolve_model(name)
    where = choose_placement(device, device_map, offload_dir=offload_dir(cache_dir, name))
    number_type = _choose_dtype(dtype, where.device)
    common: dict[str, Any] = {"trust_remote_code": False, "local_files_only": source.hub_id is None}
    if source.hub_id is not None:
        common["revision"] = revision
    with _quiet_bars():
        if source.packaged is not None:
            folder: Path | str = ensure_packaged(source.packaged, cache_dir, progress=progress, stop=stop)
        else:
            folder = source.directory or name
        if progress is not None:
            progress("loading", None)
        try:
            model = _load_weights(folder, number_type, where, common)
            tokenizer = AutoTokenizer.from_pretrained(folder, **common)
        except Exception as error:  # a broken file can raise anything from half a dozen libraries
            raise _explain(name, source, error) from error
    logger.info("%s: %s", name, check_claim(name, model))
    loaded = adopt_model(name, model, tokenizer)
    logger.info("%s: %s", name, quantise(name, model, weights))
    return loaded


def adopt_model(name: str, model: Any, tokenizer: Any) -> LoadedModel:
    """Wrap a model that is already in memory (as ``load_model`` does at its end); it is frozen from here on.

    Its attention goes through ``attention.py`` from here on, which by itself changes nothing, to the bit. A tokenizer
    without a chat template is given the plain transcript. Raises ``UnsupportedModel``.
    """
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise UnsupportedModel(f"{name}: {type(model).__name__} has no key-value cache, which the decode loop needs")
    model.eval().requires_grad_(False)
    if not adopt_attention(model):
        logger.info("%s keeps its own attention function, so it cannot carry virtual tokens", name)
    chat_stop: tuple[str, ...] = ()
    if tokenizer.chat_template is None:
        logger.info("%s has no chat template; messages become a plain User/Assistant transcript", name)
        tokenizer.chat_template = PLAIN_TEMPLATE
        chat_stop = PLAIN_STOP
    eos_ids = _eos_ids(model, tokenizer)
    harmony = find_harmony_tokens(tokenizer)
    return LoadedModel(
        name=name,
        model=model,
        tokenizer=tokenizer,
        eos_ids=eos_ids if harmony is None else harmony.ends(eos_ids),
        context_length=_context_length(name, model, tokenizer),
        dtype=model.dtype,
        device=entrance(model),
        fingerprint=_fingerprint(model, tokenizer),
        chat_stop=chat_stop,
        harmony=harmony,
    )


def _load_weights(folder: Path | str, dtype: torch.dtype, where: Placement, common: dict[str, Any]) -> Any:
    """Read the weights in ``dtype`` to their places (``model.to(dtype)`` would round RoPE's frequencies as well)."""
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        use_safetensors=True,
        attn_implementation=_choose_attention(dtype, where.device),
        **where.options,
        **common,
    )


def _choose_attention(dtype: torch.dtype, device: torch.device) -> str | None:
    """Eager for bfloat16 on a CPU; None otherwise: transformers then takes sdpa where the architecture supports it.

    Measured on SmolLM2-135M, 1 thread, EPYC with AVX512_BF16, alternated, medians in ms (eager | sdpa):
    bfloat16 decode after 64 tokens 53 | 48, after 1024 tokens 57 | 81; prefill of 1024 tokens 2128 | 2089.
    float32  decode after 64 tokens 59 | 57, after 1024 tokens 73 | 65; prefill of 1024 tokens 3774 | 3384.
    With 2 threads the two are within the noise of each other for bfloat16 decode (91 | 86 after 1024 tokens).
    """
    return "eager" if device.type == "cpu" and dtype == torch.bfloat16 else None


def _choose_dtype(dtype: DtypeName, device: torch.device) -> torch.dtype:
    """``auto``: bfloat16 where the processor multiplies it natively, else float32.

    On a CPU without AVX512_BF16 or AMX bfloat16 is emulated and slower than float32.
    """
    if dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    if device.type == "cpu":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        native = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float32


def _eos_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Ends of a turn, from everything that names one: chat models often list more than their tokenizer does."""
    found: set[int] = set()
    for holder in (model.generation_config, model.config.get_text_config(), tokenizer):
        value = getattr(holder, "eos_token_id", None)
        if value is not None:
            found.update([int(value)] if isinstance(value, int) else (int(item) for item in value))
    return frozenset(found)


def _context_length(name: str, model: Any, tokenizer: Any) -> int:
    config = model.config.get_text_config()
    for key in _CONTEXT_KEYS:
        value = getattr(config, key, None)
        if isinstance(value, int) and value > 0:
            return value
    if 0 < tokenizer.model_max_length < 1 << 31:  # transformers writes 1e30 for "unknown"
        return int(tokenizer.model_max_length)
    raise UnsupportedModel(f"{name}: neither its config.json nor its tokenizer states a context length; add one")


def _fingerprint(model: Any, tokenizer: Any) -> str:
    """Digest of every parameter's name, shape and ``_SAMPLED_VALUES`` evenly spaced values, and of the vocabulary.

    Cheap enough for every start and the same on every machine; it tells models and fine-tunes apart, but it is not
    proof against somebody who edits single weights on purpose.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = stored_values(model, name).detach().reshape(-1)
        step = max(1, flat.numel() // _SAMPLED_VALUES)
        values = flat[::step][:_SAMPLED_VALUES].to("cpu").contiguous()
        digest.update(f"{name}:{tuple(parameter.shape)}:{parameter.dtype}".encode())
        digest.update(values.view(torch.uint8).numpy().tobytes())
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        digest.update(f"{number}:{token}".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:32]


@contextlib.contextmanager
def _quiet_bars() -> Iterator[None]:
    """No progress bars in log files: they are only for terminals."""
    if (sys.stderr is not None and sys.stderr.isatty()) or not transformers_logging.is_progress_bar_enabled():
        yield
        return
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()


def _explain(name: str, source: ModelSource, error: Exception) -> Exception:
    """Our error for what ``from_pretrained`` raised: not found, or found and unusable."""
    if source.hub_id is not None and isinstance(error, OSError):
        return UnknownModel(f"{_unknown(name)}\nThe hub client said: {error}")
    return UnsupportedModel(f"{name} was found but cannot be loaded (safetensors weights are required): {error}")


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, PACKAGED, n=1)
    return (
        f"unknown model {name!r}{f' (did you mean {near[0]}?)' if near else ''}: known packaged names are "
        f"{', '.join(sorted(PACKAGED))}; otherwise give the path of a local directory, or a hub id such as "
        "openai/gpt-oss-20b (which needs a connection to the hub, or its files in the hub's local cache)"
    )
