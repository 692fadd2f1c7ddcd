"""Evaluation, fluency guard, profile and the tool task, on tiny models and by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from tests.support.workspace_training import RECIPE, WORKSPACE, captured
from workspace.answering import Answering, answer_loss
from workspace.calibration import observe_text, real_kv
from workspace.capture_folder import Capture
from workspace.errors import CaptureMismatch
from workspace.evaluation import EvaluationOptions, evaluate
from workspace.fluency import Change, FluencyLimits, FluencyOptions, guard
from workspace.models import LoadedModel
from workspace.modules import WorkspaceModules
from workspace.profiling import profile
from workspace.sampling import SamplingParams
from workspace.steering import Steering
from workspace.steering_types import Toggles
from workspace.text_quality import distinct, repetition
from workspace.tool_task import call_text, is_formed, is_right, requests, shares, system_message
from workspace.training import train

FEW = FluencyOptions(questions=4, tokens=12, temperature=0.7)


@pytest.fixture
def steer(tiny: LoadedModel) -> Iterator[Callable[..., Steering]]:
    """``steer(**changes)``: a steering of the tiny model; all are closed at the end."""
    made: list[Steering] = []

    def make(**changes: Any) -> Steering:
        made.append(Steering(tiny, WORKSPACE.model_copy(update={"kv_plan_bias": -16.0, **changes})))
        return made[-1]

    yield make
    for steering in made:
        steering.close()


# Numbers of texts.


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [([], 0.0), ([1, 2, 3], 0.0), ([1, 2, 3, 4, 5, 6], 0.0), ([1] * 8, 0.8), ([1, 2, 3, 4] * 3, 5 / 9)],
)
def test_repetition(tokens: list[int], expected: float) -> None:
    assert repetition(tokens) == pytest.approx(expected)


def test_distinct_counts_over_all_texts() -> None:
    assert distinct([[1, 2, 3], [1, 2, 4]], 1) == pytest.approx(4 / 6)
    assert distinct([[1, 2, 3], [1, 2, 4]], 2) == pytest.approx(3 / 4)
    assert distinct([[1], []], 2) == 1.0
    with pytest.raises(ValueError, match="n of at least 1"):
        distinct([[1]], 0)


def test_the_loss_of_an_answer(tiny: LoadedModel) -> None:
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
    with torch.inference_mode():
        logits = tiny.model(ids).logits[0]
    expected = functional.cross_entropy(logits[3:6], ids[0, 4:])
    assert answer_loss(tiny, [5, 6, 7, 8], [9, 10, 11]) == pytest.approx(float(expected), abs=1e-5)
    assert answer_loss(tiny, [5], []) != answer_loss(tiny, [5], [])  # NaN: there is none


# The tool task.


def test_tool_calls_are_judged() -> None:
    asked = requests(3, 40)
    assert asked == requests(3, 40)
    assert asked != requests(4, 40)
    assert {request.tool for request in asked} == {"weather", "translate", "define", "timer"}
    for request in asked:
        assert request.argument in request.text
        right = call_text(request.tool, request.argument)
        assert is_formed(right)
        assert is_right(right, request)
        assert is_right(right.replace(request.argument, request.argument.upper()), request)
        assert not is_right(call_text(request.tool, "other"), request)
    for answer in (
        "",
        "weather",
        '{"tool": "weather"}',
        '{"tool": "fly", "argument": "x"}',
        "[1]",
        '{"tool": 3, "argument": 1}',
    ):
        assert not is_formed(answer)
    wrong = call_text("define", "nothing")
    assert shares([(call_text(asked[0].tool, asked[0].argument), asked[0]), (wrong, asked[1]), ("", asked[2])]) == (
        pytest.approx(2 / 3),
        pytest.approx(1 / 3),
    )
    assert all(call_text(tool, "Paris")[:16] in system_message() for tool in ("weather",))


# Answers.


def test_answers_are_those_of_the_engine(steer: Callable[..., Steering], make_engine: Any) -> None:
    steering = steer()
    engine = make_engine(steering.loaded)
    params = SamplingParams(max_tokens=10, temperature=0.9, seed=3)
    question = [{"role": "user", "content": "Where is Bern?"}]
    expected = engine.submit(question, params).result()
    with Answering(steering.loaded, steering) as answering:
        stock = answering.answer(question, params)
        steered = answering.answer(question, params, Toggles(memory=False))
    assert (stock.token_ids, stock.text) == (expected.token_ids, expected.text)
    assert stock.report is None
    assert steered.report is not None
    assert steered.report.broadcasts >= 1
    assert 0 < stock.first_token_seconds <= stock.seconds
    with Answering(steering.loaded) as answering, pytest.raises(ValueError, match="no workspace to switch on"):
        answering.answer(question, params, Toggles())


# The guard.


def test_a_workspace_that_is_off_changes_nothing(steer: Callable[..., Steering]) -> None:
    report = guard(steer(virtual_kv=True), FEW)
    assert report.passed
    assert report.equal == 4
    assert report.off == report.on
    assert [change.change for change in report.changes] == [0, 0, 0]
    assert "passed" in report.table()
    assert json.loads(json.dumps(report.to_json()))["passed"] is True
    assert report.seeds == (0, 3)


def test_random_tokens_fail_the_guard(steer: Callable[..., Steering]) -> None:
    """The tiny model's own loss is what random tokens raise; limits are those of the real guard."""
    steering = steer()
    report = guard(steering, FEW, control="random")
    assert report.equal < 4
    assert not report.passed
    assert "random virtual tokens: FAILED" in report.table()
    assert "TOO MUCH" in report.table()
    again = guard(steering, FEW, control="random")
    assert again.to_json() == report.to_json()
    with pytest.raises(ValueError, match="known is random"):
        guard(steering, FEW, control="zero")


def test_limits_decide(steer: Callable[..., Steering]) -> None:
    steering = steer()
    wide = FluencyLimits(loss=100, repetition=1, distinct=1)
    assert guard(steering, FEW, wide, control="random").passed
    assert Change("loss", 0.1, None, 0.1).passed
    assert not Change("loss", 0.1001, None, 0.1).passed


# Calibration.


def test_real_keys_are_those_of_the_cache(steer: Callable[..., Steering]) -> None:
    steering = steer()
    ids = torch.arange(5, 25)
    found = real_kv(steering.hooked, ids)
    with torch.inference_mode():
        cache = steering.loaded.model(ids[None], use_cache=True).past_key_values
    for layer, (keys, values) in found.items():
        rotated = steering.hooked.rope.rotate(keys, torch.arange(20)[None], layer)
        torch.testing.assert_close(rotated, cache.layers[layer].keys, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(values, cache.layers[layer].values)
    modules = WorkspaceModules(steering.modules.shape, steering.config)
    assert not modules.projector.calibrated
    observe_text(steering.hooked, modules.projector, ids)
    assert modules.projector.calibrated


# All of it.


@pytest.fixture(scope="module")
def capture(tiny: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Capture:
    return captured(tiny, tmp_path_factory.mktemp("captured"))


SMALL = EvaluationOptions(fluency=FEW, speed_rounds=2, speed_tokens=6, dialogues=1, turns=3, held_out_rows=2, keep=4)


def test_without_weights_everything_is_measured_that_can_be(steer: Callable[..., Steering], capture: Capture) -> None:
    told: list[str] = []
    report = evaluate(steer(), SMALL, capture=capture, progress=told.append)
    assert told == ["speed", "tools", "fluency", "loss"]
    assert report.trained == ()
    assert {item.arm for item in report.losses} == {"none", "random", "heuristic"}
    assert report.speed is not None
    assert report.speed[0].decode_rate > 0
    assert report.tools is not None
    assert report.tools[0] == report.tools[1]  # the workspace is at its default bias: off
    text = report.table()
    for words in (
        "tokens per second",
        "distinct-2",
        "tool calls: late formed",
        "fox, whole context",
        "heuristics only",
    ):
        assert words in text
    value = json.loads(json.dumps(report.to_json()))
    assert value["losses"][0].keys() == {"kind", "keep", "arm", "loss", "texts"}


def test_with_weights_all_arms_are_there(tiny: LoadedModel, capture: Capture, tmp_path: Path) -> None:
    result = train(tiny, capture, tmp_path / "run", RECIPE)
    steering = Steering(tiny, RECIPE.workspace.model_copy(update={"state_path": result.state}))
    try:
        report = evaluate(steering, SMALL.model_copy(update={"speed_rounds": 0, "dialogues": 0}), capture=capture)
    finally:
        steering.close()
    assert report.trained == RECIPE.parts
    assert {item.arm for item in report.losses} == {"none", "trained", "other", "stranger", "random", "heuristic"}
    assert (report.speed, report.tools) == (None, None)
    trained = result.metrics["held_out"]["fox"]["whole"]
    again = {item.arm: item for item in report.losses if (item.kind, item.keep) == ("fox", None)}
    assert again["none"].mean == pytest.approx(trained["without"], abs=1e-3)
    assert again["trained"].mean - again["none"].mean == pytest.approx(trained["change"], abs=1e-3)


def test_texts_of_another_model_are_refused(
    steer: Callable[..., Steering], capture: Capture, tiny_models: dict[str, LoadedModel]
) -> None:
    other = Steering(tiny_models["gpt_oss"], WORKSPACE)
    try:
        with pytest.raises(CaptureMismatch, match="was captured from tiny-llama"):
            evaluate(other, SMALL.model_copy(update={"speed_rounds": 0, "dialogues": 0}), capture=capture)
    finally:
        other.close()


# The profile.


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_a_profile_names_every_part(name: str, tiny_models: dict[str, LoadedModel]) -> None:
    found = profile(tiny_models[name], WORKSPACE, context=40, rounds=3)
    parts = [cost.part for cost in found.costs]
    for part in ("hooks, nothing carried", "probes", "4 virtual tokens", "controller", "broadcast made", "deltas made"):
        assert part in parts
    assert found.stock_milliseconds > 0
    assert all(cost.milliseconds > 0 for cost in found.costs[-5:])
    assert [memory.part for memory in found.memory] == ["hooks", "hooks, modules and store", "one broadcast"]
    assert found.memory[1].tensor_bytes > found.memory[2].tensor_bytes > 0
    for norms in found.norms:
        assert 0 < norms.virtual_keys < 2 * norms.real_keys
    assert json.loads(json.dumps(found.to_json()))["rounds"] == 3
    assert "virtual keys" in found.table()
    again = Steering(tiny_models[name], WORKSPACE)  # the hooks were taken away
    again.close()
