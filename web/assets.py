"""Static files with their content's hash in the address: a browser may keep them for ever and never shows old ones.

Modules import each other by plain names, which are asked for anew at every load; a page names all that it will need, so
that they come side by side and not one after the other.
"""

from __future__ import annotations

import hashlib
import re
import threading
from pathlib import Path

_IMPORT = re.compile(r"^import\b[^\"';]*\"\./([\w-]+\.js)\";$", re.MULTILINE)


class Assets:
    """Hashes files under ``folder`` when they are first asked for, and again when they have changed."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._lock = threading.Lock()
        self._known: dict[str, tuple[int, str]] = {}
        self._imports: dict[str, tuple[str, tuple[str, ...]]] = {}

    def url(self, name: str) -> str:
        """``/static/<name>?v=<hash>``. Raises ``FileNotFoundError``: a template that names no file is a defect."""
        version = self.version(name)
        if version is None:
            raise FileNotFoundError(f"there is no static file {name!r}")
        return f"/static/{name}?v={version}"

    def version(self, name: str) -> str | None:
        """The first 12 hex digits of the content's SHA-256, or None when there is no such file under ``folder``."""
        path = (self._folder / name).resolve()
        if not path.is_relative_to(self._folder.resolve()) or not path.is_file():
            return None
        changed = path.stat().st_mtime_ns
        with self._lock:
            known = self._known.get(name)
        if known is not None and known[0] == changed:
            return known[1]
        version = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        with self._lock:
            self._known[name] = (changed, version)
        return version

    def imports(self, name: str) -> list[str]:
        """Every module that the module ``name`` imports, near and far, once each; [] when there is no such file."""
        found: dict[str, None] = {}
        waiting = [name]
        while waiting:
            for imported in self._direct(waiting.pop(0)):
                if imported not in found:
                    found[imported] = None
                    waiting.append(imported)
        return list(found)

    def _direct(self, name: str) -> tuple[str, ...]:
        version = self.version(name)
        if version is None:
            return ()
        with self._lock:
            known = self._imports.get(name)
        if known is not None and known[0] == version:
            return known[1]
        folder = name.rpartition("/")[0]
        text = (self._folder / name).read_text(encoding="utf-8")
        direct = tuple(f"{folder}/{module}" for module in _IMPORT.findall(text))
        with self._lock:
            self._imports[name] = (version, direct)
        return direct
