"""``python -m cli.main capture | train-workspace | eval | fluency-guard | profile-workspace | workspace-texts``.

Each is a few lines over the functions of the same name in ``workspace``; ``scripts/`` has them under the names of the
design. The model and the workspace are those of the settings (``--config``). What goes wrong ends the command with one
message: exit code 1, or 2 for settings or options that cannot be used; the guard's verdict is 0 or 1 as well.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, TypeVar

import typer
from pydantic import BaseModel, ValidationError

from settings import Settings, SettingsError, load_settings

if TYPE_CHECKING:  # torch is imported by the commands that need it
    from workspace.capture_folder import CaptureEntry
    from workspace.models import LoadedModel
    from workspace.steering import Steering
    from workspace.training import StepReport

ConfigOption = Annotated[
    str | None, typer.Option("--config", "-c", help="A YAML file, or the name of one in configs/.", show_default=False)
]
RecipeOption = Annotated[
    Path | None, typer.Option(help="A YAML file with the sections capture and training.", show_default=False)
]
StateOption = Annotated[
    Path | None, typer.Option("--workspace-state", help="Trained weights; default: those of the settings.")
]
DeviceOption = Annotated[str | None, typer.Option(help="Default: that of the settings.", show_default=False)]
DtypeOption = Annotated[
    str | None, typer.Option(help="bfloat16, float32 or auto; default: that of the settings.", show_default=False)
]
ThreadsOption = Annotated[int, typer.Option(min=0, help="Cores to use; 0: as the server, all but one.")]
Model = TypeVar("Model", bound=BaseModel)
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the numbers here as well.", show_default=False)]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command("workspace-texts")(texts)
    app.command("capture")(capture)
    app.command("train-workspace")(train)
    app.command("eval")(evaluate)
    app.command("fluency-guard")(fluency_guard)
    app.command("profile-workspace")(profile)


def texts(
    output: Annotated[Path, typer.Option(help="The file of prompts to write.")] = Path("data/workspace/prompts.jsonl"),
    data: Annotated[Path | None, typer.Option(help="A folder with tinyshakespeare and banking77.")] = None,
    each: Annotated[int, typer.Option(min=0, help="Texts of each kind.")] = 200,
    held_out: Annotated[int, typer.Option(min=0, help="Further ones of each kind, held out.")] = 24,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Collect texts to capture: documentation of what is installed, questions, and data sets where they lie."""
    from workspace.training_texts import TextOptions, write_texts

    options = TextOptions(docs=each, chat=each, play=each, banking=each, held_out=held_out, seed=seed)
    try:
        counts = write_texts(output, options, data)
    except OSError as error:
        _fail(f"{error.filename or output}: {error.strerror or error}")
    typer.echo(f"{output}: {', '.join(f'{count} {name}' for name, count in counts.items())}; seed {seed}")


def capture(
    prompts: Annotated[Path, typer.Option(help="Questions (.txt, one a line) or texts (.jsonl).")],
    output: Annotated[Path, typer.Option(help="The folder to capture into; what is there stays.")] = Path(
        "data/capture"
    ),
    recipe: RecipeOption = None,
    workspace: Annotated[bool, typer.Option(help="Answers are written with the workspace on.")] = False,
    seed: Annotated[int | None, typer.Option(min=0, help="Default: the recipe's.", show_default=False)] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    threads: ThreadsOption = 0,
    state: StateOption = None,
    config: ConfigOption = None,
) -> None:
    """Run the model over texts and keep what training needs: residuals, distributions, tokens."""
    from workspace.capture import CaptureOptions
    from workspace.capture import capture as run
    from workspace.training_config import TrainingConfig

    with _explained():
        sections = _sections(recipe)
        given = {"workspace": workspace or None, "seed": seed}
        changes = {name: value for name, value in given.items() if value is not None}
        options = _validated(CaptureOptions, {**sections.get("capture", {}), **changes}, recipe)
        training = _validated(TrainingConfig, sections.get("training", {}), recipe)
        layers = training.workspace.hooked_layers
        with _steering(config, state, device, dtype, threads, layers=layers, shipped=False) as steering:
            summary = run(steering, prompts, output, options, progress=_captured())
    typer.echo(
        f"{summary.manifest}: {summary.captured} texts captured, {summary.kept} were there; {summary.tokens:,} tokens, "
        f"{summary.bytes:,} bytes, seed {options.seed}"
    )


def train(
    manifest: Annotated[Path, typer.Option(help="Of the captured texts.")] = Path("data/capture/manifest.jsonl"),
    output: Annotated[Path, typer.Option(help="The run's folder; one that was begun goes on.")] = Path(
        "data/workspace/run"
    ),
    recipe: RecipeOption = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Default: the recipe's.", show_default=False)] = None,
    begin: Annotated[Path | None, typer.Option(help="Weights to start from.", show_default=False)] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    threads: ThreadsOption = 0,
    one_dtype: Annotated[bool, typer.Option("--one-dtype", help="Weights count for this dtype only.")] = False,
    config: ConfigOption = None,
) -> None:
    """Train slots, projector, deltas and controller on captured texts; the model stays as it is."""
    from workspace.capture_folder import read_capture
    from workspace.training import train as run
    from workspace.training_config import make_config

    with _explained():
        values = dict(_sections(recipe).get("training", {}))
        if epochs is not None:
            values["epochs"] = epochs
        wanted = make_config(values, str(recipe or "the default recipe"))
        texts = read_capture(manifest)
        settings = _settings(config)
        _set_threads(threads)
        prints = [] if one_dtype else _fingerprints(settings, device)
        loaded = _load(settings, device, dtype)
        result = run(loaded, texts, output, wanted, fingerprints=prints, begin=begin, progress=_stepped())
    typer.echo(f"{result.state}: {result.step} steps; use it as workspace.state_path, or with --workspace-state")
    typer.echo(json.dumps(result.metrics, indent=1))


def evaluate(
    manifest: Annotated[Path | None, typer.Option(help="Captured texts, for held-out losses.")] = None,
    questions: Annotated[int, typer.Option(min=1, help="Of the fluency part.")] = 24,
    tokens: Annotated[int, typer.Option(min=8, help="Most tokens of an answer.")] = 64,
    dialogues: Annotated[int, typer.Option(min=0, help="Of the tool task; 0: none.")] = 2,
    speed_rounds: Annotated[int, typer.Option(min=0, help="Pairs of timed answers; 0: none.")] = 4,
    held_out: Annotated[int, typer.Option(min=1, help="Held-out texts of each kind.")] = 16,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    json_path: JsonOption = None,
    state: StateOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    threads: ThreadsOption = 0,
    config: ConfigOption = None,
) -> None:
    """The model with its workspace off and on, side by side: speed, fluency, tools, held-out loss."""
    from workspace.capture_folder import read_capture
    from workspace.evaluation import EvaluationOptions
    from workspace.evaluation import evaluate as run

    with _explained():
        texts = None if manifest is None else read_capture(manifest)
        with _steering(config, state, device, dtype, threads) as steering:
            options = EvaluationOptions.model_validate(
                {
                    "fluency": {"questions": questions, "tokens": tokens, "seed": seed, **_sampling(config)},
                    "dialogues": dialogues,
                    "speed_rounds": speed_rounds,
                    "held_out_rows": held_out,
                    "seed": seed,
                }
            )
            report = run(steering, options, capture=texts, threads=_cores(threads), progress=_told)
    typer.echo(report.table())
    _write(json_path, report.to_json())


def fluency_guard(
    questions: Annotated[int, typer.Option(min=1, help="So many questions, off and on.")] = 24,
    tokens: Annotated[int, typer.Option(min=8, help="Most tokens of an answer.")] = 64,
    control: Annotated[
        str | None, typer.Option(help="random: random virtual tokens instead; the guard must fail.")
    ] = None,
    loss: Annotated[float, typer.Option(min=0, help="Limit: nats per token.")] = 0.10,
    repetition: Annotated[float, typer.Option(min=0, help="Limit: share of repeated 4-grams.")] = 0.05,
    distinct: Annotated[float, typer.Option(min=0, help="Limit: share of different bigrams.")] = 0.05,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    json_path: JsonOption = None,
    state: StateOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    threads: ThreadsOption = 0,
    config: ConfigOption = None,
) -> None:
    """Exit code 0 if the workspace leaves the model as fluent as it was, 1 if not."""
    from workspace.fluency import FluencyLimits, FluencyOptions, guard

    if control not in (None, "random"):
        _fail(f"unknown control {control}; known is random", 2)
    with _explained(), _steering(config, state, device, dtype, threads) as steering:
        options = FluencyOptions.model_validate(
            {"questions": questions, "tokens": tokens, "seed": seed, **_sampling(config)}
        )
        limits = FluencyLimits(loss=loss, repetition=repetition, distinct=distinct)
        report = guard(steering, options, limits, control=control, threads=_cores(threads))
    typer.echo(report.table())
    _write(json_path, report.to_json())
    raise typer.Exit(0 if report.passed else 1)


def profile(
    context: Annotated[int, typer.Option(min=1, help="Tokens in the cache.")] = 256,
    rounds: Annotated[int, typer.Option(min=1)] = 20,
    json_path: JsonOption = None,
    state: StateOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    threads: ThreadsOption = 0,
    config: ConfigOption = None,
) -> None:
    """Milliseconds and memory of every part of the workspace, and the norms of its virtual keys and values."""
    from workspace.profiling import profile as run

    with _explained():
        settings = _settings(config)
        _set_threads(threads)
        wanted = settings.workspace if state is None else settings.workspace.model_copy(update={"state_path": state})
        report = run(_load(settings, device, dtype), wanted, context=context, rounds=rounds)
    typer.echo(report.table())
    _write(json_path, report.to_json())


# What they share.


@contextmanager
def _explained() -> Iterator[None]:
    """Our errors as one message and an exit code."""
    from workspace.errors import RequestError, TrainingConfigError, WorkspaceError

    try:
        yield
    except WorkspaceError as error:
        _fail(str(error), 2 if isinstance(error, (TrainingConfigError, RequestError)) else 1)


def _settings(config: str | None) -> Settings:
    try:
        return load_settings(config)
    except SettingsError as error:
        _fail(f"the configuration cannot be used:\n{error}", 2)


def _sampling(config: str | None) -> dict[str, float]:
    """Answers are sampled as the server samples when a request names nothing."""
    engine = _settings(config).engine
    return {"temperature": engine.temperature, "top_p": engine.top_p}


def _sections(recipe: Path | None) -> dict[str, Any]:
    from workspace.training_config import read_recipe

    return {} if recipe is None else read_recipe(recipe)


def _validated(kind: type[Model], values: dict[str, Any], source: Path | None) -> Model:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        told = "\n".join(
            f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors(include_url=False)
        )
        _fail(f"{source or 'options'} cannot be used:\n{told}", 2)


def _cores(threads: int) -> int:
    from workspace.engine import usable_cores

    return threads or max(1, usable_cores() - 1)


def _set_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(_cores(threads))


def _load(settings: Settings, device: str | None, dtype: str | None) -> LoadedModel:
    from workspace.models import load_model

    model = settings.model
    if dtype not in (None, "auto", "float32", "bfloat16"):
        _fail(f"unknown dtype {dtype}; known are auto, float32 and bfloat16", 2)
    return load_model(
        model.name,
        cache_dir=Path(model.cache_dir),
        dtype=dtype or model.dtype,  # type: ignore[arg-type]
        device=device or model.device,
        revision=model.revision,
    )


def _fingerprints(settings: Settings, device: str | None) -> list[str]:
    """Of the model in both dtypes: weights that were trained in one work in the other."""
    kinds: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    return [_load(settings, device, kind).fingerprint for kind in kinds]


@contextmanager
def _steering(
    config: str | None,
    state: Path | None,
    device: str | None,
    dtype: str | None,
    threads: int,
    layers: tuple[int, ...] | None = None,
    shipped: bool = True,
) -> Iterator[Steering]:
    """The workspace of the settings beside their model; not ``shipped``: without the weights that come along."""
    from workspace.steering import Steering

    settings = _settings(config)
    _set_threads(threads)
    changes: dict[str, Any] = {
        "state_path": state,
        "hooked_layers": layers,
        "shipped_weights": None if shipped else False,
    }
    wanted = settings.workspace.model_copy(update={name: value for name, value in changes.items() if value is not None})
    steering = Steering(_load(settings, device, dtype), wanted)
    try:
        yield steering
    finally:
        steering.close()


def _captured() -> Callable[[int, int, CaptureEntry], None]:
    def tell(done: int, every: int, entry: CaptureEntry) -> None:
        _line(f"{done} of {every}: {entry.kind}, {entry.tokens} tokens", last=done == every, each=50, number=done)

    return tell


def _stepped() -> Callable[[StepReport], None]:
    def tell(report: StepReport) -> None:
        losses = ", ".join(f"{name} {value:.3f}" for name, value in report.losses.items())
        _line(
            f"step {report.step} of {report.steps}: {losses}; {report.tokens / report.seconds:.0f} tokens/s, "
            f"{report.left / 60:.0f} min left",
            last=report.step == report.steps,
            each=10,
            number=report.step,
        )

    return tell


def _line(text: str, *, last: bool, each: int, number: int) -> None:
    """One line that is written over on a terminal, every ``each``-th line elsewhere."""
    if sys.stderr.isatty():
        typer.echo(f"\r\033[K{text}", nl=last, err=True)
    elif last or number % each == 0:
        typer.echo(text, err=True)


def _told(stage: str) -> None:
    typer.echo(f"measuring {stage}", err=True)


def _write(path: Path | None, value: dict[str, Any]) -> None:
    from storage import files

    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(path, value)
    except (OSError, ValueError) as error:
        _fail(f"{path} cannot be written: {error}")


def _fail(message: str, code: int = 1) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(code)
