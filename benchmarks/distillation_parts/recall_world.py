"""The little language of the recall benchmark: names, the values that belong to them, and how a chat about them reads.

A pair is a turn: the user says a name, the assistant answers its value. A history of pairs reads

    <start> k17 <answer> v3 <end> k201 <answer> v40 <end> ...

four tokens a pair, and a question is a name and ``<answer>``. Every token is a whole word, and who has which value is
drawn anew for every history, so nothing but the history says what is right. After a cartridge a text has no
``<start>`` (that lies in its first slot), so half of the training sequences have none.

Not here: the model (``recall_model.py``), cartridges (``recall.py``).

Shapes: B sequences, N pairs, T tokens.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

KEYS, VALUES = 256, 64
SPECIALS = ("<pad>", "<start>", "<answer>", "<end>", "<unknown>")
PAD, START, ANSWER, END = range(4)
FIRST_KEY = len(SPECIALS)
FIRST_VALUE = FIRST_KEY + KEYS
VOCABULARY = FIRST_VALUE + VALUES
TOKENS_PER_PAIR = 4
TEMPLATE = (
    "<start>{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<answer> {{ message['content'] }}<end>"
    "{% else %} {{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<answer>{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word."""
    words = [*SPECIALS, *(f"k{number}" for number in range(KEYS)), *(f"v{number}" for number in range(VALUES))]
    backend = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unknown>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # splits "<end>", which nobody may write
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<start>",
        eos_token="<end>",
        unk_token="<unknown>",
        additional_special_tokens=["<answer>"],
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


@dataclass(frozen=True, eq=False)
class Sequences:
    """Histories that are asked about at once."""

    ids: Tensor  #: [B, T]
    asked: Tensor  #: [Q] places of ``<answer>`` whose next token the history determines


def sequences(
    rows: int, pairs: int, generator: torch.Generator, *, start: bool = True, passes: int = 2, questions: int = 0
) -> Sequences:
    """``rows`` sequences: all pairs once, then ``passes`` - 1 times again, each time in another order.

    From the second time on every value is determined. ``questions`` bounds how many are asked in each further pass
    (0: all of them). Everybody has another value, drawn with replacement; no name has two.
    """
    keys = torch.rand(rows, KEYS, generator=generator).argsort(dim=1)[:, :pairs] + FIRST_KEY  # [B, N]
    values = torch.randint(0, VALUES, (rows, pairs), generator=generator) + FIRST_VALUE
    parts = [torch.full((rows, 1), START)] if start else []
    parts.append(_turns(keys, values))
    for _ in range(1, passes):
        order = torch.rand(rows, pairs, generator=generator).argsort(dim=1)[:, : questions or pairs]
        parts.append(_turns(keys.gather(1, order), values.gather(1, order)))
    ids = torch.cat(parts, dim=1)
    first = int(start) + TOKENS_PER_PAIR * pairs
    return Sequences(ids, torch.arange(first + 1, ids.shape[1], TOKENS_PER_PAIR))


def history(pairs: int, seed: int) -> list[tuple[str, str]]:
    """One history as words, for a chat: ``pairs`` different names and the value of each."""
    chance = random.Random(f"recall {pairs} {seed}")
    return [(f"k{key}", f"v{chance.randrange(VALUES)}") for key in chance.sample(range(KEYS), pairs)]


def _turns(keys: Tensor, values: Tensor) -> Tensor:
    """[B, N] and [B, N] as tokens [B, 4 N]."""
    marks = torch.full_like(keys, ANSWER), torch.full_like(keys, END)
    return torch.stack((keys, marks[0], values, marks[1]), dim=-1).flatten(1)
