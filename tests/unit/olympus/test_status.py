"""The status object: every field is there, and each condition of convergence has its number, threshold and reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tests.unit.olympus.kernel_world import World, facts

MakeWorld = Callable[..., World]
FLAT = {
    "phi_now", "phi_mean100", "phi_std100", "phi_ok", "stable_ok", "loss_ok", "plateau", "steps_in_window",
    "converged", "reason",
}  # fmt: skip


def trained(world: World, step: int = 25) -> dict[str, Any]:
    kernel = world.tiny(experiences=tuple(facts(120)))
    world.wait_for(kernel, "training", step=step)
    return world.zeus.pause(kernel)


def test_each_condition_has_its_number_its_threshold_and_its_reason(make_world: MakeWorld) -> None:
    status = trained(make_world(patience_evaluations=10_000, holdout_percent=30))
    judged = status["convergence"]
    assert set(judged) >= FLAT
    conditions = {item["name"]: item for item in judged["conditions"]}
    assert list(conditions) == ["window", "phi", "stable", "learned", "plateau"]
    for item in judged["conditions"]:
        assert set(item) == {"name", "ok", "value", "threshold", "reason"}
        assert item["ok"] in (True, False, None)
        assert len(item["reason"]) > 10
    assert conditions["window"]["value"] == judged["steps_in_window"]
    assert conditions["window"]["threshold"] == 100
    assert conditions["phi"]["threshold"] == judged["phi_threshold"] == 0.7
    assert conditions["phi"]["value"] == judged["phi_mean100"] == status["phi"]["mean100"]
    assert conditions["learned"]["value"] == status["loss"]["holdout"]
    assert conditions["learned"]["threshold"] == status["loss"]["baseline_context_free"]
    assert conditions["plateau"]["value"] == status["loss"]["evaluations_without_improvement"]
    assert judged["converged"] is False
    assert all(item["reason"] in judged["reason"] for item in judged["conditions"] if not item["ok"])
    json.dumps(status, allow_nan=False)


def test_without_the_gate_the_specifications_own_conditions_stand_alone(make_world: MakeWorld) -> None:
    judged = trained(make_world(patience_evaluations=10_000, learning_gate=False))["convergence"]
    assert [item["name"] for item in judged["conditions"]] == ["window", "phi", "stable"]
    assert judged["gate"] is False


def test_the_saved_status_is_the_live_one(make_world: MakeWorld) -> None:
    world = make_world(patience_evaluations=10_000, autostart=False)
    status = trained(world)
    world.zeus.shutdown(5)
    again = make_world(autostart=False).zeus.status(status["kernel_id"])
    for name in ("convergence", "loss", "phi", "cost", "buffer", "plasticity", "prequential"):
        assert again[name] == status[name], name


def test_a_kernel_that_never_trained_has_nothing_measured(make_world: MakeWorld) -> None:
    world = make_world()
    status = world.zeus.status(world.tiny(train=False))
    assert status["convergence"] is None
    assert status["cost"]["overhead_share"] is None
    assert status["links"]["events"].endswith("/events")


def test_a_report_of_an_earlier_version_is_still_shown(make_world: MakeWorld) -> None:
    world = make_world()
    kernel = world.tiny(train=False)
    old = {"phi_now": 0.1, "phi_mean": 0.1, "phi_std": 0.01, "phi_ok": False, "stable_ok": True, "loss_ok": True}
    old |= {"steps_in_window": 100, "converged": False, "reason": "Phi 0.100 now, needs more than 0.7"}
    world.zeus.rows.progress(kernel, 7, {"convergence": old, "progress": {"step": 7}})
    judged = world.zeus.status(kernel)["convergence"]
    assert (judged["phi_mean100"], judged["plateau"], judged["conditions"]) == (0.1, None, [])


def test_measuring_is_counted_against_training(make_world: MakeWorld) -> None:
    cost = trained(make_world(patience_evaluations=10_000))["cost"]
    assert 0 < cost["overhead_share"] < 1
    spent = cost["phi_seconds"] + cost["evaluation_seconds"] + cost["prequential_seconds"] + cost["checkpoint_seconds"]
    assert abs(cost["overhead_share"] - spent / (spent + cost["train_seconds"])) < 0.02
