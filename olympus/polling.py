"""One question to all kernels: every answer with its evidence, and one recommended by routing.

Kernels are asked one after the other, the nearest first (``routing``), until all have answered or the time is used
up; those that were not reached say so. A kernel that cannot answer has an ``error`` in its place and spoils nothing.
``recommended`` is the routed kernel if it answered, with the reason; for an unknown text it is null, and nobody's
answer is put first silently.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import structlog

from olympus.errors import KernelNotFound, OlympusError
from olympus.kernel_rows import KernelRecord
from olympus.lineage import parent_ids
from olympus.requests import PollRequest, QueryRequest
from qig_core.errors import KernelMathError

log = structlog.get_logger(__name__)

MOST_ASKED = 64
_SHOWN = ("kernel_id", "god_name", "domain", "state", "ready", "holdout_loss", "distance", "p_value")
_ANSWER = ("output", "confidence", "candidates", "finished", "depth", "checkpoint_used", "latency_ms")


def poll(
    request: PollRequest,
    routed: dict[str, Any],
    kernels: list[KernelRecord],
    ask: Callable[[str, QueryRequest], dict[str, Any]],
) -> dict[str, Any]:
    """The body of ``POST /olympus/poll``. ``routed`` is the route of the input, ``ask`` queries one kernel."""
    begun = time.perf_counter()
    wanted = None if request.kernels is None else set(_named(request.kernels, kernels))
    chosen = [line for line in routed["kernels"] if wanted is None or line["kernel_id"] in wanted]
    question = QueryRequest(**{name: getattr(request, name) for name in QueryRequest.model_fields})
    answers = []
    for number, line in enumerate(chosen):
        late = number >= MOST_ASKED or time.perf_counter() - begun > request.seconds
        told = {"error": "not_asked", "detail": "the poll's time was used up"} if late else _ask(line, question, ask)
        route = {"route_confidence": line["confidence"]}
        answers.append({**{key: line[key] for key in _SHOWN}, **route, **told})
    return {
        "answers": answers,
        "asked": sum(answer.get("error") != "not_asked" for answer in answers),
        "recommended": _recommend(answers, routed),
        "routing": {key: value for key, value in routed.items() if key != "kernels"},
        "latency_ms": round((time.perf_counter() - begun) * 1000, 3),
    }


def _named(given: tuple[str, ...], kernels: list[KernelRecord]) -> list[str]:
    missing = [name for name in given if name not in {kernel.id for kernel in kernels}]
    if missing:
        raise KernelNotFound(f"there is no kernel {', '.join(missing)}; GET /olympus/kernels lists them")
    return parent_ids(given, kernels)


def _ask(line: dict[str, Any], question: QueryRequest, ask: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    try:
        answer = ask(line["kernel_id"], question)
    except (OlympusError, KernelMathError, RuntimeError, OSError) as error:
        log.warning("a kernel did not answer a poll", kernel=line["kernel_id"], reason=str(error))
        code = error.code if isinstance(error, OlympusError) else "kernel_error"
        detail = str(error) if isinstance(error, OlympusError | KernelMathError) else "see the server's log"
        return {"error": code, "detail": detail}
    return {key: answer[key] for key in _ANSWER if key in answer}


def _recommend(answers: list[dict[str, Any]], routed: dict[str, Any]) -> dict[str, Any]:
    nobody = {"kernel_id": None, "output": None, "confidence": None}
    if routed["kernel_id"] is None:
        return {**nobody, "reason": routed["reason"]}
    found = next((answer for answer in answers if answer["kernel_id"] == routed["kernel_id"]), None)
    if found is None or "error" in found:
        why = "was not among those asked" if found is None else f"did not answer ({found['error']})"
        return {**nobody, "reason": f"{routed['kernel_id']}, where {routed['reason']}, {why}"}
    chosen = {key: found[key] for key in ("kernel_id", "output", "confidence")}
    return {**chosen, "reason": routed["reason"]}
