"""Tiny models, and rows of a tiny domain, for tests of cartridge training: everything real but the size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from memory.distillation.config import TrainingConfig
from memory.distillation.encoding import Encoder
from memory.distillation.rows import Row, RowMessage, flatten_topk
from tests.support.architectures import stock_model
from tests.support.tiny_model import save_tiny_model
from workspace.models import LoadedModel, adopt_model

#: Small enough for a test: 16 slots, four rows a step.
TRAINING = TrainingConfig(
    slots=16,
    frozen=1,
    learning_rate=3e-2,
    warmup_steps=2,
    max_steps=12,
    rows=4,
    evaluate_every=4,
    save_every=4,
    max_tokens=64,
)
WORDS = ("fox", "dog", "cat", "cow", "hen", "owl", "bee", "ant")
LABELS = ("Paris", "Bern", "Italy", "France")


def tiny_loaded(
    folder: Path,
    architecture: str = "llama",
    dtype: torch.dtype = torch.float32,
    base: str = "eager",
    **config: Any,
) -> LoadedModel:
    """A random model of 4 layers with a byte-level tokenizer; sliding windows of 8 where it has any."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(save_tiny_model(folder))
    model = stock_model(architecture, base, dtype, vocab_size=len(tokenizer), eos_token_id=1, bos_token_id=0, **config)
    return adopt_model(f"tiny-{architecture}", model, tokenizer)


def gold_rows(count: int = 8, *, shuffled: bool = False, **metadata: Any) -> list[Row]:
    """Questions about animals whose answer is a city; ``shuffled`` breaks what the one has to do with the other."""
    found = []
    for number in range(count):
        word = WORDS[number % len(WORDS)]
        label = LABELS[(number + shuffled * (1 + number // 4)) % len(LABELS)]
        messages = (RowMessage("user", f"{word} {'likes' if number % 2 else 'sees'}"), RowMessage("assistant", label))
        found.append(Row(messages, metadata={"content_key": f"{word}{number}", **metadata}))
    return found


def teacher_row(
    loaded: LoadedModel, memory: Sequence[dict[str, str]], question: str, *, tokens: int = 3, top_k: int = 8
) -> Row:
    """What ``loaded`` says to ``question`` after ``memory``, greedily, with its likeliest tokens."""
    prompt = Encoder(loaded).prompt([*memory, {"role": "user", "content": question}], after_prefix=False)
    ids = list(prompt)
    tops, logs = [], []
    for _ in range(tokens):
        with torch.no_grad():
            logits = loaded.model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
        top = logits.topk(top_k)
        tops.append(top.indices.tolist())
        logs.append(top.values.tolist())
        ids.append(int(top.indices[0]))
    answer = tuple(ids[len(prompt) :])
    content = loaded.tokenizer.decode(answer)
    return Row(
        (
            RowMessage("user", question),
            RowMessage("assistant", content, token_ids=answer, top_logprobs=flatten_topk(tops, logs)),
        ),
        metadata={"content_key": question},
    )
