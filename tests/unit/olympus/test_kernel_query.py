"""Questions to a kernel: one answer or several rollouts, repeatable by seed, and under load."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from olympus.kernel_query import RANK_NOISE, WRITE_NOISE, answer
from olympus.query_gate import TooManyQueries
from olympus.requests import QueryRequest
from olympus.snapshot import Snapshot, SnapshotShelf
from olympus.zeus import Zeus
from qig_core.inference import candidate_confidences, generate, rank_candidates
from qig_core.vocabulary import encode_prompt
from tests.unit.olympus.kernel_world import World, facts, trained_state

MakeWorld = Callable[..., World]
WORDS = ("stop", "go", "wait")


@pytest.fixture(scope="module")
def snapshot() -> Snapshot:
    return Snapshot("latest", trained_state(20).ema.shadow, 20, 1.0, None, "linear")


def _ask(snapshot: Snapshot, **request: Any) -> dict[str, Any]:
    told = answer(QueryRequest(input="red light 3", **request), snapshot)
    json.dumps(told, allow_nan=False)
    told.pop("latency_ms")
    return told


def test_a_ranking_is_that_of_the_kernel(snapshot: Snapshot) -> None:
    told = _ask(snapshot, candidates=(*WORDS, "go"))
    ranked = rank_candidates(snapshot.kernel, "red light 3", WORDS)
    assert [item["candidate"] for item in told["candidates"]] == [text for text, _ in ranked]
    assert [item["log_prob"] for item in told["candidates"]] == pytest.approx([score for _, score in ranked])
    expected = candidate_confidences(ranked)
    assert [item["confidence"] for item in told["candidates"]] == pytest.approx(expected, abs=1e-6)
    assert (told["samples"], told["seed"], told["agreement"], told["noise"]) == (1, None, None, None)


def test_a_text_is_that_of_the_kernel(snapshot: Snapshot) -> None:
    told = _ask(snapshot, max_tokens=6, return_basin=True)
    written = generate(snapshot.kernel, encode_prompt("red light 3", 64, 6), 6)
    assert told["output"] == written.text
    assert told["confidence"] == pytest.approx(written.confidence)
    assert told["halted_at"] == told["depth"] == written.depth
    assert told["alternatives"] == []
    assert len(told["basin"]) == 64


def test_what_was_said_before_makes_no_difference_to_what_is_said(snapshot: Snapshot) -> None:
    shelf, request = SnapshotShelf(), QueryRequest(input="red light 3", max_tokens=12)
    told = [answer(request, snapshot, shelf.phrases("k")) for _ in range(2)]
    plain = answer(request, snapshot)
    for again in told:
        assert again["output"] == plain["output"]
        assert again["confidence"] == pytest.approx(plain["confidence"], abs=1e-5)
    assert len(shelf.phrases("k")) == 1
    shelf.forget("k")
    assert len(shelf.phrases("k")) == 0


def test_rollouts_agree_or_say_what_else_they_found(snapshot: Snapshot) -> None:
    told = _ask(snapshot, samples=8, seed=5, noise=1.0, max_tokens=4, temperature=1.0)
    others = sum(other["count"] for other in told["alternatives"])
    assert told["agreement"] == pytest.approx(1 - others / 8)
    assert (told["samples"], told["seed"], told["noise"]) == (8, 5, 1.0)
    assert told["alternatives"]  # at this temperature an untaught kernel does not say one thing eight times
    assert told["output"] not in [other["text"] for other in told["alternatives"]]


@pytest.mark.parametrize("kind", [{"candidates": WORDS}, {"max_tokens": 5, "temperature": 0.7}])
def test_the_reported_seed_repeats_the_answer(snapshot: Snapshot, kind: dict[str, Any]) -> None:
    first = _ask(snapshot, samples=4, **kind)
    assert first["noise"] == (RANK_NOISE if "candidates" in kind else WRITE_NOISE)
    assert _ask(snapshot, samples=4, seed=first["seed"], **kind) == first
    again = [_ask(snapshot, samples=4, seed=seed, noise=1.0, **kind) for seed in (1, 2)]
    assert again[0]["confidence"] != again[1]["confidence"]


def test_without_noise_rollouts_say_what_one_answer_says(snapshot: Snapshot) -> None:
    one, many = _ask(snapshot, candidates=WORDS), _ask(snapshot, candidates=WORDS, samples=5, noise=0.0)
    assert many["agreement"] == 1.0
    assert [item["confidence"] for item in many["candidates"]] == pytest.approx(
        [item["confidence"] for item in one["candidates"]], abs=1e-5
    )


def test_long_questions_and_long_candidates_fit(snapshot: Snapshot) -> None:
    told = _ask(snapshot, candidates=("x" * 500, "stop", "é" * 100), samples=2, seed=1)
    assert len(told["candidates"]) == 3
    request = QueryRequest(input="long " * 1000, max_tokens=500, samples=2, seed=1)
    assert len(answer(request, snapshot)["output"].encode()) <= 3 * 32


def test_too_many_questions_are_refused(make_world: MakeWorld) -> None:
    world = make_world(max_queries=1)
    kernel = world.tiny(train=False)
    with world.zeus.gate.question(), pytest.raises(TooManyQueries):
        world.zeus.query(kernel, QueryRequest(input="x", max_tokens=1))
    assert world.zeus.query(kernel, QueryRequest(input="x", max_tokens=1))["checkpoint_used"] == "latest@0"


def test_fifty_questions_a_second_beside_three_that_train(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every answer is whole and of weights that were never torn; training goes on meanwhile; the door counts right."""
    seen: dict[int, Snapshot] = {}
    original = SnapshotShelf.get

    def get(self: SnapshotShelf, kernel_id: str, which: str) -> Snapshot | None:
        found = original(self, kernel_id, which)
        if found is not None:
            seen[id(found)] = found
        return found

    monkeypatch.setattr(SnapshotShelf, "get", get)
    world = make_world(patience_evaluations=10_000, evaluate_every=2, max_concurrent=3, max_queries=64)
    kernels = [world.tiny(f"k{number}", f"d{number}", experiences=tuple(facts(40))) for number in range(3)]
    begun = {kernel: world.wait_for(kernel, "training", step=1)["step"] for kernel in kernels}
    answers: list[dict[str, Any]] = []
    failures: list[BaseException] = []
    enough = threading.Event()
    clients = [
        threading.Thread(target=_client, args=(world.zeus, kernels, n, enough, answers, failures)) for n in range(5)
    ]
    for client in clients:
        client.start()
    try:
        for kernel in kernels:  # they learn while they are asked, not after it
            world.wait_for(kernel, "training", step=begun[kernel] + 6, seconds=60)
    finally:
        enough.set()
        for client in clients:
            client.join(60)
    assert not failures
    assert len(answers) >= 100
    assert all(sum(item["confidence"] for item in told["candidates"]) == pytest.approx(1.0) for told in answers)
    assert {told["output"] for told in answers} <= set(WORDS)
    for kernel in kernels:  # the weights of now, should no question have fallen between two snapshots
        world.zeus.query(kernel, QueryRequest(input="green light", candidates=WORDS))
    world.zeus.gate.check_invariants()
    assert world.zeus.gate.counts()["open"] == 0
    assert len({snapshot.checksum for snapshot in seen.values()}) > 3
    for snapshot in seen.values():
        snapshot.check_invariants()


def _client(
    zeus: Zeus,
    kernels: list[str],
    number: int,
    enough: threading.Event,
    answers: list[dict[str, Any]],
    failures: list[BaseException],
) -> None:
    """Ten questions a second: at least twenty, and until there are enough."""
    try:
        for turn in itertools.count():
            if turn >= 20 and enough.is_set():
                return
            begun = time.monotonic()
            which = "latest" if turn % 2 else "best"
            request = QueryRequest(input=f"green light {turn}", candidates=WORDS, checkpoint=which)
            answers.append(zeus.query(kernels[(turn + number) % 3], request))
            time.sleep(max(0.0, 0.1 - (time.monotonic() - begun)))
    except Exception as error:
        failures.append(error)
