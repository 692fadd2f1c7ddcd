"""The whole way with a tiny model: what was lived through becomes a cartridge, serves, and grows stale."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from memory.distillation import evaluation, initialisers, train_adapter
from memory.distillation.answers import content_key
from memory.distillation.pipeline import Surroundings
from memory.distillation.replay_env import split_of
from memory.distillation.runs import RunStore
from memory.distillation.worker import Outcome
from memory.history import History, NewExperience
from olympus.distillery import RunUnderWay, UnknownRun
from olympus.errors import InvalidAction, InvalidRequest, NotReady
from olympus.runtime import Runtime
from settings import load_settings
from storage.database import Database
from tests.support.tiny_model import save_tiny_model

WORDS = ("fox", "dog", "cat", "cow", "hen", "owl", "bee", "ant")
LABELS = ("Paris", "Bern")
LIVED = (b"owl 5 likes", b"fox 0 sees", b"owl 77 sees")
#: Small, and with enough steps that the random model learns two labels.
LEARNING: dict[str, Any] = {
    "training": {
        "slots": 16,
        "learning_rate": 0.05,
        "warmup_steps": 2,
        "max_steps": 30,
        "rows": 8,
        "evaluate_every": 5,
        "save_every": 10,
        "max_tokens": 64,
    },
    "gate": {"min_rows": 4, "margin": 0.5},
    "data": {"targets": "feedback", "eval_share": 0.25},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def make(tmp_path: Path, model: Path) -> Iterator[Callable[..., Runtime]]:
    made: list[Runtime] = []

    def start(**distillation: Any) -> Runtime:
        chosen = {
            "data_dir": str(tmp_path / "data"),
            "model": {"name": str(model), "threads": 1, "dtype": "float32"},
            "kernels": {"spawn_default": False, "auto_spawn": False},
            "memory": {"episodic": {"enabled": False}},
            "distillation": {"automatic": False, **distillation},
        }
        runtime = Runtime(load_settings(environ={}, overrides=chosen))
        made.append(runtime)
        runtime.start(wait_for_model=True)
        return runtime

    yield start
    for runtime in made:
        runtime.shutdown(10)


def _live(runtime: Runtime, count: int = 48, domain: str = "zoo") -> None:
    items = []
    for number in range(count):
        label = LABELS[number % 2]
        wrong = number % 3 == 0
        items.append(
            NewExperience(
                observation=f"{WORDS[number % len(WORDS)]} {number} {'likes' if number % 2 else 'sees'}",
                action=LABELS[1 - number % 2] if wrong else label,
                domain=domain,
                source="test",
                feedback=f"Incorrect! The correct answer is {label}." if wrong else "Correct!",
                score=0.0 if wrong else 1.0,
            )
        )
    runtime.history.append(items)


def _ended(runtime: Runtime, run_id: str, seconds: float = 60) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        run = runtime.distillery.run(run_id)
        if run["finished_at"] is not None:
            return run
        time.sleep(0.05)
    raise AssertionError(f"the run has not ended: {runtime.distillery.run(run_id)}")


def test_from_experiences_to_a_serving_cartridge(make: Callable[..., Runtime]) -> None:
    runtime = make()
    _live(runtime)
    with runtime.hub.subscribe(["distillation"]) as watching:
        run = _ended(runtime, runtime.distillery.begin("zoo", preset="quick", overrides=LEARNING)["id"])
        stages = [event.data["progress"]["stage"] for event in watching.get(1)]
    assert run["state"] == "promoted", run
    assert [stage for place, stage in enumerate(stages) if stage not in stages[:place]] == [
        "queued",
        "dataset",
        "initial prefix",
        "training",
        "gate",
    ]
    progress = run["progress"]
    assert progress["fraction"] == 1.0
    assert progress["data"]["rows"] == 48
    assert progress["data"]["targets"] == {"feedback": 48}
    row = runtime.cartridges.serving("zoo")
    assert row is not None
    assert (row.id, row.run_id) == (progress["cartridge"], run["id"])
    arms = progress["evaluation"]["arms"]
    assert arms["cartridge"]["nll"]["mean"] < 0.85 * arms["memoryless"]["nll"]["mean"]
    assert arms["cartridge"]["attended"] < arms["long_prompt"]["attended"] / 4
    assert row.metrics["verdict"]["passed"] is True
    folder = runtime.distillery.folder / run["id"]
    assert (folder / "cache_last.pt").exists()
    _until_gone(folder / "state")
    logged = runtime.distillery.metrics(run["id"], 0)
    assert [line["step"] for line in logged["metrics"] if "loss" in line and "learning_rate" in line][:3] == [1, 2, 3]
    assert runtime.distillery.metrics(run["id"], logged["next"])["metrics"] == []
    # What it learned from is forgotten: it goes on to serve, is stale, and the schedule says so.
    assert runtime.distillery.outlook("zoo")["would_start"] is None
    newest = runtime.history.page(domain="zoo", limit=1)[0]
    runtime.forget(actor="test", experience_id=newest.id)
    stale = runtime.cartridges.serving("zoo")
    assert stale is not None
    assert stale.stale
    assert {item["name"]: item["fires"] for item in runtime.distillery.outlook("zoo")["triggers"]}["stale"]
    runtime.cartridges.check_invariants()
    runtime.distillery.runs.check_invariants()


def test_too_little_is_said_and_nothing_serves(make: Callable[..., Runtime]) -> None:
    runtime = make()
    _live(runtime, 6)
    overrides = {**LEARNING, "gate": {"min_rows": 50}}
    run = _ended(runtime, runtime.distillery.begin("zoo", preset="quick", overrides=overrides)["id"])
    assert run["state"] == "rejected"
    assert "not enough held-out rows" in run["progress"]["detail"]
    assert runtime.cartridges.serving("zoo") is None
    assert [row.state for row in runtime.cartridges.list("zoo")] == ["rejected"]
    runtime.history.append([NewExperience("just talk", "yes", domain="chat", source="test")])
    run = _ended(runtime, runtime.distillery.begin("chat", preset="quick", overrides=LEARNING)["id"])
    assert run["state"] == "skipped"
    assert "can become a row" in run["progress"]["detail"]


def test_the_teacher_is_the_engine_where_nobody_judged(make: Callable[..., Runtime]) -> None:
    runtime = make()
    items = [NewExperience(f"say {word} {n}", "yes", domain="chat", source="test") for n in range(3) for word in WORDS]
    runtime.history.append(items)
    overrides = {
        **LEARNING,
        "data": {"targets": "teacher", "eval_share": 0.25},
        "teacher": {"max_tokens": 4, "max_prompt_tokens": 200},
        "gate": {"min_rows": 2, "metric": "auto"},
    }
    run = _ended(runtime, runtime.distillery.begin("chat", preset="quick", overrides=overrides)["id"])
    assert run["state"] in ("promoted", "rejected"), run
    assert run["progress"]["verdict"]["metric"] == "kl"
    assert run["progress"]["data"]["targets"] == {"teacher": 24}


def test_a_restart_goes_on_where_it_stood(make: Callable[..., Runtime]) -> None:
    runtime = make()
    _live(runtime)
    slow = {**LEARNING, "training": {**LEARNING["training"], "max_steps": 400, "early_stop_patience": 0}}
    run_id = runtime.distillery.begin("zoo", preset="quick", overrides=slow)["id"]
    deadline = time.monotonic() + 60
    while runtime.distillery.run(run_id)["progress"].get("step", 0) < 10 and time.monotonic() < deadline:
        time.sleep(0.05)
    runtime.shutdown(20)
    again = make()
    waiting = again.distillery.run(run_id)
    assert waiting["state"] in ("queued", "running")
    again.distillery.cancel(run_id)
    assert _ended(again, run_id)["state"] == "cancelled"
    steps = [line["step"] for line in again.distillery.metrics(run_id, 0)["metrics"] if "learning_rate" in line]
    assert steps == list(range(1, len(steps) + 1)), "every step once, none lost"
    assert len(steps) >= 10


def test_what_cannot_be_asked_is_refused(make: Callable[..., Runtime]) -> None:
    runtime = make()
    distillery = runtime.distillery
    with pytest.raises(InvalidRequest, match="nothing was lived through"):
        distillery.begin("unknown")
    _live(runtime)
    with pytest.raises(InvalidRequest, match=r"training\.max_stepz: unknown key; did you mean training\.max_steps"):
        distillery.begin("zoo", overrides={"training": {"max_stepz": 1}})
    with pytest.raises(InvalidRequest, match=r"one of: .*quick"):
        distillery.begin("zoo", preset="../../etc/passwd")
    with pytest.raises(UnknownRun):
        distillery.run("run-000000000000")
    slow = {**LEARNING, "training": {**LEARNING["training"], "max_steps": 5000, "early_stop_patience": 0}}
    run_id = distillery.begin("zoo", preset="quick", overrides=slow)["id"]
    with pytest.raises(RunUnderWay, match=run_id):
        distillery.begin("zoo")
    distillery.cancel(run_id)
    assert _ended(runtime, run_id)["state"] == "cancelled"
    with pytest.raises(InvalidAction, match="nothing to cancel"):
        distillery.cancel(run_id)


def test_the_schedule_starts_what_a_trigger_asks_for(make: Callable[..., Runtime], tmp_path: Path) -> None:
    preset = tmp_path / "often.yaml"
    preset.write_text(
        "schedule: {enabled: true, when: {every_episodes: 40}}\ndata: {targets: feedback}\n"
        "training: {slots: 16, max_steps: 4, warmup_steps: 1, rows: 4, max_tokens: 64}\ngate: {min_rows: 2}\n"
    )
    runtime = make(preset=str(preset), automatic=True, check_seconds=0.1)
    _live(runtime, 39)
    time.sleep(0.5)
    assert runtime.distillery.page("zoo", 5) == []
    _live(runtime, 48)  # equal contents: other experiences all the same
    deadline = time.monotonic() + 30
    while not (found := runtime.distillery.page("zoo", 5)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert found[0]["trigger"] == "episodes"
    _ended(runtime, found[0]["id"])
    time.sleep(0.5)
    assert len(runtime.distillery.page("zoo", 5)) == 1, "what was learned does not trigger again"
    assert runtime.distillery.schedule()["next_look"] is not None


def test_without_a_model_it_says_so(tmp_path: Path) -> None:
    settings = load_settings(
        environ={},
        overrides={"data_dir": str(tmp_path), "model": {"load": False}, "kernels": {"spawn_default": False}},
    )
    runtime = Runtime(settings)
    runtime.start()
    try:
        _live(runtime)
        with pytest.raises(NotReady):
            runtime.distillery.begin("zoo")
        assert runtime.distillery.schedule()["working"] is False
    finally:
        runtime.shutdown(5)


#: A run that is soon over: two steps, and too few questions for the gate.
SHORT: dict[str, Any] = {
    **LEARNING,
    "training": {**LEARNING["training"], "max_steps": 2, "warmup_steps": 1},
    "gate": {"min_rows": 50},
}


def _until_gone(path: Path) -> None:
    """What is only needed while a run goes on is removed soon after its end."""
    deadline = time.monotonic() + 10
    while path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not path.exists()


def _short(runtime: Runtime, **more: Any) -> dict[str, Any]:
    return _ended(runtime, runtime.distillery.begin("zoo", preset="quick", overrides={**SHORT, **more})["id"])


def _texts(runtime: Runtime, run_id: str) -> set[str]:
    """Files of the run in which something stands that was lived through."""
    folder = runtime.distillery.folder / run_id
    return {path.name for path in folder.rglob("*") if path.is_file() and any(w in path.read_bytes() for w in LIVED)}


def test_what_is_forgotten_goes_from_the_folders_of_runs(make: Callable[..., Runtime]) -> None:
    runtime = make()
    _live(runtime, 24)
    kept, gone = _short(runtime)["id"], _short(runtime)["id"]
    runtime.history.append([NewExperience("owl 77 sees", "Bern", domain="zoo", source="test", feedback="Correct!")])
    late = _short(runtime)["id"]
    assert _texts(runtime, late) == _texts(runtime, kept) == {"journal.jsonl", "dataset.parquet"}
    runtime.forget(actor="test", experience_id=runtime.history.page(domain="zoo", limit=1)[0].id)
    assert _texts(runtime, late) == set()
    assert _texts(runtime, kept), "it never saw what was forgotten"
    # A crash between forgetting and removing is made good at the next start.
    runtime.history.delete(domain="zoo")
    assert _texts(runtime, gone)
    runtime.shutdown(10)
    again, deadline = make(), time.monotonic() + 10
    while _texts(again, gone) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _texts(again, gone)


@pytest.mark.parametrize(
    "overrides",
    [
        {"checkpoint_dir": "/etc"},
        {"output_path": "/tmp/elsewhere"},
        {"hf_repo_id": "them/rows"},
        {"teacher": {"model": "openai:x@http://198.51.100.7/v1"}},
        {"teacher": {"api_key_env": "HOME"}},
        {"data": {"redact": {"enabled": False}}},
    ],
)
def test_a_request_names_no_files_servers_or_secrets(make: Callable[..., Runtime], overrides: dict[str, Any]) -> None:
    runtime = make()
    _live(runtime, 4)
    with pytest.raises(InvalidRequest, match="a request cannot change it"):
        runtime.distillery.begin("zoo", preset="quick", overrides=overrides)
    assert runtime.distillery.page("zoo", 5) == []


def test_the_owner_may(make: Callable[..., Runtime], tmp_path: Path) -> None:
    runtime = make()
    _live(runtime, 4)
    begun = runtime.distillery.begin("zoo", overrides={"checkpoint_dir": str(tmp_path)}, owner=True)
    assert "memory_*.jsonl" in _ended(runtime, begun["id"])["error"]


def test_what_is_forgotten_while_it_is_learned_is_not_promoted(
    make: Callable[..., Runtime], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = make()
    _live(runtime)
    learn = train_adapter.train

    def train(*args: Any, **options: Any) -> Any:
        runtime.forget(actor="test", experience_id=runtime.history.page(domain="zoo", limit=1)[0].id)
        return learn(*args, **options)

    monkeypatch.setattr(train_adapter, "train", train)
    run = _ended(runtime, runtime.distillery.begin("zoo", preset="quick", overrides=LEARNING)["id"])
    assert run["state"] == "failed"
    assert "was forgotten" in run["error"]
    assert [(row.state, row.stale) for row in runtime.cartridges.list("zoo")] == [("rejected", True)]
    deadline = time.monotonic() + 10
    while _texts(runtime, run["id"]) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _texts(runtime, run["id"])


def test_who_was_quicker_than_the_gate_has_decided(
    make: Callable[..., Runtime], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = make()
    _live(runtime)
    measure = evaluation.evaluate

    def evaluate(*args: Any, **options: Any) -> Any:
        runtime.cartridge_desk.reject(runtime.cartridges.list("zoo")[0].id, actor="test", reason="I do not like it")
        return measure(*args, **options)

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    run = _ended(runtime, runtime.distillery.begin("zoo", preset="quick", overrides=LEARNING)["id"])
    assert (run["state"], run["progress"]["detail"]) == ("rejected", "I do not like it")


def test_what_was_judged_between_two_attempts_is_learned(make: Callable[..., Runtime]) -> None:
    runtime = make()
    _live(runtime)
    late = runtime.history.append([NewExperience("cow 99 sees", "Bern", domain="zoo", source="test")])[0]
    slow = {**LEARNING, "training": {**LEARNING["training"], "max_steps": 80, "early_stop_patience": 0}}
    run_id = runtime.distillery.begin("zoo", preset="quick", overrides=slow)["id"]
    deadline = time.monotonic() + 60
    while runtime.distillery.run(run_id)["progress"].get("step", 0) < 10 and time.monotonic() < deadline:
        time.sleep(0.01)
    runtime.shutdown(20)
    database = Database(runtime.settings.database_url)
    assert RunStore(database).get(run_id).state == "queued", "it was to be interrupted"
    History(database).give_feedback(late.id, "Incorrect! The correct answer is Paris.", 0.0)
    database.close()
    run = _ended(make(), run_id)
    assert run["state"] in ("promoted", "rejected"), run["error"]
    assert run["progress"]["data"]["rows"] == 49


def test_an_observation_too_long_for_the_long_prompt_is_not_asked(make: Callable[..., Runtime]) -> None:
    runtime = make()
    _live(runtime)
    texts = (f"{number} {'fox ' * 120}" for number in range(100))
    held_out = next(text for text in texts if split_of(content_key(text), 0.25) == "eval")
    runtime.history.append(
        [NewExperience(held_out, "Bern", domain="zoo", source="test", feedback="Correct!", score=1.0)]
    )
    run = _short(runtime, teacher={"max_prompt_tokens": 100}, gate={"min_rows": 2})
    assert run["state"] in ("promoted", "rejected"), run["error"]
    assert run["progress"]["evaluation"]["questions"] == run["progress"]["data"]["eval_rows"] - 1


def test_the_long_prompt_is_no_longer_than_the_model_can_read(
    make: Callable[..., Runtime], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = make()
    _live(runtime)
    small = replace(runtime.engine.loaded, context_length=300)
    monkeypatch.setattr(Surroundings, "loaded", property(lambda _: small))
    run = _short(runtime, gate={"min_rows": 2}, teacher={"max_prompt_tokens": 4096})
    assert run["state"] in ("promoted", "rejected"), run["error"]
    assert 150 < run["progress"]["evaluation"]["arms"]["long_prompt"]["prompt_tokens"] <= 300 - 64


def test_answers_that_were_cut_off_are_not_learned(make: Callable[..., Runtime]) -> None:
    runtime = make()
    _live(runtime, 24)
    cut = NewExperience("hen 99 sees", "Be", domain="zoo", source="test", meta={"finish_reason": "cancelled"})
    judged = replace(cut, observation="owl 98 sees", feedback="Incorrect! The correct answer is Bern.")
    runtime.history.append([cut, judged])
    run = _short(runtime)
    assert run["progress"]["experiences"] == 25
    assert run["progress"]["data"]["rows"] == 25


def test_a_strict_hold_out_holds_for_the_initial_prefix(
    make: Callable[..., Runtime], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = make()
    _live(runtime)
    seen: list[str] = []
    initial = initialisers.initial_prefix

    def initial_prefix(*args: Any, history: Any, **options: Any) -> Any:
        seen.extend(item["content"] for item in history if item["content"].startswith(WORDS))
        return initial(*args, history=history, **options)

    monkeypatch.setattr(initialisers, "initial_prefix", initial_prefix)
    run = _short(runtime, data={**LEARNING["data"], "strict_hold_out": True})
    assert len(seen) == run["progress"]["data"]["train_rows"]
    assert {split_of(content_key(text), 0.25) for text in seen} == {"train"}


def test_a_successor_inherits_what_was_learned_and_nothing_stale(make: Callable[..., Runtime]) -> None:
    runtime = make()
    _live(runtime, 24)
    first = runtime.cartridges.list("zoo")[0].id if _short(runtime) else ""
    runtime.cartridge_desk.promote(first, actor="test", force=True)
    _live(runtime, 24)
    inherit = {"cache_init": {"type": "pretrained"}}
    _short(runtime, **inherit, data={**LEARNING["data"], "max_records": 20})
    second = runtime.cartridges.list("zoo")[0]
    assert second.parent_id == first
    oldest = runtime.history.page(domain="zoo", limit=100)[-1]
    runtime.forget(actor="test", experience_id=oldest.id)  # not among the newest 20: only the first one saw it
    assert {row.id: row.stale for row in runtime.cartridges.list("zoo")} == {first: True, second.id: True}
    _short(runtime, **inherit)
    third = runtime.cartridges.list("zoo")[0]
    assert (third.parent_id, third.stale) == (None, False)
    run = _short(runtime, cache_init={"type": "pretrained", "cartridge": first})
    assert f"{first} is stale" in run["error"]


def test_a_stale_cartridge_that_nothing_replaces_is_tried_once(make: Callable[..., Runtime], tmp_path: Path) -> None:
    preset = tmp_path / "eager.yaml"
    preset.write_text(yaml.safe_dump({**SHORT, "schedule": {"enabled": True, "cooldown_seconds": 0}}))
    runtime = make(preset=str(preset))
    _live(runtime, 24)
    _short(runtime)
    runtime.cartridge_desk.promote(runtime.cartridges.list("zoo")[0].id, actor="test", force=True)
    runtime.forget(actor="test", experience_id=runtime.history.page(domain="zoo", limit=1)[0].id)
    (run_id,) = runtime.distillery.look()
    assert _ended(runtime, run_id)["state"] == "rejected"
    assert runtime.distillery.look() == [], "the same again would end in the same way"
    _live(runtime, 1)
    assert len(runtime.distillery.look()) == 1


def test_a_preset_that_cannot_be_read_hides_no_other_domain(make: Callable[..., Runtime]) -> None:
    runtime = make(domains={"zoo": "/nowhere.yaml"})
    _live(runtime, 2)
    _live(runtime, 2, "farm")
    told = {item["domain"]: item for item in runtime.distillery.schedule()["domains"]}
    assert "no configuration file '/nowhere.yaml'" in told["zoo"]["reason"]
    assert told["farm"]["situation"]["experiences"] == 2
    assert set(told["zoo"]) == set(told["farm"])


def test_a_model_that_is_ready_too_late_starts_nothing(make: Callable[..., Runtime]) -> None:
    runtime = make()
    runtime.distillery.shutdown(5)
    before = threading.active_count()
    runtime.distillery.start(lambda run, report, stop: Outcome("promoted"))
    assert threading.active_count() == before
