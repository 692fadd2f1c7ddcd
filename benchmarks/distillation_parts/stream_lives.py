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

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from agents.base import AgentConfig, MemoryAgent
from agents.environments.base import Environment
from agents.episodes import EpisodeRunner, EpisodesConfig, Score
from agents.experience_log import FileLog, HistoryLog
from agents.registry import make_agent
from lm.engine_client import EngineClient
from memory.history import History
from storage.database import Database
from storage.models import Base
from workspace.engine import Engine

WINDOW = 4
NEIGHBOURS = (8, 4)  #: the second is what the hybrid has beside its cartridge
MAX_TOKENS = 8  #: of an action; the codes have up to six
ARMS = 5


def local_arms(engines: Sequence[Engine], history: History, system_prompt: str) -> dict[str, MemoryAgent]:
    """The arms by name, each with an engine of ``ARMS`` and a domain of ``history`` of its own."""
    config = AgentConfig(system_prompt=system_prompt, max_tokens=MAX_TOKENS, apply_corrections=True)
    whole = config.model_copy(update={"max_prompt_tokens": engines[0].loaded.context_length - MAX_TOKENS})
    first, second, third, *others = (EngineClient(engine, timeout=3600.0) for engine in engines)
    nearest = {}
    for count, lm in zip(NEIGHBOURS, others, strict=True):
        own = config.model_copy(update={"neighbours": count})
        nearest[f"{count} nearest (BM25)"] = make_agent(
            "knn", lm, log=HistoryLog(history, f"nearest-{count}"), config=own
        )
    return {
        "memoryless": make_agent("memoryless", first, log=FileLog("memoryless"), config=config),
        "full history": make_agent("history", second, log=HistoryLog(history, "full"), config=whole),
        f"newest {WINDOW}": make_agent("history", third, log=HistoryLog(history, "window", WINDOW), config=config),
        **nearest,
    }


def live(agent: MemoryAgent, environment: Environment, folder: Path, config: EpisodesConfig) -> list[Score]:
    """One life, with its examinations."""
    runner = EpisodeRunner(agent, environment, folder, config, life=folder.name)
    runner.run()
    return runner.scores()


@contextmanager
def own_history(folder: Path) -> Iterator[History]:
    """An empty history in ``folder``."""
    database = Database(f"sqlite:///{folder / 'lives.db'}")
    Base.metadata.create_all(database.engine)
    try:
        yield History(database)
    finally:
        database.close()
