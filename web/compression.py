"""Static texts go out gzipped: scripts and styles shrink to a third. Each is compressed once and kept in memory.

Not here: pages and API answers. They are made for one reader, and beside a secret a compressed size can tell of it
(BREACH); a proxy in front may compress what it likes.
"""

from __future__ import annotations

import gzip
import threading

from flask import Response, request

from web.assets import Assets

_TEXTS = (".js", ".css", ".svg")


class Compressor:
    """Holds the compressed files by name, as long as their content's hash is the same."""

    def __init__(self, assets: Assets):
        self._assets = assets
        self._lock = threading.Lock()
        self._kept: dict[str, tuple[str | None, bytes]] = {}

    def apply(self, response: Response) -> None:
        """Compress the body of ``response`` when it is a whole static text and the client takes gzip.

        Its ETag becomes a weak one: the same content in other bytes. It still answers ``If-None-Match``.
        """
        name = str((request.view_args or {}).get("filename", ""))
        if request.endpoint != "static" or not name.endswith(_TEXTS):
            return
        response.vary.add("Accept-Encoding")
        if response.status_code != 200 or request.method != "GET" or not request.accept_encodings["gzip"]:
            return
        response.direct_passthrough = False
        packed = self._packed(name, response)
        etag, _ = response.get_etag()
        file = response.response
        response.set_data(packed)
        if hasattr(file, "close"):  # what is not sent is not closed by the server
            file.close()
        response.headers["Content-Encoding"] = "gzip"
        if etag is not None:
            response.set_etag(etag, weak=True)

    def _packed(self, name: str, response: Response) -> bytes:
        version = self._assets.version(name)
        with self._lock:
            kept = self._kept.get(name)
        if kept is not None and kept[0] == version:
            return kept[1]
        packed = gzip.compress(response.get_data(), mtime=0)
        with self._lock:
            self._kept[name] = (version, packed)
        return packed
