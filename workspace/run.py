"""The workspace in one generation: what each forward pass carries, and what is made of what it showed.

A ``StepContext`` of the engine. Before every pass it hands out an immutable ``Context``; after it, the probes have
recorded the residuals of the hooked layers. After every token the controller decides:

    write      the slots see the residuals since the last time (also every ``update_every`` tokens)
    broadcast  the slots (or, without trained weights, the averaged residuals) become virtual tokens, which replace
               those of the broadcast before
    retrieve   the memory is asked about the last question and the answer so far; what comes back updates the slots,
               and its keys and values become virtual tokens
    halt       the answer ends

Virtual tokens come from five places: trained static ones, the session's own, the last broadcast, the last retrieval,
and what stands in for tokens that left a capped cache (``window.py``). At the end a session keeps the last broadcast
with the probes' view of the end of the answer in it. Nothing here is random.

Not here: how a decision is made (``controller.py``), and what all generations share (``steering.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from workspace.context import Context, Delta, Recorder, Segment
from workspace.controller import Controller, Decision
from workspace.forward import PassiveContext
from workspace.merging import merge_segments
from workspace.projector import LayerKV
from workspace.recall import Recollection
from workspace.slots import SlotUpdate
from workspace.steering_types import Toggles, WorkspaceReport
from workspace.window import ActiveWindow

if TYPE_CHECKING:
    from workspace.steering import Steering

#: Of a chunk of the prompt, so many evenly spaced positions are shown to the slots.
PROMPT_PROBES = 16
#: Tokens of the answer so far that a question to the memory is made of.
_QUERY_TOKENS = 48


class WorkspaceRun(PassiveContext):
    """For one generation; made by ``Steering.run``. ``report`` is complete once the generation has ended."""

    def __init__(self, steering: Steering, session: str | None, domain: str | None, question: str, toggles: Toggles):
        self.report = WorkspaceReport(toggles={name: getattr(toggles, name) for name in _SWITCHES})
        self.report.trace = [] if toggles.trace else None
        self.toggles = toggles
        self._steering, self._toggles = steering, toggles
        self._config = steering.config
        self._session, self._domain, self._question = session, domain, question
        self._window: ActiveWindow | None = None
        self._controller: Controller | None = steering.modules.new_controller() if toggles.controller else None
        self._slots: Tensor = steering.modules.slots.start(1)
        self._pending: list[dict[int, Tensor]] = []  # residuals [1, N, hidden] that the slots have not seen yet
        self._recent: dict[int, Tensor] = {}  # what they saw last, for a heuristic broadcast
        self._last: dict[int, Tensor] = {}  # residuals [1, hidden] of the last token
        self._recorder: Recorder | None = None
        self._fixed: list[Mapping[int, Segment]] = []  # static tokens and the session's
        self._broadcast: dict[int, Segment] = {}
        self._broadcast_kv: LayerKV = {}
        self._retrieved: dict[int, Segment] = {}
        self._merged: tuple[object, dict[int, Segment]] = (None, {})
        self._tokens: list[int] = []
        self._since_update = 0
        self._position = 0  # of the next token
        self._prompt = 0  # where it ends
        self._ended = False

    def recollect(self) -> Sequence[Recollection]:
        """What the question brings to mind before the answer begins; for the prompt. Called by any thread, before."""
        found = self._steering.remember(self._question, session=self._session, domain=self._domain)
        self.report.recollections += [item.source for item in found]
        return found

    def save(self) -> None:
        """What the session keeps survives ``kill -9`` when this returns. After the generation has ended."""
        if self._session is not None and self.report.saved_segment is not None:
            self._steering.flush(self._session)

    # Called by the engine.

    def begin(self, cache: Cache, prompt_ids: Sequence[int]) -> None:
        """Take what the session holds, once: what other requests write meanwhile does not change this answer."""
        self._position = int(cache.get_seq_length())  # after the slots of a prefix
        self._prompt = self._position + len(prompt_ids)
        if self._config.chunk_size and isinstance(cache, DynamicCache):  # the configuration excludes static ones
            self._window = ActiveWindow(
                self._steering.hooked,
                cache,
                self._steering.window_settings,
                correction=self._steering.correction,
                prefix=self._position,
            )
            self.most_tokens = self._window.settings.block
        if self._toggles.virtual_kv:
            self._fixed.append(self._steering.static)
            if self._session is not None and self._toggles.memory:
                self._fixed.append(self._steering.store.view(self._session))
                self.report.session_segments = len(self._steering.store.segments(self._session))

    def forward_kwargs(self, start: int, count: int) -> Mapping[str, Any]:
        """The context of the next pass."""
        self._recorder = self._new_recorder(count)
        return {"workspace": Context(self._segments(count), self._deltas(start), recorder=self._recorder)}

    def fed(self, start: int, count: int) -> None:
        """Note what the probes saw; a capped cache evicts where it is time."""
        self._position = start + count
        recorder = self._recorder
        if self._window is not None:
            self.report.evicted_tokens += self._window.advance(count, recorder)
            self.report.cache_tokens = self._window.held
        else:
            self.report.cache_tokens = self._position
        if recorder is not None:
            shown = _shown(recorder, self._steering.layers, count)
            self._pending.append(shown)
            self._last = {layer: seen[:, -1] for layer, seen in shown.items()}
        if self._position == self._prompt and self._pending:
            self._update_slots()
            self._make_broadcast()

    def chosen(self, logits: Tensor, token: int) -> bool:
        """Decide what to do after ``token``, do it, and say whether the answer ends."""
        self._tokens.append(token)
        self._since_update += 1
        if self._controller is None:
            return False
        decision = self._controller.step(logits, token, self._slots)
        if decision.write or self._since_update >= self._config.update_every:
            self._update_slots()
            self.report.writes += decision.write
        if decision.retrieve and self._toggles.memory:
            self._retrieve()
        if decision.broadcast:
            self._make_broadcast()
        if self.report.trace is not None:
            self.report.trace.append(self._traced(token, decision))
        self.report.halted = decision.halt
        return decision.halt

    def ended(self) -> None:
        """Leave what the session keeps in its store; called once more than once, it does nothing."""
        if self._ended:
            return
        self._ended = True
        if self._session is not None and self._toggles.virtual_kv and self._toggles.memory and self._tokens:
            self._keep(self._session)
        self._window = None
        self._fixed = []

    # What a pass carries.

    def _new_recorder(self, count: int) -> Recorder | None:
        """Residuals of the probed layers, and queries of all hooked ones where the window needs them."""
        queries = None if self._window is None else self._window.recorder(count)
        if queries is not None:
            return Recorder(self._steering.hooked.layers, whole=count > 1, queries=True)
        return Recorder(self._steering.layers, whole=count > 1)

    def _segments(self, count: int) -> dict[int, Segment]:
        if not self._toggles.virtual_kv:
            return {}
        window = {} if self._window is None else self._window.segments(count)
        key = (id(window), id(self._broadcast), id(self._retrieved))
        if self._merged[0] != key or not self._merged[1]:
            sources = [*self._fixed, window, self._retrieved, self._broadcast]
            merged = merge_segments([source for source in sources if source])
            self._merged = (key, merged)
            self._measure(merged)
        return self._merged[1]

    def _deltas(self, start: int) -> dict[int, Delta]:
        """From the slots and the residuals of the token before; none while the prompt is read, however it is cut."""
        modules = self._steering.modules
        if not self._toggles.residual_delta or start < self._prompt or not modules.trained("residual_delta"):
            return {}
        vectors = modules.projector.delta(self._slots, self._last)
        first = torch.tensor([start])
        return {layer: Delta(vector, first) for layer, vector in vectors.items()}

    def _measure(self, merged: Mapping[int, Segment]) -> None:
        report = self.report
        report.virtual_tokens = sum(segment.tokens for segment in merged.values())
        report.kv_bytes = sum(
            segment.keys.nbytes + segment.values.nbytes + segment.bias.nbytes for segment in merged.values()
        )
        if self._toggles.trace or self._config.log_virtual_kv_stats:
            report.norms = {
                layer: (
                    float(segment.keys.float().norm(dim=-1).mean()),
                    float(segment.values.float().norm(dim=-1).mean()),
                )
                for layer, segment in merged.items()
            }

    # What is done with what was seen.

    def _update_slots(self, retrieved: Tensor | None = None) -> None:
        if not self._pending:
            return
        seen = {layer: torch.cat([item[layer] for item in self._pending], dim=1) for layer in self._steering.layers}
        self._pending, self._since_update = [], 0
        self._recent = seen
        update = self._steering.modules.update(seen, self._slots, retrieved)
        if self._toggles.trace:
            self.report.slots = _slot_numbers(update, self._slots)
        self._slots = update.slots
        self.report.slot_updates += 1

    def _make_broadcast(self) -> None:
        if not self._toggles.virtual_kv or not self._recent:
            return
        self._broadcast_kv = self._steering.broadcast(self._slots, self._recent)
        self._broadcast = self._steering.as_segments(self._broadcast_kv, born=self._position)
        self.report.broadcasts += 1

    def _retrieve(self) -> None:
        tail = self._steering.loaded.tokenizer.decode(self._tokens[-_QUERY_TOKENS:], skip_special_tokens=True)
        found = self._steering.remember(f"{self._question}\n{tail}", session=self._session, domain=self._domain)
        self.report.retrievals += 1
        found = [item for item in found if item.source not in self.report.recollections]  # others are known already
        if not found:
            return
        self.report.recollections += [item.source for item in found]
        embeddings = [item.embedding for item in found if item.embedding is not None]
        if embeddings:
            self._update_slots(torch.stack(embeddings)[None])
        if self._toggles.virtual_kv:
            text = "\n".join(item.text for item in found)
            self._retrieved = self._steering.as_segments(self._steering.read(text), born=self._position)

    def _keep(self, session: str) -> None:
        """One segment per request: the slots' last word, with the end of the answer in it."""
        with torch.inference_mode():
            self._update_slots()
            layers = self._steering.broadcast(self._slots, self._recent) if self._recent else {}
        if not layers:
            return
        meta = {"question": self._question[:200], "tokens": len(self._tokens)}
        self.report.saved_segment = self._steering.keep(session, layers, steps=len(self._tokens), meta=meta)

    def _traced(self, token: int, decision: Decision) -> dict[str, Any]:
        numbers = {name: round(value, 4) for name, value in decision.numbers.items()}
        acts = {name: getattr(decision, name) for name in ("broadcast", "retrieve", "write", "halt")}
        return {
            "token": token,
            "text": self._steering.loaded.tokenizer.decode([token]),
            **acts,
            **numbers,
            "virtual_tokens": self.report.virtual_tokens,
            "cache_tokens": self.report.cache_tokens,
        }


_SWITCHES = ("virtual_kv", "residual_delta", "controller", "memory")


def _slot_numbers(update: SlotUpdate, before: Tensor) -> list[dict[str, float]]:
    """Of each slot after ``update``: its norm, the share of what was seen that it claimed, how far it moved."""
    with torch.inference_mode():
        norms, moved = update.slots[0].norm(dim=-1), (update.slots[0] - before[0]).norm(dim=-1)
        columns = zip(norms.tolist(), update.attention[0].mean(dim=-1).tolist(), moved.tolist(), strict=True)
    return [{"norm": round(a, 4), "share": round(b, 4), "moved": round(c, 4)} for a, b, c in columns]


def probe_places(count: int) -> Tensor:
    """Positions of a pass over ``count`` prompt tokens that the slots see: evenly spaced, the last among them."""
    kept = min(count, PROMPT_PROBES)
    return torch.linspace(count / kept - 1, count - 1, kept).round().long()


def _shown(recorder: Recorder, layers: Sequence[int], count: int) -> dict[int, Tensor]:
    """Residuals [1, N, hidden] of a pass for the slots."""
    if count == 1:
        return {layer: recorder.residuals[layer].unsqueeze(1) for layer in layers}
    places = probe_places(count)
    return {layer: recorder.residuals[layer][:, places] for layer in layers}
