"""Which tokens of a vocabulary are Harmony's control tokens, and which of them end a generation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from workspace.harmony import Control

_REQUIRED = ("start", "channel", "message")  # a vocabulary that has these speaks Harmony


@dataclass(frozen=True, slots=True)
class HarmonyTokens:
    """Control tokens by id; special tokens without a meaning in the format are "other"."""

    controls: dict[int, Control]
    start: int

    def ends(self, eos_ids: frozenset[int]) -> frozenset[int]:
        """Tokens that end a generation: also ``<|return|>`` and ``<|call|>``, never ``<|end|>``.

        ``<|end|>`` ends a message, after which the same answer goes on; converted models were seen to list it.
        gpt-oss itself lists ``<|return|>``, ``<|endoftext|>`` and ``<|call|>``.
        """
        closing = {number for number, control in self.controls.items() if control in ("return", "call")}
        return (eos_ids | closing) - {number for number, control in self.controls.items() if control == "end"}


def find_harmony_tokens(tokenizer: Any) -> HarmonyTokens | None:
    """The control tokens of a Harmony vocabulary, or None for any other."""
    added = {str(token): int(number) for number, token in tokenizer.added_tokens_decoder.items()}
    if not all(f"<|{name}|>" in added for name in _REQUIRED):
        return None
    controls: dict[int, Control] = {
        int(number): "other" for number, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    for name in get_args(Control):
        if (number := added.get(f"<|{name}|>")) is not None:
            controls[number] = name
    return HarmonyTokens(controls, added["<|start|>"])
