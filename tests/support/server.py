"""The real server as a subprocess, for tests that talk to it as a user would: ``python app.py`` on a free port."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    """A TCP port on the loopback interface that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """One life of the server on ``data_dir``. Its output is kept in ``log`` for messages of failed assertions."""

    def __init__(self, data_dir: Path, environ: Mapping[str, str] | None = None, port: int | None = None):
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        cache = os.environ.get("OLYMPUS_CACHE_DIR", str(ROOT / ".cache"))
        clean = {key: value for key, value in os.environ.items() if not key.startswith("OLYMPUS_") and key != "PORT"}
        self.environ = clean | {
            "OLYMPUS_DATA_DIR": str(data_dir),
            "OLYMPUS_CACHE_DIR": cache,
            "PORT": str(self.port),
            "PYTHONUNBUFFERED": "1",
            **(environ or {}),
        }
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "app.py"],
            cwd=ROOT,
            env=self.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.client = httpx.Client(base_url=self.url, timeout=60, trust_env=False)

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(self.process.stdout)

    @property
    def log(self) -> str:
        """The newest output of the process."""
        return "".join(self.lines[-120:])

    def wait_ready(self, timeout: float = 300) -> float:
        """Wait for ``/readyz`` to answer 200; returns the seconds since the process was started."""
        return self._wait("/readyz", timeout)

    def wait_alive(self, timeout: float = 60) -> float:
        """Wait for ``/healthz`` to answer; the model may still be loading."""
        return self._wait("/healthz", timeout)

    def _wait(self, path: str, timeout: float) -> float:
        pause = threading.Event()
        while time.monotonic() - self.started < timeout:
            assert self.process.poll() is None, f"the server ended with {self.process.returncode}:\n{self.log}"
            try:
                if self.client.get(path).status_code == 200:
                    return time.monotonic() - self.started
            except httpx.TransportError:
                pass
            pause.wait(0.1)
        raise AssertionError(f"{path} did not answer 200 within {timeout} s:\n{self.log}")

    def json(self, method: str, path: str, status: int = 200, **arguments: Any) -> Any:
        """Send a request, insist on ``status``, and return the body."""
        response = self.client.request(method, path, **arguments)
        assert response.status_code == status, f"{method} {path}: {response.status_code} {response.text[:2000]}"
        return response.json()

    def kill(self) -> None:
        """``kill -9`` of the arbiter and the worker at the same moment."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self._reap()

    def terminate(self, timeout: float = 40) -> float:
        """SIGTERM; returns the seconds until the process was gone. Its exit code is in ``process.returncode``."""
        begun = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the server did not end within {timeout} s of SIGTERM:\n{self.log}") from None
        self._reap()
        return time.monotonic() - begun

    def _reap(self) -> None:
        self.process.wait()
        self._reader.join(5)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.client.close()

    def stop(self) -> None:
        """Make sure that nothing is left, whatever happened before."""
        if self.process.poll() is None:
            self.terminate()


@contextmanager
def running(data_dir: Path, environ: Mapping[str, str] | None = None, *, ready: bool = True) -> Iterator[Server]:
    """A server that is ready (or at least alive), stopped at the end."""
    server = Server(data_dir, environ)
    try:
        server.wait_ready() if ready else server.wait_alive()
        yield server
    finally:
        server.stop()
