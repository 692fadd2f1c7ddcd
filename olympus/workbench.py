"""The workspace of the loaded model, as the server uses it: made with the model, asked for each chat, made to forget.

A request that says nothing about the workspace gets the server's default. One that asks for it where the model cannot
have it gets an error that says why; the others are answered by the stock model.

Not here: what the workspace does in a generation (``workspace.run``), and the course of a chat (``chat.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import structlog

from memory.history import History, Record
from memory.latent import LatentSessions
from memory.recall import HistoryRecall, recall_turns
from olympus.chat_types import WorkspaceWish
from olympus.errors import InvalidRequest
from settings import Settings
from storage.database import Database

if TYPE_CHECKING:  # torch is imported by whoever loads the model
    from workspace.models import LoadedModel
    from workspace.recall import Recall, Recollection
    from workspace.run import WorkspaceRun
    from workspace.steering import Steering

log = structlog.get_logger(__name__)

_MEMORY_HEAD = "From earlier conversations, possibly useful:"
#: What all sessions may take in the database; those that were not used for longest leave first.
_STORED_BYTES = 4 << 30


class WorkspaceUnavailable(InvalidRequest):
    """The loaded model has no workspace; ask without ``workspace``."""

    code = "workspace_unavailable"


@dataclass(frozen=True)
class Workbench:
    """The workspace of the loaded model, or why there is none."""

    steering: Steering | None
    reason: str = ""
    latent: LatentSessions | None = None

    def status(self) -> dict[str, Any]:
        """For people: what there is, or why there is nothing."""
        return (
            {"available": False, "reason": self.reason}
            if self.steering is None
            else {"available": True, **self.steering.status()}
        )

    def forget(self, session: str, actor: str) -> None:
        """Remove what a session keeps in virtual tokens, here and in the database."""
        if self.steering is not None:
            self.steering.store.clear(session)
        if self.latent is not None:
            self.latent.forget(session, actor)
        if self.steering is not None:
            self.steering.store.flush(session)

    def close(self) -> None:
        """Save what is not saved yet."""
        if self.steering is not None:
            self.steering.close()

    def run(
        self, wish: WorkspaceWish | None, *, session: str | None, domain: str, question: str
    ) -> WorkspaceRun | None:
        """The workspace for one answer; None: the stock model answers. Raises ``WorkspaceUnavailable``."""
        if self.steering is None:
            if wish is not None and (wish.enabled or wish.compare):
                raise WorkspaceUnavailable(f"the workspace is not available: {self.reason}; leave workspace out")
            return None
        config = self.steering.config
        wish = wish or WorkspaceWish()
        enabled = config.enabled if wish.enabled is None else wish.enabled
        if not (enabled or wish.compare):
            return None
        from workspace.steering_types import Toggles

        chosen = {
            name: getattr(config, name) if getattr(wish, name) is None else getattr(wish, name)
            for name in ("virtual_kv", "residual_delta", "controller", "memory")
        }
        toggles = Toggles(**chosen, trace=wish.trace)
        return self.steering.run(session=session, domain=domain, question=question, toggles=toggles)

    def with_memories(self, messages: Sequence[Mapping[str, Any]], run: WorkspaceRun) -> list[Mapping[str, Any]]:
        """``messages`` with what the question brings to mind, within ``retrieve_tokens``.

        It enters the system message; where the cache is capped, the last user message, and then earlier turns of the
        conversation itself are brought back, too.
        """
        steering = self.steering
        assert steering is not None
        if not run.toggles.memory or steering.config.retrieve_tokens == 0:
            return list(messages)
        capped = steering.config.chunk_size > 0
        turns = _own_turns(steering, messages) if capped else []
        lines = _within(steering, [*turns, *run.recollect()])
        run.report.recollections += [item.source for item in turns]
        if not lines:
            return list(messages)
        text = "\n".join([_MEMORY_HEAD, *lines])
        first, last = messages[0], messages[-1]
        if capped and last["role"] == "user":  # a system message leaves a capped cache with everything else
            return [*messages[:-1], {**last, "content": f"{text}\n\n{last['content']}"}]
        if first["role"] in ("system", "developer"):
            return [{**first, "content": f"{first['content']}\n\n{text}"}, *messages[1:]]
        return [{"role": "system", "content": text}, *messages]


def _own_turns(steering: Steering, messages: Sequence[Mapping[str, Any]]) -> list[Recollection]:
    """Earlier messages of the conversation itself that the last one brings to mind: they may have left the cache."""
    if messages[-1]["role"] != "user":
        return []
    turns = [str(message["content"]) for message in messages[:-1] if message["role"] == "user"]
    return recall_turns(turns, str(messages[-1]["content"]), steering.config.retrieve_items)


def _within(steering: Steering, found: Sequence[Recollection]) -> list[str]:
    """As many recollections, best first, as the budget of tokens has room for; none is cut."""
    left = steering.config.retrieve_tokens - len(steering.loaded.tokenizer.encode(_MEMORY_HEAD))
    lines = []
    for item in found:
        line = "- " + item.text.replace("\n", " ")
        cost = len(steering.loaded.tokenizer.encode(line)) + 1
        if cost <= left:
            lines.append(line)
            left -= cost
    return lines


def make_workbench(
    loaded: LoadedModel, settings: Settings, database: Database, history: History, memory: Recall | None = None
) -> Workbench:
    """Hook the model as the settings say. A workspace that cannot be had is no error: its reason is kept and logged.

    It asks ``memory``; without one, words alone bring back experiences.
    """
    from workspace.errors import InvalidWorkspace, StateError, UnsupportedModel
    from workspace.steering import Steering

    latent = LatentSessions(database, loaded.fingerprint)
    recall = memory or HistoryRecall(history, settings.kernels.default_domain)
    for removed in latent.prune(_STORED_BYTES):
        log.info("removed the virtual tokens of a session", session=removed.session, bytes=removed.size)
    try:
        steering = Steering(loaded, settings.workspace, load=latent.load, save=latent.save, recall=recall)
    except (InvalidWorkspace, UnsupportedModel, StateError) as error:
        log.warning("there is no workspace", reason=str(error))
        return Workbench(None, str(error))
    return Workbench(steering, latent=latent)


def forget_experiences(history: History, workbench: Workbench, *, actor: str, **which: Any) -> int:
    """Delete from the history (``History.delete`` says what ``which`` may be) and what sessions keep of it.

    The virtual tokens of a session cannot be told apart by experience, so they go as a whole.
    """
    sessions = history.sessions_of(**which)
    count = history.delete(actor=actor, **which)
    for session in sessions:
        workbench.forget(session, actor)
    return count


def correct_experience(
    history: History, workbench: Workbench, experience_id: int, *, actor: str, **fields: Any
) -> Record | None:
    """``History.correct``; the virtual tokens of the session, which know what was wrong, go as when it is forgotten."""
    sessions = history.sessions_of(experience_id=experience_id)
    corrected = history.correct(experience_id, actor=actor, **fields)
    for session in sessions if corrected is not None else ():
        workbench.forget(session, actor)
    return corrected
