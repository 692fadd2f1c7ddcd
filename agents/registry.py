"""Agents by name: what a configuration or a command line says becomes an agent, or a clear refusal."""

from __future__ import annotations

import difflib

from agents.base import AgentConfig, MemoryAgent
from agents.errors import AgentConfigError, UnknownAgent
from agents.experience_log import ExperienceLog
from agents.history_agent import HistoryAgent
from agents.hybrid_agent import HybridKVHistoryAgent, Trigger
from agents.knn_agent import KNNAgent
from agents.kv_memory_agent import KVMemoryAgent
from lm.types import LanguageModel
from memory.kv_cache_memory import KVCacheMemory

#: Name -> what it lives on.
AGENTS = {
    "memoryless": "nothing: the arm that every memory is compared with",
    "history": "the whole history in the prompt",
    "knn": "the nearest experiences in the prompt",
    "kv": "a cartridge",
    "hybrid": "a cartridge and a few experiences; it lives on and is distilled again",
}


def make_agent(
    name: str,
    lm: LanguageModel,
    *,
    log: ExperienceLog | None = None,
    memory: KVCacheMemory | None = None,
    config: AgentConfig | None = None,
    trigger: Trigger | None = None,
    by_server: bool = False,
) -> MemoryAgent:
    """The agent called ``name``. Raises ``UnknownAgent``, or ``AgentConfigError`` for a part that it needs."""
    if name not in AGENTS:
        near = difflib.get_close_matches(name, AGENTS, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UnknownAgent(f"there is no agent called {name!r}{hint}; there are {', '.join(sorted(AGENTS))}")
    if name in ("kv", "hybrid") and memory is None:
        raise AgentConfigError(f"{name} acts with a cartridge: give it a KVCacheMemory")
    if name != "kv" and log is None:
        raise AgentConfigError(f"{name} writes down what it lives through: give it a log")
    if name == "kv":
        assert memory is not None
        return KVMemoryAgent(lm, memory, config, by_server=by_server)
    assert log is not None
    if name == "hybrid":
        assert memory is not None
        return HybridKVHistoryAgent(lm, memory, log, config, trigger=trigger)
    if name == "knn":
        return KNNAgent(lm, log, config)
    return HistoryAgent(lm, log, config, memoryless=name == "memoryless")
