"""The vote on a new kernel: whose loss says that it is needed, and whose that it is not.

Upstream's vote was decided by hashes of names: 200 of 200 random proposals passed, and an exact duplicate with .949.
Here every trained kernel casts a ballot that was measured (``ballots``), and the ballots are weighed so that the
number of kernels that know nothing about the matter cannot outvote one that does:

    coverage  c = the greatest fit among the voters: how well the sample is served already
    AGAINST   weighs affinity * fit
    FOR       weighs affinity * (1 - c) / (number of FOR): "I do not know this" said n times is said once
    ratio     for / (for + against); passed when it reaches the threshold of the consensus type

An exact duplicate of a domain that some kernel has learned has c near 1, so the ratio is near 0 however many others
there are; a domain that none serves has no AGAINST and the ratio 1. Without any ballot (nobody has learned anything
yet) there is nobody to object: passed, with ratio null and the reason. ``force`` overrides a lost vote and is
recorded as such.

Every vote leaves an audit row with all its evidence and a ``kernel.proposal`` event. Not here: the making of the
kernel (``spawning``), when Zeus proposes one by himself (``coverage``).
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
import structlog

from memory.history import History, content_hash
from olympus import pantheon
from olympus.ballots import LEAST_SAMPLE, Ballot, Sample, Voter, cast
from olympus.checkpoints import CheckpointStore
from olympus.errors import InvalidAction, InvalidRequest, OlympusError, VoteLost
from olympus.example import Example, is_imitable
from olympus.kernel_query import choose_snapshot
from olympus.kernel_rows import KernelRecord, KernelRows
from olympus.lineage import parent_ids
from olympus.requests import ALL_DOMAINS, Consensus, ExperienceIn, ProposeRequest
from olympus.routing import Router
from olympus.snapshot import SnapshotShelf
from settings import KernelSettings
from storage.database import Database
from storage.models import AuditEvent
from telemetry.hub import EventHub

log = structlog.get_logger(__name__)

THRESHOLDS: dict[Consensus, float] = {"unanimous": 1.0, "supermajority": 0.667, "majority": 0.501, "quorum": 0.333}
ACTION = "kernel.proposal"
#: The newest experiences of a domain that stand for it, and the voters that are asked: those nearest to the sample.
MOST_SAMPLED, MOST_VOTERS = 300, 16
_HINT = "the ballots' numbers stand in vote_result; spawn with force to overrule them, or feed an incumbent instead"


@dataclass(frozen=True, slots=True)
class Tally:
    """The count. ``ratio`` None: nobody could be measured."""

    passed: bool
    ratio: float | None
    for_weight: float
    against_weight: float
    coverage: float


def count(ballots: Sequence[Ballot], consensus: Consensus) -> Tally:
    """Weigh the ballots; see the module docstring."""
    coverage = max((ballot.fit for ballot in ballots), default=0.0)
    against = sum(ballot.affinity * ballot.fit for ballot in ballots if ballot.vote == "against")
    voices = [ballot.affinity for ballot in ballots if ballot.vote == "for"]
    gap = sum(voices) * (1.0 - coverage) / len(voices) if voices else 0.0
    if gap + against == 0.0:
        return Tally(True, None, 0.0, 0.0, coverage)
    ratio = gap / (gap + against)
    return Tally(ratio >= THRESHOLDS[consensus], ratio, gap, against, coverage)


class Council:
    """Holds votes. ``report`` gives a kernel's live report. Safe to use from all threads."""

    def __init__(
        self,
        settings: KernelSettings,
        database: Database,
        history: History,
        hub: EventHub,
        rows: KernelRows,
        snapshots: SnapshotShelf,
        checkpoints: CheckpointStore,
        router: Router,
        report: Callable[[KernelRecord], Mapping[str, Any]],
    ):
        self._settings = settings
        self._database = database
        self._history = history
        self._hub = hub
        self._rows = rows
        self._snapshots = snapshots
        self._checkpoints = checkpoints
        self._router = router
        self._report = report

    def propose(self, request: ProposeRequest, actor: str, *, force: bool = False) -> dict[str, Any]:
        """Hold the vote and return it with the proposal. Raises ``VoteLost`` unless it passed or was forced.

        Raises ``InvalidRequest`` for an unknown parent or a sample that is too small to measure on, and
        ``InvalidAction`` when it is the history that holds too little.
        """
        domain = request.domain or self._settings.default_domain
        parents = parent_ids(request.parent_gods, self._rows.all())
        sample = self._sample(request.experiences, domain)
        ballots, not_asked = self._ballots(sample, domain)
        tally = count(ballots, request.consensus_type)
        vote = _vote_result(request.consensus_type, tally, ballots, forced=force and not tally.passed)
        vote["evidence"] = {
            "experiences_in_domain": self._history.count(domain=None if domain == ALL_DOMAINS else domain),
            "sample": {"experiences": len(sample), "source": "request" if request.experiences else "history"},
            "coverage": round(tally.coverage, 4),
            "ballots": [ballot.to_json() for ballot in ballots],
            "not_asked": not_asked,
        }
        proposal = {
            "proposal_id": f"spawn_{secrets.token_hex(4)}",
            "proposed_name": request.name,
            "proposed_domain": domain,
            "reason": request.reason,
            "parent_gods": parents,
            "status": vote["status"],
            "proposed_at": time.time(),
        }
        self._record(proposal, vote, actor)
        answer = {"success": tally.passed or force, "phase": "voting", "proposal": proposal, "vote_result": vote}
        if not answer["success"]:
            raise VoteLost(f"the kernels voted against {domain}: {vote['note']}", {**answer, "hint": _HINT})
        return answer

    def proposals(self, limit: int = 50) -> list[dict[str, Any]]:
        """The newest votes with their evidence, newest first; the audit log is their store."""
        query = sa.select(AuditEvent).where(AuditEvent.action == ACTION).order_by(AuditEvent.id.desc()).limit(limit)
        with self._database.read() as session:
            return [{"at": row.at, "actor": row.actor, **row.detail} for row in session.scalars(query)]

    # -- inside -----------------------------------------------------------------------------------------------

    def _sample(self, given: Sequence[ExperienceIn], domain: str) -> Sample:
        if given:
            hashes = [content_hash(item.observation, item.action) for item in given]
            examples = [
                Example(-1, item.observation, item.action, item.score, digest)
                for item, digest in zip(given, hashes, strict=True)
                if is_imitable("api", item.score)
            ]
        else:
            records = self._history.page(domain=None if domain == ALL_DOMAINS else domain, limit=MOST_SAMPLED)
            examples = [Example.of(record) for record in records if is_imitable(record.source, record.score)]
        sample = Sample(examples, self._settings.holdout_percent)
        if len(sample) < LEAST_SAMPLE:
            needs = f"a vote is measured on at least {LEAST_SAMPLE} different experiences"
            if given:
                raise InvalidRequest(f"experiences: {needs}, and {len(sample)} were given; send more")
            raise InvalidAction(f"{needs}, and the history of {domain} holds {len(sample)}; spawn without a vote")
        return sample

    def _ballots(self, sample: Sample, domain: str) -> tuple[list[Ballot], int]:
        """Ballots of the kernels that are most likely to know the sample, and how many were not asked."""
        kernels = sorted(self._rows.all(), key=self._nearness(sample, domain))
        return [self._cast(kernel, sample) for kernel in kernels[:MOST_VOTERS]], max(0, len(kernels) - MOST_VOTERS)

    def _nearness(self, sample: Sample, domain: str) -> Callable[[KernelRecord], tuple[float, float]]:
        texts = [example.observation for example in sample.examples[:LEAST_SAMPLE]]
        distance: dict[str, float] = {ALL_DOMAINS: 0.0, domain: 0.0}
        for places in self._router.atlas().locate(texts):
            for place in places:
                distance[place.domain] = distance.get(place.domain, 0.0) + place.distance / len(texts)
        return lambda kernel: (distance.get(kernel.domain, float("inf")), kernel.created_at)

    def _cast(self, kernel: KernelRecord, sample: Sample) -> Ballot:
        progress = self._report(kernel).get("progress", {})
        network, affinity = None, pantheon.affinity(kernel.god_name)
        try:
            if progress.get("best_loss") is not None:
                network = choose_snapshot(kernel, "best", self._snapshots, self._checkpoints).kernel
        except OlympusError as error:  # a damaged checkpoint is no opinion, and must not stop the vote
            log.warning("a kernel could not vote", kernel=kernel.id, reason=str(error))
            who = (kernel.id, kernel.god_name, kernel.domain)
            return Ballot(*who, vote="abstain", reason=f"it cannot be asked: {error}", affinity=affinity)
        known = self._known(kernel.domain, sample)
        return cast(Voter(kernel.id, kernel.god_name, kernel.domain, affinity, progress, network, known), sample)

    def _known(self, domain: str, sample: Sample) -> frozenset[str] | None:
        if domain == ALL_DOMAINS:
            return None
        hashes = [example.content_hash for example in sample.examples]
        return frozenset(self._history.known_contents(domain, hashes))

    def _record(self, proposal: dict[str, Any], vote: dict[str, Any], actor: str) -> None:
        detail = {"proposal": proposal, "vote_result": vote}
        with self._database.write() as session:
            session.add(AuditEvent(actor=actor, action=ACTION, target=proposal["proposed_domain"], detail=detail))
        told = {key: proposal[key] for key in ("proposal_id", "proposed_domain", "reason", "status")}
        self._hub.publish("kernel.proposal", {**told, "vote_ratio": vote["vote_ratio"], "note": vote["note"]})
        log.info("vote on a new kernel", **told, ratio=vote["vote_ratio"], actor=actor)


def _vote_result(consensus: Consensus, tally: Tally, ballots: Sequence[Ballot], *, forced: bool) -> dict[str, Any]:
    names = {choice: [b.kernel_id for b in ballots if b.vote == choice] for choice in ("for", "against", "abstain")}
    ratio = None if tally.ratio is None else round(tally.ratio, 4)
    return {
        "passed": tally.passed,
        "forced": forced,
        "status": "approved" if tally.passed else "forced" if forced else "rejected",
        "consensus_type": consensus,
        "vote_ratio": ratio,
        "votes": {ballot.kernel_id: ballot.vote for ballot in ballots},
        "details": {
            "consensus_type": consensus,
            "threshold": THRESHOLDS[consensus],
            "vote_ratio": ratio,
            "for_weight": round(tally.for_weight, 4),
            "against_weight": round(tally.against_weight, 4),
            "total_weight": round(tally.for_weight + tally.against_weight, 4),
            "votes_for": names["for"],
            "votes_against": names["against"],
            "abstentions": names["abstain"],
        },
        "note": _note(tally, ballots),
    }


def _note(tally: Tally, ballots: Sequence[Ballot]) -> str:
    """The one number that decided, for people."""
    if tally.ratio is None:
        measured = any(ballot.items for ballot in ballots)
        return "no kernel serves it well" if measured else "no kernel has learned enough to be measured on it"
    against = max((b for b in ballots if b.vote == "against"), key=lambda b: b.fit, default=None)
    if against is not None:
        return f"{against.kernel_id} serves it already ({against.reason})"
    return f"{sum(b.vote == 'for' for b in ballots)} kernels are not clearly better on it than the baseline"
