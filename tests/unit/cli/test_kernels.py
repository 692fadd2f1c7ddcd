"""``kernels list|export|import`` against a real server on a port of this machine."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner
from werkzeug.serving import WSGIRequestHandler, make_server

from cli.main import app
from olympus.archive_reader import read_archive
from olympus.runtime import Runtime
from settings import load_settings
from tests.support.server import free_port
from tests.unit.olympus.kernel_world import archive_bytes
from web.app import create_app

KEY = "a-bootstrap-key-for-tests"


class Quiet(WSGIRequestHandler):
    """Server and command share this process's output."""

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that wants a key."""
    chosen = {
        "data_dir": str(tmp_path_factory.mktemp("data")),
        "model": {"load": False},
        "kernels": {"spawn_default": False},
        "memory": {"episodic": {"embedding": "none"}},
        "telemetry": {"log_level": "error"},
        "server": {"api_key": KEY, "host": "0.0.0.0"},
    }
    runtime = Runtime(load_settings(environ={}, overrides=chosen))
    runtime.start()
    server = make_server("127.0.0.1", 0, create_app(runtime=runtime), threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.port}"
    server.shutdown()
    thread.join()
    server.server_close()
    runtime.shutdown(5)


def run(*arguments: str, key: str = KEY) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["kernels", *arguments], env={"OLYMPUS_KEY": key})
    return result.exit_code, result.output


def test_a_kernel_goes_up_is_listed_and_comes_down(url: str, tmp_path: Path) -> None:
    file = tmp_path / "pallas.kernel.zip"
    file.write_bytes(archive_bytes(training=True))
    code, told = run("import", str(file), "--name", "metis", "--domain", "files", "--no-train", "--url", url)
    assert code == 0, told
    kernel_id = told.split(":")[0]
    assert told.strip().endswith("paused, domain files")
    code, told = run("list", "--url", url)
    assert code == 0
    assert kernel_id in told
    assert "files" in told
    back = tmp_path / "back.zip"
    code, told = run("export", kernel_id, str(back), "--training", "--checkpoint", "latest", "--url", url)
    assert code == 0, told
    archive = read_archive(back.read_bytes(), 1 << 24)
    assert archive.manifest.kernel.god_name == "metis"
    assert archive.training is not None
    code, told = run("export", kernel_id, str(back), "--url", url)
    assert (code, "exists already" in told) == (1, True)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_without_a_name_the_server_names_the_file(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "up.zip"
    file.write_bytes(archive_bytes())
    kernel_id = run("import", str(file), "--no-train", "--url", url)[1].split(":")[0]
    code, told = run("export", kernel_id, "--url", url)
    assert code == 0, told
    assert (tmp_path / f"{kernel_id}-step-00000000.kernel.zip").is_file()


def test_what_goes_wrong_is_one_line(url: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken.zip"
    broken.write_bytes(archive_bytes()[:-5])
    for arguments, key, message in (
        (("list", "--url", url), "wrong", "401: the API key is wrong, expired or revoked"),
        (("list", "--url", f"http://127.0.0.1:{free_port()}"), KEY, "is the server running?"),
        (("list", "--url", "file:///etc/passwd"), KEY, "is no address of a server"),
        (("export", "nobody-000000", "--url", url), KEY, "404: there is no kernel nobody-000000"),
        (("export", "../../v1/models", "--url", url), KEY, "404:"),
        (("import", str(broken), "--url", url), KEY, "422: the file is not a whole zip archive"),
        (("import", str(tmp_path / "none.zip"), "--url", url), KEY, "cannot be read"),
    ):
        code, told = run(*arguments, key=key)
        assert code == 1, arguments
        assert message in told, told
        assert len(told.strip().splitlines()) == 1
