"""Zeus as a governor over HTTP: proposals and votes, routing, polls, lineage, names."""

from __future__ import annotations

from dataclasses import asdict

from flask import Blueprint, jsonify
from flask.typing import ResponseReturnValue

from olympus.pantheon import PROFILES
from olympus.requests import PollRequest, ProposeRequest, RouteRequest
from web.auth import requires
from web.context import principal, runtime
from web.jsonio import parse_body, parse_query
from web.schemas import ProposalsQuery

blueprint = Blueprint("pantheon", __name__, url_prefix="/olympus")


@blueprint.post("/kernels/propose")
@requires("kernels:write")
def propose() -> ResponseReturnValue:
    """Hold a vote on a new kernel without making it."""
    return jsonify(runtime().zeus.governor.propose(parse_body(ProposeRequest), principal().id))


@blueprint.get("/proposals")
@requires("kernels:read")
def proposals() -> ResponseReturnValue:
    """The votes that were held, with their ballots."""
    query = parse_query(ProposalsQuery)
    return jsonify({"proposals": runtime().zeus.governor.council.proposals(query.limit)})


@blueprint.post("/route")
@requires("kernels:read")
def route() -> ResponseReturnValue:
    """Which kernel a text belongs to."""
    body = parse_body(RouteRequest)
    governor = runtime().zeus.governor
    if body.text is not None:
        return jsonify(governor.route([body.text])[0])
    return jsonify({"routes": governor.route(body.texts)})


@blueprint.post("/poll")
@requires("kernels:read")
def poll() -> ResponseReturnValue:
    """Ask all kernels at once."""
    return jsonify(runtime().zeus.governor.poll(parse_body(PollRequest)))


@blueprint.get("/lineage")
@requires("kernels:read")
def lineage() -> ResponseReturnValue:
    """Who descends from whom."""
    return jsonify(runtime().zeus.governor.lineage())


@blueprint.get("/pantheon")
@requires("kernels:read")
def names() -> ResponseReturnValue:
    """The names that kernels are given, with their words and affinities."""
    return jsonify({"profiles": [asdict(profile) for profile in PROFILES]})
