"""``python -m cli.main distill``: distil here and now, ask a running server to, or see a whole cycle.

``run`` and ``register`` work on a data directory that no server uses; the others talk to a server over REST. Exit
codes: 0, 1 for what went wrong (a run that failed or was rejected counts), 2 for options that cannot be used.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from settings import Settings, SettingsError, load_settings

if TYPE_CHECKING:  # heavy imports belong to the commands that need them
    from lm.transport import Transport
    from olympus.runtime import Runtime

app = typer.Typer(no_args_is_help=True, help="From a history to a cartridge.")

UrlOption = Annotated[
    str | None, typer.Option("--url", help="Where the server is; default: this machine, at the port of the settings.")
]
KeyOption = Annotated[
    str | None, typer.Option("--key", envvar="OLYMPUS_KEY", help="An API key; none is needed on the server's machine.")
]
ConfigOption = Annotated[
    str | None, typer.Option("--config", "-c", help="The server's settings: a YAML file, or a name in configs/.")
]
DomainOption = Annotated[str, typer.Option("--domain", "-d", help="Whose history.")]
PresetOption = Annotated[str | None, typer.Option("--preset", "-p", help="A name in configs/distill/.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="A value on top, such as training.max_steps=50; may be repeated.", show_default=False),
]
_ENDS = ("promoted", "rejected", "skipped", "failed", "cancelled")


@app.command()
def run(
    domain: DomainOption,
    preset: PresetOption = None,
    values: SetOption = None,
    snapshot: Annotated[
        Path | None, typer.Option(help="A memory_*.jsonl to import into the domain first.", show_default=False)
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Distil a domain of a data directory that no server uses, and wait for the end."""
    with offline(config) as runtime:
        if snapshot is not None:
            _import(runtime, snapshot, domain)
        with _explained():
            begun = runtime.distillery.begin(
                domain, preset=preset, overrides=overrides(values), actor="cli", owner=True
            )
        ended = follow(lambda: runtime.distillery.run(begun["id"]))
    conclude(ended)


@app.command()
def register(
    source: Annotated[Path, typer.Argument(help="A cartridge's folder, a .pt file, or an exported .zip.")],
    domain: DomainOption,
    promote: Annotated[bool, typer.Option("--promote", help="Let it serve at once.")] = False,
    model: Annotated[
        str | None,
        typer.Option(help="The model that it was made for, where the file does not say.", show_default=False),
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Take a cartridge from elsewhere into the registry of a data directory that no server uses."""
    with offline(config) as runtime, _explained():
        made = runtime.cartridge_desk.take_in(_packed(source), domain=domain, model=model, actor="cli")
        if promote:
            made = runtime.cartridge_desk.promote(made["id"], actor="cli", reason="registered by hand")
    typer.echo(f"{made['id']}: {made['state']}, {made['slots']} slots, domain {made['domain']}")


@app.command()
def start(
    domain: DomainOption,
    preset: PresetOption = None,
    values: SetOption = None,
    wait: Annotated[bool, typer.Option("--wait", help="Follow it to its end.")] = False,
    url: UrlOption = None,
    key: KeyOption = None,
) -> None:
    """Ask a running server to distil."""
    with server(url, key) as transport, _explained():
        body = {"domain": domain, "config": overrides(values)} | ({} if preset is None else {"preset": preset})
        begun = transport.post("/olympus/distillation/runs", body)
        typer.echo(f"{begun['id']}: {begun['state']}")
        if wait:
            conclude(follow(lambda: transport.get(f"/olympus/distillation/runs/{begun['id']}")))


@app.command()
def runs(
    domain: Annotated[str | None, typer.Option("--domain", "-d", help="Of one domain only.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=500)] = 20,
    url: UrlOption = None,
    key: KeyOption = None,
) -> None:
    """List a server's runs, newest first."""
    with server(url, key) as transport, _explained():
        query = {"limit": str(limit)} | ({} if domain is None else {"domain": domain})
        for item in transport.get("/olympus/distillation/runs", query)["runs"]:
            progress = item["progress"]
            typer.echo(
                f"{item['id']}  {item['state']:10} {progress.get('fraction', 0):>5.0%}  {item['trigger']:8} "
                f"{item['domain']}  {item['error'] or progress.get('detail', '')}"
            )


@app.command()
def cancel(run_id: str, url: UrlOption = None, key: KeyOption = None) -> None:
    """Ask a server's run to end."""
    with server(url, key) as transport, _explained():
        typer.echo(transport.post(f"/olympus/distillation/runs/{run_id}/cancel", {})["state"])


@app.command()
def cycle(
    episodes: Annotated[int, typer.Option(min=4, help="That the agent lives before it is distilled.")] = 240,
    labels: Annotated[str, typer.Option(help="codes (arbitrary) or semantic.")] = "codes",
    data: Annotated[
        Path | None, typer.Option(help="Folder with banking77; default: made messages.", show_default=False)
    ] = None,
    preset: PresetOption = "feedback_labels",
    values: SetOption = None,
    examine: Annotated[int, typer.Option(min=1, help="Held-out messages that are asked before and after.")] = 60,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    data_dir: Annotated[
        Path | None, typer.Option(help="Of the server; default: one that is removed at the end.", show_default=False)
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the numbers here as well.")] = None,
) -> None:
    """A whole cycle on a server of its own: an agent lives, is distilled, and answers with what it lived through."""
    from cli.distill_cycle import Cycle

    with _explained():
        chosen = Cycle(episodes, labels, data, preset or "feedback_labels", overrides(values), examine, seed, data_dir)
        told = chosen.run(lambda line: typer.echo(line, err=True))
    if json_path is not None:
        json_path.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    typer.echo(told["summary"])
    if not told["passed"]:
        raise typer.Exit(1)


@app.command()
def outlook(domain: DomainOption, url: UrlOption = None, key: KeyOption = None) -> None:
    """What a server's schedule would do for a domain now, and why."""
    with server(url, key) as transport, _explained():
        told = transport.get("/olympus/distillation/outlook", {"domain": domain})
        for item in told["triggers"]:
            typer.echo(f"{'fires' if item['fires'] else '-':6} {item['name']:9} {item['reason']}")
        typer.echo(f"would start: {told['would_start'] or 'nothing'} ({told['reason']})")


# What the commands share; the cycle and the tools use it, too.


@contextmanager
def offline(config: str | None) -> Iterator[Runtime]:
    """A runtime with the model and the data directory, without kernels, schedule and HTTP."""
    from olympus.runtime import Runtime

    with _explained():
        settings = _settings(config)
        quiet: dict[str, Any] = {
            "kernels": {"autostart": False, "spawn_default": False, "auto_spawn": False},
            "distillation": {"automatic": False},
            "memory": {"episodic": {"enabled": False}},
        }
        runtime = Runtime(load_settings(config, overrides=quiet))
        typer.echo(f"loading {settings.model.name}", err=True)
        runtime.start(wait_for_model=True)
        if runtime.model_state.stage != "ready":
            runtime.shutdown(5)
            fail(f"the model {runtime.model_state.name} is not there: {runtime.model_state.detail}")
    try:
        yield runtime
    finally:
        runtime.shutdown(20)


@contextmanager
def server(url: str | None, key: str | None) -> Iterator[Transport]:
    """A connection to the server of this machine, or of ``url``."""
    from lm.transport import Patience, Transport

    with _explained():
        base = url or f"http://127.0.0.1:{_settings(None).server.port}"
        transport = Transport(base, api_key=key, patience=Patience(tries=3))
    with transport:
        yield transport


def overrides(values: list[str] | None) -> dict[str, Any]:
    """``["training.max_steps=50"]`` as a nested mapping; values are YAML scalars."""
    import yaml

    tree: dict[str, Any] = {}
    for item in values or ():
        path, equals, value = item.partition("=")
        if not equals or not path:
            fail(f"--set {item}: expected section.key=value", 2)
        branch = tree
        *sections, name = path.split(".")
        try:
            for section in sections:
                branch = branch.setdefault(section, {})
            branch[name] = yaml.safe_load(value)
        except (AttributeError, TypeError):  # a value stands where a section is wanted
            fail(f"--set {item}: {path.rpartition('.')[0]} was given a value before; it cannot have keys, too", 2)
        except yaml.YAMLError as error:
            fail(f"--set {item}: not a YAML value: {' '.join(str(error).split())}", 2)
    return tree


def follow(look: Callable[[], dict[str, Any]], seconds: float = 0.5) -> dict[str, Any]:
    """Show a run's progress until it has ended; returns it. On a terminal one line that changes, else one per stage."""
    last = ""
    while True:
        found = look()
        progress = found["progress"]
        eta = progress.get("eta_s")
        left = "" if eta is None else f", {eta / 60:.1f} min left"
        loss = "" if progress.get("loss") is None else f", loss {progress['loss']:.3f}"
        line = (
            f"{progress.get('stage', '')}: {progress.get('fraction', 0):.0%} {progress.get('detail', '')}{loss}{left}"
        )
        if sys.stderr.isatty():
            typer.echo(f"\r\x1b[K{line[:160]}", err=True, nl=False)
        elif progress.get("stage") != last or found["state"] in _ENDS:
            typer.echo(line, err=True)
        last = progress.get("stage", "")
        if found["state"] in _ENDS:
            if sys.stderr.isatty():
                typer.echo("", err=True)
            return found
        time.sleep(seconds)


def conclude(ended: dict[str, Any]) -> None:
    """Say how a run ended; anything but a promotion is exit code 1."""
    progress = ended["progress"]
    typer.echo(f"{ended['id']}: {ended['state']}. {ended['error'] or progress.get('detail', '')}")
    for name, arm in progress.get("evaluation", {}).get("arms", {}).items():
        numbers = {key: round(arm[key]["mean"], 3) for key in ("exact", "ranked", "nll", "kl") if key in arm}
        typer.echo(f"  {name:12} attended {arm['attended']:>8}  {json.dumps(numbers)}")
    if ended["state"] != "promoted":
        raise typer.Exit(1)


def fail(message: str, code: int = 1) -> NoReturn:
    """One message, and the end."""
    typer.echo(message, err=True)
    raise typer.Exit(code)


@contextmanager
def _explained() -> Iterator[None]:
    """What a person can mend is one message, not a traceback."""
    from lm.errors import LanguageModelError
    from memory.cartridges.errors import CartridgeError
    from memory.distillation.errors import DistillationError
    from olympus.errors import OlympusError
    from storage.errors import StorageError
    from storage.files import DataDirInUse

    try:
        yield
    except SettingsError as error:
        fail(f"the configuration cannot be used:\n{error}", 2)
    except (
        LanguageModelError,
        CartridgeError,
        DistillationError,
        OlympusError,
        StorageError,
        DataDirInUse,
        OSError,
    ) as error:
        fail(str(error))


def _settings(config: str | None) -> Settings:
    return load_settings(config)


def _import(runtime: Runtime, snapshot: Path, domain: str) -> None:
    from memory.snapshots import import_snapshot

    with _explained():
        report = import_snapshot(runtime.history, snapshot, domain=domain)
    bad = "" if report.rejected is None else f", {len(report.bad)} bad lines are in {report.rejected}"
    typer.echo(f"{snapshot}: {report.imported} imported, {report.known} were known{bad}", err=True)


def _packed(source: Path) -> bytes:
    """The bytes of an upload: a file as it is, a folder as a zip of its files."""
    if not source.is_dir():
        return source.read_bytes()
    import io
    import zipfile

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path in sorted(source.iterdir()):
            if path.is_file():
                archive.write(path, path.name)
    return buffer.getvalue()
