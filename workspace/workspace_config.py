"""Every knob of the workspace, as one frozen and validated section of the settings.

One that exists is valid: an unknown key, a value out of range and two values that contradict each other are errors
that say what to do. ``settings.py`` mounts ``WorkspaceConfig`` as its section ``workspace``; so nothing here imports
torch, transformers or anything of ours.

Trained weights fix some of the values (``STRUCTURE``: what they are weights of) and bring others with them (``DIALS``:
what they were trained with). ``for_weights`` merges those into a configuration in which the user named some himself.

What the three ``kv_*`` numbers mean follows the measurements on virtual tokens: a bias of -16 changes logits by 1e-4
and is off for every purpose, -8 is not (it costs 0.14 nats with random keys on SmolLM2), and 0 makes a virtual token
compete like a real one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

#: Recent tokens that a capped cache must be able to hold beside its sinks.
FEWEST_RECENT = 16
#: Fields that say what the trained weights are weights of: a configuration cannot change them afterwards.
STRUCTURE = (
    "slots",
    "slot_width",
    "iterations",
    "write_slots",
    "virtual_tokens",
    "static_tokens",
    "delta_rank",
    "embedding_width",
)
#: Fields that weights were trained with; a configuration that names one of them wins.
DIALS = (
    "kv_plan_scale",
    "kv_plan_bias",
    "kv_projection_scale",
    "delta_cap",
    "chunk_size",
    "sinks",
    "update_every",
)


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class RetentionConfig(_Section):
    """How much virtual KV is kept, and for how long. The fields are those of the store's own limits."""

    max_tokens_per_layer: int = Field(256, ge=1, le=65_536, description="Virtual tokens of a session in one layer.")
    max_segments: int = Field(64, ge=1, le=65_536, description="Separately written segments of a session.")
    max_bytes: int = Field(64 << 20, ge=1 << 12, description="Virtual KV of a session, in bytes.")
    spill_bytes: int = Field(
        512 << 20, ge=1 << 12, description="Virtual KV of all sessions beside the model; above it, some are spilled."
    )
    parked_bytes: int = Field(
        2 << 30, ge=1 << 12, description="Spilled virtual KV in main memory; above it, sessions go to the database."
    )
    ttl_steps: int | None = Field(None, ge=1, description="Generated tokens that a segment lives; none: no limit.")
    ttl_seconds: float | None = Field(2_592_000.0, gt=0, description="Seconds that a segment lives; none: no limit.")

    @model_validator(mode="after")
    def _one_session_fits(self) -> RetentionConfig:
        if self.spill_bytes < self.max_bytes:
            raise ValueError(
                f"spill_bytes ({self.spill_bytes}) must be at least max_bytes ({self.max_bytes}), because the session "
                "in use has to fit beside the model; raise spill_bytes or lower max_bytes"
            )
        return self


class ControllerConfig(_Section):
    """When the controller acts. Entropies and surprises are in nats; a run of repeated tokens is counted in tokens.

    The thresholds lie where SmolLM2-135M-Instruct is unsure by its own standard. Its smoothed entropy over eight
    answers has quartiles 1.0, 1.8, 2.5 and a 95th percentile of 3.3 at temperature 0.8 (0.3, 1.4, 2.1 and 2.9 when
    greedy); on Shakespeare the median is 3.4. They then broadcast 10 to 20 times in 1,000 tokens of its own text, 36
    times in Shakespeare, and ask the memory 5 and 16 times. The longest run of repeats was 26 tokens, far from a halt.
    """

    broadcast_entropy: float = Field(3.0, gt=0, le=20, description="Broadcast when smoothed entropy reaches this.")
    broadcast_trend: float = Field(1.5, gt=0, le=20, description="Broadcast when entropy has risen by this.")
    retrieve_entropy: float = Field(3.5, gt=0, le=20, description="Ask the memory when smoothed entropy reaches this.")
    write_surprise: float = Field(3.5, gt=0, le=50, description="Write to the slots when smoothed surprise gets there.")
    broadcast_gap: int = Field(16, ge=2, description="Fewest tokens between two broadcasts.")
    retrieve_gap: int = Field(64, ge=2, description="Fewest tokens between two questions to the memory.")
    write_gap: int = Field(16, ge=2, description="Fewest tokens between two writes.")
    release: float = Field(
        0.8, gt=0, lt=1, description="A signal must fall below this share of its threshold before it can act again."
    )
    smoothing: float = Field(0.3, gt=0, le=1, description="Weight of the newest token in the smoothed signals.")
    trend_smoothing: float = Field(0.03, gt=0, lt=1, description="The same for the level that a trend is against.")
    halt_on_repetition: bool = Field(True, description="End an answer that only repeats itself.")
    halt_run: int = Field(96, ge=16, description="Tokens repeated in a row that end an answer.")
    halt_cycles: int = Field(4, ge=2, description="Full repeats that this run must hold as well.")
    longest_cycle: int = Field(32, ge=1, le=256, description="Longest repeated passage that is recognised, in tokens.")
    learned_probability: float = Field(0.5, gt=0, lt=1, description="The trained controller acts from here on.")
    learned_halt: bool = Field(False, description="Let the trained controller end answers, too.")

    @model_validator(mode="after")
    def _thresholds_agree(self) -> ControllerConfig:
        if self.trend_smoothing >= self.smoothing:
            raise ValueError(
                f"trend_smoothing ({self.trend_smoothing}) must be below smoothing ({self.smoothing}), or the trend is "
                "taken against a level that moves as fast as the signal; lower trend_smoothing"
            )
        if self.halt_run < self.longest_cycle:
            raise ValueError(
                f"halt_run ({self.halt_run}) must be at least longest_cycle ({self.longest_cycle}), or an answer ends "
                "before a passage of that length was repeated once; raise halt_run or lower longest_cycle"
            )
        return self


class WorkspaceConfig(_Section):
    """The workspace beside the frozen model: what is hooked, how large it is, how it acts."""

    # What a request that says nothing gets.
    enabled: bool = Field(False, description="The workspace serves requests that do not say; off is exactly off.")
    virtual_kv: bool = Field(True, description="Default of a request's toggle: virtual keys and values.")
    residual_delta: bool = Field(True, description="Default of a request's toggle: trained residual deltas.")
    controller: bool = Field(True, description="Default of a request's toggle: decisions during generation.")
    memory: bool = Field(True, description="Default of a request's toggle: retrieval from the memory.")

    # Shapes.
    hooked_layers: tuple[int, ...] | None = Field(
        None, description="Layers by number, full attention only; none: at most six of these, evenly spaced."
    )
    slots: int = Field(8, ge=2, le=64, description="Slots of the workspace.")
    slot_width: int = Field(64, ge=8, le=1024, description="Width of a slot: 64 costs 0.4 ms an update, 128 costs 0.6.")
    iterations: int = Field(3, ge=1, le=8, description="Rounds of slot attention in one update.")
    write_slots: int = Field(4, ge=1, le=64, description="Slots that win an update and are written; others keep.")
    virtual_tokens: int = Field(
        16, ge=1, le=512, description="Virtual tokens per hooked layer in one broadcast or summary."
    )
    static_tokens: int = Field(0, ge=0, le=512, description="Trained virtual tokens that depend on no input; 0: none.")
    delta_rank: int = Field(4, ge=1, le=64, description="Rank of the residual delta.")
    embedding_width: int = Field(384, ge=1, le=8192, description="Width of the memory's embeddings.")

    # Dials.
    kv_plan_scale: float = Field(1.0, ge=0, le=4, description="Gain on virtual keys: how sharply they are attended.")
    kv_plan_bias: float = Field(
        -16.0, ge=-64, le=8, description="Added to virtual tokens' scores: -16 is off, 0 competes like real tokens."
    )
    kv_projection_scale: float = Field(1.0, ge=0, le=4, description="Gain on virtual values.")
    delta_cap: float = Field(0.25, gt=0, le=2, description="Longest delta, as a share of the residual's length.")

    # The active cache.
    chunk_size: int = Field(0, ge=0, description="Tokens kept in the cache, sinks included; 0: all of them.")
    sinks: int = Field(4, ge=0, le=64, description="First tokens that a capped cache always keeps.")

    # When.
    update_every: int = Field(16, ge=1, description="Generated tokens between two updates of the slots.")
    retrieve_items: int = Field(4, ge=1, le=64, description="Memories that one retrieval brings at most.")
    retrieve_tokens: int = Field(
        256, ge=0, le=8192, description="Tokens of a prompt that memories may take; 0: they reach the slots only."
    )

    # Running it.
    enable_torch_compile: bool = Field(
        False, description="Compile the decode step: half a minute at the first start, faster after."
    )
    torch_compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = Field(
        "default", description="Mode of torch.compile."
    )
    inference_threads: int = Field(0, ge=0, le=256, description="Cores for a forward pass; 0: as model.threads.")
    log_virtual_kv_stats: bool = Field(False, description="Log norms of virtual keys and values at each broadcast.")
    state_path: Path | None = Field(None, description="Directory of trained weights; none: those that ship, if any.")
    shipped_weights: bool = Field(
        True, description="Use the trained weights that come with the program for this model; false: heuristics."
    )

    retention: RetentionConfig = Field(default_factory=RetentionConfig)
    thresholds: ControllerConfig = Field(default_factory=ControllerConfig)

    @field_validator("hooked_layers")
    @classmethod
    def _layers(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is None:
            return None
        if not value:
            raise ValueError("names no layer; leave it out for the default, or set workspace.enabled to false")
        if min(value) < 0:
            raise ValueError(f"layers are numbered from 0, {min(value)} is not one of them")
        if list(value) != sorted(set(value)):
            raise ValueError(f"name each layer once and in rising order: {sorted(set(value))}")
        return value

    @field_validator("state_path")
    @classmethod
    def _home(cls, value: Path | None) -> Path | None:
        return None if value is None else value.expanduser()

    @field_validator("write_slots")
    @classmethod
    def _winners(cls, value: int, info: ValidationInfo) -> int:
        slots = info.data.get("slots")
        if slots is not None and value > slots:
            raise ValueError(f"{value} of {slots} slots cannot win; use at most {slots} or raise workspace.slots")
        return value

    @field_validator("virtual_tokens")
    @classmethod
    def _whole_slots(cls, value: int, info: ValidationInfo) -> int:
        slots = info.data.get("slots")
        if slots is not None and value % slots:
            below, above = value // slots * slots, (value // slots + 1) * slots
            raise ValueError(
                f"must be a multiple of the {slots} slots, because each becomes equally many virtual tokens; "
                f"use {f'{below} or {above}' if below else above}"
            )
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> WorkspaceConfig:
        if self.chunk_size and self.chunk_size < self.sinks + FEWEST_RECENT:
            raise ValueError(
                f"chunk_size ({self.chunk_size}) must hold the {self.sinks} sinks and {FEWEST_RECENT} recent tokens; "
                f"use at least {self.sinks + FEWEST_RECENT}, or 0 for no cap"
            )
        needed = self.virtual_tokens + self.static_tokens
        if self.retention.max_tokens_per_layer < needed:
            raise ValueError(
                f"retention.max_tokens_per_layer ({self.retention.max_tokens_per_layer}) cannot hold one broadcast: "
                f"virtual_tokens + static_tokens is {needed}; raise it to {needed} or lower those"
            )
        ttl = self.retention.ttl_steps
        if ttl is not None and ttl < self.update_every:
            raise ValueError(
                f"retention.ttl_steps ({ttl}) is below update_every ({self.update_every}): segments would be gone "
                "before they are renewed; raise ttl_steps or lower update_every"
            )
        return self

    @property
    def tokens_per_slot(self) -> int:
        """Virtual tokens that one slot becomes."""
        return self.virtual_tokens // self.slots

    def trained_part(self) -> dict[str, Any]:
        """What weights have to remember of the configuration that they were trained with: JSON types."""
        return {name: getattr(self, name) for name in (*STRUCTURE, *DIALS)}

    def for_weights(self, trained: Mapping[str, Any]) -> WorkspaceConfig:
        """This configuration with what weights bring: ``trained`` is the ``trained_part`` that they were saved with.

        A dial that was set here explicitly wins over the weights' own. Raises ``ValueError`` where a field of the
        structure was set explicitly to something else, because weights cannot be reshaped.
        """
        refused = [
            f"{name} is {getattr(self, name)}, the weights have {trained[name]}"
            for name in STRUCTURE
            if name in self.model_fields_set and name in trained and getattr(self, name) != trained[name]
        ]
        if refused:
            raise ValueError("; ".join(refused) + "; remove these settings or train weights with them")
        values = {name: getattr(self, name) for name in self.model_fields_set}
        brought = {name: value for name, value in trained.items() if name not in self.model_fields_set}
        return WorkspaceConfig.model_validate({**values, **brought})
