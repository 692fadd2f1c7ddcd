"""Start and stop: SIGTERM with open streams, two servers on one directory, refusals at the door, reload."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

from tests.support.server import ROOT, Server, running

NO_MODEL = {"OLYMPUS_MODEL__LOAD": "false"}
FEED = [{"observation": f"question {n} about {w}", "action": w} for n in range(20) for w in ("cash", "card", "fee")]


@pytest.mark.model
def test_sigterm_with_open_streams_and_a_trainer_flushes(smollm2: object, tmp_path: Path) -> None:
    """Two chats and two dashboards are open and a kernel trains: the exit is clean and the last step is saved."""
    server = Server(tmp_path, {"OLYMPUS_KERNELS__SERVE_PAUSE_MS": "0", "OLYMPUS_KERNELS__CHECKPOINT_EVERY": "100000"})
    try:
        server.wait_ready()
        spawned = server.json("POST", "/olympus/kernels/spawn", 201, json={"domain": "general"})
        kernel = spawned["kernel"]["kernel_id"]
        server.json("POST", f"/olympus/kernels/{kernel}/experiences", 201, json={"experiences": FEED})
        ended: list[str] = []
        opened = [threading.Event() for _ in range(4)]

        def watch(index: int) -> None:
            with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
                if index < 2:
                    body = {"model": "smollm2-135m-instruct", "stream": True, "max_tokens": 4000}
                    messages = [{"role": "user", "content": "Write a very long story about the sea."}]
                    context = client.stream("POST", "/v1/chat/completions", json=body | {"messages": messages})
                else:
                    context = client.stream("GET", "/olympus/stream")
                try:
                    with context as response:
                        for line in response.iter_lines():
                            if line:
                                opened[index].set()
                    ended.append("clean")
                except httpx.TransportError:
                    ended.append("cut")

        watchers = [threading.Thread(target=watch, args=(index,), daemon=True) for index in range(4)]
        for watcher in watchers:
            watcher.start()
        for event in opened:
            assert event.wait(60), server.log
        step = _wait_for_step(server, kernel, 5)
        seconds = server.terminate()
        for watcher in watchers:
            watcher.join(30)
    finally:
        server.stop()
    assert server.process.returncode == 0, server.log
    assert seconds < 20, f"it took {seconds:.1f} s"
    assert ended == ["clean"] * 4
    assert "Traceback" not in "".join(server.lines), server.log
    with running(tmp_path, NO_MODEL) as again:
        checkpoints = again.json("GET", f"/olympus/kernels/{kernel}/checkpoints")["checkpoints"]
        assert max(item["step"] for item in checkpoints) >= step


def _wait_for_step(server: Server, kernel: str, step: int) -> int:
    for _ in range(1500):
        status = server.json("GET", f"/olympus/kernels/{kernel}/status")
        if status["step"] >= step:
            return int(status["step"])
        threading.Event().wait(0.1)
    raise AssertionError(f"the kernel never reached step {step}: {status}\n{server.log}")


def test_a_second_server_on_one_data_directory_refuses(tmp_path: Path) -> None:
    with running(tmp_path, NO_MODEL) as first:
        second = Server(tmp_path, NO_MODEL)
        assert second.process.wait(60) != 0
        second._reap()
        assert "is in use by process" in second.log
        assert "OLYMPUS_DATA_DIR" in second.log
        assert "Traceback" not in second.log
        assert first.json("GET", "/healthz")["status"] == "ok"


def test_it_does_not_listen_beyond_loopback_without_a_key(tmp_path: Path) -> None:
    server = Server(tmp_path, NO_MODEL | {"OLYMPUS_SERVER__HOST": "0.0.0.0"})
    assert server.process.wait(60) != 0
    server._reap()
    assert "without an API key" in server.log
    assert "Traceback" not in server.log


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"OLYMPUS_SERVER__PRT": "1"}, "server.prt: unknown key; did you mean server.port?"),
        ({"OLYMPUS_KERNELS__PRESET": "huge"}, "kernels.preset: Input should be 'nano', 'micro' or 'small'"),
        ({"OLYMPUS_CONFIG": "nowhere.yaml"}, "no configuration file 'nowhere.yaml'"),
        ({"DATABASE_URL": "oracle://scott:tiger@x"}, "database.url: give a URL that begins with sqlite:/// or"),
    ],
)
def test_a_bad_configuration_is_one_clear_message(tmp_path: Path, environ: dict[str, str], message: str) -> None:
    server = Server(tmp_path, NO_MODEL | environ)
    assert server.process.wait(60) != 0
    server._reap()
    assert message in server.log
    assert "Traceback" not in server.log


def test_an_unknown_model_is_told_where_people_look(tmp_path: Path) -> None:
    with running(tmp_path, {"OLYMPUS_MODEL__NAME": "no-such-model"}, ready=False) as server:
        for _ in range(600):
            response = server.client.get("/readyz")
            if "failed" in response.text:
                break
            threading.Event().wait(0.1)
        assert response.status_code == 503
        assert "smollm2-135m-instruct" in response.json()["checks"]["model"]
        body = {"model": "x", "messages": [{"role": "user", "content": "hi"}]}
        answer = server.client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 503
        assert "no-such-model" in answer.json()["error"]["message"]


def test_a_reload_hands_the_data_directory_over(tmp_path: Path) -> None:
    """SIGHUP with a stream open: the old worker drains, the new one waits for the lock and takes over."""
    with running(tmp_path, NO_MODEL) as server:
        before = server.json("GET", "/olympus/status")["pid"]
        with server.client.stream("GET", "/olympus/stream") as stream:
            lines = stream.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGHUP)
            for _ in lines:  # until the old worker ends it
                pass
        for _ in range(900):
            try:
                now = server.client.get("/olympus/status").json()["pid"]
            except (httpx.TransportError, json.JSONDecodeError, KeyError):
                now = before
            if now != before:
                break
            threading.Event().wait(0.1)
        assert now != before, server.log
        server.wait_ready()  # it answers before it has taken over
        assert server.json("GET", "/readyz")["status"] == "ready"


def test_importing_the_application_starts_nothing(tmp_path: Path) -> None:
    script = "import threading, app; print(len(threading.enumerate()), app.app.extensions['olympus'].started_at)"
    environ = {"OLYMPUS_DATA_DIR": str(tmp_path / "never"), "PATH": "/usr/bin:/bin"}
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environ, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["1", "None"], result.stderr
    assert not (tmp_path / "never").exists()
