"""The episodic memory as the server runs it: made from the settings, considerate of requests, or switched off.

Not here: how it remembers (``memory.episodic``), and where a chat asks it (``olympus.workbench``).
"""

from __future__ import annotations

from collections.abc import Callable

from memory.episodic import EpisodicMemory, EpisodicOptions
from memory.episodic_follower import Courtesy
from memory.history import History
from olympus.errors import InvalidAction
from olympus.query_gate import be_nice
from settings import Settings
from storage.database import Database


class MemoryDisabled(InvalidAction):
    """The episodic memory is switched off; the settings switch it on."""

    code = "memory_disabled"

    def __init__(self) -> None:
        super().__init__("the episodic memory is switched off (memory.episodic.enabled is false)")


def make_memory(
    settings: Settings, database: Database, history: History, is_busy: Callable[[], bool]
) -> EpisodicMemory | None:
    """The episodic memory that the settings ask for, not started; None when it is off."""
    chosen = settings.memory.episodic
    if not chosen.enabled:
        return None
    options = EpisodicOptions(
        embedding=chosen.embedding,
        index=chosen.index,
        max_entries=chosen.max_entries,
        approximate_from=chosen.approximate_from,
        words_weight=chosen.words_weight,
        cache_dir=settings.model.cache_dir,
    )

    def on_thread() -> None:
        import torch

        be_nice(settings.kernels.niceness)
        torch.set_num_threads(1)  # counts for this thread only

    return EpisodicMemory(
        database,
        history,
        options,
        default_domain=settings.kernels.default_domain,
        embedding_width=settings.workspace.embedding_width,
        courtesy=Courtesy(on_thread, is_busy),
    )
