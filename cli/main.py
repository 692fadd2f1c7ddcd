"""The command line: ``python -m cli.main COMMAND``. Each command is a few lines over the same functions as the server.

Nothing here takes the data directory's lock: keys can be made and revoked while the server runs (SQLite's own lock
and ``BEGIN IMMEDIATE`` keep the two apart).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
import yaml

from cli import workspace as workspace_commands
from cli.distill import app as distill_app
from cli.kernels import app as kernels_app
from settings import Settings, SettingsError, load_settings, prepare_process_environment, setting_paths
from storage import migrate
from storage.database import Database
from storage.errors import StorageError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
keys_app = typer.Typer(no_args_is_help=True, help="API keys: who may use a server that listens beyond this machine.")
database_app = typer.Typer(no_args_is_help=True, help="The database's schema.")
model_app = typer.Typer(no_args_is_help=True, help="The language model's files.")
app.add_typer(keys_app, name="keys")
app.add_typer(database_app, name="db")
app.add_typer(model_app, name="model")
app.add_typer(kernels_app, name="kernels")
app.add_typer(distill_app, name="distill")
workspace_commands.register(app)

ConfigOption = Annotated[
    str | None, typer.Option("--config", "-c", help="A YAML file, or the name of one in configs/.", show_default=False)
]


def _settings(config: str | None) -> Settings:
    try:
        return load_settings(config)
    except SettingsError as error:
        typer.echo(f"the configuration cannot be used:\n{error}", err=True)
        raise typer.Exit(2) from None


@contextmanager
def _database(config: str | None) -> Iterator[tuple[Settings, Database]]:
    settings = _settings(config)
    database = Database(settings.database_url, busy_timeout_ms=settings.database.busy_timeout_ms)
    try:
        migrate.upgrade(database)
        yield settings, database
    except StorageError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    finally:
        database.close()


@app.command()
def serve(config: ConfigOption = None) -> None:
    """Run the server; the same as ``python app.py``."""
    if config is not None:
        os.environ["OLYMPUS_CONFIG"] = config  # read again by gunicorn's configuration file
    import app as server

    raise typer.Exit(server.main())


@app.command("config")
def show_config(
    config: ConfigOption = None,
    docs: Annotated[bool, typer.Option("--docs", help="Print docs/settings.md instead.")] = False,
) -> None:
    """Print the effective settings as YAML, secrets masked."""
    if docs:
        typer.echo(settings_page(), nl=False)
        return
    typer.echo(yaml.safe_dump(_settings(config).masked(), sort_keys=False, allow_unicode=True), nl=False)


@app.command("openapi")
def show_openapi() -> None:
    """Print the OpenAPI document, as it stands in docs/openapi.json (a test compares the two)."""
    from web.app import create_app
    from web.openapi import document

    typer.echo(json.dumps(document(create_app(load_settings(environ={}))), indent=1, ensure_ascii=False))


def settings_page() -> str:
    """The reference page of all settings, as it stands in docs/settings.md (a test compares the two)."""
    head = """# Settings

Defaults, then the YAML file named by `OLYMPUS_CONFIG` (a path, or a name from `configs/`), then the environment: the
path of a key, upper case, parts joined by two underscores, so `server.port` is `OLYMPUS_SERVER__PORT`. `PORT`,
`DATABASE_URL`, `OLYMPUS_DATA_DIR` and `OLYMPUS_CACHE_DIR` are understood, too. An unknown key is an error.
`python -m cli.main config` prints what is in force. This page is printed by `python -m cli.main config --docs`.

| key | default | meaning |
|---|---|---|
"""
    rows = (f"| `{path}` | `{_shown(default)}` | {description} |\n" for path, description, default in setting_paths())
    return head + "".join(rows)


def _shown(default: object) -> str:
    plain = list(default) if isinstance(default, tuple) else default
    return str(plain) if isinstance(plain, Path) else json.dumps(plain)


@keys_app.command("create")
def create_key(
    name: str,
    scope: Annotated[list[str] | None, typer.Option(help="Repeat for several; default: admin.")] = None,
    days: Annotated[float | None, typer.Option(min=0, help="Expires after so many days; default: never.")] = None,
    config: ConfigOption = None,
) -> None:
    """Make a key and print it, this once: only its hash is kept."""
    from olympus.access import KeyStore

    with _database(config) as (settings, database):
        store = KeyStore(database, settings.server.api_key)
        try:
            key_id, key = store.create(name, scope or ["admin"], None if days is None else days * 86400)
        except ValueError as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(2) from None
    typer.echo(f"{key}\nkey {key_id} is shown only now; send it as: Authorization: Bearer {key}", err=False)


@keys_app.command("list")
def list_keys(config: ConfigOption = None) -> None:
    """List the keys, never their secrets."""
    from olympus.access import KeyStore

    with _database(config) as (settings, database):
        for key in KeyStore(database, settings.server.api_key).list():
            created = datetime.fromtimestamp(key["created_at"], UTC).strftime("%Y-%m-%d")
            state = "revoked" if key["revoked_at"] else "active"
            typer.echo(f"{key['id']}  {state:8} {created}  {','.join(key['scopes']):24} {key['name']}")


@keys_app.command("revoke")
def revoke_key(key_id: str, config: ConfigOption = None) -> None:
    """Make a key invalid at once, also for open streams and browser sessions."""
    from olympus.access import KeyStore

    with _database(config) as (settings, database):
        if not KeyStore(database, settings.server.api_key).revoke(key_id):
            typer.echo(f"there is no active key {key_id}; `keys list` shows them", err=True)
            raise typer.Exit(1)
    typer.echo(f"revoked {key_id}")


@database_app.command("upgrade")
def upgrade_database(config: ConfigOption = None) -> None:
    """Bring the schema to this version (the server does it at boot, too)."""
    with _database(config) as (_, database):
        typer.echo(f"schema {migrate.current(database)}")


@database_app.command("revision")
def make_revision(message: str, config: ConfigOption = None) -> None:
    """For developers: write a migration from what differs between the models and the database."""
    with _database(config) as (_, database):
        typer.echo(str(migrate.make_revision(database, message)))


@model_app.command("fetch")
def fetch_model(name: Annotated[str | None, typer.Argument()] = None, config: ConfigOption = None) -> None:
    """Fetch and convert a model ahead of the first start, with progress, and load it once."""
    from workspace.errors import WorkspaceError
    from workspace.models import load_model

    model = _settings(config).model
    shown = ""

    def progress(detail: str, fraction: float | None) -> None:
        nonlocal shown
        line = detail if fraction is None else f"{detail} {fraction:.0%}"
        if line != shown:
            typer.echo(line)
            shown = line

    try:
        loaded = load_model(
            name or model.name,
            cache_dir=Path(model.cache_dir),
            dtype=model.dtype,
            device=model.device,
            revision=model.revision,
            progress=progress,
        )
    except WorkspaceError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    typer.echo(f"{loaded.name}: ready, {loaded.dtype}, context of {loaded.context_length} tokens")


if __name__ == "__main__":
    prepare_process_environment()
    sys.exit(app())
