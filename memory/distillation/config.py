"""Every knob of a distillation, as one frozen and validated object, read from YAML or made in code.

A ``DistillConfig`` that exists is valid: an unknown key, a value out of range and two values that contradict each other
are errors that say what to do. Presets lie in ``configs/distill/``; docs/distillation.md lists every key.

Two spellings of the original plan are understood as well: a section ``lm_config`` is ``teacher``, and a section
``distill`` with ``when`` and ``cache_init`` is ``schedule.when`` and ``cache_init``.

Nothing here imports torch, a database or a language model.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from memory.distillation.errors import DistillConfigError
from memory.distillation.triggers import When

ROOT = Path(__file__).resolve().parents[2]
PRESETS = ROOT / "configs" / "distill"

StrategyName = Literal["full_memory", "exclude_current", "rolling_window", "failure_focus", "random_subset", "mixed"]
SeedType = Literal["structuring", "summarization", "question", "use_case", "creative"]
Targets = Literal["teacher", "feedback", "mixed"]
RedactionKind = Literal["email", "phone", "card", "iban", "api_key", "ip"]
SEED_TYPES: tuple[SeedType, ...] = ("structuring", "summarization", "question", "use_case", "creative")
REDACTION_KINDS: tuple[RedactionKind, ...] = ("email", "phone", "card", "iban", "api_key", "ip")


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class StrategyConfig(_Section):
    """Which experiences the teacher sees beside the one that it answers."""

    name: StrategyName = Field("full_memory", description="How a memory is formed; see docs/distillation.md.")
    window_k: int = Field(32, ge=1, description="Experiences in a rolling window.")
    subset_share: float = Field(0.5, gt=0, le=1, description="Share of the experiences in a random subset.")
    exclude_current: bool = Field(
        True, description="Leave out everything with the same observation, so that the answer cannot be read off."
    )
    failure_focus: bool = Field(
        False, description="Ask about failures first, and keep all failures in memory but only a share of the rest."
    )
    success_share: float = Field(0.25, ge=0, le=1, description="Share of successes that failure focus keeps.")
    shuffle: bool = Field(False, description="Show the memory in random order, so that order is not learned.")
    mixture: dict[StrategyName, float] = Field(
        {"full_memory": 0.5, "random_subset": 0.25, "rolling_window": 0.25},
        description="Shares of the samples by strategy, for mixed.",
    )

    @field_validator("mixture")
    @classmethod
    def _shares(cls, value: dict[StrategyName, float]) -> dict[StrategyName, float]:
        if not value or any(not 0 < share <= 1 for share in value.values()):
            raise ValueError("name at least one strategy, each with a share above 0 and at most 1")
        if "mixed" in value:
            raise ValueError("mixed cannot contain itself")
        return value


class TeacherConfig(_Section):
    """Who answers with the memory in its prompt."""

    model: str = Field(
        "engine:",
        min_length=1,
        description="As lm_factory takes it: engine:, flex:<model>, toka:<model>@<server>, openai:<model>@<server>.",
    )
    api_key_env: str | None = Field(None, description="Name of the environment variable that holds the server's key.")
    max_tokens: int = Field(128, ge=1, description="Longest answer.")
    max_prompt_tokens: int = Field(
        4096, ge=64, description="Longest prompt; the oldest experiences are left out until it fits."
    )
    parallel: int = Field(1, ge=1, le=64, description="Questions asked at once; users wait behind them.")
    attempts: int = Field(5, ge=1, le=20, description="Times that one question is asked before the run fails.")
    backoff_seconds: float = Field(1.0, ge=0, description="Pause after the first failure; it doubles every time.")
    max_backoff_seconds: float = Field(60.0, ge=0, description="Longest such pause.")


class SelfStudyConfig(_Section):
    """Questions that the teacher asks itself about the memory, beside the replay of what was lived through."""

    rows: int = Field(0, ge=0, description="How many; 0 switches self-study off.")
    types: tuple[SeedType, ...] = Field(SEED_TYPES, min_length=1, description="Kinds of questions, taken in turn.")
    memory_records: int = Field(24, ge=1, description="Experiences that one question is about, chosen by chance.")
    temperature: float = Field(0.6, ge=0, le=2, description="Of the questions; answers are greedy.")
    question_tokens: int = Field(96, ge=8, description="Longest question.")


class RedactionConfig(_Section):
    """What is taken out of texts before they leave the history. Placeholders say the kind, never the text."""

    enabled: bool = Field(True, description="False trains on the texts as they are.")
    kinds: tuple[RedactionKind, ...] = Field(REDACTION_KINDS, description="Built-in kinds that are looked for.")
    patterns: dict[str, str] = Field(
        {}, description="Further ones: name to regular expression, e.g. {employee: 'E-[0-9]{6}'}."
    )

    @field_validator("patterns")
    @classmethod
    def _compile(cls, value: dict[str, str]) -> dict[str, str]:
        for name, pattern in value.items():
            if not re.fullmatch(r"[a-z][a-z0-9_]{0,31}", name):
                raise ValueError(f"{name!r}: a name has small letters, digits and underscores, 32 at most")
            try:
                compiled = re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{name}: no regular expression: {error}") from None
            if compiled.match(""):
                raise ValueError(f"{name}: matches the empty text, so it would match everywhere")
        return value


class DataConfig(_Section):
    """How experiences become rows."""

    prompt_style: Literal["turns", "list"] = Field(
        "turns", description="turns: observation, action and feedback as chat turns; list: all in one user message."
    )
    targets: Targets = Field(
        "teacher", description="teacher: imitate it; feedback: corrected answers only; mixed: those where known."
    )
    replay: bool = Field(True, description="Make a row of each experience.")
    max_records: int = Field(4096, ge=1, description="Newest experiences that are looked at.")
    max_rows: int = Field(2048, ge=1, description="Rows of replay at most; with failure focus, failures come first.")
    eval_share: float = Field(0.15, ge=0, lt=1, description="Share of observations held out, by hash of their content.")
    hold_out: Literal["observations", "reasks"] = Field(
        "observations",
        description="Held out are whole observations; or none, and a share of what is trained is asked again (recall).",
    )
    strict_hold_out: bool = Field(
        False, description="Keep what is held out out of every memory too: a cleaner proof, and less is remembered."
    )
    filter_incorrect: bool = Field(False, description="Drop the teacher's answers that contradict a known right one.")
    apply_corrections: bool = Field(
        False, description="In memory, show the right answer for the wrong one and leave the feedback out."
    )
    merge_turns: bool = Field(
        False, description="Join neighbouring turns of one role, for chat templates that insist on alternation (Gemma)."
    )
    latest_feedback_wins: bool = Field(
        True, description="Of experiences with equal observations use the one that was judged last."
    )
    half_life: int | None = Field(
        None,
        ge=1,
        description="An experience counts half as much as one that is so many experiences newer, in training and at "
        "the gate: for conventions that change. null: all count alike.",
    )
    recent_turns: int = Field(0, ge=0, description="Experiences that the student sees too, as a hybrid agent does.")
    recent_choice: Literal["newest", "nearest"] = Field(
        "newest", description="Which: the newest, or those whose words are nearest to the observation (BM25)."
    )
    recent_share: float = Field(0.5, ge=0, le=1, description="Share of the rows in which it does.")
    self_study: SelfStudyConfig = Field(default_factory=SelfStudyConfig)
    redact: RedactionConfig = Field(default_factory=RedactionConfig)

    @model_validator(mode="after")
    def _makes_rows(self) -> DataConfig:
        if not self.replay and not self.self_study.rows:
            raise ValueError("replay is off and self_study.rows is 0: nothing would become a row; switch one on")
        return self


class CacheInit(_Section):
    """What the prefix is before training. Text is the best that is known (51 % against 30 % for random vectors)."""

    type: Literal["text", "random", "pretrained"] = Field("text", description="Prefilled text, noise, or a cartridge.")
    text: str | None = Field(None, description="For text; without it the domain's own history, newest last.")
    cartridge: str | None = Field(
        None, description="For pretrained: its id; without it the domain's serving one, or text where there is none."
    )

    @model_validator(mode="after")
    def _belongs(self) -> CacheInit:
        if self.text is not None and self.type != "text":
            raise ValueError(f"text is given, but type is {self.type}; drop one of them")
        if self.cartridge is not None and self.type != "pretrained":
            raise ValueError(f"cartridge is given, but type is {self.type}; drop one of them")
        return self


class TrainingConfig(_Section):
    """The prefix and its training."""

    trainer: Literal["inprocess", "cartridges"] = Field(
        "inprocess", description="inprocess: ours, CPU or GPU; cartridges: that library, where it is installed."
    )
    slots: int = Field(64, ge=16, le=8192, multiple_of=16, description="Length of the prefix.")
    frozen: int = Field(1, ge=1, description="First slots that stay as they are; without one, other skills suffer.")
    learning_rate: float = Field(1e-2, gt=0, le=1, description="Adam's, after the warm-up.")
    step_size: Literal["relative", "absolute"] = Field(
        "relative", description="relative: the rate is a share of each tensor's initial size; absolute: as upstream."
    )
    warmup_steps: int = Field(10, ge=0, description="Steps in which the learning rate rises.")
    clip_norm: float = Field(1.0, gt=0, description="Longest gradient.")
    max_steps: int = Field(200, ge=1, description="Optimizer steps at most.")
    epochs: int | None = Field(None, ge=1, description="Ends training earlier, after so many passes over the rows.")
    rows: int = Field(16, ge=1, le=512, description="Rows of a step.")
    top_k: int = Field(20, ge=1, description="Candidates of the teacher that count at each position.")
    loss: Literal["kl", "upstream"] = Field(
        "kl",
        description="kl: mean over positions, the rest as one token; upstream: cross-entropy, mean over candidates.",
    )
    gold_weight: float = Field(1.0, ge=0, description="Of the loss on answers known to be right.")
    failure_weight: float = Field(
        2.0, gt=0, description="metadata.weight of rows whose experience went wrong; data generation writes it."
    )
    early_stop_patience: int = Field(6, ge=0, description="Evaluations without improvement that end it; 0: never.")
    min_watched: int = Field(24, ge=1, description="With fewer held-out rows to watch none are: they choose by noise.")
    evaluate_every: int = Field(10, ge=1, description="Steps between evaluations on held-out rows.")
    save_every: int = Field(25, ge=1, description="Steps between checkpoints.")
    keep_last: int = Field(2, ge=1, description="Checkpoints that stay.")
    time_budget_seconds: float | None = Field(None, gt=0, description="Training ends after it; waiting does not count.")
    max_tokens: int = Field(512, ge=8, description="Longest row; longer ones lose the beginning of what was asked.")
    threads: int = Field(0, ge=0, description="Intra-op threads; 0 leaves torch's setting.")
    dtype: Literal["float32"] = Field("float32", description="Of the trained parameters; the model keeps its own.")
    seed: int = Field(0, ge=0, description="Of shuffling and of random initialisation.")

    @model_validator(mode="after")
    def _fits_together(self) -> TrainingConfig:
        if self.frozen >= self.slots:
            raise ValueError(f"frozen ({self.frozen}) must be below slots ({self.slots}), or nothing is trained")
        if self.warmup_steps >= self.max_steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) must be below max_steps ({self.max_steps})")
        return self


class GateConfig(_Section):
    """When a candidate may serve: it must not be worse than what it replaces, on rows that it has not seen."""

    margin: float = Field(0.05, ge=0, le=1, description="It may score lower than the long prompt by this much.")
    min_rows: int = Field(20, ge=1, description="Fewer held-out rows prove nothing: the candidate is then rejected.")
    max_rows: int = Field(
        96, ge=1, description="Held-out rows that are asked at most; each is asked with every prompt."
    )
    metric: Literal["auto", "exact", "ranked", "kl"] = Field(
        "exact",
        description="exact: greedy answers, as text; ranked: the likeliest of the known ones; kl: nats. "
        "auto: exact where min_rows rows have an answer known to be right, else kl.",
    )
    must_beat_serving: bool = Field(True, description="It must also be no worse than the serving cartridge.")

    def decided(self, known_answers: int) -> GateConfig:
        """With a metric instead of ``auto``, for so many held-out rows whose right answer is known."""
        if self.metric != "auto":
            return self
        return self.model_copy(update={"metric": "exact" if known_answers >= self.min_rows else "kl"})

    @property
    def chosen(self) -> Literal["exact", "ranked", "kl"]:
        """The metric. Raises ``ValueError`` for ``auto``: ``decided`` comes first."""
        if self.metric == "auto":
            raise ValueError("gate.metric is auto; say with decided() how many right answers are known")
        return self.metric


class WhenConfig(_Section):
    """Triggers; any one that is set starts a run. Without a value it is off."""

    max_history_tokens: int | None = Field(None, ge=1, description="Tokens of history since the last run.")
    every_episodes: int | None = Field(None, ge=1, description="Episodes since the last run.")
    every_hours: float | None = Field(None, gt=0, description="Time since the last run, if there is anything new.")
    plateau: int | None = Field(None, ge=2, description="Scores in each of the two windows that are compared.")
    min_improvement: float = Field(0.02, ge=0, description="Less than this between the windows is a plateau.")
    on_stale: bool = Field(True, description="What the serving cartridge learned from was deleted or corrected.")


class ScheduleConfig(_Section):
    """Whether runs start by themselves."""

    enabled: bool = Field(False, description="False: runs start by hand only.")
    cooldown_seconds: float = Field(600.0, ge=0, description="Least time between two runs of one domain.")
    when: WhenConfig = Field(default_factory=WhenConfig)

    def thresholds(self) -> When:
        """The triggers' own form."""
        when = self.when
        return When(
            max_history_tokens=when.max_history_tokens,
            every_episodes=when.every_episodes,
            every_seconds=None if when.every_hours is None else 3600.0 * when.every_hours,
            plateau_window=when.plateau,
            min_improvement=when.min_improvement,
            cooldown_seconds=self.cooldown_seconds,
            on_stale=when.on_stale,
        )


class DistillConfig(_Section):
    """The whole of it."""

    checkpoint_dir: Path | None = Field(
        None, description="Folder with memory_*.jsonl snapshots to distil instead of the domain's history."
    )
    output_path: Path | None = Field(None, description="A folder that gets a copy of every run, named after the run.")
    system_prompt: str = Field("", description="What the student has as system message, in training and in service.")
    top_logprobs: int = Field(20, ge=1, le=100, description="Candidates that the teacher gives at each position.")
    top_mass: float = Field(0.99, gt=0, le=1, description="Of them, the likeliest are kept up to this probability.")
    hf_repo_id: str | None = Field(None, description="Hub repository that gets the dataset and the cartridge.")
    wandb_project: str | None = Field(None, description="W&B project that gets the metrics and the files.")
    seed: int = Field(0, ge=0, description="Of everything that is chosen by chance while rows are made.")
    strategy: StrategyConfig = Field(default_factory=StrategyConfig)
    teacher: TeacherConfig = Field(default_factory=TeacherConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    cache_init: CacheInit = Field(default_factory=CacheInit)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    gate: GateConfig = Field(default_factory=GateConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)

    @field_validator("hf_repo_id")
    @classmethod
    def _repository(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", value):
            raise ValueError("expected owner/name")
        return value

    @model_validator(mode="before")
    @classmethod
    def _spelled_as_planned(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        tree = dict(value)
        if "lm_config" in tree:
            if "teacher" in tree:
                raise ValueError("lm_config and teacher are the same section; keep one")
            tree["teacher"] = tree.pop("lm_config")
        planned = tree.get("distill")
        if isinstance(planned, Mapping) and not set(planned) - {"when", "cache_init"}:
            del tree["distill"]
            if "cache_init" in planned:
                tree.setdefault("cache_init", planned["cache_init"])
            if "when" in planned:
                tree["schedule"] = {"enabled": True, **tree.get("schedule", {}), "when": planned["when"]}
        return tree


def load_distill_config(source: Path | str | None = None, overrides: Mapping[str, Any] | None = None) -> DistillConfig:
    """The defaults, then a YAML file (a path, or the name of a preset), then ``overrides``, a nested mapping.

    Raises ``DistillConfigError`` with one line per problem.
    """
    tree = {} if source is None else _read_yaml(_find(source))
    return make_distill_config(_merged(tree, overrides or {}), "distillation" if source is None else str(source))


def make_distill_config(values: Mapping[str, Any], source: str = "distillation") -> DistillConfig:
    """A configuration from plain values. Raises ``DistillConfigError`` naming ``source`` and every problem."""
    try:
        return DistillConfig.model_validate(dict(values))
    except ValidationError as error:
        raise DistillConfigError("\n".join(f"{source}: {_explain(item)}" for item in error.errors())) from None


def config_paths() -> Iterator[tuple[str, str, Any]]:
    """Every key as ``(dotted path, description, default)``; the documentation and its test walk it."""
    yield from _walk(DistillConfig, "")


def presets() -> list[str]:
    """The names of the files in ``configs/distill/``."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def _walk(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, Any]]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _walk(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field.description or "", field.get_default(call_default_factory=True)


def _find(source: Path | str) -> Path:
    for candidate in (Path(source), PRESETS / source, PRESETS / f"{source}.yaml"):
        if candidate.is_file():
            return candidate
    raise DistillConfigError(f"no configuration file {str(source)!r}; give a path or one of: {', '.join(presets())}")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise DistillConfigError(f"{path}: cannot be read: {error}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise DistillConfigError(f"{path}: expected a mapping at the top level, found {type(loaded).__name__}")
    return loaded


def _merged(base: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in extra.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(value, Mapping) and isinstance(old, Mapping) else value
    return merged


def _explain(error: Any) -> str:
    path = [str(part) for part in error["loc"]]
    dotted = ".".join(path) or "configuration"
    if error["type"] != "extra_forbidden":
        shown = repr(error["input"])
        found = shown if len(shown) <= 80 else shown[:77] + "..."
        return f"{dotted}: {error['msg'].removeprefix('Value error, ')} (got {found})"
    known = [name for name, _, _ in config_paths()]
    sections = sorted({name.rsplit(".", depth)[0] for name in known for depth in range(1, name.count(".") + 1)})
    nearest = difflib.get_close_matches(dotted, known + sections, n=1, cutoff=0.6)
    if not nearest:  # the right name in the wrong section
        tails = {name.rsplit(".", 1)[-1]: name for name in known}
        nearest = [tails[name] for name in difflib.get_close_matches(path[-1], tails, n=1, cutoff=0.6)]
    hint = f"; did you mean {nearest[0]}?" if nearest else "; docs/distillation.md lists the known ones"
    return f"{dotted}: unknown key{hint}"
