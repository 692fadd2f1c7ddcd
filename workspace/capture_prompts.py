"""What is to be captured: a file of prompts or texts becomes a numbered list of token sequences.

A ``.txt`` file holds one question per line. A ``.jsonl`` file holds one JSON object per line, one of

    {"prompt": "...", "answer": "..."}         a question; without an answer the model writes one
    {"messages": [...], "answer": "..."}       the same with a conversation
    {"text": "..."}                            running text, cut into windows: context, then what came next

each with an optional ``kind`` (results are told apart by it) and ``split`` ("train", "held_out"). Order and numbers
depend on the file alone, so that a capture that was killed goes on where it was. Nothing is read from the model but
its tokenizer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from workspace.capture_folder import Split
from workspace.errors import InvalidPrompt, PromptsDamaged
from workspace.models import LoadedModel
from workspace.prompting import Prompting


class PromptLine(BaseModel):
    """One line of a file of prompts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str | None = Field(None, min_length=1)
    messages: tuple[Mapping[str, Any], ...] | None = Field(None, min_length=1)
    text: str | None = Field(None, min_length=1)
    answer: str | None = Field(None, min_length=1)
    kind: str = Field("text", min_length=1, max_length=64)
    split: Split = "train"

    @model_validator(mode="after")
    def _one_of_three(self) -> PromptLine:
        if sum(value is not None for value in (self.prompt, self.messages, self.text)) != 1:
            raise ValueError("give exactly one of prompt, messages and text")
        if self.text is not None and self.answer is not None:
            raise ValueError("a text is its own continuation; an answer belongs to a prompt")
        return self


@dataclass(frozen=True, slots=True)
class Item:
    """One text to capture. ``answer_ids`` None: the model is to write the answer."""

    index: int
    kind: str
    split: Split
    prompt: str  #: for people
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...] | None


def read_prompts(path: Path) -> tuple[list[PromptLine], str]:
    """The lines of ``path`` and the SHA-256 of the file. Raises ``PromptsDamaged`` naming file and line."""
    try:
        data = path.read_bytes()
        text = data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptsDamaged(f"{path} cannot be read: {error}") from None
    lines = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            lines.append(PromptLine(prompt=line.strip(), kind="chat"))
            continue
        try:
            lines.append(PromptLine.model_validate_json(line))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise PromptsDamaged(f"{path}, line {number}: {f'{where}: ' if where else ''}{first['msg']}") from None
    if not lines:
        raise PromptsDamaged(f"{path} holds no prompts; write one per line")
    return lines, hashlib.sha256(data).hexdigest()


def items(lines: list[PromptLine], loaded: LoadedModel, *, window: int, context: int, most: int) -> Iterator[Item]:
    """Number the texts of ``lines``. Texts are cut into windows of ``window`` tokens, the first ``context`` of them
    the prompt; a shorter rest is left out. Prompts of more than ``most`` tokens raise ``PromptsDamaged``."""
    prompting = Prompting(loaded)
    end = _end_of_turn(loaded)
    index = 0
    for number, line in enumerate(lines, start=1):
        if line.text is not None:
            ids = [
                int(token) for token in loaded.tokenizer(line.text, add_special_tokens=False, verbose=False).input_ids
            ]
            for start in range(0, len(ids) - window + 1, window):
                piece = ids[start : start + window]
                shown = loaded.tokenizer.decode(piece[:32])
                yield Item(index, line.kind, line.split, shown, tuple(piece[:context]), tuple(piece[context:]))
                index += 1
            continue
        messages = line.messages or ({"role": "user", "content": line.prompt or ""},)
        try:
            prompt_ids = prompting.render(messages)
        except InvalidPrompt as error:
            raise PromptsDamaged(f"prompt {number}: {error}") from None
        answer = None if line.answer is None else prompting.encode(line.answer) + end
        taken = len(prompt_ids) + len(answer or ())
        if taken > most:
            raise PromptsDamaged(f"prompt {number} has {taken} tokens, at most {most} are captured; shorten it")
        shown = str(messages[-1].get("content", ""))
        yield Item(index, line.kind, line.split, shown, tuple(prompt_ids), None if answer is None else tuple(answer))
        index += 1


def _end_of_turn(loaded: LoadedModel) -> list[int]:
    """What the model itself would write after an answer."""
    own = loaded.tokenizer.eos_token_id
    return [own] if own in loaded.eos_ids else sorted(loaded.eos_ids)[:1]
