"""Environments by name, for configurations and command lines."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path

from agents.environments.associative_recall import AssociativeRecall
from agents.environments.base import Environment
from agents.environments.drifting_conventions import DriftingConventions
from agents.environments.intent_tagging import intent_tagging
from agents.errors import EnvironmentDataError

_MAKERS: dict[str, Callable[[Path | None, int], Environment]] = {
    "intents": lambda folder, seed: intent_tagging(folder, labels="semantic", seed=seed),
    "intents-codes": lambda folder, seed: intent_tagging(folder, labels="codes", seed=seed),
    "associative-recall": lambda folder, seed: AssociativeRecall(seed=seed),
    "drifting-conventions": lambda folder, seed: DriftingConventions(folder, seed=seed),
}
ENVIRONMENTS = tuple(sorted(_MAKERS))


def make_environment(name: str, *, folder: Path | None = None, seed: int = 0) -> Environment:
    """The environment called ``name``; ``folder`` holds banking77, without it messages are made."""
    if name not in _MAKERS:
        near = difflib.get_close_matches(name, _MAKERS, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise EnvironmentDataError(f"no environment is called {name!r}{hint}; there are {', '.join(ENVIRONMENTS)}")
    return _MAKERS[name](folder, seed)
