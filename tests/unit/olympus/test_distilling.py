"""What the pipeline of a server is made of."""

from __future__ import annotations

from typing import Any

from olympus.distilling import token_counter


class _Engine:
    """An engine whose tokenizer is in use; ``encode`` takes its turn with it."""

    def encode(self, text: str, *, after_prefix: bool = False) -> list[int]:
        assert after_prefix, "no beginning of sequence is counted"
        return [1] * len(text.split())

    @property
    def loaded(self) -> Any:
        raise AssertionError("encoding changes settings of the tokenizer, which another thread is encoding with")


def test_triggers_count_tokens_in_their_turn() -> None:
    engine: Any = _Engine()
    count = token_counter(engine)
    assert count("three little words") == 3
    assert count("x" * 40_000) == 10_000
