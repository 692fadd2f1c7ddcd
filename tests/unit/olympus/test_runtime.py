"""The runtime: wiring starts nothing; starting refuses what must be refused; stopping twice is harmless."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from olympus.errors import ModelNotReady
from olympus.runtime import Runtime
from settings import SettingsError, load_settings
from storage.files import PARTIAL_PREFIX, DataDirInUse


def _runtime(data_dir: Path, **overrides: Any) -> Runtime:
    overrides = {"data_dir": data_dir, "model": {"load": False}, "kernels": {"spawn_default": False}, **overrides}
    return Runtime(load_settings(environ={}, overrides=overrides))


def test_wiring_touches_nothing(tmp_path: Path) -> None:
    runtime = _runtime(tmp_path / "data")
    assert not (tmp_path / "data").exists()
    runtime.shutdown()
    assert not (tmp_path / "data").exists()


def test_start_is_ready_and_shutdown_lets_the_next_one_in(tmp_path: Path) -> None:
    first, second = _runtime(tmp_path), _runtime(tmp_path)
    first.start()
    assert first.readiness() == (True, dict.fromkeys(first.readiness()[1], "ok"))
    with pytest.raises(DataDirInUse, match="OLYMPUS_DATA_DIR"):
        second.start()
    assert second.started_at is None
    first.shutdown()
    first.shutdown()
    assert first.readiness()[1]["stopping"] == "the server is stopping"
    third = _runtime(tmp_path)
    third.start()
    third.shutdown()


def test_leftovers_are_swept_at_start(tmp_path: Path) -> None:
    leftover = tmp_path / "kernels" / "x" / f"{PARTIAL_PREFIX}step-1"
    leftover.mkdir(parents=True)
    runtime = _runtime(tmp_path)
    runtime.start()
    assert not leftover.exists()
    runtime.shutdown()


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::"])
def test_an_open_door_needs_a_key(tmp_path: Path, host: str) -> None:
    runtime = _runtime(tmp_path)
    with pytest.raises(SettingsError, match="without an API key"):
        runtime.start(listening=[(host, 5000)])
    again = _runtime(tmp_path)  # the lock was given back
    again.start()
    again.keys.create("somebody", ["chat"])
    again.shutdown()
    with_key = _runtime(tmp_path)
    with_key.start(listening=[(host, 5000)])
    with_key.shutdown()


def test_the_cookie_secret_survives_a_restart_and_is_private(tmp_path: Path) -> None:
    first = _runtime(tmp_path)
    first.start()
    first.shutdown()
    second = _runtime(tmp_path)
    second.start()
    second.shutdown()
    assert len(first.cookie_secret) == 32
    assert first.cookie_secret == second.cookie_secret
    assert (tmp_path / "secret.key").stat().st_mode & 0o077 == 0


def test_a_model_that_will_not_come_is_not_worth_waiting_for(tmp_path: Path) -> None:
    disabled = _runtime(tmp_path)
    with pytest.raises(ModelNotReady, match="runs without a language model") as caught:
        _ = disabled.engine
    assert caught.value.retry_after is None
    loading = _runtime(tmp_path, model={"load": True})
    with pytest.raises(ModelNotReady, match="still loading") as caught:
        _ = loading.engine
    assert caught.value.retry_after == 5.0


def test_an_unknown_model_fails_with_its_reason(tmp_path: Path) -> None:
    runtime = _runtime(tmp_path, model={"name": "no-such-model"})
    runtime.start(wait_for_model=True)
    assert runtime.model_state.stage == "failed"
    ready, checks = runtime.readiness()
    assert not ready
    assert "smollm2-135m-instruct" in checks["model"]
    runtime.shutdown()
