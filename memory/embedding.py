"""From a text to a vector of length 1 whose cosine with another says how near two meanings are.

Two models: all-MiniLM-L6-v2 (22 million parameters, trained for exactly this; ``memory.minilm`` fetches it), and the
served model itself, whose hidden states are averaged over the tokens. A language model's states lie in a narrow cone
(Ethayarajh 2019, arXiv 1909.00512), a few of its coordinates larger than all others: each is measured against its mean
and its spread over a few unrelated sentences. The same sentences tell each model's ``floor``: what the cosine of two
texts is that have nothing to do with each other.

Both may be asked by several threads at once, beside a generation too. Not here: when texts are embedded
(``memory.episodic``), and where vectors are kept (``memory.episodic_store``).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from memory import minilm

if TYPE_CHECKING:  # torch and transformers are imported when a model is opened
    from workspace.download import Progress
    from workspace.models import LoadedModel

Matrix = NDArray[np.float32]

_MOST_TOKENS = 256  # MiniLM was trained on no more
_ENGINE_TOKENS = 128
#: Share of the layers below the states that are used: of all layers of SmolLM2-135M those around the eighth of 30 tell
#: the intents of banking77 apart best (precision@10 0.586 of 600 messages of 20 intents; the last one 0.540).
_ENGINE_DEPTH = 0.26
_FLOOR_QUANTILE = 0.99

#: Sentences about different things, in the ways in which people write.
REFERENCE = (
    "The ferry to the island leaves at half past six in the morning.",
    "How do I sort a list of dictionaries by one of their keys?",
    "Her grandmother taught her to knit when she was five.",
    "The central bank raised its interest rate by a quarter of a point.",
    "Preheat the oven and butter a deep baking dish.",
    "My phone does not charge any more since I dropped it.",
    "Mitochondria turn nutrients into energy that the cell can use.",
    "Please translate this letter into Spanish.",
    "The referee gave a penalty in the last minute of the match.",
    "What is the difference between a comet and an asteroid?",
    "He tuned the old piano before the guests arrived.",
    "The treaty ended a war that had lasted thirty years.",
    "I would like to cancel my subscription from next month on.",
    "Glaciers carve valleys with a round floor and steep walls.",
    "Our puppy chews every shoe that it can find.",
    "Write a short poem about autumn leaves.",
    "The tenant must give notice three months before moving out.",
    "A triangle with sides three, four and five has a right angle.",
    "Traffic on the ring road is slow because of road works.",
    "She planted tomatoes along the southern wall of the garden.",
    "Which vaccine do I need before I travel to Brazil?",
    "The novel tells the story of a lighthouse keeper and his son.",
    "Restart the router and wait until the green light stays on.",
    "Bees find their way by the position of the sun.",
)


class Embedding(Protocol):
    """A model that embeds. ``name`` identifies its weights: vectors of other names are not compared with its own."""

    @property
    def name(self) -> str:
        """At most 96 characters."""

    @property
    def dimension(self) -> int:
        """E."""

    @property
    def floor(self) -> float:
        """The cosine that hardly any two unrelated texts reach."""

    def embed(self, texts: Sequence[str]) -> Matrix:
        """[N, E], float32, rows of length 1."""


class MiniLM:
    """all-MiniLM-L6-v2 as its authors use it: mean over the tokens, then length 1. On the CPU, float32."""

    name = minilm.NAME

    def __init__(self, folder: Path):
        from workspace.heavy import import_models

        import_models()
        import torch
        from safetensors.torch import load_file
        from tokenizers import Tokenizer
        from transformers import BertConfig, BertModel

        self._torch = torch
        self._tokenizer: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.enable_truncation(_MOST_TOKENS)
        self._tokenizer.enable_padding()
        self._model: Any = BertModel(BertConfig.from_json_file(folder / "config.json"), add_pooling_layer=False)
        weights = load_file(folder / "model.safetensors")
        used = self._model.state_dict().keys() & weights.keys()  # the file also has a pooler that nobody trained
        self._model.load_state_dict({name: weights[name] for name in used})
        self._model.eval().requires_grad_(False)
        self.dimension = int(self._model.config.hidden_size)
        self.floor = floor_of(self.embed(REFERENCE))

    def embed(self, texts: Sequence[str]) -> Matrix:
        """See ``Embedding``."""
        torch = self._torch
        encoded = self._tokenizer.encode_batch(list(texts))
        ids = torch.tensor([item.ids for item in encoded])
        mask = torch.tensor([item.attention_mask for item in encoded])
        with torch.inference_mode():
            states = self._model(input_ids=ids, attention_mask=mask).last_hidden_state  # [N, T, E]
            weights = mask[:, :, None].to(states.dtype)
            means = (states * weights).sum(1) / weights.sum(1)
        return unit_rows(means.numpy())


class EngineEmbedding:
    """Hidden states of the served model between its layers, averaged over the tokens; see the module docstring.

    Nothing is changed on the model, and a call without a workspace is the stock model.
    """

    def __init__(self, loaded: LoadedModel):
        import torch

        self._torch, self._loaded = torch, loaded
        text_config = loaded.model.config.get_text_config()
        self._layer = max(1, round(int(text_config.num_hidden_layers) * _ENGINE_DEPTH))
        self.dimension = int(text_config.hidden_size)
        self.name = f"engine-{loaded.fingerprint}-{self._layer}"
        self._tokenizing = threading.Lock()
        reference = self._states(REFERENCE)
        self._mean, self._spread = reference.mean(axis=0), reference.std(axis=0) + 1e-6
        self.floor = floor_of(self.embed(REFERENCE))

    def embed(self, texts: Sequence[str]) -> Matrix:
        """See ``Embedding``."""
        return unit_rows((self._states(texts) - self._mean) / self._spread)

    def _states(self, texts: Sequence[str]) -> Matrix:
        """[N, E], each of length 1. One text at a time: no token is wasted on padding."""
        torch, loaded = self._torch, self._loaded
        rows: list[Matrix] = []
        for text in texts:
            with self._tokenizing:
                ids = loaded.tokenizer.encode(text or " ", add_special_tokens=False)[:_ENGINE_TOKENS]
            with torch.inference_mode():
                out = loaded.model(
                    input_ids=torch.tensor([ids or [0]], device=loaded.device),
                    use_cache=False,
                    output_hidden_states=True,
                    logits_to_keep=1,
                )
                rows.append(out.hidden_states[self._layer][0].float().mean(0).cpu().numpy())
        return unit_rows(np.stack(rows)) if rows else np.zeros((0, self.dimension), np.float32)


def open_minilm(cache_dir: Path, *, progress: Progress | None = None, stop: threading.Event | None = None) -> MiniLM:
    """MiniLM, fetched now if it is not there. Raises what ``ensure_minilm`` raises."""
    return MiniLM(minilm.ensure_minilm(cache_dir, progress=progress, stop=stop))


def unit_rows(matrix: Any) -> Matrix:
    """``matrix`` [N, E] with rows of length 1; a row of zeros stays one."""
    rows = np.asarray(matrix, np.float32)
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12), np.float32)


def floor_of(reference: Matrix) -> float:
    """The cosine below which all but a hundredth of the pairs of ``reference`` [N, E] lie, which are unrelated."""
    cosines = (reference @ reference.T)[np.triu_indices(len(reference), 1)]
    return float(np.quantile(cosines, _FLOOR_QUANTILE))
