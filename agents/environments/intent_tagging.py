"""Tag a customer's message with the house's label for its intent.

Two kinds of labels, which ask two different things of a memory. *Semantic* labels are the intents' own names: a long
prompt shows the format, and the message says the rest. *Codes* are arbitrary (``OPS-RED``): only experience tells which
is which, and a model of 135M parameters cannot take it from a long prompt either (docs/distillation.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from agents.environments.base import Split, Task, in_turn, split_texts
from agents.environments.messages import INTENTS, load_banking77, make_messages
from agents.errors import EnvironmentDataError
from memory.distillation.strategies.base import chance

LabelStyle = Literal["semantic", "codes"]
SYSTEM_PROMPT = "Tag the customer's message with one label of this house. Answer with the label only."

_DESKS = ("OPS", "FIN", "CRM", "LOG", "DEV", "HUB", "LAB", "NET", "PAY", "QA", "SEC", "TAX")
_MARKS = ("RED", "OAK", "SKY", "ICE", "SUN", "FOX", "GEM", "JET", "KEY", "MAP", "OWL", "PIN")


def make_codes(classes: Sequence[str], seed: int) -> dict[str, str]:
    """An arbitrary code for each class, different in both parts; another seed, another assignment."""
    if len(classes) > len(_DESKS):
        raise EnvironmentDataError(f"at most {len(_DESKS)} classes have codes, got {len(classes)}")
    desks, marks = list(_DESKS), list(_MARKS)
    chance(seed, "codes", "desks").shuffle(desks)
    chance(seed, "codes", "marks").shuffle(marks)
    return {name: f"{desks[place]}-{marks[place]}" for place, name in enumerate(sorted(classes))}


@dataclass(frozen=True)
class IntentTagging:
    """``texts``: intent -> messages. ``labels``: intent -> what has to be answered. Made by ``intent_tagging``."""

    name: str
    texts: Mapping[str, Sequence[str]]
    labels: Mapping[str, str]
    eval_share: float = 0.3
    seed: int = 0
    system_prompt: str = SYSTEM_PROMPT
    _tasks: dict[Split, list[Task]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if set(self.texts) != set(self.labels) or len(set(self.labels.values())) != len(self.labels):
            raise EnvironmentDataError("every intent needs a label, and no two the same")
        split = split_texts(self.texts, eval_share=self.eval_share, seed=self.seed)
        tasks = {
            side: [Task(text, self.labels[intent], intent) for intent, text in in_turn(texts)]
            for side, texts in split.items()
        }
        object.__setattr__(self, "_tasks", tasks)

    def tasks(self, split: Split) -> Sequence[Task]:
        """See ``Environment``: the intents take turns."""
        return self._tasks[split]

    def evaluation(self, episode: int) -> Sequence[Task]:
        """The same at any time."""
        return self._tasks["eval"]

    def answers(self) -> Sequence[str]:
        """The labels."""
        return sorted(self.labels.values())


def intent_tagging(
    folder: Path | None = None,
    *,
    intents: Sequence[str] = INTENTS,
    labels: LabelStyle = "semantic",
    eval_share: float = 0.3,
    seed: int = 0,
) -> IntentTagging:
    """Messages of banking77 in ``folder``, or made ones without it. Raises ``EnvironmentDataError``."""
    texts = make_messages(intents) if folder is None else load_banking77(folder, intents)
    chosen = {intent: intent for intent in texts} if labels == "semantic" else make_codes(list(texts), seed)
    name = f"intents-{'made' if folder is None else 'banking77'}-{labels}"
    return IntentTagging(name, texts, chosen, eval_share, seed)
