"""Customer messages by intent: banking77 from a folder, or sentences made here where there is none.

banking77: Casanueva et al. 2020, CC BY 4.0; ``train.csv`` and ``test.csv`` with the columns ``text,category``. The made
ones are simple on purpose: they exist so that every environment runs anywhere, not to be hard.
"""

from __future__ import annotations

import csv
import difflib
from collections.abc import Sequence
from pathlib import Path

from agents.errors import EnvironmentDataError

#: Six intents of banking77 that a reader tells apart without knowing the bank.
INTENTS = (
    "card_arrival",
    "cash_withdrawal_charge",
    "exchange_rate",
    "lost_or_stolen_card",
    "passcode_forgotten",
    "top_up_failed",
)

_OPENINGS = (
    "",
    "Hello, ",
    "Hi there. ",
    "Excuse me, ",
    "Please help: ",
    "Good morning. ",
    "Sorry to ask, ",
    "Quick one: ",
)
_CORES: dict[str, tuple[str, ...]] = {
    "card_arrival": (
        "my new card has not come in the post yet",
        "I am still waiting for the card that you sent",
        "how long does it take until the card is delivered",
        "the card was ordered two weeks ago and is not here",
        "can I track the delivery of my card",
    ),
    "cash_withdrawal_charge": (
        "why did I pay a fee at the cash machine",
        "there is a charge for taking out cash",
        "is withdrawing money abroad free of charge",
        "the machine took extra money for my withdrawal",
        "how much do you charge for getting cash",
    ),
    "exchange_rate": (
        "which exchange rate do you use for euros",
        "the rate for my dollars looks wrong",
        "how is the rate between currencies decided",
        "where can I see the exchange rate of today",
        "do you add something on top of the currency rate",
    ),
    "lost_or_stolen_card": (
        "somebody has stolen my card",
        "I lost my card on the train",
        "my card is gone and I want it blocked",
        "a thief took my purse with the card in it",
        "I cannot find my card anywhere",
    ),
    "passcode_forgotten": (
        "I forgot the passcode of the app",
        "how can I reset my passcode",
        "the app does not let me in because I do not know the code",
        "I cannot remember the code to log in",
        "what do I do without my passcode",
    ),
    "top_up_failed": (
        "my top up did not go through",
        "adding money to the account failed",
        "the app refused to top up my balance",
        "why was my top up declined",
        "I tried to add money and nothing happened",
    ),
}


def load_banking77(folder: Path, intents: Sequence[str] = INTENTS) -> dict[str, list[str]]:
    """The messages of ``intents`` from both files, in file order. Raises ``EnvironmentDataError``."""
    found: dict[str, list[str]] = {}
    for name in ("train.csv", "test.csv"):
        path = folder / name
        try:
            with open(path, encoding="utf-8", newline="") as handle:
                for number, row in enumerate(csv.DictReader(handle), start=2):
                    if row.get("text") is None or row.get("category") is None:
                        raise EnvironmentDataError(f"{name}, line {number}: expected the columns text and category")
                    found.setdefault(row["category"], []).append(" ".join(row["text"].split()))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise EnvironmentDataError(f"banking77 is not in this folder: {name}: {error}") from None
    for intent in intents:
        if intent not in found:
            near = difflib.get_close_matches(intent, found, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise EnvironmentDataError(f"banking77 has no intent {intent!r}{hint}")
    return {intent: found[intent] for intent in intents}


def make_messages(intents: Sequence[str] = INTENTS) -> dict[str, list[str]]:
    """40 made sentences for each of ``intents``. Raises ``EnvironmentDataError`` for other than ``INTENTS``."""
    unknown = sorted(set(intents) - set(_CORES))
    if unknown:
        raise EnvironmentDataError(f"no sentences are made for {', '.join(unknown)}; there are {', '.join(_CORES)}")
    return {
        intent: [_sentence(opening, core) for core in _CORES[intent] for opening in _OPENINGS] for intent in intents
    }


def _sentence(opening: str, core: str) -> str:
    joined = opening + (core if opening.endswith((", ", ": ")) else core[0].upper() + core[1:])
    asks = core.split()[0] in {"how", "which", "why", "where", "what", "can", "do", "is"}
    return joined + ("?" if asks else ".")
