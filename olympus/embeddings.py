"""Vectors of texts for clients: by MiniLM where the settings allow it, and by the served model's own states.

The models are those of the episodic memory (``memory.embedding``), opened at the first request that names them; the
memory keeps one of its own. Neither reads a long text to its end: MiniLM 256 tokens, the served model 128.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from memory.embedding import EngineEmbedding, Matrix, MiniLM, unit_rows
from memory.minilm import ensure_minilm
from olympus.chat_types import ModelNotFound
from olympus.errors import InvalidRequest, OlympusError

if TYPE_CHECKING:  # torch is imported by whoever loads the model
    from memory.embedding import Embedding
    from workspace.engine import Engine

MINILM_ID = "all-minilm-l6-v2"
_AT_ONCE = 16  # texts per pass: they are padded to the longest

Input = str | tuple[int, ...]


class EmbeddingUnavailable(OlympusError):
    """The embedding model could not be fetched or opened; the message says why."""

    status = 503
    code = "embedding_unavailable"


class InvalidInput(InvalidRequest):
    """Token ids that the model does not have, or more dimensions than it has."""

    status = 400


@dataclass(frozen=True, slots=True)
class Embedded:
    """Vectors [N, E] of length 1, the model that made them, and how many tokens the inputs have."""

    model: str
    vectors: Matrix
    tokens: int


class Embeddings:
    """Embeds for clients. Safe to use from all threads."""

    def __init__(
        self,
        choice: Literal["auto", "minilm", "engine", "none"],
        cache_dir: Path,
        engine_provider: Callable[[], Engine],
    ):
        """``choice`` is the memory's: with "engine" and "none" there is no MiniLM, and nothing is fetched."""
        self._with_minilm = choice in ("auto", "minilm")
        self._cache_dir = cache_dir
        self._engine_provider = engine_provider
        self._lock = threading.Lock()
        self._minilm: tuple[Embedding, Any] | None = None
        self._engine: tuple[Embedding, Engine] | None = None

    @property
    def own_models(self) -> tuple[str, ...]:
        """Ids of the models that only embed; the served model does, too."""
        return (MINILM_ID,) if self._with_minilm else ()

    def embed(self, inputs: Sequence[Input], model: str | None = None, dimensions: int | None = None) -> Embedded:
        """Embed texts, or token ids of that model. ``dimensions``: the first ones only, again with length 1.

        Raises ``ModelNotFound``, ``ModelNotReady``, ``EmbeddingUnavailable`` or ``InvalidInput``.
        """
        if self._with_minilm and model in (None, MINILM_ID):
            name, embedding, tokenizer = MINILM_ID, *self._opened_minilm()
            texts, count = _read(
                inputs, tokenizer.get_vocab_size(), tokenizer.decode, lambda text: _ids(tokenizer, text)
            )
        else:
            name, embedding, engine = self._opened_engine(model)
            loaded = engine.loaded
            texts, count = _read(
                inputs,
                loaded.vocabulary_size,
                loaded.tokenizer.decode,
                lambda text: engine.encode(text, after_prefix=True),
            )
        if dimensions is not None and dimensions > embedding.dimension:
            raise InvalidInput(f"dimensions: {name} has {embedding.dimension}, got {dimensions}; ask for fewer")
        parts = [embedding.embed(texts[start : start + _AT_ONCE]) for start in range(0, len(texts), _AT_ONCE)]
        vectors = np.concatenate(parts)  # [N, E]
        return Embedded(name, vectors if dimensions is None else unit_rows(vectors[:, :dimensions]), count)

    def _opened_minilm(self) -> tuple[Embedding, Any]:
        with self._lock:
            if self._minilm is None:
                from tokenizers import Tokenizer

                from workspace.errors import ModelError

                try:
                    folder = ensure_minilm(self._cache_dir)
                except ModelError as error:
                    raise EmbeddingUnavailable(
                        f"{MINILM_ID} cannot be had: {error}; name the served model to embed with its states"
                    ) from error
                self._minilm = MiniLM(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
            return self._minilm

    def _opened_engine(self, model: str | None) -> tuple[str, Embedding, Engine]:
        engine = self._engine_provider()
        name = engine.loaded.name
        shown = Path(name).name if Path(name).expanduser().is_dir() else name
        if model not in (None, name, shown):
            there = " and ".join(repr(item) for item in (*self.own_models, shown))
            raise ModelNotFound(f"the model {model!r} does not embed here; there is {there}")
        with self._lock:
            if self._engine is None or self._engine[1] is not engine:
                self._engine = EngineEmbedding(engine.loaded), engine
            return shown, *self._engine


def _read(
    inputs: Sequence[Input],
    vocabulary: int,
    decode: Callable[[list[int]], str],
    encode: Callable[[str], Sequence[int]],
) -> tuple[list[str], int]:
    """The inputs as texts, and how many tokens they have together."""
    texts, count = [], 0
    for item in inputs:
        if isinstance(item, str):
            texts.append(item)
            count += len(encode(item))
            continue
        outside = next((token for token in item if not 0 <= token < vocabulary), None)
        if outside is not None:
            raise InvalidInput(
                f"input: token id {outside} is outside the model's vocabulary of {vocabulary}; another tokenizer's ids "
                "mean nothing here, send texts (LangChain: check_embedding_ctx_length=False)"
            )
        texts.append(decode(list(item)))
        count += len(item)
    return texts, count


def _ids(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return found
