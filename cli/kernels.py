"""``python -m cli.main kernels``: list, download and upload kernels of a running server, over its REST API.

Only the standard library's HTTP client, so that the commands also work where nothing but this checkout is installed.
They never touch the data directory: that belongs to the server.
"""

from __future__ import annotations

import http.client
import json
import shutil
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from settings import SettingsError, load_settings
from storage.files import partial_path

app = typer.Typer(no_args_is_help=True, help="Kernels of a running server, as files.")

UrlOption = Annotated[
    str | None, typer.Option("--url", help="Where the server is; default: this machine, at the port of the settings.")
]
KeyOption = Annotated[
    str | None, typer.Option("--key", envvar="OLYMPUS_KEY", help="An API key; none is needed on the server's machine.")
]
_TIMEOUT_SECONDS = 60.0


@app.command("list")
def list_kernels(url: UrlOption = None, key: KeyOption = None) -> None:
    """List the kernels: id, state, step, held-out loss and baseline in nats per byte."""
    with _request(url, key, "/olympus/kernels") as response:
        kernels = json.load(response)["kernels"]
    for kernel in kernels:
        losses = [_number(kernel[name]) for name in ("holdout_loss", "baseline_loss")]
        line = f"{kernel['kernel_id']:28} {kernel['state']:10} {kernel['step']:>8} {losses[0]:>8} {losses[1]:>8}"
        typer.echo(f"{line}  {kernel['domain']}")


@app.command("export")
def export_kernel(
    kernel_id: str,
    file: Annotated[Path | None, typer.Argument(help="Default: the name that the server gives it.")] = None,
    checkpoint: Annotated[str, typer.Option(help="best, latest, or a checkpoint's name.")] = "best",
    training: Annotated[bool, typer.Option("--training", help="Include what it takes to train on.")] = False,
    url: UrlOption = None,
    key: KeyOption = None,
) -> None:
    """Download a kernel as one file. An existing file is not overwritten."""
    query = {"checkpoint": checkpoint, **({"include": "training"} if training else {})}
    path = f"/olympus/kernels/{urllib.parse.quote(kernel_id, safe='')}/export?{urllib.parse.urlencode(query)}"
    with _request(url, key, path) as response:
        given = response.headers.get_filename() or f"{kernel_id}.kernel.zip"
        target = file or Path(Path(given).name)
        if target.exists():
            _fail(f"{target} exists already; give another name")
        partial = partial_path(target)
        try:
            with open(partial, "xb") as handle:
                shutil.copyfileobj(response, handle)
            partial.rename(target)
        except OSError as error:
            _fail(f"{target} cannot be written: {error}")
        finally:
            partial.unlink(missing_ok=True)
    typer.echo(f"{target}: {target.stat().st_size:,} bytes")


@app.command("import")
def import_kernel(
    file: Path,
    name: Annotated[str | None, typer.Option(help="Default: its own, if it is free.")] = None,
    domain: Annotated[str | None, typer.Option(help="Default: its own.")] = None,
    train: Annotated[bool, typer.Option(help="Train on with this server's history.")] = True,
    url: UrlOption = None,
    key: KeyOption = None,
) -> None:
    """Upload a kernel's file; it becomes a new kernel."""
    query = {"train": str(train).lower(), **{k: v for k, v in (("name", name), ("domain", domain)) if v is not None}}
    try:
        data = file.read_bytes()
    except OSError as error:
        _fail(f"{file} cannot be read: {error.strerror}")
    with _request(url, key, f"/olympus/kernels/import?{urllib.parse.urlencode(query)}", data) as response:
        made = json.load(response)
    typer.echo(f"{made['kernel_id']}: {made['state']}, domain {made['domain']}")


def _request(url: str | None, key: str | None, path: str, data: bytes | None = None) -> http.client.HTTPResponse:
    """An open response; whatever goes wrong ends the command with one line."""
    base = url or _own_url()
    if not base.startswith(("http://", "https://")):
        _fail(f"{base} is no address of a server; give one like http://127.0.0.1:5000")
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    if data is not None:
        headers["Content-Type"] = "application/zip"
    request = urllib.request.Request(base.rstrip("/") + path, data, headers)
    try:
        found: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)
        return found
    except urllib.error.HTTPError as error:
        with error:
            _fail(_detail(error))
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        _fail(f"no answer from {base}: {getattr(error, 'reason', error)}; is the server running?")


def _own_url() -> str:
    try:
        server = load_settings().server
    except SettingsError as error:
        _fail(f"the configuration cannot be used:\n{error}")
    return f"http://127.0.0.1:{server.port}"


def _detail(error: urllib.error.HTTPError) -> str:
    try:
        body: Any = json.loads(error.read())
        return f"{error.code}: {body['detail']}"
    except (ValueError, KeyError, TypeError):
        return f"{error.code}: {error.reason}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _fail(message: str) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(1)
