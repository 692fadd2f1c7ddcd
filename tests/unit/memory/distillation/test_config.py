"""The configuration: presets load, mistakes are named with what was meant, and the plan's own spelling works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from memory.distillation.config import (
    CacheInit,
    DistillConfig,
    RedactionConfig,
    TrainingConfig,
    config_paths,
    load_distill_config,
    make_distill_config,
    presets,
)
from memory.distillation.errors import DistillConfigError
from memory.distillation.triggers import When


@pytest.mark.parametrize("name", presets())
def test_presets_load_and_say_something(name: str) -> None:
    assert load_distill_config(name) != DistillConfig()


def test_the_documented_presets_are_there() -> None:
    assert {"feedback_labels", "gpt_oss_gpu", "quick", "smollm2_cpu"} <= set(presets())


def test_a_file_then_overrides(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("training: {slots: 32, rows: 4}\ndata: {self_study: {rows: 3}}\n")
    config = load_distill_config(path, {"training": {"rows": 8}})
    assert (config.training.slots, config.training.rows, config.data.self_study.rows) == (32, 8, 3)
    (tmp_path / "empty.yaml").write_text("")
    assert load_distill_config(tmp_path / "empty.yaml") == load_distill_config() == DistillConfig()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"trainin": {}}, r"trainin: unknown key; did you mean training\?"),
        (
            {"training": {"learning_rat": 1}},
            r"training.learning_rat: unknown key; did you mean training.learning_rate\?",
        ),
        ({"slots": 64}, r"slots: unknown key; did you mean training.slots\?"),
        ({"zzzz": 1}, "zzzz: unknown key; docs/distillation.md"),
        ({"training": {"slots": 40}}, "training.slots: .*multiple of 16.*got 40"),
        ({"training": {"slots": 16, "frozen": 16}}, "frozen .16. must be below slots"),
        ({"training": {"warmup_steps": 20, "max_steps": 10}}, "warmup_steps"),
        ({"training": {"learning_rate": float("nan")}}, "learning_rate"),
        ({"strategy": {"name": "fifo"}}, "strategy.name"),
        ({"strategy": {"mixture": {"mixed": 1}}}, "cannot contain itself"),
        ({"strategy": {"mixture": {}}}, "at least one"),
        ({"data": {"replay": False}}, "nothing would become a row"),
        ({"data": {"redact": {"kinds": ["emails"]}}}, "data.redact.kinds.0"),
        ({"data": {"redact": {"patterns": {"x": "("}}}}, "no regular expression"),
        ({"data": {"redact": {"patterns": {"x": "a*"}}}}, "matches the empty text"),
        ({"data": {"redact": {"patterns": {"X y": "a"}}}}, "small letters"),
        ({"cache_init": {"type": "random", "text": "x"}}, "text is given"),
        ({"cache_init": {"cartridge": "x_v0001"}}, "cartridge is given"),
        ({"hf_repo_id": "only-a-name"}, "owner/name"),
        ({"lm_config": {}, "teacher": {}}, "same section"),
        ({"distill": {"wen": {}}}, "distill: unknown key"),
    ],
)
def test_mistakes_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(DistillConfigError, match=message):
        make_distill_config(values, "mine.yaml")


def test_every_problem_has_its_line() -> None:
    with pytest.raises(DistillConfigError) as caught:
        make_distill_config({"seed": -1, "top_mass": 2, "gate": {"margn": 1}}, "mine.yaml")
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert all(line.startswith("mine.yaml: ") for line in lines)


def test_files_that_are_none_are_named(tmp_path: Path) -> None:
    with pytest.raises(DistillConfigError, match=r"one of: .*feedback_labels"):
        load_distill_config("nothing")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(DistillConfigError, match="expected a mapping"):
        load_distill_config(tmp_path / "list.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1\n")
    with pytest.raises(DistillConfigError, match="cannot be read"):
        load_distill_config(tmp_path / "bad.yaml")


def test_the_plans_own_spelling_is_understood() -> None:
    config = make_distill_config(
        {
            "checkpoint_dir": "runs/1",
            "strategy": {"name": "rolling_window", "window_k": 8, "exclude_current": True, "failure_focus": True},
            "lm_config": {"model": "toka:gpt-oss"},
            "top_logprobs": 20,
            "system_prompt": "s",
            "output_path": "out",
            "hf_repo_id": "me/data",
            "distill": {
                "when": {"max_history_tokens": 1000, "every_episodes": 5, "min_improvement": 0.1},
                "cache_init": {"type": "random"},
            },
        }
    )
    assert config.teacher.model == "toka:gpt-oss"
    assert config.cache_init == CacheInit(type="random")
    assert config.schedule.enabled
    assert config.schedule.thresholds() == When(max_history_tokens=1000, every_episodes=5, min_improvement=0.1)


def test_hours_become_seconds() -> None:
    config = make_distill_config({"schedule": {"when": {"every_hours": 0.5, "plateau": 4}, "cooldown_seconds": 1}})
    when = config.schedule.thresholds()
    assert (when.every_seconds, when.plateau_window, when.cooldown_seconds) == (1800.0, 4, 1.0)
    assert not config.schedule.enabled


def test_a_configuration_survives_json() -> None:
    config = load_distill_config("gpt_oss_gpu", {"output_path": "x"})
    assert make_distill_config(config.model_dump(mode="json")) == config


def test_every_key_is_described() -> None:
    paths = dict((path, description) for path, description, _ in config_paths())
    assert all(paths.values()), [path for path, description in paths.items() if not description]
    assert {"training.slots", "data.self_study.rows", "schedule.when.plateau"} <= set(paths)


def test_sections_are_usable_alone() -> None:
    assert TrainingConfig(slots=32).frozen == 1
    assert RedactionConfig().enabled
