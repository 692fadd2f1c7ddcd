"""The two prompts of a sample: the teacher's, with memory, and the student's, without.

Two styles, in the words of the original plan's implementation. ``list`` writes all experiences into one user message.
``turns`` makes each observation a user turn, each action an assistant turn and each feedback a user turn; models of
135M parameters follow only that one (9 of 12 against 1 of 12 labels, docs/distillation.md).

Agents that serve with a cartridge use ``student_messages``, so that what was trained is what is asked.

Not here: which experiences are memory (``strategies``), and templates (the engine).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from memory.distillation.answers import corrected_answer, went_wrong
from memory.distillation.errors import ObservationTooLong
from memory.history import EntryType, Record

Style = Literal["turns", "list"]
Message = dict[str, str]
#: Tokens of a prompt, as the teacher's chat template makes them.
Count = Callable[[Sequence[Mapping[str, Any]]], int]

INSTRUCTIONS = (
    "You will be given the previous experiences you've had and their feedback. "
    "You should use this feedback to improve your performance in the subsequent actions."
)
EXPERIENCES = "Here is a list of your previous experiences:"
NO_EXPERIENCES = "No previous experiences."
CURRENT = "Here is the current observation:"
_ROLES: dict[EntryType, str] = {"Observation": "user", "Action": "assistant", "Feedback": "user"}


@dataclass(frozen=True, slots=True)
class Prompt:
    """``included`` are the ids of the experiences in the teacher's prompt; ``dropped`` were too many for it."""

    teacher_messages: list[Message]
    student_messages: list[Message]
    included: tuple[int, ...]
    dropped: int
    tokens: int  #: of the teacher's prompt


@dataclass(frozen=True)
class PromptBuilder:
    """How prompts are made; ``max_tokens`` bounds the teacher's, as ``count`` measures it."""

    style: Style
    system_prompt: str
    count: Count
    max_tokens: int
    apply_corrections: bool = False
    merge_turns: bool = False

    def build(self, observation: str, memory: Sequence[Record], recent: Sequence[Record] = ()) -> Prompt:
        """Both prompts for ``observation``. ``recent`` are experiences that the student is shown as well.

        The oldest experiences are left out until the teacher's prompt fits. Raises ``ObservationTooLong``.
        """
        shown = [as_corrected(record) for record in memory] if self.apply_corrections else list(memory)
        kept, tokens = self._fitting(observation, shown)
        return Prompt(
            teacher_messages=self._teacher(observation, kept),
            student_messages=self.student(observation, recent).student_messages,
            included=tuple(record.id for record in kept),
            dropped=len(shown) - len(kept),
            tokens=tokens,
        )

    def _teacher(self, observation: str, memory: Sequence[Record]) -> list[Message]:
        return teacher_messages(self.style, self.system_prompt, observation, memory, merge_turns=self.merge_turns)

    def student(self, observation: str, recent: Sequence[Record] = ()) -> Prompt:
        """The student's prompt alone, for targets that need no teacher."""
        last = [as_corrected(record) for record in recent] if self.apply_corrections else list(recent)
        messages = student_messages(self.style, self.system_prompt, observation, last, merge_turns=self.merge_turns)
        return Prompt([], messages, (), 0, 0)

    def _fitting(self, observation: str, memory: list[Record]) -> tuple[list[Record], int]:
        """As much of ``memory``, in its order, as fits; and the tokens of that prompt.

        More memory never makes a shorter prompt, so the fewest that must go are found by search, beginning where an
        estimate says: then no prompt much longer than the limit is ever tokenized.
        """
        ages = sorted(record.id for record in memory)
        known: dict[int, int] = {}

        def kept(dropped: int) -> list[Record]:
            gone = set(ages[:dropped])
            return [record for record in memory if record.id not in gone]

        def fits(dropped: int) -> bool:
            if dropped not in known:
                known[dropped] = self.count(self._teacher(observation, kept(dropped)))
            return known[dropped] <= self.max_tokens

        low, high = _bracket(fits, self._guess(memory), len(ages))
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(middle) else (middle + 1, high)
        if not fits(high):
            raise ObservationTooLong(
                f"an observation of {len(observation)} characters makes a prompt of {known[high]} tokens without any "
                f"memory; raise teacher.max_prompt_tokens ({self.max_tokens})"
            )
        return kept(high), known[high]

    def _guess(self, memory: Sequence[Record]) -> int:
        """How many of the oldest to leave out, by estimate."""
        tokens, kept = 0, 0
        for record in sorted(memory, key=lambda item: -item.id):
            tokens += estimate_tokens(_turns([record]))
            if tokens > self.max_tokens:
                break
            kept += 1
        return len(memory) - kept


def _bracket(fits: Callable[[int], bool], guess: int, most: int) -> tuple[int, int]:
    """Bounds of the smallest number that ``fits``, found by growing steps from ``guess``; ``most`` is not asked."""
    step = 1
    if fits(guess):
        high = guess
        while high > 0:
            probe = max(0, high - step)
            if not fits(probe):
                return probe + 1, high
            high, step = probe, 2 * step
        return 0, 0
    low = guess + 1
    while low < most:
        probe = min(most, low + step)
        if probe < most and fits(probe):
            return low, probe
        low, step = probe if probe == most else probe + 1, 2 * step
    return min(low, most), most


def teacher_messages(
    style: Style, system_prompt: str, observation: str, memory: Sequence[Record], *, merge_turns: bool = False
) -> list[Message]:
    """The prompt with ``memory``, in its order, and the observation last."""
    if style == "turns":
        turns = [*_turns(memory), {"role": "user", "content": observation}]
        return _system(system_prompt) + (_merged(turns) if merge_turns else turns)
    lines = [EXPERIENCES]
    lines += [f"{entry.type.upper()}: {entry.content}" for record in memory for entry in record.entries()]
    if not memory:
        lines.append(NO_EXPERIENCES)
    lines += [CURRENT, observation]
    system = f"{system_prompt}\n\n{INSTRUCTIONS}" if system_prompt else INSTRUCTIONS
    return [*_system(system), {"role": "user", "content": "\n\n".join(lines)}]


def student_messages(
    style: Style, system_prompt: str, observation: str, recent: Sequence[Record] = (), *, merge_turns: bool = False
) -> list[Message]:
    """The prompt without memory, or with a few ``recent`` experiences: what a cartridge is attached to."""
    if style == "turns":
        return teacher_messages("turns", system_prompt, observation, recent, merge_turns=merge_turns)
    if recent:
        return teacher_messages("list", system_prompt, observation, recent)
    return [*_system(system_prompt), {"role": "user", "content": f"{CURRENT}\n\n{observation}"}]


def as_corrected(record: Record) -> Record:
    """The experience as it should have been: with the right answer, and without feedback. Unknown: as it was."""
    right = corrected_answer(record)
    if right is None:
        return record
    return replace(record, action=right if went_wrong(record) else record.action, feedback=None)


def estimate_tokens(messages: Sequence[Mapping[str, Any]]) -> int:
    """A ``Count`` for teachers whose tokenizer is elsewhere: high rather than low (3 bytes a token, 8 a turn)."""
    return sum(8 + len(str(message["content"]).encode("utf-8", "replace")) // 3 for message in messages)


def _turns(records: Sequence[Record]) -> list[Message]:
    return [{"role": _ROLES[entry.type], "content": entry.content} for item in records for entry in item.entries()]


def _system(text: str) -> list[Message]:
    return [{"role": "system", "content": text}] if text else []


def _merged(turns: Sequence[Message]) -> list[Message]:
    merged: list[Message] = []
    for turn in turns:
        if merged and merged[-1]["role"] == turn["role"]:
            merged[-1] = {"role": turn["role"], "content": f"{merged[-1]['content']}\n\n{turn['content']}"}
        else:
            merged.append(dict(turn))
    return merged
