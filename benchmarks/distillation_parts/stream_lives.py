"""The lives that are lived in this process: the same stream, another memory each.

    memoryless   nothing
    full         every experience in the prompt, whose keys and values the engine keeps from one question to the next
    window       the newest few
    nearest      the few whose words are nearest (BM25), out of all

Every arm answers by itself and is told what came of its own answers, so their histories differ in the actions alone.
Prompts show the right answers in place of its own: shown its mistakes with their corrections, this model repeats them
(in a trial of 18 episodes the full history was not right once).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from agents.base import AgentConfig, MemoryAgent
from agents.environments.base import Environment
from agents.episodes import EpisodeRunner, EpisodesConfig, Score
from agents.experience_log import NEWEST, FileLog, HistoryLog
from agents.registry import make_agent
from lm.engine_client import EngineClient
from memory.history import History
from storage.database import Database
from storage.models import Base
from workspace.engine import Engine

WINDOW = 4
NEIGHBOURS = 8
MAX_TOKENS = 12  #: of an action; the codes have up to six


@dataclass(frozen=True)
class Life:
    """What an arm lived through, and the CPU seconds of one answer, its share of everything around it included."""

    scores: list[Score]
    cpu_seconds: float


def local_arms(engine: Engine, history: History, system_prompt: str) -> dict[str, MemoryAgent]:
    """The arms by name; each has a domain of ``history`` of its own, but the memoryless one, which reads nothing."""
    lm = EngineClient(engine, timeout=3600.0)
    config = AgentConfig(
        system_prompt=system_prompt, max_tokens=MAX_TOKENS, neighbours=NEIGHBOURS, apply_corrections=True
    )
    whole = config.model_copy(update={"max_prompt_tokens": engine.loaded.context_length - MAX_TOKENS})

    def agent(name: str, domain: str, config: AgentConfig = config, newest: int = NEWEST) -> MemoryAgent:
        return make_agent(name, lm, log=HistoryLog(history, domain, newest), config=config)

    return {
        "memoryless": make_agent("memoryless", lm, log=FileLog("memoryless"), config=config),
        "full history": agent("history", "full", whole),
        f"newest {WINDOW}": agent("history", "window", newest=WINDOW),
        f"{NEIGHBOURS} nearest (BM25)": agent("knn", "nearest"),
    }


def live(agent: MemoryAgent, environment: Environment, folder: Path, config: EpisodesConfig) -> Life:
    """One life, with its examinations."""
    began = time.process_time()
    runner = EpisodeRunner(agent, environment, folder, config, life=folder.name)
    runner.run()
    scores = runner.scores()
    return Life(scores, (time.process_time() - began) / len(scores))


@contextmanager
def own_history(folder: Path) -> Iterator[History]:
    """An empty history in ``folder``."""
    database = Database(f"sqlite:///{folder / 'lives.db'}")
    Base.metadata.create_all(database.engine)
    try:
        yield History(database)
    finally:
        database.close()
