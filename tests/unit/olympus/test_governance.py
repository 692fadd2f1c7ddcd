"""Votes: measured ballots of kernels that were really trained, and how they are counted."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch

from memory.history import History
from olympus.ballots import Ballot, Sample, Voter, cast
from olympus.errors import InvalidAction, InvalidRequest, VoteLost
from olympus.example import Example
from olympus.governance import THRESHOLDS, count
from olympus.requests import ExperienceIn, ProposeRequest, SpawnRequest
from olympus.zeus import Zeus
from storage.database import Database
from storage.models import Base
from telemetry.hub import EventHub
from tests.unit.olympus.kernel_world import TINY, World, facts, make_settings

MakeWorld = Callable[..., World]
PETS = {"dog": "bark", "cat": "meow", "cow": "moo"}


def pets(count: int, start: int = 0) -> list[ExperienceIn]:
    """Another learnable stream."""
    draw = random.Random(start)
    chosen = [draw.choice(sorted(PETS)) for _ in range(count)]
    return [ExperienceIn(observation=f"the {pet} number {start + i}", action=PETS[pet]) for i, pet in enumerate(chosen)]


def coins(count: int) -> list[ExperienceIn]:
    """Nothing to learn: the answer does not follow from the question."""
    draw = random.Random(5)
    return [
        ExperienceIn(observation=f"toss number {i}", action=draw.choice(("heads", "tails", "edge")))
        for i in range(count)
    ]


def learn(world: World, name: str, domain: str, items: list[ExperienceIn]) -> str:
    """A kernel that has learned its domain, by its own gate, and rests."""
    kernel = world.tiny(name, domain, experiences=tuple(items), config={"lr": 0.01})
    step = 0
    for _ in range(60):
        status = world.wait_for(kernel, "training", step=step + 10, seconds=60)
        step, loss = status["step"], status["loss"]
        if loss["below_baseline"] and loss["best"] < 0.5 * loss["baseline_context_free"]:
            world.zeus.pause(kernel)
            return kernel
    raise AssertionError(f"{name} has not learned {domain}: {loss}")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[World, str, str]]:
    """A world with two kernels that have learned: lights and pets."""
    torch.set_num_threads(1)
    settings = make_settings(
        tmp_path_factory.mktemp("votes"), auto_spawn=False, patience_evaluations=10_000, phi_every=10_000
    )
    database = Database(settings.database_url)
    Base.metadata.create_all(database.engine)
    history, hub, stop = History(database), EventHub(), threading.Event()
    world = World(settings, database, history, hub, stop, Zeus(settings, database, history, hub, stop))
    world.zeus.start()
    try:
        lights = learn(world, "athena", "lights", facts(220))
        yield world, lights, learn(world, "hermes", "pets", pets(220))
    finally:
        stop.set()
        world.zeus.shutdown(10)
        database.close()


# -- the vote ---------------------------------------------------------------------------------------------------


def test_an_exact_duplicate_is_rejected_with_numbers(trained: tuple[World, str, str]) -> None:
    world, lights, animals = trained
    before = len(world.zeus.kernels())
    with pytest.raises(VoteLost, match="serves it already") as lost:
        world.zeus.spawn(SpawnRequest(domain="lights", config=TINY, vote=True))
    told = lost.value.extensions
    assert (told["success"], told["phase"], told["vote_result"]["passed"]) == (False, "voting", False)
    assert "force" in told["hint"]
    assert told["vote_result"]["vote_ratio"] < 0.1
    assert told["vote_result"]["votes"] == {lights: "against", animals: "for"}
    ballot = _ballot(told, lights)
    assert ballot["loss"] < 0.6 * ballot["baseline"]
    assert ballot["fit"] > 0.9
    assert ballot["unseen"], "a voter of the same domain is asked what it holds out"
    assert ballot["items"] >= 20
    assert len(world.zeus.kernels()) == before
    json.dumps(told, allow_nan=False)


def test_the_same_matter_under_another_name_is_rejected(trained: tuple[World, str, str]) -> None:
    world, lights, _ = trained
    proposal = ProposeRequest(domain="signals", experiences=tuple(facts(60, start=300)))
    with pytest.raises(VoteLost) as lost:
        world.zeus.governor.propose(proposal, "test")
    ballot = _ballot(lost.value.extensions, lights)
    assert (ballot["vote"], ballot["unseen"]) == ("against", True)
    assert lost.value.extensions["vote_result"]["evidence"]["coverage"] == ballot["fit"] > 0.5


def test_a_gap_is_accepted_with_numbers(trained: tuple[World, str, str]) -> None:
    world, lights, animals = trained
    watcher = world.hub.subscribe(["kernel.proposal"])
    told = world.zeus.governor.propose(ProposeRequest(domain="coins", experiences=tuple(coins(60))), "test")
    vote = told["vote_result"]
    assert (told["success"], vote["passed"], vote["vote_ratio"]) == (True, True, 1.0)
    assert vote["votes"] == {lights: "for", animals: "for"}
    assert all(ballot["loss"] > ballot["baseline"] for ballot in vote["evidence"]["ballots"])
    assert vote["evidence"]["coverage"] == 0.0
    (event,) = watcher.get(1.0)
    assert event.data["proposal_id"] == told["proposal"]["proposal_id"]
    newest = world.zeus.governor.council.proposals(1)[0]
    assert newest["actor"] == "test"
    assert newest["vote_result"] == vote, "the audit log keeps all the evidence"


def test_force_overrides_and_is_recorded(trained: tuple[World, str, str]) -> None:
    world, _, _ = trained
    request = SpawnRequest(domain="lights", config=TINY, reason="overload", force=True, train=False)
    told = world.zeus.spawn(request)
    kernel = told["kernel"]["kernel_id"]
    try:
        assert (told["vote_result"]["passed"], told["vote_result"]["forced"]) == (False, True)
        assert world.zeus.governor.council.proposals(1)[0]["vote_result"]["status"] == "forced"
        assert world.zeus.status(kernel)["config"]["proposal_id"] == told["proposal"]["proposal_id"]
        again = world.zeus.governor.council.propose(ProposeRequest(domain="lights"), "test", force=True)
        assert again["vote_result"]["votes"][kernel] == "abstain", "it has learned nothing yet"
    finally:
        world.zeus.delete(kernel)


def test_a_vote_needs_enough_to_measure_on(trained: tuple[World, str, str]) -> None:
    world, _, _ = trained
    with pytest.raises(InvalidRequest, match="at least 20 different experiences, and 19 were given"):
        world.zeus.governor.propose(ProposeRequest(domain="x", experiences=(*coins(19), coins(1)[0])), "test")
    with pytest.raises(InvalidAction, match="history of x holds 0"):
        world.zeus.governor.propose(ProposeRequest(domain="x"), "test")
    with pytest.raises(InvalidRequest, match="no kernel nobody"):
        world.zeus.governor.propose(ProposeRequest(domain="lights", parent_gods=("nobody",)), "test")


def test_the_same_key_is_not_voted_on_twice(trained: tuple[World, str, str]) -> None:
    world, _, _ = trained
    request = SpawnRequest(
        domain="coins", config=TINY, vote=True, experiences=tuple(coins(30)), train=False, idempotency_key="once"
    )
    first = world.zeus.spawn(request)
    held = len(world.zeus.governor.council.proposals(500))
    second = world.zeus.spawn(request)
    assert (second["kernel"]["kernel_id"], second["created"]) == (first["kernel"]["kernel_id"], False)
    assert len(world.zeus.governor.council.proposals(500)) == held
    world.zeus.delete(first["kernel"]["kernel_id"])
    world.history.delete(domain="coins")


def test_nobody_has_learned_anything_so_nobody_objects(make_world: MakeWorld) -> None:
    world = make_world(auto_spawn=False)
    world.tiny("hera", train=False)
    vote = world.zeus.governor.propose(ProposeRequest(domain="d", experiences=tuple(facts(40))), "test")["vote_result"]
    assert (vote["passed"], vote["vote_ratio"]) == (True, None)
    assert list(vote["votes"].values()) == ["abstain"]
    assert "no kernel has learned enough" in vote["note"]


# -- counting ---------------------------------------------------------------------------------------------------


def ballot(vote: str, fit: float = 0.0, affinity: float = 1.0) -> Ballot:
    return Ballot("k", "k", "d", vote, "", affinity, fit=fit)  # type: ignore[arg-type]


@pytest.mark.parametrize("strangers", [1, 10, 100])
def test_strangers_cannot_outvote_the_one_who_knows(strangers: int) -> None:
    crowd = [ballot("for", affinity=1.5)] * strangers
    for consensus in THRESHOLDS:
        assert not count([*crowd, ballot("against", fit=0.95)], consensus).passed
        assert count(crowd, consensus).ratio == 1.0
    assert count([*crowd, ballot("abstain", fit=0.3)], "unanimous").passed


def test_the_thresholds_decide_what_half_known_means() -> None:
    ballots = [ballot("for"), ballot("against", fit=0.6)]
    assert count(ballots, "quorum").ratio == pytest.approx(0.4)
    assert count(ballots, "quorum").passed
    assert not count(ballots, "majority").passed
    assert count([ballot("for", affinity=1.5), ballot("against", fit=0.6)], "majority").ratio == pytest.approx(0.5)


def test_shuffled_answers_are_nobodys_competence(trained: tuple[World, str, str]) -> None:
    """The control: the same questions with answers that do not follow cannot be called served."""
    world, lights, _ = trained
    answers = [item.action for item in facts(60, start=7000)]
    random.Random(1).shuffle(answers)
    mixed = [
        item.model_copy(update={"action": answer}) for item, answer in zip(facts(60, start=7000), answers, strict=True)
    ]
    told = world.zeus.governor.propose(ProposeRequest(domain="mixed", experiences=tuple(mixed)), "test")
    assert told["vote_result"]["votes"][lights] == "for"


def test_the_baseline_never_saw_what_it_judges() -> None:
    unique = [Example(i, f"q{i}", f"answer {i}", None, f"{i:064x}") for i in range(25)]
    same = [Example(i, f"q{i}", "yes", None, f"{i:064x}") for i in range(25)]
    _, alone = Sample(unique, 15).encoded(64)
    _, shared = Sample(same, 15).encoded(64)
    assert float(alone.min()) > 5.0, "an action that occurs once is new to the folds that exclude it"
    assert float(shared.max()) < 0.2
    voter = Voter("k", "k", "d", 1.0, {"best_loss": 0.1, "baseline_loss": 0.5, "loss_ok": False}, None)
    assert cast(voter, Sample(same, 15)).vote == "abstain"


def _ballot(told: Mapping[str, Any], kernel: str) -> dict[str, Any]:
    return next(item for item in told["vote_result"]["evidence"]["ballots"] if item["kernel_id"] == kernel)


def test_a_voter_is_asked_what_it_cannot_have_learned() -> None:
    examples = [Example(i, f"q{i}", "yes", None, f"{i % 100:08x}{i:056x}") for i in range(200)]
    sample = Sample(examples, 15)
    hashes = frozenset(example.content_hash for example in examples)
    held = [i for i, example in enumerate(sample.examples) if int(example.content_hash[:8], 16) % 100 < 15]
    assert sample.for_voter(hashes) == (held, True), "its own domain: only what it holds out"
    assert sample.for_voter(None) == (held, True)
    assert sample.for_voter(frozenset()) == (list(range(48)), True)
    few = Sample(examples[15:60], 15)
    assert few.for_voter(hashes) == (list(range(45)), False), "too little held out: it is asked all, and that is said"
