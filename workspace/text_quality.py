"""How varied a text is, in tokens: repetition within an answer, variety over many. Pure functions.

``repetition`` is seq-rep-n of Welleck et al. (2020): the share of n-grams that occurred before in the same text.
``distinct`` is distinct-n of Li et al. (2016): different n-grams over all n-grams, of all texts together. How probable
a text is under a model is measured in ``answering.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

REPEATED = 4  # n of seq-rep-n, as in the paper


def repetition(tokens: Sequence[int], n: int = REPEATED) -> float:
    """Share of n-grams that repeat an earlier one; 0 for texts that are too short to have two."""
    grams = list(_grams(tokens, n))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(texts: Iterable[Sequence[int]], n: int) -> float:
    """Different n-grams over all n-grams of all texts; 1 where there are none."""
    grams = [gram for tokens in texts for gram in _grams(tokens, n)]
    return len(set(grams)) / len(grams) if grams else 1.0


def _grams(tokens: Sequence[int], n: int) -> Iterable[tuple[int, ...]]:
    if n < 1:
        raise ValueError(f"n-grams need n of at least 1, got {n}")
    return zip(*(tokens[start:] for start in range(n)), strict=False)
