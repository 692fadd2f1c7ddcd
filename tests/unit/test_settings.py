"""Settings: layering, unknown keys, masking, presets."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from cli.main import settings_page
from settings import Settings, SettingsError, is_replit, load_settings, setting_paths

ROOT = Path(__file__).resolve().parents[2]


def test_environment_wins_over_yaml_wins_over_defaults(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("server: {port: 1111, threads: 100}\nkernels: {retention: {every_100_steps: 7}}\n")
    settings = load_settings(config, environ={"OLYMPUS_SERVER__PORT": "2222"})
    assert (settings.server.port, settings.server.threads) == (2222, 100)
    assert settings.kernels.retention.every_100_steps == 7
    assert settings.kernels.retention.every_1000_steps == 10


def test_port_data_dir_and_database_url_are_honoured(tmp_path: Path) -> None:
    settings = load_settings(environ={"PORT": "8081", "OLYMPUS_DATA_DIR": str(tmp_path)})
    assert settings.server.port == 8081
    assert settings.data_dir == tmp_path
    assert settings.database_url == f"sqlite:///{tmp_path}/olympus.db"
    assert settings.kernel_dir == tmp_path / "kernels"
    by_url = load_settings(environ={"DATABASE_URL": "postgres://u:p@db/olympus"})
    assert by_url.database_url == "postgresql+psycopg://u:p@db/olympus"


@pytest.mark.parametrize(
    ("environ", "hint"),
    [
        ({"OLYMPUS_SERVER__PRT": "1"}, "server.prt: unknown key; did you mean server.port?"),
        ({"OLYMPUS_SERVR__PORT": "1"}, "servr: unknown key; did you mean server?"),
        ({"OLYMPUS_KERNELS__RETENTION__EVERY_100": "1"}, "did you mean kernels.retention.every_100_steps?"),
        ({"OLYMPUS_QQQ": "1"}, "qqq: unknown key; `python -m cli.main config` prints the known ones"),
        ({"OLYMPUS_SERVER__PORT": "ninety"}, "server.port: Input should be a valid integer"),
        ({"OLYMPUS_SERVER": "1", "OLYMPUS_SERVER__PORT": "2"}, "OLYMPUS_SERVER is a single value"),
        ({"OLYMPUS_SERVER__API_KEY": "short"}, "server.api_key: must have at least 16 characters"),
        ({"OLYMPUS_SERVER__MAX_CHATS": "60"}, "must leave 8 of the 96 threads"),
    ],
)
def test_bad_keys_and_values_say_what_to_do(environ: dict[str, str], hint: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(environ=environ)
    assert hint in str(caught.value)


def test_every_problem_is_named_at_once() -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(environ={"OLYMPUS_SERVER__PORT": "-1", "OLYMPUS_ENGINE__TOP_P": "0"})
    assert "server.port" in str(caught.value)
    assert "engine.top_p" in str(caught.value)


def test_secrets_are_masked_and_never_in_errors() -> None:
    settings = load_settings(environ={"OLYMPUS_SERVER__API_KEY": "hunter2" * 3, "DATABASE_URL": "sqlite:///hunter2"})
    assert "hunter2" not in str(settings.masked()) + repr(settings)
    with pytest.raises(SettingsError) as caught:
        load_settings(environ={"OLYMPUS_SERVER__API_KEY": "[hunter2]"})
    assert "hunter2" not in str(caught.value)


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings().server.port = 1  # type: ignore[misc]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_each_preset_is_valid(path: Path) -> None:
    assert load_settings(path.stem, environ={}) == load_settings(path, environ={})


def test_compiled_steps_and_exact_passes_exclude_each_other() -> None:
    both = {"engine": {"batching": "exact"}, "workspace": {"enable_torch_compile": True}}
    with pytest.raises(SettingsError, match="set batching to batched, or enable_torch_compile to false"):
        load_settings(environ={}, overrides=both)


def test_a_missing_or_malformed_file_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="one of: cpu_small"):
        load_settings("nowhere", environ={})
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [")
    with pytest.raises(SettingsError, match="not valid YAML"):
        load_settings(bad, environ={})
    bad.write_text("- 1")
    with pytest.raises(SettingsError, match="expected a mapping"):
        load_settings(bad, environ={})


def test_every_setting_is_described_and_documented() -> None:
    for path, description, _ in setting_paths():
        assert description, f"{path} has no description"
    assert (ROOT / "docs" / "settings.md").read_text() == settings_page(), (
        "docs/settings.md is out of date: python -m cli.main config --docs > docs/settings.md"
    )


def _imports(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text())
    found = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    return found | {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}


def test_settings_stand_on_the_lowest_floor() -> None:
    """import-linter sees packages only; settings is a module. The workspace's section stands as low as it does."""
    ours = {"app", "cli", "web", "olympus", "memory", "workspace", "qig_core", "storage", "telemetry", "torch"}
    mounted = "workspace.workspace_config"
    assert not {name.split(".")[0] for name in _imports("settings.py") - {mounted}} & ours
    assert not {name.split(".")[0] for name in _imports("workspace/workspace_config.py")} & (ours | {"transformers"})


def test_replit_is_recognised_by_its_id() -> None:
    assert is_replit({"REPL_ID": "x"})
    assert not is_replit({})


def test_each_value_knows_where_it_comes_from(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("server: {port: 1111, threads: 100}\ndistillation: {domains: {support: quick}}\n")
    environ = {"OLYMPUS_SERVER__PORT": "2222", "OLYMPUS_DATA_DIR": str(tmp_path), "OLYMPUS_KERNELS": "{preset: small}"}
    settings = load_settings(config, environ=environ, overrides={"model": {"load": False}})
    assert settings.origin("server.port") == "environment OLYMPUS_SERVER__PORT"
    assert settings.origin("server.threads") == f"file {config}"
    assert settings.origin("distillation.domains") == f"file {config}"
    assert settings.origin("data_dir") == "environment OLYMPUS_DATA_DIR"
    assert settings.origin("kernels.preset") == "environment OLYMPUS_KERNELS"
    assert settings.origin("model.load") == "overrides"
    assert settings.origin("server.host") is None
    assert load_settings("server", environ={}).origin("server.host") == "file configs/server.yaml"


def test_a_named_preset_is_shown_by_its_place_in_the_project() -> None:
    settings = load_settings(environ={"OLYMPUS_CONFIG": "server", "PORT": "81"})
    assert settings.origin("server.host") == "file configs/server.yaml"
    assert settings.origin("server.port") == "environment PORT"
