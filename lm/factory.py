"""From a specification to a client: one line in a configuration says who answers.

    engine:                                      the engine of this process
    flex:<model>                                 a packaged name, directory or hub id, loaded here
    toka:<server>   toka:<model>@<server>        Tokasaurus, or Olympus through the same API
    olympus:<server>                             Olympus, asked not to write what it answers into its history
    openai:<model>@<server>   openai:<model>     any OpenAI API; without a server: OPENAI_BASE_URL, or OpenAI's own

A server is an address with http:// or https://. Keys come from ``api_key``, never from the specification, which is
logged and stored; OPENAI_API_KEY goes only where no server is named, so that it reaches no other one. Clients are
imported when they are wanted: torch is heavy.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm.errors import InvalidSpec
from lm.types import LanguageModel

if TYPE_CHECKING:
    from lm.engine_client import Resolve
    from lm.transport import Patience
    from workspace.engine import Engine

KINDS = ("engine", "flex", "olympus", "openai", "toka")
#: OpenAI's word for keeping an answer. An agent's experiences are its own to write, and an examination leaves none.
UNRECORDED: Mapping[str, Any] = {"store": False}
_OPENAI = "https://api.openai.com/v1"
_SERVED = re.compile(r"(?:(?P<model>.*)@)?(?P<url>https?://\S+)")


def lm_factory(
    spec: str,
    *,
    engine: Engine | None = None,
    resolve: Resolve | None = None,
    cache_dir: Path | None = None,
    tokenizer: Any = None,
    api_key: str | None = None,
    accepts_cartridges: bool = False,
    extra: Mapping[str, Any] | None = None,
    patience: Patience | None = None,
    stop: threading.Event | None = None,
) -> LanguageModel:
    """The client that ``spec`` names. Arguments that its kind has no use for are ignored. Raises ``InvalidSpec``.

    ``resolve`` finds cartridges for ``engine:`` and ``flex:``; ``tokenizer`` and ``accepts_cartridges`` are for
    ``openai:`` (see ``openai_client.py``). ``extra`` are fields that the server knows beyond its API.
    """
    kind, colon, rest = spec.partition(":")
    rest = rest.strip()
    if not colon or kind not in KINDS:
        raise InvalidSpec(
            f"{spec!r} names no language model: it must begin with one of {', '.join(f'{name}:' for name in KINDS)} "
            "such as engine:, flex:smollm2-135m-instruct, toka:http://127.0.0.1:10210 or openai:gpt-4o-mini"
        )
    if kind == "engine":
        return _engine(spec, rest, engine, resolve)
    if kind == "flex":
        return _flex(spec, rest, cache_dir, resolve)
    if kind in ("toka", "olympus"):
        from lm.tokasaurus_client import TokasaurusClient

        model, url = _served(spec, rest)
        fields = {**(UNRECORDED if kind == "olympus" else {}), **(extra or {})}
        return TokasaurusClient(url, model, api_key=api_key, extra=fields, patience=patience, stop=stop)
    from lm.openai_client import OpenAIClient

    if "://" in rest:
        model, url = _served(spec, rest)
    else:
        model, url = rest, os.environ.get("OPENAI_BASE_URL", _OPENAI)
        api_key = api_key or os.environ.get("OPENAI_API_KEY")
    if not model:
        raise InvalidSpec(f"{spec!r} lacks the model: openai:<model>@<server>")
    return OpenAIClient(
        url,
        model,
        api_key=api_key,
        tokenizer=tokenizer,
        accepts_cartridges=accepts_cartridges,
        extra=extra,
        patience=patience,
        stop=stop,
    )


def _engine(spec: str, rest: str, engine: Engine | None, resolve: Resolve | None) -> LanguageModel:
    if rest:
        raise InvalidSpec(f"{spec!r}: the engine has its model already, so nothing follows engine:")
    if engine is None:
        raise InvalidSpec("engine: means the engine of a running server, and there is none here; use flex:<model>")
    from lm.engine_client import EngineClient

    return EngineClient(engine, resolve=resolve)


def _flex(spec: str, rest: str, cache_dir: Path | None, resolve: Resolve | None) -> LanguageModel:
    if not rest:
        raise InvalidSpec(f"{spec!r} lacks the model: flex:<packaged name, directory or hub id>")
    if cache_dir is None:
        raise InvalidSpec(f"{spec!r} needs cache_dir, the folder where packaged models are kept")
    from lm.flex_hf_client import LocalFlexHFClient

    return LocalFlexHFClient(rest, cache_dir=cache_dir, resolve=resolve)


def _served(spec: str, rest: str) -> tuple[str | None, str]:
    match = _SERVED.fullmatch(rest)
    if match is None:
        raise InvalidSpec(f"{spec!r} needs the address of a server, such as http://127.0.0.1:10210")
    return match["model"] or None, match["url"]
