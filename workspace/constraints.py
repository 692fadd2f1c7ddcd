"""Answers that fit a grammar: which tokens may come next, as a mask over the vocabulary.

The grammars are compiled and followed by llguidance (Earley parsing over a token trie; Microsoft, MIT licence). A mask
is computed only for generations that have a grammar. The end of the text is possible exactly where the grammar may
end, so an answer that ends by itself fits it; one that was cut off by ``max_tokens`` does not, and says so by its
reason. Compiled grammars are kept; each generation follows a copy of its own.

Between the tokens of JSON there may be one line break and a few blanks: models that may write white space without end
sometimes do. What is asked for in the prompt is not decided here.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer

from workspace.errors import InvalidGrammar, UnsupportedGrammar
from workspace.models import LoadedModel

if TYPE_CHECKING:  # it has a stub only
    from llguidance._lib import JsonCompileOptions

JSON_OPTIONS: JsonCompileOptions = {"whitespace_flexible": True, "whitespace_pattern": r"\n?[ ]{0,8}"}
_KEPT = 64


class Constraint:
    """The way of one generation through a grammar. Used by one thread."""

    def __init__(self, matcher: LLMatcher):
        self._matcher = matcher

    def mask(self, logits: torch.Tensor) -> torch.Tensor:
        """``logits`` [V] with minus infinity for every token that cannot come next; a new tensor."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        allowed = torch.from_numpy(np.unpackbits(bits, count=min(logits.numel(), bits.size * 8), bitorder="little"))
        masked = torch.full_like(logits, -torch.inf)
        places = allowed.nonzero().squeeze(1)
        masked[places] = logits[places]
        return masked

    def advance(self, token: int) -> None:
        """``token`` was chosen."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise UnsupportedGrammar(f"the grammar cannot be followed any further: {self._matcher.get_error()}")


class Grammar:
    """A compiled grammar, shared by all generations that follow it."""

    def __init__(self, matcher: LLMatcher):
        self._matcher = matcher

    def start(self) -> Constraint:
        """At its beginning."""
        return Constraint(self._matcher.deep_copy())


class Grammars:
    """Compiles grammars for one model and keeps the last ones. Safe to use from any thread."""

    def __init__(self, loaded: LoadedModel):
        self._loaded = loaded
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[str, Grammar] = OrderedDict()

    def json_schema(self, schema: Mapping[str, Any], param: str = "response_format") -> Grammar:
        """JSON that fits ``schema``. Raises ``InvalidGrammar`` for ``param``, naming a keyword that cannot be kept."""
        try:
            text = LLMatcher.grammar_from_json_schema(dict(schema), overrides=JSON_OPTIONS)
        except ValueError as error:
            raise InvalidGrammar(param, f"the schema cannot be used: {error}") from error
        return self.compiled(text, param)

    def lark(self, text: str, param: str) -> Grammar:
        """Text that fits a grammar in llguidance's dialect of Lark. Raises ``InvalidGrammar``."""
        return self.compiled(LLMatcher.grammar_from_lark(text), param)

    def compiled(self, text: str, param: str) -> Grammar:
        """A grammar in llguidance's own notation. Raises ``InvalidGrammar``."""
        with self._lock:
            found = self._compiled.get(text)
            if found is not None:
                self._compiled.move_to_end(text)
                return found
            if self._tokenizer is None:
                self._tokenizer = self._open(param)
            tokenizer = self._tokenizer
        matcher = LLMatcher(tokenizer, text, log_level=0)
        if matcher.is_error():
            reason = " ".join(matcher.get_error().split())[:300]
            raise InvalidGrammar(param, f"the schema cannot be used: {reason}")
        grammar = Grammar(matcher)
        with self._lock:
            self._compiled[text] = grammar
            while len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        return grammar

    def check_invariants(self) -> None:
        """Raise ``AssertionError`` if more is kept than should be."""
        with self._lock:
            assert len(self._compiled) <= _KEPT

    def _open(self, param: str) -> LLTokenizer:
        loaded = self._loaded
        if loaded.harmony is not None:
            raise UnsupportedGrammar(f"{loaded.name} writes the Harmony format, which no grammar here describes", param)
        try:
            ends = sorted(token for token in loaded.eos_ids if token < loaded.vocabulary_size)
            return from_tokenizer(loaded.tokenizer, n_vocab=loaded.vocabulary_size, eos_token=ends)
        except (ValueError, RuntimeError) as error:
            raise UnsupportedGrammar(f"the tokenizer of {loaded.name} can follow no grammar: {error}", param) from error


def json_text(value: Any) -> str:
    """``value`` in one line, as it stands in a grammar."""
    return json.dumps(value, ensure_ascii=False)
