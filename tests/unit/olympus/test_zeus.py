"""Zeus from the outside: spawn, feed, train, ask, steer, restart."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from olympus import continuous_trainer
from olympus.errors import (
    CheckpointNotFound,
    DuplicateKernel,
    InvalidAction,
    InvalidRequest,
    KernelLimitReached,
    KernelNotFound,
    NotReady,
    StorageFull,
)
from olympus.kernel_thread import KernelTrainingThread
from olympus.requests import ExperienceIn, QueryRequest, SpawnRequest
from olympus.snapshot import SnapshotShelf
from olympus.training_session import TrainingSession
from olympus.zeus import REPLIT_CHECKPOINTS, checkpoint_root
from tests.unit.olympus.kernel_world import TINY, World, facts, make_settings

MakeWorld = Callable[..., World]


# -- spawning ---------------------------------------------------------------------------------------------------


def test_spawn_answers_with_the_contracts_shape(make_world: MakeWorld) -> None:
    world = make_world()
    body = world.zeus.spawn(SpawnRequest(name="hera", domain="d", config=TINY, element="air", role="judge"))
    assert {"success", "kernel", "proposal", "vote_result", "training", "links"} <= body.keys()
    assert body["kernel"]["kernel_id"].startswith("hera-")
    assert body["proposal"]["proposed_element"] == "air"
    assert body["vote_result"]["votes"] == {}
    assert body["vote_result"]["evidence"] == {"experiences_in_domain": 0, "incumbents": []}
    second = world.zeus.spawn(SpawnRequest(domain="d", config=TINY))
    assert [item["kernel_id"] for item in second["vote_result"]["evidence"]["incumbents"]] == [
        body["kernel"]["kernel_id"]
    ]
    json.dumps([body, second, world.zeus.kernels()], allow_nan=False)


def test_the_same_key_gives_the_same_kernel(make_world: MakeWorld) -> None:
    world = make_world()
    request = SpawnRequest(domain="d", config=TINY, idempotency_key="k1", experiences=tuple(facts(3)))
    first, second = world.zeus.spawn(request), world.zeus.spawn(request)
    assert first["kernel"]["kernel_id"] == second["kernel"]["kernel_id"]
    assert (first["created"], second["created"]) == (True, False)
    assert len(world.zeus.kernels()) == 1
    assert world.history.count() == 3


def test_names_limits_and_options_are_checked(make_world: MakeWorld) -> None:
    world = make_world(max_kernels=2)
    world.tiny("hera")
    with pytest.raises(DuplicateKernel, match="hera"):
        world.tiny("hera")
    with pytest.raises(InvalidRequest, match="heads"):
        world.tiny("ares", config={"heads": 3})
    with pytest.raises(InvalidRequest, match="unknown kernel option 'depth'"):
        world.tiny("ares", config={"depth": 3})
    world.tiny("hera", force=True)
    with pytest.raises(KernelLimitReached, match="max_kernels"):
        world.tiny("zeus")


@pytest.mark.parametrize("name", ["", "Hera", "-a", "a" * 64, "a/b", "..", "a\n", "hera\x00"])
def test_bad_names_are_refused(name: str) -> None:
    with pytest.raises(ValidationError):
        SpawnRequest(name=name)
    with pytest.raises(ValidationError):
        SpawnRequest(domain=name)


def test_requests_are_strict() -> None:
    for bad in ({"inputt": "x"}, {"input": ""}, {"input": "x", "max_tokens": 0}, {"input": "x", "checkpoint": "../x"}):
        with pytest.raises(ValidationError):
            QueryRequest.model_validate(bad)
    with pytest.raises(ValidationError):
        ExperienceIn(observation="a", action="b", score=float("nan"))
    with pytest.raises(ValidationError):
        ExperienceIn(observation="a\x00", action="b")


def test_nothing_works_before_start_and_unknown_kernels_are_unknown(make_world: MakeWorld) -> None:
    world = make_world(start=False)
    with pytest.raises(NotReady):
        world.zeus.spawn(SpawnRequest())
    for ask in (world.zeus.status, world.zeus.checkpoints, world.zeus.metrics, world.zeus.delete):
        with pytest.raises(KernelNotFound):
            ask("nobody-000000")


def test_an_empty_installation_gets_one_kernel_once(make_world: MakeWorld) -> None:
    world = make_world(spawn_default=True)
    lines = world.zeus.kernels()
    assert [(line["god_name"], line["domain"]) for line in lines] == [("athena", "general")]
    world.zeus.delete(lines[0]["kernel_id"])
    world.zeus.shutdown(5)
    assert make_world(spawn_default=True).zeus.kernels() == []


# -- feeding ----------------------------------------------------------------------------------------------------


def test_feeding_counts_duplicates_and_takes_their_judgement(make_world: MakeWorld) -> None:
    world = make_world()
    kernel = world.tiny(train=False)
    first = world.zeus.feed(kernel, [*facts(5), facts(1)[0]])
    assert (first["accepted"], first["duplicates"]) == (5, 1)
    assert first["ids"][0] == first["ids"][5]
    wrong = facts(1)[0].model_copy(update={"score": -1.0})
    again = world.zeus.feed(kernel, [wrong])
    assert (again["accepted"], again["duplicates"], again["ids"]) == (0, 1, [first["ids"][0]])
    stored = world.history.get(first["ids"][0])
    assert stored is not None
    assert stored.score == -1.0
    keyed = ExperienceIn(observation="once", action="yes", request_id="r1")
    assert world.zeus.feed(kernel, [keyed])["accepted"] == 1
    other_words = ExperienceIn(observation="twice", action="yes", request_id="r1")
    assert world.zeus.feed(kernel, [other_words])["accepted"] == 0


def test_a_kernel_waits_for_experience_and_then_trains(make_world: MakeWorld) -> None:
    world = make_world(patience_evaluations=2)
    kernel = world.tiny()
    status = world.wait_for(kernel, "waiting")
    assert "training begins at 8" in status["state_reason"]
    assert not world.zeus.trainer.is_busy(kernel)
    world.zeus.feed(kernel, facts(60))
    assert world.wait_for(kernel, "training", "settled", step=1)["buffer"]["size"] == 60


# -- training, resting, waking ----------------------------------------------------------------------------------


def test_a_settled_kernel_says_why_serves_its_best_and_wakes(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continuous_trainer, "EXAMINE_SECONDS", 0.1)
    world = make_world(patience_evaluations=1, evaluate_every=5)
    kernel = world.tiny(config={"lr": 1e-9}, experiences=tuple(facts(60)))
    status = world.wait_for(kernel, "settled", seconds=60)
    assert "not converged" in status["state_reason"]
    assert not world.zeus.trainer.is_busy(kernel)
    assert status["convergence"]["converged"] is False
    assert world.zeus.checkpoints(kernel)["checkpoints"][0]["step"] == status["step"]
    answer = world.zeus.query(kernel, QueryRequest(input="red light 1", candidates=("stop", "go", "wait")))
    assert answer["checkpoint_used"] == f"best@{status['loss']['best_step']}"
    assert answer["ready"] is False
    assert sum(item["confidence"] for item in answer["candidates"]) == pytest.approx(1.0)
    world.zeus.feed(kernel, facts(40, start=500))
    assert world.wait_for(kernel, "training", "settled", seconds=60, step=status["step"] + 1)


def test_a_little_news_is_examined_and_the_kernel_sleeps_on(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continuous_trainer, "EXAMINE_SECONDS", 0.1)
    looked: list[str] = []
    original = TrainingSession.still_rests
    monkeypatch.setattr(TrainingSession, "still_rests", lambda self: looked.append("x") or original(self))
    world = make_world(patience_evaluations=1, evaluate_every=5)
    kernel = world.tiny(config={"lr": 1e-9}, experiences=tuple(facts(60)))
    step = world.wait_for(kernel, "settled", seconds=60)["step"]
    world.zeus.feed(kernel, facts(1, start=900))
    deadline = time.monotonic() + 20
    while not looked and time.monotonic() < deadline:
        time.sleep(0.02)
    assert looked
    status = world.wait_for(kernel, "settled")
    assert status["step"] == step


def test_one_after_the_other_in_the_order_of_asking(make_world: MakeWorld) -> None:
    world = make_world(max_concurrent=1, patience_evaluations=10_000)
    first = world.tiny("hera", experiences=tuple(facts(40)))
    world.wait_for(first, "training", step=1)
    second, third = world.tiny("ares"), world.tiny("apollo")
    assert [world.zeus.status(kernel)["queue_position"] for kernel in (second, third)] == [1, 2]
    assert world.zeus.status(second)["state"] == "queued"
    world.zeus.pause(first)
    world.wait_for(second, "training", step=1)
    assert world.zeus.status(third)["queue_position"] == 1


def test_pause_resume_stop_and_a_checkpoint_on_request(make_world: MakeWorld) -> None:
    world = make_world(patience_evaluations=10_000)
    kernel = world.tiny(experiences=tuple(facts(40)))
    world.wait_for(kernel, "training", step=3)
    with pytest.raises(InvalidAction, match="nothing to resume"):
        world.zeus.resume(kernel)
    saved = world.zeus.checkpoint_now(kernel)
    assert saved["name"].startswith("step-")
    paused = world.zeus.pause(kernel)
    assert paused["state"] == "paused"
    assert paused["last_saved_step"] == paused["step"] >= saved["step"]
    with pytest.raises(InvalidAction, match="already"):
        world.zeus.pause(kernel)
    with pytest.raises(InvalidAction, match="not training"):
        world.zeus.checkpoint_now(kernel)
    assert world.zeus.resume(kernel)["wanted"] == "train"
    world.wait_for(kernel, "training", step=paused["step"] + 1)
    assert world.zeus.stop(kernel)["state"] == "stopped"
    assert world.zeus.resume(kernel)["state"] in ("queued", "training")


def test_restore_is_like_a_revert(make_world: MakeWorld) -> None:
    world = make_world(patience_evaluations=10_000)
    kernel = world.tiny(experiences=tuple(facts(40)))
    world.wait_for(kernel, "training", step=2)
    early = world.zeus.checkpoint_now(kernel)
    world.wait_for(kernel, "training", step=early["step"] + 3)
    with pytest.raises(InvalidAction, match="pause it first"):
        world.zeus.restore(kernel, early["name"])
    late = world.zeus.pause(kernel)["step"]
    restored = world.zeus.restore(kernel, early["name"])
    assert restored["step"] == late + 1
    store = world.zeus.checkpoint_store
    again, original = store.load(kernel, restored["name"]), store.load(kernel, early["name"])
    assert all(again.tensors["model"][name].equal(value) for name, value in original.tensors["model"].items())
    assert world.zeus.status(kernel)["step"] == late + 1
    with pytest.raises(CheckpointNotFound):
        world.zeus.restore(kernel, "step-99999999")
    world.zeus.resume(kernel)
    assert world.wait_for(kernel, "training", step=late + 2)["restored_from"] == early["name"]


def test_delete_ends_the_thread_and_leaves_only_the_history(make_world: MakeWorld) -> None:
    world = make_world(patience_evaluations=10_000)
    kernel = world.tiny(experiences=tuple(facts(40)))
    world.wait_for(kernel, "training", step=2)
    world.zeus.checkpoint_now(kernel)
    world.zeus.delete(kernel)
    assert world.zeus.kernels() == []
    assert not (world.zeus.checkpoint_root / kernel).exists()
    assert world.history.count() == 40
    world.zeus.checkpoint_store.check_invariants()
    with pytest.raises(KernelNotFound):
        world.zeus.metrics(kernel)


def test_metrics_and_events_flow(make_world: MakeWorld) -> None:
    world = make_world(patience_evaluations=10_000)
    subscription = world.hub.subscribe(["kernel.metric", "kernel.state", "kernel.checkpoint"])
    kernel = world.tiny(experiences=tuple(facts(40)))
    world.wait_for(kernel, "training", step=12)
    world.zeus.pause(kernel)
    columns = world.zeus.metrics(kernel)
    assert len(columns["step"]) == len(columns["loss"]) == len(columns["phi"]) > 0
    assert columns["next_since"] == columns["step"][-1]
    events = subscription.get(1.0)
    states = [event.data["state"] for event in events if event.topic == "kernel.state"]
    assert states[0] == "queued"
    assert states[-2:] == ["training", "paused"]
    assert {event.topic for event in events} == {"kernel.metric", "kernel.state", "kernel.checkpoint"}
    with pytest.raises(InvalidRequest, match="max_points"):
        world.zeus.metrics(kernel, max_points=0)


def test_chats_come_first(make_world: MakeWorld) -> None:
    busy = threading.Event()
    busy.set()
    world = make_world(busy=busy.is_set, serve_share=0.001, serve_pause_ms=5000, patience_evaluations=10_000)
    kernel = world.tiny(experiences=tuple(facts(40)))
    world.wait_for(kernel, "training", step=1)
    time.sleep(1.5)
    assert world.zeus.status(kernel)["step"] <= 4
    begun = time.monotonic()
    world.zeus.pause(kernel)
    assert time.monotonic() - begun < 3  # resting does not delay a stop


# -- trouble ----------------------------------------------------------------------------------------------------


def test_a_failing_trainer_is_restarted_with_backoff_and_then_fails(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(self: TrainingSession) -> Any:
        raise RuntimeError("secret detail " * 50)

    monkeypatch.setattr(TrainingSession, "advance", explode)
    world = make_world(max_restarts=1)
    kernel = world.tiny(experiences=tuple(facts(40)))
    status = world.wait_for(kernel, "failed")
    assert status["error"].startswith("RuntimeError: secret detail")
    assert "after 1 restarts" in status["error"]
    assert len(status["error"]) < 300
    assert "Traceback" not in json.dumps(status)
    monkeypatch.undo()
    world.zeus.resume(kernel)
    world.wait_for(kernel, "training", "settled", step=1)


def test_a_stalled_thread_is_shown_and_gives_up_its_place(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continuous_trainer, "STALL_SECONDS", 0.3)
    release, original = threading.Event(), TrainingSession.advance
    age = KernelTrainingThread.heartbeat_age

    def hang(self: TrainingSession) -> Any:
        if self.live.seed == 99:
            release.wait(20)
        return original(self)

    def age_of_ares(self: KernelTrainingThread) -> float:
        return age(self) if self.kernel_id.startswith("ares-") else 0.0  # on a busy machine hera would stall, too

    monkeypatch.setattr(TrainingSession, "advance", hang)
    monkeypatch.setattr(KernelTrainingThread, "heartbeat_age", age_of_ares)
    monkeypatch.setattr(KernelTrainingThread, "_show", lambda *_, **__: None)
    world = make_world(max_concurrent=1, patience_evaluations=10_000)
    request = SpawnRequest(name="ares", domain="d", config=TINY, seed=99, experiences=tuple(facts(40)))
    stuck = str(world.zeus.spawn(request)["kernel"]["kernel_id"])
    next_in_line = world.tiny("hera")
    assert "no sign of life" in world.wait_for(stuck, "stalled")["state_reason"]
    world.wait_for(next_in_line, "training")
    release.set()
    assert "its place was taken" in world.wait_for(stuck, "queued")["state_reason"]


def test_lack_of_room_pauses_loudly_and_goes_on_by_itself(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world(patience_evaluations=10_000)
    shortage: list[str | None] = [None]
    monkeypatch.setattr(world.zeus.checkpoint_store, "shortage", lambda: shortage[0])
    monkeypatch.setattr("olympus.kernel_thread.ROOM_CHECK_SECONDS", 0.1)
    kernel = world.tiny(experiences=tuple(facts(40)))
    world.wait_for(kernel, "training", step=1)
    shortage[0] = "the disk has 1 byte left"
    status = world.wait_for(kernel, "paused")
    assert status["state_reason"] == "no room: the disk has 1 byte left"
    with pytest.raises(StorageFull):
        world.tiny("hera")
    shortage[0] = None
    world.wait_for(kernel, "training", step=status["step"] + 1)


# -- restarts ---------------------------------------------------------------------------------------------------


def test_a_restart_goes_on_where_it_was(make_world: MakeWorld) -> None:
    world = make_world(patience_evaluations=10_000)
    training = world.tiny("hera", experiences=tuple(facts(40)))
    paused = world.tiny("ares")
    world.wait_for(training, "training", step=3)
    world.zeus.pause(paused)
    world.zeus.shutdown(10)
    stopped_at = world.zeus.status(training)
    assert stopped_at["state"] == "queued"
    assert stopped_at["last_saved_step"] == stopped_at["step"]
    second = make_world(patience_evaluations=10_000)
    second.wait_for(training, "training", step=stopped_at["step"] + 1)
    assert second.zeus.status(paused)["state"] == "paused"
    answer = second.zeus.query(paused, QueryRequest(input="red light"))
    assert answer["checkpoint_used"].startswith(("best@", "latest@"))


def test_the_early_stop_event_ends_training_with_a_checkpoint_and_starts_nothing(make_world: MakeWorld) -> None:
    world = make_world(patience_evaluations=10_000)
    kernel = world.tiny(experiences=tuple(facts(40)))
    world.wait_for(kernel, "training", step=2)
    world.stop.set()
    status = world.wait_for(kernel, "queued")
    assert status["last_saved_step"] == status["step"]
    time.sleep(0.6)
    assert not world.zeus.trainer.is_busy(kernel)


def test_a_phantom_training_row_is_queued_again(make_world: MakeWorld) -> None:
    world = make_world(start=False)
    world.zeus.start()
    kernel = world.tiny(train=False)
    world.zeus.shutdown(5)
    world.zeus.rows.set_state(kernel, "training", wanted="train")  # as kill -9 leaves it
    second = make_world()
    assert second.wait_for(kernel, "queued", "waiting")["state"] != "training"
    second.zeus.shutdown(5)
    second.zeus.rows.set_state(kernel, "training")
    third = make_world(autostart=False)
    assert third.zeus.status(kernel)["state"] == "paused"
    assert "autostart" in third.zeus.status(kernel)["state_reason"]


# -- asking -----------------------------------------------------------------------------------------------------


def test_asking_while_training_is_never_torn(make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = SnapshotShelf.get

    def get(self: SnapshotShelf, kernel_id: str, which: str) -> Any:
        found = original(self, kernel_id, which)
        if found is not None:
            seen.append(found)
        return found

    monkeypatch.setattr(SnapshotShelf, "get", get)
    world = make_world(patience_evaluations=10_000, evaluate_every=2)
    kernel = world.tiny(experiences=tuple(facts(60)))
    begun = world.wait_for(kernel, "training", step=1)["step"]

    def ask(number: int) -> None:
        which = "latest" if number % 2 else "best"
        world.zeus.query(kernel, QueryRequest(input="green light", candidates=("go", "stop"), checkpoint=which))

    for number in range(40):
        ask(number)
    world.wait_for(kernel, "training", step=begun + 6)
    ask(1)  # the weights of now, should no question have fallen between two snapshots
    world.zeus.pause(kernel)
    assert len({snapshot.checksum for snapshot in seen}) > 1
    for snapshot in seen:
        snapshot.check_invariants()


def test_every_way_of_asking(make_world: MakeWorld) -> None:
    world = make_world(patience_evaluations=10_000)
    kernel = world.tiny(experiences=tuple(facts(40)))
    world.wait_for(kernel, "training", step=2)
    name = world.zeus.checkpoint_now(kernel)["name"]
    world.zeus.pause(kernel)
    free = world.zeus.query(kernel, QueryRequest(input="red light", max_tokens=5, temperature=1.0, return_basin=True))
    assert len(free["basin"]) == 64
    assert sum(free["basin"]) == pytest.approx(1.0, abs=1e-3)
    assert 0 < free["confidence"] <= 1
    named = world.zeus.query(kernel, QueryRequest(input="red light", checkpoint=name, candidates=("stop",)))
    assert named["checkpoint_used"] == name
    with pytest.raises(CheckpointNotFound):
        world.zeus.query(kernel, QueryRequest(input="x", checkpoint="step-00000000"))
    learned = world.zeus.query(kernel, QueryRequest(input="red light", candidates=("stop",), learn=True))
    record = world.history.get(learned["experience_id"])
    assert record is not None
    assert (record.source, record.action, record.score) == ("query", "stop", None)
    json.dumps([free, named, learned, world.zeus.status(kernel)], allow_nan=False)


# -- Replit -----------------------------------------------------------------------------------------------------


def test_on_replit_one_trains_and_the_database_remembers(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("REPL_ID", "x")
    assert checkpoint_root(make_settings(tmp_path), on_replit=True) == REPLIT_CHECKPOINTS
    root = tmp_path / "volatile"
    world = make_world(checkpoint_dir=str(root), patience_evaluations=10_000)
    assert world.zeus.limit == 1
    kernel = world.tiny(experiences=tuple(facts(40)))
    world.wait_for(kernel, "training", step=2)
    step = world.zeus.pause(kernel)["step"]
    world.zeus.shutdown(5)
    shutil.rmtree(root)
    second = make_world(checkpoint_dir=str(root), patience_evaluations=10_000)
    assert [row["step"] for row in second.zeus.checkpoints(kernel)["checkpoints"]] == [step]
    second.zeus.resume(kernel)
    second.wait_for(kernel, "training", step=step + 1)


def test_elsewhere_three_train_under_the_data_directory(make_world: MakeWorld) -> None:
    world = make_world()
    assert world.zeus.limit == 3
    assert world.zeus.checkpoint_root == world.settings.data_dir / "kernels"
