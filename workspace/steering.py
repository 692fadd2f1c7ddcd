"""The workspace beside one model: what all generations share.

The hooks, the trained parts (or none), the store of virtual tokens, and the memory that can be asked. ``run`` gives a
generation its own ``WorkspaceRun``; a generation without one is the stock model, to the bit.

Not here: the decode loop (``engine.py``), a generation's course (``run.py``), persistence (handed in), HTTP.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from workspace.context import Context, Segment
from workspace.correction import shipped_correction
from workspace.errors import StoreFull
from workspace.heuristic_kv import heuristic_kv
from workspace.hooking import HookedModel, default_layers, hookable_layers
from workspace.models import LoadedModel
from workspace.modules import WorkspaceModules
from workspace.projector import LayerKV, ModuleShape
from workspace.recall import Recall, Recollection
from workspace.run import WorkspaceRun
from workspace.shipped import with_shipped_weights
from workspace.state_files import read_manifest
from workspace.steering_types import Toggles
from workspace.virtual_kv import VirtualKVStore
from workspace.virtual_kv_limits import StoreLimits, StoreShape
from workspace.virtual_kv_residency import Load, Save
from workspace.window import WindowSettings
from workspace.workspace_config import WorkspaceConfig

logger = logging.getLogger(__name__)

#: Where retrieved text stands before each query, in tokens, and the most of it that is read in mid-generation.
_RETRIEVED_TOKENS = 64


class Steering:
    """See the module docstring. ``load`` and ``save`` persist sessions, both or neither.

    Raises ``InvalidWorkspace`` or ``UnsupportedModel`` where the model cannot be hooked, and ``StateError`` where
    ``config.state_path`` cannot be used.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        config: WorkspaceConfig,
        *,
        load: Load | None = None,
        save: Save | None = None,
        recall: Recall | None = None,
    ):
        config = with_shipped_weights(loaded, config)
        layers = _module_layers(loaded, config)
        hooked = layers if not config.chunk_size else hookable_layers(loaded.model.config)
        self.loaded = loaded
        self.hooked = HookedModel(loaded, hooked)
        self.layers = layers
        shape = ModuleShape(self.hooked.hidden_size, self.hooked.kv_heads, self.hooked.head_dim, layers)
        try:
            self.modules = _modules(loaded, shape, config)
            #: What is learnt about the errors of compaction; it comes with the program for models it was trained on.
            self.correction = shipped_correction(self.hooked) if config.chunk_size else None
        except BaseException:
            self.hooked.remove()
            raise
        self.config = self.modules.config
        self.window_settings = WindowSettings(
            chunk_size=max(self.config.chunk_size, self.config.sinks + 1),
            sinks=self.config.sinks,
            virtual_tokens=self.config.virtual_tokens,
        )
        self.store = VirtualKVStore(self._store_shape(), _limits(self.config), load=load, save=save)
        self.static: Mapping[int, Segment] = {}
        if self.modules.trained("static_tokens"):
            with torch.no_grad():
                self.static = self.as_segments(self.modules.projector.static(), born=0)
        self._recall = recall

    def run(
        self,
        *,
        session: str | None = None,
        domain: str | None = None,
        question: str = "",
        toggles: Toggles | None = None,
    ) -> WorkspaceRun:
        """The workspace for one generation. ``question``: what the memory is asked about, with the answer so far."""
        return WorkspaceRun(self, session, domain, question, toggles or Toggles())

    # What generations ask for.

    def broadcast(self, slots: Tensor, residuals: Mapping[int, Tensor]) -> LayerKV:
        """Virtual keys, values and biases of the slots [1, S, W]; without trained weights, of the residuals themselves.

        ``residuals[layer]`` [1, T, hidden].
        """
        if self.modules.trained("virtual_kv"):
            return self.modules.projector.kv(slots)
        made = heuristic_kv(
            residuals, {layer: self.hooked.decoder_layers[layer] for layer in self.layers}, self.config.virtual_tokens
        )
        dials = self.config
        return {
            layer: (
                keys * dials.kv_plan_scale,
                values * dials.kv_projection_scale,
                torch.full((1, 1, keys.shape[2]), dials.kv_plan_bias, device=keys.device),
            )
            for layer, (keys, values) in made.items()
        }

    def as_segments(self, layers: LayerKV, *, born: int) -> dict[int, Segment]:
        """What a forward pass can carry, in the model's dtype, visible from position ``born`` on."""
        dtype = self.loaded.dtype
        return {
            layer: Segment(
                keys.to(dtype),
                values.to(dtype),
                bias.float(),
                torch.full((1, keys.shape[2]), born, dtype=torch.int64, device=keys.device),
            )
            for layer, (keys, values, bias) in layers.items()
        }

    def remember(self, query: str, *, session: str | None, domain: str | None) -> Sequence[Recollection]:
        """Ask the memory; nothing where there is none. A memory that fails is logged and has nothing to say."""
        if self._recall is None:
            return ()
        try:
            return self._recall(query, session=session, domain=domain, limit=self.config.retrieve_items)
        except Exception:  # the memory is no part of the answer: its failure must not end it
            logger.exception("the memory could not be asked")
            return ()

    def read(self, text: str) -> LayerKV:
        """The model's own keys and values of ``text`` (its first tokens), in content space, at full weight (bias 0)."""
        ids = self.loaded.tokenizer.encode(text, add_special_tokens=False)[:_RETRIEVED_TOKENS]
        if not ids:
            return {}
        cache = DynamicCache(config=self.loaded.model.config)
        places = torch.arange(len(ids), device=self.loaded.device)[None]
        with torch.no_grad():
            self.loaded.model(
                torch.tensor([ids], device=self.loaded.device),
                past_key_values=cache,
                position_ids=places,
                workspace=Context(),
            )
        found: LayerKV = {}
        for layer in self.layers:
            held: Any = cache.layers[layer]
            content = self.hooked.rope.derotate(held.keys.float(), places, layer)
            found[layer] = (content, held.values, torch.zeros(1, 1, len(ids), device=self.loaded.device))
        return found

    def keep(self, session: str, layers: LayerKV, *, steps: int, meta: Mapping[str, Any]) -> int | None:
        """Let the session keep a segment; its number, or None where pins leave no room for it."""
        if steps:
            self.store.tick(session, steps)
        try:
            number = self.store.write(session, layers, born=0, kind="broadcast", meta=meta)
        except StoreFull as error:
            logger.warning("session %s keeps nothing of this request: %s", session, error)
            return None
        return int(number)

    # Life.

    def status(self) -> dict[str, Any]:
        """What is hooked, trained and held, as JSON types."""
        record = self.modules.record
        return {
            "layers": list(self.layers),
            "hooked_layers": list(self.hooked.layers),
            "trained": None if record is None else {"parts": list(record.parts), "step": record.step},
            "parameters": self.modules.parameter_count,
            "chunk_size": self.config.chunk_size,
            "window_correction": self.correction is not None,
            "virtual_tokens": self.config.virtual_tokens,
            "static_tokens": sum(segment.tokens for segment in self.static.values()),
            "memory": self._recall is not None,
            "store": asdict(self.store.totals()),
        }

    def flush(self, session: str) -> None:
        """What the session keeps survives ``kill -9`` when this returns, and is the past of the next request."""
        self.store.settle(session)
        self.store.flush(session)

    def forget(self, session: str) -> None:
        """Remove what the session keeps, durably."""
        self.store.clear(session)
        self.store.flush(session)

    def close(self) -> None:
        """Save what is not saved yet and take the hooks away."""
        self.store.flush_all()
        self.hooked.remove()

    def _store_shape(self) -> StoreShape:
        loaded, hooked = self.loaded, self.hooked
        return StoreShape(
            loaded.fingerprint, self.layers, hooked.kv_heads, hooked.head_dim, loaded.dtype, torch.device(loaded.device)
        )


def _module_layers(loaded: LoadedModel, config: WorkspaceConfig) -> tuple[int, ...]:
    """The configured layers, or those that the weights were trained with, or the default ones."""
    if config.hooked_layers is not None:
        return config.hooked_layers
    if config.state_path is not None:
        return read_manifest(config.state_path).shape.layers
    return default_layers(loaded.model.config)


def _modules(loaded: LoadedModel, shape: ModuleShape, config: WorkspaceConfig) -> WorkspaceModules:
    if config.state_path is None:
        modules = WorkspaceModules(shape, config).eval()
    else:
        modules = WorkspaceModules.load(config.state_path, fingerprint=loaded.fingerprint, shape=shape, config=config)
    return modules.to(loaded.device).requires_grad_(False)


def _limits(config: WorkspaceConfig) -> StoreLimits:
    return StoreLimits(**config.retention.model_dump())
