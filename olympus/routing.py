"""Which kernel should a text go to? The nearest by Fisher-Rao distance, with a confidence, or an honest "unknown".

A kernel lives where its domain lives: the geometry is that of the history's domains (``route_reference``), and a
domain without a kernel takes part, so that a text about it is not given to the next best kernel. Three answers:

    routed      the nearest domain has a kernel; of several the one with the lowest held-out loss
    uncovered   the nearest domain is known and has no kernel
    unknown     the text lies further out than 95 % of the nearest domain's own texts

References follow the history: at most every ``REFRESH_SECONDS`` the domains that changed are fitted anew, on the time
of the request that finds them so (counted as ``reference_seconds``); meanwhile other requests use the old ones. A
kernel for all domains (``*``) has no place of its own and is named beside the answer.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from memory.history import History
from olympus.example import is_imitable
from olympus.requests import ALL_DOMAINS
from olympus.route_reference import ALPHA, LEAST_TEXTS, Atlas, DomainReference, Place, texts_per_domain

REFRESH_SECONDS = 15.0
#: Domains that take part, those with the most experience first.
MOST_DOMAINS = 128

_Signature = tuple[int, int, int]  # experiences, newest id, reference texts
Line = Mapping[str, Any]


class Router:
    """``lines`` gives the list of kernels as ``GET /olympus/kernels`` shows it. Safe to use from all threads."""

    def __init__(self, history: History, lines: Callable[[], list[dict[str, Any]]]):
        self._history = history
        self._lines = lines
        self._building = threading.Lock()
        self._atlas: Atlas | None = None
        self._fitted: dict[str, tuple[_Signature, DomainReference | None]] = {}
        self._looked = float("-inf")
        #: Seconds spent on fitting references since the start.
        self.reference_seconds = 0.0

    def route(self, texts: Sequence[str]) -> list[dict[str, Any]]:
        """One answer per text, as JSON types."""
        atlas, lines = self.atlas(), self._lines()
        return [self._answer(places, lines) for places in atlas.locate(texts)]

    def atlas(self) -> Atlas:
        """The present geometry; fits what has changed when it is time to look."""
        due = time.monotonic() - self._looked > REFRESH_SECONDS
        if (atlas := self._atlas) is not None and not due:
            return atlas
        if not self._building.acquire(blocking=atlas is None):
            assert atlas is not None, "only a router with an atlas does not wait for the builder"
            return atlas
        try:
            if self._atlas is None or time.monotonic() - self._looked > REFRESH_SECONDS:
                self._rebuild()
            assert self._atlas is not None
            return self._atlas
        finally:
            self._building.release()

    def forget(self) -> None:
        """Look at the history again at the next question."""
        self._looked = float("-inf")

    def _rebuild(self) -> None:
        begun = time.perf_counter()
        domains = self._history.domains()
        chosen = sorted(domains, key=lambda domain: (-domains[domain][0], domain))[:MOST_DOMAINS]
        share = texts_per_domain(len(chosen))
        fitted: dict[str, tuple[_Signature, DomainReference | None]] = {}
        for domain in sorted(chosen):
            signature = (*domains[domain], share)
            known = self._fitted.get(domain)
            fitted[domain] = known if known and known[0] == signature else (signature, self._fit(domain, share))
        if self._atlas is None or fitted != self._fitted:
            self._fitted = fitted
            self._atlas = Atlas([reference for _, reference in fitted.values() if reference is not None])
        self._looked = time.monotonic()
        self.reference_seconds += time.perf_counter() - begun

    def _fit(self, domain: str, share: int) -> DomainReference | None:
        """From the newest observations, of those a sample that changes little as the history grows."""
        newest = self._history.page(domain=domain, limit=4 * share)
        texts = {
            record.observation: record.content_hash
            for record in newest
            if record.observation.strip() and is_imitable(record.source, record.score)
        }
        sample = sorted(texts, key=lambda text: texts[text])[:share]
        return DomainReference.fit(domain, sample) if len(sample) >= LEAST_TEXTS else None

    def _answer(self, places: list[Place], lines: list[dict[str, Any]]) -> dict[str, Any]:
        kernels = _kernels(places, lines)
        decision, reason = _decide(places, kernels)
        nearest = places[0] if places else None
        chosen = kernels[0] if decision == "routed" else None
        return {
            "decision": decision,
            "reason": reason,
            "kernel_id": chosen["kernel_id"] if chosen else None,
            "domain": nearest.domain if nearest and decision != "unknown" else None,
            "confidence": round(sum(p.confidence for p in places[:1]), 6) if decision != "unknown" else 0.0,
            "unknown_confidence": round(1.0 - sum(place.confidence for place in places), 6),
            "distance": round(nearest.distance, 6) if nearest else None,
            "p_value": round(nearest.p_value, 6) if nearest else None,
            "kernels": kernels,
            "domains": [_place(place) for place in places],
        }


def _decide(places: list[Place], kernels: list[dict[str, Any]]) -> tuple[str, str]:
    if not places:
        return "unknown", f"no domain has {LEAST_TEXTS} different texts yet, so there is nothing to compare with"
    nearest = places[0]
    shown = f"distance {nearest.distance:.3f}, further than {1 - nearest.p_value:.0%} of its own texts"
    if nearest.p_value < ALPHA:
        return "unknown", f"even the nearest domain {nearest.domain} is too far: {shown}"
    if not kernels or kernels[0]["domain"] != nearest.domain:
        return "uncovered", f"the nearest domain {nearest.domain} has no kernel ({shown})"
    return "routed", f"the nearest domain is {nearest.domain} ({shown})"


def _kernels(places: list[Place], lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every kernel with its place, the nearest first; within a domain the lowest held-out loss first."""
    by_domain = {place.domain: place for place in places}

    def order(line: Line) -> tuple[float, bool, float, str]:
        place, loss = by_domain.get(line["domain"]), line["holdout_loss"]
        return (
            float("inf") if place is None else -place.share,
            loss is None,
            0.0 if loss is None else loss,
            line["kernel_id"],
        )

    return [_candidate(line, by_domain.get(line["domain"])) for line in sorted(lines, key=order)]


def _candidate(line: Line, place: Place | None) -> dict[str, Any]:
    shown = {key: line[key] for key in ("kernel_id", "god_name", "domain", "state", "ready", "holdout_loss")}
    if place is not None:
        return {**shown, **_place(place), "reason": None}
    reason = "learns from all domains" if line["domain"] == ALL_DOMAINS else f"fewer than {LEAST_TEXTS} different texts"
    return {**shown, "distance": None, "p_value": None, "confidence": None, "reason": reason}


def _place(place: Place) -> dict[str, Any]:
    return {
        "domain": place.domain,
        "distance": round(place.distance, 6),
        "p_value": round(place.p_value, 6),
        "confidence": round(place.confidence, 6),
    }
