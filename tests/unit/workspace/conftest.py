"""Tiny random models of three architectures with a trained byte-level tokenizer: everything real but the size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch._dynamo.utils import counters
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from workspace.engine import Engine
from workspace.models import LoadedModel, adopt_model

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "Paris is the capital of France; Bern is not the capital of Italy.",
    "naïve café, größer, 日本語のテキスト, emoji 👩‍💻 🎉, tabs\tand\nlines",
]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ARCHITECTURES = ("llama", "gemma3", "gpt_oss")


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[[], PreTrainedTokenizerFast]:
    """``make_tokenizer()``: a byte-level BPE tokenizer, trained here, with a chat template and two special tokens."""

    def make() -> PreTrainedTokenizerFast:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(CORPUS, trainer)
        return PreTrainedTokenizerFast(
            tokenizer_object=backend, eos_token="<|im_end|>", bos_token="<|im_start|>", chat_template=TEMPLATE
        )

    return make


def build_model(architecture: str, vocabulary: int) -> Any:
    """A random model of a few ten thousand parameters; sliding windows of 8, so that tests pass their end."""
    torch.manual_seed(7)
    common = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "eos_token_id": 1,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "initializer_range": 0.4,  # spread-out logits: greedy choices are no coin flips
        "attn_implementation": "eager",
    }
    window = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    if architecture == "llama":
        return LlamaForCausalLM(LlamaConfig(**common))
    if architecture == "gemma3":
        return Gemma3ForCausalLM(Gemma3TextConfig(**common, **window))
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return GptOssForCausalLM(GptOssConfig(**common, **window, **experts))


@pytest.fixture(scope="session")
def tiny_models(make_tokenizer: Callable[[], PreTrainedTokenizerFast]) -> dict[str, LoadedModel]:
    """One loaded tiny model per architecture."""
    found = {}
    for architecture in ARCHITECTURES:
        tokenizer = make_tokenizer()
        found[architecture] = adopt_model(f"tiny-{architecture}", build_model(architecture, len(tokenizer)), tokenizer)
    return found


@pytest.fixture(scope="session")
def tiny(tiny_models: dict[str, LoadedModel]) -> LoadedModel:
    """The tiny Llama."""
    return tiny_models["llama"]


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing that was traced before, nor counted, and nothing left behind."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def make_engine() -> Iterator[Callable[..., Engine]]:
    """``make_engine(loaded, **options)``: a started engine; all are stopped and checked at the end of the test."""
    engines: list[Engine] = []

    def make(loaded: LoadedModel, **options: Any) -> Engine:
        engine = Engine(loaded, **{"max_active": 4, "max_waiting": 4, "threads": 1, **options})
        engines.append(engine)
        engine.start()
        return engine

    yield make
    for engine in engines:
        assert engine.stop(timeout=10)
        engine.check_invariants()
