"""One frozen, typed settings tree: defaults <- YAML <- ``OLYMPUS_*`` environment.

A ``Settings`` that exists is valid: it is checked once, when it is made, and an unknown key is an error that
suggests the nearest known one. Nothing here reads the database, opens a file for writing, or imports torch.

Environment names are the path of the key, joined by two underscores: ``OLYMPUS_SERVER__PORT=8080``. Values are
YAML scalars. Four names that hosting platforms and people already use are honoured too: ``PORT``,
``DATABASE_URL``, ``OLYMPUS_DATA_DIR`` and ``OLYMPUS_CONFIG`` (the YAML file).

Layering follows the twelve-factor order (the environment wins); the ``unknown key`` rule follows pydantic's
``extra="forbid"``.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from workspace.workspace_config import WorkspaceConfig

ROOT = Path(__file__).resolve().parent
ENV_PREFIX = "OLYMPUS_"
#: Environment names with the prefix that are not settings keys: used before the tree exists, by the command line
#: (OLYMPUS_KEY), or by the tests.
RESERVED_ENV = frozenset({"OLYMPUS_CONFIG", "OLYMPUS_DATA_DIR", "OLYMPUS_CACHE_DIR", "OLYMPUS_KEY"})
_SHORT_NAMES = {
    "DATABASE_URL": ["database", "url"],
    "OLYMPUS_DATA_DIR": ["data_dir"],
    "OLYMPUS_CACHE_DIR": ["model", "cache_dir"],
}
RESERVED_ENV_PREFIXES = ("OLYMPUS_TEST_", "OLYMPUS_SHARED_")
SHORTEST_API_KEY = 16
LOOPBACK_HOSTS = frozenset({"127.0.0.1", "::1", "localhost"})


class SettingsError(ValueError):
    """The configuration cannot be used. The message names every bad key and says what to do."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class ServerSettings(_Section):
    """The HTTP server: where it listens, how much it admits, how long it may take to stop."""

    host: str = Field("127.0.0.1", description="Address to listen on. Beyond loopback an API key must exist.")
    port: int = Field(5000, ge=0, le=65535, description="TCP port; also read from PORT. 0 lets the system choose.")
    threads: int = Field(96, ge=16, le=1024, description="Request threads of the one worker.")
    grace_seconds: float = Field(25.0, gt=1, le=600, description="From SIGTERM to the last flush, in seconds.")
    max_body_bytes: int = Field(1 << 20, ge=1024, description="Largest accepted request body, in bytes.")
    max_chats: int = Field(16, ge=1, description="Chat requests admitted at once; further ones get 429.")
    max_streams: int = Field(64, ge=1, description="Dashboard event streams admitted at once.")
    allowed_hosts: tuple[str, ...] = Field((), description="Extra Host header names that are accepted.")
    trusted_proxies: int = Field(0, ge=0, le=8, description="Proxies in front whose X-Forwarded-* is believed.")
    api_key: SecretStr | None = Field(None, description="A bootstrap administrator key, e.g. from a secret store.")

    @field_validator("api_key")
    @classmethod
    def _long_enough(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and len(value.get_secret_value()) < SHORTEST_API_KEY:
            raise ValueError(
                f"must have at least {SHORTEST_API_KEY} characters; it is an administrator's key, use a long random one"
            )
        return value

    @model_validator(mode="after")
    def _leave_threads_for_health(self) -> ServerSettings:
        if self.max_chats + self.max_streams > self.threads - 8:
            raise ValueError(
                f"max_chats + max_streams ({self.max_chats + self.max_streams}) must leave 8 of the "
                f"{self.threads} threads for health checks and short requests; lower them or raise threads"
            )
        return self

    @property
    def is_loopback(self) -> bool:
        """True when only this machine can connect."""
        return self.host in LOOPBACK_HOSTS


class DatabaseSettings(_Section):
    """Where the state lives that is not a file. Without a URL: SQLite under the data directory."""

    url: SecretStr | None = Field(None, description="SQLAlchemy URL; also read from DATABASE_URL.")
    busy_timeout_ms: int = Field(5000, ge=100, description="How long SQLite waits for another process's lock.")

    @field_validator("url")
    @classmethod
    def _known_database(cls, value: SecretStr | None) -> SecretStr | None:
        kinds = ("sqlite:///", "postgres://", "postgresql://", "postgresql+psycopg://")
        if value is not None and not value.get_secret_value().startswith(kinds):
            raise ValueError("give a URL that begins with sqlite:/// or postgresql://")
        return value


class ModelSettings(_Section):
    """The frozen language model."""

    name: str = Field("smollm2-135m-instruct", min_length=1, description="Packaged name, local path, or hub id.")
    revision: str | None = Field(None, description="Hub revision (branch, tag or commit).")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto: bfloat16 where it is fast.")
    weights: Literal["auto", "exact", "int8", "int4"] = Field(
        "auto", description="How a CPU decodes: int8, int4, exact, or auto: 4 bits for models that have no more."
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:0, or split: over all GPUs.")
    threads: int = Field(0, ge=0, description="Intra-op threads for decoding; 0 leaves one core for the rest.")
    cache_dir: Path = Field(Path(".cache"), description="Converted packaged models; safe to delete.")
    load: bool = Field(True, description="False: serve kernels and the dashboard without a language model.")


class EngineSettings(_Section):
    """Generation: queueing and the defaults of a request that names none."""

    max_active: int = Field(8, ge=1, description="Generations that share forward passes.")
    max_waiting: int = Field(32, ge=0, description="Generations that may wait; further ones get 429.")
    prefill_chunk: int = Field(256, ge=16, description="Prompt tokens per forward pass.")
    batching: Literal["batched", "exact"] = Field(
        "batched", description="exact: each generation computed alone, equal to the bit whatever runs beside it."
    )
    prefix_cache_bytes: int = Field(
        256 << 20, ge=0, description="Kept of prompts and answers, for prompts that begin the same way; 0: nothing."
    )
    default_max_tokens: int = Field(512, ge=1, description="When a request names no limit.")
    max_tokens: int = Field(4096, ge=1, description="The most a request may ask for.")
    temperature: float = Field(0.2, ge=0, le=2, description="When a request names none; what SmolLM2's authors advise.")
    top_p: float = Field(0.9, gt=0, le=1, description="When a request names none.")
    request_timeout_seconds: float = Field(600.0, gt=0, description="A generation is cancelled after this long.")


class RetentionSettings(_Section):
    """Which checkpoints stay. Rules are a union: a checkpoint lives while any rule keeps it."""

    every_100_steps: int = Field(5, ge=0, description="How many of the newest multiples of 100 steps stay.")
    every_1000_steps: int = Field(10, ge=0, description="How many of the newest multiples of 1000 steps stay.")
    keep_converged: bool = Field(True, description="Keep every checkpoint written at convergence.")
    max_bytes: int = Field(2 << 30, ge=1 << 20, description="All kernels together; training pauses above it.")
    min_free_bytes: int = Field(256 << 20, ge=0, description="Training pauses when the disk has less left.")


class KernelSettings(_Section):
    """M8 kernels: how many train, how often they measure and save, when they have converged."""

    preset: Literal["nano", "micro", "small"] = Field("nano", description="Size of a kernel that names none.")
    max_concurrent: int | None = Field(None, ge=1, le=16, description="Training at once; default 3, on Replit 1.")
    max_kernels: int = Field(64, ge=1, description="Kernels that may exist; spawn is refused above it.")
    autostart: bool = Field(True, description="Resume unfinished training at boot.")
    default_domain: str = Field(
        "general", pattern=r"^[a-z0-9][a-z0-9-]{0,62}$", description="Domain of chats that name none."
    )
    spawn_default: bool = Field(True, description="Spawn one kernel for the default domain on an empty install.")
    min_experiences: int = Field(8, ge=2, description="Training waits until the buffer holds this many.")
    batch_size: int = Field(16, ge=1, le=512, description="Experiences per step.")
    buffer_capacity: int = Field(4096, ge=64, description="Experiences a kernel keeps in memory.")
    holdout_percent: int = Field(15, ge=5, le=50, description="Share kept for held-out measurement, by hash.")
    priority_share: float = Field(0.0, ge=0, le=0.9, description="Share of a batch drawn by loss; 0: off.")
    source_cap_percent: int = Field(100, ge=5, le=100, description="Of the buffer, for one source; 100: no cap.")
    der_alpha: float = Field(0.0, ge=0, le=10, description="Weight of stored logits (DER++) on replay; 0: off.")
    evaluate_every: int = Field(25, ge=1, description="Steps between held-out measurements.")
    evaluation_share: float = Field(
        0.07, gt=0, le=1, description="Share of the training time that they may take: above it they come less often."
    )
    phi_every: int = Field(5, ge=1, description="Steps between integration measurements, at the least.")
    phi_share: float = Field(0.06, gt=0, le=1, description="The same for integration measurements.")
    checkpoint_every: int = Field(100, ge=1, description="Steps between checkpoints.")
    phi_threshold: float = Field(0.7, gt=0, lt=1, description="Converged needs mean Phi above this.")
    phi_std: float = Field(0.05, gt=0, lt=1, description="Converged needs std(Phi) below this.")
    learning_gate: bool = Field(True, description="Converged also needs held-out loss below the baseline.")
    plateau_evaluations: int = Field(
        10, ge=0, description="Converged also needs this many evaluations without improvement (part of the gate)."
    )
    patience_evaluations: int = Field(40, ge=1, description="Evaluations without improvement until settled.")
    step_pause_ms: float = Field(0.0, ge=0, le=1000, description="Pause after each step, in milliseconds.")
    serve_share: float = Field(
        0.05, gt=0, le=1, description="Share of a core that a training thread takes while a chat is generating."
    )
    serve_pause_ms: float = Field(
        10_000.0, ge=0, le=30_000, description="The most that running chats may hold up one training step."
    )
    query_pause_ms: float = Field(
        250.0, ge=0, le=10_000, description="The most that open questions to kernels may hold up one training step."
    )
    max_queries: int = Field(16, ge=1, le=1024, description="Questions to kernels open at once; more get a 503.")
    niceness: int = Field(5, ge=0, le=19, description="Niceness of training threads (Linux only).")
    max_restarts: int = Field(3, ge=0, description="Restarts of a failed trainer before it stays failed.")
    auto_spawn: bool = Field(True, description="Zeus proposes kernels himself for badly served domains.")
    coverage_seconds: float = Field(60.0, ge=0.05, description="Least time between two looks for such domains.")
    coverage_cooldown_hours: float = Field(24.0, ge=0, description="No second such proposal for a domain before.")
    import_max_bytes: int = Field(64 << 20, ge=1 << 10, description="Largest kernel file that can be imported.")
    checkpoint_dir: Path | None = Field(None, description="Default: kernels/ in the data directory.")
    retention: RetentionSettings = Field(default_factory=RetentionSettings)


class EpisodicSettings(_Section):
    """What a question brings to mind, by words and by meaning."""

    enabled: bool = Field(True, description="False: words alone, over the newest experiences of a domain.")
    embedding: Literal["auto", "minilm", "engine", "none"] = Field(
        "auto", description="auto: MiniLM, fetched once; where it cannot be had, the served model's own states."
    )
    index: Literal["auto", "faiss", "pgvector"] = Field(
        "auto", description="auto: pgvector on a PostgreSQL that has it, else FAISS."
    )
    max_entries: int = Field(200_000, ge=1, description="Experiences that can be recalled: the newest.")
    approximate_from: int = Field(20_000, ge=100, description="Vectors from which on not every one is looked at.")
    words_weight: float = Field(2.0, ge=0, le=10, description="Weight of rare words against 1 for meaning.")


class ChatMemorySettings(_Section):
    """Chats that are answered with their domain's cartridge in place of a long history."""

    enabled: bool = Field(False, description="For requests that do not say; those that do decide themselves.")
    recent_turns: int = Field(4, ge=0, description="Last turns that stay in the prompt as they are.")


class MemorySettings(_Section):
    """The history and its memories."""

    import_max_bytes: int = Field(64 << 20, ge=1 << 10, description="Largest file of history that can be imported.")
    chat: ChatMemorySettings = Field(default_factory=ChatMemorySettings)
    episodic: EpisodicSettings = Field(default_factory=EpisodicSettings)


class CartridgeSettings(_Section):
    """Trained prefixes: how many serve one request, and what they may take."""

    most_per_request: int = Field(2, ge=1, le=16, description="Cartridges that one request may name.")
    memory_bytes: int = Field(1 << 30, ge=0, description="Cartridges kept in memory; the longest unused leave.")
    import_max_bytes: int = Field(512 << 20, ge=1 << 10, description="Largest cartridge file that can be imported.")


class DistillationSettings(_Section):
    """When the history of a domain is distilled into a cartridge, and how hard that may work."""

    automatic: bool = Field(True, description="Triggers start runs; False: by hand only.")
    preset: str = Field("server", min_length=1, description="A name in configs/distill/, or a path.")
    domains: dict[str, str] = Field({}, description="Other presets, by domain.")
    check_seconds: float = Field(30.0, ge=0.05, description="Time between two looks at the triggers.")
    serve_pause_ms: float = Field(10.0, ge=0, le=1000, description="Pause per layer while a chat is generating.")
    niceness: int = Field(5, ge=0, le=19, description="Niceness of the thread (Linux only).")
    threads: int = Field(1, ge=1, description="Intra-op threads of the training.")
    keep_runs: int = Field(20, ge=1, description="Ended runs that keep all files; older ones keep their reports.")


class TelemetrySettings(_Section):
    """What the process says about itself."""

    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe line logged.")
    log_format: Literal["console", "json"] = Field("console", description="json: one object per line.")
    log_prompts: bool = Field(False, description="True writes prompts and answers into the log.")
    ring_events: int = Field(4096, ge=64, description="Events a reconnecting dashboard can catch up on.")


class Settings(_Section):
    """The whole tree. Make one with ``load_settings``; pass it on, never read it from a global."""

    data_dir: Path = Field(Path("data"), description="All state lives here; also read from OLYMPUS_DATA_DIR.")
    server: ServerSettings = Field(default_factory=ServerSettings)
    database: DatabaseSettings = Field(default_factory=DatabaseSettings)
    model: ModelSettings = Field(default_factory=ModelSettings)
    engine: EngineSettings = Field(default_factory=EngineSettings)
    workspace: WorkspaceConfig = Field(default_factory=WorkspaceConfig)
    kernels: KernelSettings = Field(default_factory=KernelSettings)
    memory: MemorySettings = Field(default_factory=MemorySettings)
    cartridges: CartridgeSettings = Field(default_factory=CartridgeSettings)
    distillation: DistillationSettings = Field(default_factory=DistillationSettings)
    telemetry: TelemetrySettings = Field(default_factory=TelemetrySettings)

    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    def origin(self, path: str) -> str | None:
        """Where the value of ``path`` comes from: an environment variable, a file, ``overrides``; None: the default."""
        branches = [path.rsplit(".", depth)[0] for depth in range(path.count(".") + 1)]
        inside = [known for known in self._origins if known.startswith(f"{path}.")]  # of a mapping, such as domains
        return next((self._origins[known] for known in branches + inside if known in self._origins), None)

    @field_validator("data_dir")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return value.expanduser().absolute()

    @model_validator(mode="after")
    def _compiles_what_may_differ(self) -> Settings:
        if self.engine.batching == "exact" and self.workspace.enable_torch_compile:
            raise ValueError(
                "engine.batching exact takes the stock model's own passes, which workspace.enable_torch_compile would "
                "replace: set batching to batched, or enable_torch_compile to false"
            )
        return self

    @property
    def database_url(self) -> str:
        """The SQLAlchemy URL in use; holds the password, never log it."""
        if self.database.url is None:
            return f"sqlite:///{self.data_dir / 'olympus.db'}"
        return normalise_database_url(self.database.url.get_secret_value())

    @property
    def cartridge_dir(self) -> Path:
        """Where cartridges live."""
        return self.data_dir / "cartridges"

    @property
    def kernel_dir(self) -> Path:
        """Where checkpoints live."""
        return self.kernels.checkpoint_dir or self.data_dir / "kernels"

    def masked(self) -> dict[str, Any]:
        """The effective values as plain JSON types; secrets are shown as ``**********``."""
        return self.model_dump(mode="json")


def normalise_database_url(url: str) -> str:
    """``postgres://`` (as platforms hand it out) becomes SQLAlchemy's name for the psycopg 3 driver."""
    for scheme in ("postgres://", "postgresql://"):
        if url.startswith(scheme):
            return "postgresql+psycopg://" + url.removeprefix(scheme)
    return url


def is_replit(environ: Mapping[str, str] | None = None) -> bool:
    """True inside a Replit workspace or deployment (both set ``REPL_ID``)."""
    return bool((os.environ if environ is None else environ).get("REPL_ID"))


def prepare_process_environment() -> None:
    """Set what must be set before torch is imported.

    OpenMP threads that spin while they wait make decoding 3.5 times slower when cores are oversubscribed
    (measured: 206 against 58 ms a token with training beside it), so they wait passively. And a thread that answers
    takes the interpreter from one that trains after 1 ms instead of 5 (95 % of questions to a kernel beside three that
    train: 1.99 times their idle latency instead of 2.40).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.setswitchinterval(0.001)


def load_settings(
    path: Path | str | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Settings:
    """Build the tree: defaults, then the YAML file, then the environment, then ``overrides``.

    ``path`` falls back to ``OLYMPUS_CONFIG``, then to no file. ``overrides`` is a nested mapping (used by the
    command line and by tests). Raises ``SettingsError`` with one line per problem.
    """
    environ = os.environ if environ is None else environ
    chosen = path if path is not None else environ.get("OLYMPUS_CONFIG") or None
    tree: dict[str, Any] = {}
    origins: dict[str, str] = {}
    if chosen:
        file = _find_config(chosen)
        tree = _read_yaml(file)
        shown = file.resolve().relative_to(ROOT) if file.resolve().is_relative_to(ROOT) else file
        origins.update(dict.fromkeys(_leaves(tree), f"file {shown}"))
    _merge(tree, _from_environment(environ))
    origins.update({".".join(keys): f"environment {name}" for name, keys, _ in _environment_entries(environ)})
    _merge(tree, overrides or {})
    origins.update(dict.fromkeys(_leaves(overrides or {}), "overrides"))
    try:
        settings = Settings.model_validate(tree)
    except ValidationError as error:
        raise SettingsError("\n".join(_explain(item) for item in error.errors())) from None
    settings._origins = origins
    return settings


def setting_paths() -> Iterator[tuple[str, str, Any]]:
    """Every key as ``(dotted path, description, default)``; the documentation test walks it."""
    yield from _walk(Settings, "")


def _walk(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, Any]]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _walk(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field.description or "", field.default


def _find_config(path: Path | str) -> Path:
    """A path as given, or the name of a preset in ``configs/``."""
    given = Path(path)
    for candidate in (given, ROOT / "configs" / given, ROOT / "configs" / f"{given}.yaml"):
        if candidate.is_file():
            return candidate
    known = sorted(item.stem for item in (ROOT / "configs").glob("*.yaml"))
    raise SettingsError(f"no configuration file {str(path)!r}; give a path or one of: {', '.join(known)}")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: not valid YAML: {error}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise SettingsError(f"{path}: expected a mapping of settings at the top level, found {type(loaded).__name__}")
    return loaded


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for _, keys, value in _environment_entries(environ):
        _put(tree, keys, value)
    return tree


def _environment_entries(environ: Mapping[str, str]) -> Iterator[tuple[str, list[str], Any]]:
    """``(variable, path of the key, value)``; later ones win."""
    if environ.get("PORT"):
        yield "PORT", ["server", "port"], _scalar(environ["PORT"])
    for name, keys in _SHORT_NAMES.items():
        if environ.get(name):
            yield name, keys, environ[name]
    for name in sorted(environ):
        if not name.startswith(ENV_PREFIX) or name in RESERVED_ENV or name.startswith(RESERVED_ENV_PREFIXES):
            continue
        yield name, name.removeprefix(ENV_PREFIX).lower().split("__"), _scalar(environ[name])


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted paths of the values of a nested mapping."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _scalar(text: str) -> Any:
    """A YAML scalar or flow sequence; text that YAML cannot read stays text (a password, say)."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _put(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    for depth, key in enumerate(keys[:-1]):
        branch = tree.setdefault(key, {})
        if not isinstance(branch, dict):
            given = ENV_PREFIX + "__".join(keys[: depth + 1]).upper()
            wanted = ENV_PREFIX + "__".join(keys).upper()
            raise SettingsError(f"{given} is a single value, so {wanted} cannot be set; unset one of them")
        tree = branch
    tree[keys[-1]] = value


def _merge(base: dict[str, Any], extra: Mapping[str, Any]) -> None:
    for key, value in extra.items():
        if isinstance(value, Mapping) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = dict(value) if isinstance(value, Mapping) else value


def _explain(error: Any) -> str:
    path = [str(part) for part in error["loc"]]
    dotted = ".".join(path) or "settings"
    if error["type"] != "extra_forbidden":
        return f"{dotted}: {error['msg'].removeprefix('Value error, ')} (got {_shown(dotted, error['input'])})"
    known = [name for name, _, _ in setting_paths()]
    sections = sorted({name.rsplit(".", depth)[0] for name in known for depth in range(1, name.count(".") + 1)})
    nearest = difflib.get_close_matches(dotted, known + sections, n=1, cutoff=0.5) or difflib.get_close_matches(
        path[-1], [name.rsplit(".", 1)[-1] for name in known], n=1, cutoff=0.6
    )
    hint = f"; did you mean {nearest[0]}?" if nearest else "; `python -m cli.main config` prints the known ones"
    return f"{dotted}: unknown key{hint}"


def _shown(path: str, value: Any) -> str:
    if path.endswith(("api_key", "database.url")):
        return "a secret value"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
