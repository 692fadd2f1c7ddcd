"""Cartridge training on tiny models: it learns, a kill changes nothing, and what is broken is refused by name."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from memory.cartridges.torch_format import read_torch_file
from memory.distillation import training_checkpoint
from memory.distillation.encoding import Encoder
from memory.distillation.errors import BadRow, CheckpointUnusable, TrainerDiskFull, TrainerDiverged, TrainerError
from memory.distillation.initialisers import text_prefix
from memory.distillation.rows import Row, RowMessage
from memory.distillation.student import Student
from memory.distillation.trainer import (
    FINAL_SHARE,
    Progress,
    TrainingResult,
    learning_share,
    train_cartridge,
)
from storage import files
from tests.support.tiny_cartridges import TRAINING, gold_rows, teacher_row, tiny_loaded
from workspace.errors import PrefixMismatch
from workspace.models import LoadedModel
from workspace.prefix import KVPrefix

MEMORY = [
    {"role": role, "content": content}
    for turn in ("fox", "dog", "owl")
    for role, content in (("user", f"{turn} sleeps"), ("assistant", f"Paris is the {turn}"))
]


class Killed(BaseException):
    """Stands for ``kill -9``: nothing catches it."""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return tiny_loaded(tmp_path_factory.mktemp("tiny"), num_hidden_layers=2)


@pytest.fixture(scope="module")
def init(loaded: LoadedModel) -> KVPrefix:
    return text_prefix(loaded, "The quick brown fox jumps over the lazy dog.", TRAINING.slots)


def run(loaded: LoadedModel, init: KVPrefix, folder: Path, **options: Any) -> TrainingResult:
    """Train on eight rows, with the same rows held out unless said otherwise."""
    named = {name: options.pop(name) for name in ("stop", "progress", "between") if name in options}
    rows = options.pop("rows_of", gold_rows())
    held_out = options.pop("held_out", rows[:4])
    config = options.pop("config", TRAINING).model_copy(update=options)
    return train_cartridge(loaded, rows, held_out, config, init, folder=folder, **named)


def log(folder: Path) -> list[dict[str, Any]]:
    """Logged lines without their times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def same(one: KVPrefix, other: KVPrefix) -> bool:
    return all(torch.equal(a, b) for a, b in zip((*one.keys, *one.values), (*other.keys, *other.values), strict=True))


def loss_of(loaded: LoadedModel, prefix: KVPrefix, rows: list[Row]) -> float:
    encoder = Encoder(loaded)
    examples = [encoder.example(row, name="x", top_k=20, max_tokens=64) for row in rows]
    found = Student(loaded).losses(list(zip(prefix.keys, prefix.values, strict=True)), examples)
    return sum(float(item.losses.sum()) for item in found) / sum(len(item.losses) for item in found)


# It learns.


@pytest.mark.parametrize("architecture", ["llama", "gpt_oss"])
def test_loss_falls_below_init_and_below_a_shuffled_control(architecture: str, tmp_path: Path) -> None:
    layers = {
        "num_hidden_layers": 2,
        **({"layer_types": ["sliding_attention", "full_attention"]} if architecture == "gpt_oss" else {}),
    }
    loaded = tiny_loaded(tmp_path / "model", architecture, **layers)
    init = text_prefix(loaded, "The quick brown fox jumps over the lazy dog.", 16)
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    rows, options = gold_rows(), {"max_steps": 40, "learning_rate": 0.2, "held_out": []}
    true = run(loaded, init, tmp_path / "true", rows_of=rows, **options)
    control = run(loaded, init, tmp_path / "control", rows_of=gold_rows(shuffled=True), **options)
    start, end, shuffled = (loss_of(loaded, prefix, rows) for prefix in (init, true.prefix, control.prefix))
    assert end < 0.7 * start
    assert end < shuffled - 1
    for layer in range(len(init.keys)):  # slot 0 is what it was
        assert torch.equal(true.prefix.keys[layer][:, :, :1], init.keys[layer][:, :, :1])
        assert torch.equal(true.prefix.values[layer][:, :, :1], init.values[layer][:, :, :1])
        assert not torch.equal(true.prefix.values[layer][:, :, 1:], init.values[layer][:, :, 1:])
    after = loaded.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert not loaded.model.training


def test_a_relative_step_moves_each_tensor_by_a_share_of_its_size(
    loaded: LoadedModel, init: KVPrefix, tmp_path: Path
) -> None:
    """Adam's first step moves every number by the rate, or by nothing where there is no gradient."""
    options: dict[str, Any] = {"max_steps": 1, "warmup_steps": 0, "held_out": [], "learning_rate": 1.0}
    for how in ("relative", "absolute"):
        trained = run(loaded, init, tmp_path / how, step_size=how, **options).prefix
        for before, after in zip((*init.keys, *init.values), (*trained.keys, *trained.values), strict=True):
            before, after = before[:, :, 1:].float(), after[:, :, 1:].float()
            size = float(before.square().mean().sqrt()) if how == "relative" else 1.0
            assert float((after - before).abs().max()) == pytest.approx(FINAL_SHARE * size, rel=0.01)


def test_it_moves_a_memory_into_the_prefix(loaded: LoadedModel, tmp_path: Path) -> None:
    """Distillation: questions are answered as after a prompt with the memory, which the student never sees."""
    questions = ["fox", "dog", "owl", "fox sleeps", "dog sleeps", "who", "hen", "Bern"]
    rows = [teacher_row(loaded, MEMORY, question) for question in questions]
    init = text_prefix(loaded, MEMORY, 16)
    result = run(loaded, init, tmp_path, rows_of=rows, held_out=rows[:2], max_steps=40, top_k=8)
    metrics = result.metrics
    assert metrics["best_held_out"] < 0.5 * metrics["first_held_out"]
    assert loss_of(loaded, result.prefix, rows) < 0.5 * loss_of(loaded, init, rows)


def test_other_loss(loaded: LoadedModel, init: KVPrefix, tmp_path: Path) -> None:
    rows = [teacher_row(loaded, MEMORY, question) for question in ("fox", "dog", "owl", "hen")]
    result = run(loaded, init, tmp_path, rows_of=rows, held_out=[], loss="upstream", max_steps=20)
    assert result.metrics["loss"] < result.metrics["first_loss"]


def test_result_is_the_best_on_held_out_rows_and_training_stops_early(loaded: LoadedModel, tmp_path: Path) -> None:
    """Held-out rows that contradict what is trained get worse at once."""
    rows = gold_rows()
    against = [Row((row.messages[0], RowMessage("assistant", "xyz"))) for row in rows[:4]]
    trained = run(
        loaded, text_prefix(loaded, "a", 16), tmp_path / "a", max_steps=30, held_out=[], early_stop_patience=0
    )
    start = trained.prefix
    result = run(
        loaded, start, tmp_path / "b", held_out=against, evaluate_every=1, early_stop_patience=3, max_steps=60,
        learning_rate=0.3, warmup_steps=0,
    )  # fmt: skip
    assert result.reason == "early stop"
    assert result.step < 60
    evaluations = {line["step"]: line["held_out"] for line in log(tmp_path / "b") if "held_out" in line}
    assert result.best_step == min(evaluations, key=lambda step: (evaluations[step], step))
    assert result.best_step == result.step - 3
    assert loss_of(loaded, result.prefix, against) == pytest.approx(min(evaluations.values()), rel=1e-4)


def test_schedule() -> None:
    shares = [learning_share(step, 20, 4) for step in range(1, 21)]
    assert shares[:4] == [0.25, 0.5, 0.75, 1.0]
    assert shares[4:] == sorted(shares[4:], reverse=True)
    assert shares[-1] == pytest.approx(FINAL_SHARE)
    assert learning_share(1, 1, 10) == pytest.approx(FINAL_SHARE)  # epochs may end before the warm-up


def test_rows_of_weight_zero_do_not_count(loaded: LoadedModel, init: KVPrefix, tmp_path: Path) -> None:
    rows = gold_rows(4)
    silent = [Row((RowMessage("user", "zzz"), RowMessage("assistant", "qqq")), metadata={"weight": 0.0})]
    one = run(loaded, init, tmp_path / "one", rows_of=rows, held_out=[])
    two = run(loaded, init, tmp_path / "two", rows_of=rows + silent, held_out=[])
    assert same(one.prefix, two.prefix)
    with pytest.raises(TrainerError, match="weight above 0"):
        run(loaded, init, tmp_path / "none", rows_of=silent, held_out=[])


# It goes on.


@pytest.fixture(scope="module")
def whole(
    loaded: LoadedModel, init: KVPrefix, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainingResult, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("whole")
    return run(loaded, init, folder), log(folder)


@pytest.mark.parametrize("after", [1, 5, 8])
def test_a_killed_run_goes_on_with_the_same_losses(
    after: int, loaded: LoadedModel, init: KVPrefix, tmp_path: Path, whole: tuple[TrainingResult, list[dict[str, Any]]]
) -> None:
    def kill(progress: Progress) -> None:
        if progress.step == after:
            raise Killed

    with pytest.raises(Killed):
        run(loaded, init, tmp_path, progress=kill)
    result = run(loaded, init, tmp_path)
    assert log(tmp_path) == whole[1]
    assert same(result.prefix, whole[0].prefix)
    assert result.best_step == whole[0].best_step


def test_a_kill_while_a_checkpoint_is_written(
    loaded: LoadedModel,
    init: KVPrefix,
    tmp_path: Path,
    whole: tuple[TrainingResult, list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write = training_checkpoint.write_torch_file

    def killed(path: Path, *arguments: Any) -> None:
        if path.name == "cache-step8.pt":
            path.with_name(".partial-cache-step8.pt-00").write_bytes(b"half")
            raise Killed
        write(path, *arguments)

    monkeypatch.setattr(training_checkpoint, "write_torch_file", killed)
    with pytest.raises(Killed):
        run(loaded, init, tmp_path)
    monkeypatch.undo()
    assert os.readlink(tmp_path / "cache_last.pt") == "cache-step4.pt"
    assert same(run(loaded, init, tmp_path).prefix, whole[0].prefix)
    assert log(tmp_path) == whole[1]
    assert not list(tmp_path.glob(".partial-*"))


def test_stop_ends_within_a_layer_and_is_gone_on_from(
    loaded: LoadedModel, init: KVPrefix, tmp_path: Path, whole: tuple[TrainingResult, list[dict[str, Any]]]
) -> None:
    stop, calls = threading.Event(), 0

    def between() -> None:
        nonlocal calls
        calls += 1
        if calls in (3, 50, 80):  # within an evaluation, a forward and a backward pass
            stop.set()

    for _ in range(3):
        result = run(loaded, init, tmp_path, stop=stop, between=between)
        assert result.reason == "stopped"
        assert not result.finished
        assert result.file is None
        stop.clear()
    assert run(loaded, init, tmp_path, between=between).finished
    assert log(tmp_path) == whole[1]


def test_stop_before_the_first_step(loaded: LoadedModel, init: KVPrefix, tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    result = run(loaded, init, tmp_path, stop=stop)
    assert (result.step, result.finished) == (0, False)
    assert same(result.prefix, init)


def test_a_finished_run_is_only_returned_again(
    loaded: LoadedModel, init: KVPrefix, tmp_path: Path, whole: tuple[TrainingResult, list[dict[str, Any]]]
) -> None:
    steps: list[int] = []
    run(loaded, init, tmp_path)
    again = run(loaded, init, tmp_path, progress=lambda progress: steps.append(progress.step))
    assert steps == []
    assert same(again.prefix, whole[0].prefix)
    assert log(tmp_path) == whole[1]


def test_time_budget_ends_it_with_what_it_has(loaded: LoadedModel, init: KVPrefix, tmp_path: Path) -> None:
    result = run(loaded, init, tmp_path, time_budget_seconds=1e-6)
    assert (result.reason, result.step, result.finished) == ("time budget", 1, True)
    assert {line["step"] for line in log(tmp_path) if "held_out" in line} == {0, 1}
    more = run(loaded, init, tmp_path)  # the budget may be raised
    assert more.reason == "steps"


def test_waiting_for_others_is_not_in_the_budget(loaded: LoadedModel, init: KVPrefix, tmp_path: Path) -> None:
    """A clock that only waiting moves: a day of it, and the training still ends after its steps."""

    class Clock:
        def __init__(self) -> None:
            self.now = 0.0

        def __call__(self) -> float:
            return self.now

    clock = Clock()

    def between() -> None:
        clock.now += 3600.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("memory.distillation.trainer.time.perf_counter", clock)
        result = run(loaded, init, tmp_path, time_budget_seconds=60, between=between)
    assert result.reason == "steps"
    assert clock.now > 86_400


def test_another_run_in_the_same_folder_is_refused(loaded: LoadedModel, init: KVPrefix, tmp_path: Path) -> None:
    run(loaded, init, tmp_path / "a", max_steps=4)
    for changes in (
        {"learning_rate": 0.5},
        {"rows_of": gold_rows(shuffled=True)},
        {"held_out": gold_rows(1)},
    ):
        with pytest.raises(CheckpointUnusable, match="is of another run"):
            run(loaded, init, tmp_path / "a", **{"max_steps": 4, **changes})
    other = text_prefix(loaded, "another text", 16)
    with pytest.raises(CheckpointUnusable, match="init was"):
        run(loaded, other, tmp_path / "a", max_steps=4)


def test_damaged_checkpoints(loaded: LoadedModel, init: KVPrefix, tmp_path: Path) -> None:
    result = run(loaded, init, tmp_path)
    newest, older = sorted((tmp_path / "state").iterdir(), reverse=True)
    (newest / "state.safetensors").write_bytes(b"x")
    assert same(run(loaded, init, tmp_path).prefix, result.prefix)  # from the one before
    for path in (newest, older):
        (path / "state.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointUnusable, match="no checkpoint can be read"):
        run(loaded, init, tmp_path)


# Files.


def test_files_of_a_run(loaded: LoadedModel, init: KVPrefix, tmp_path: Path) -> None:
    result = run(loaded, init, tmp_path, max_steps=12, save_every=2, keep_last=2, held_out=[])
    assert sorted(path.name for path in tmp_path.glob("cache-step*.pt")) == ["cache-step10.pt", "cache-step12.pt"]
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["step-000010", "step-000012"]
    assert os.readlink(tmp_path / "cache_last.pt") == "cache-step12.pt"
    assert result.file == tmp_path / "cache-step12.pt"
    keys, values, frozen = read_torch_file(tmp_path / "cache_last.pt")
    assert frozen == 1
    assert same(KVPrefix(tuple(keys), tuple(values)), result.prefix)


def test_the_link_ends_at_the_chosen_one(loaded: LoadedModel, init: KVPrefix, tmp_path: Path) -> None:
    against = [Row((row.messages[0], RowMessage("assistant", "xyz"))) for row in gold_rows(4)]
    result = run(loaded, init, tmp_path, held_out=against, evaluate_every=2, save_every=2, learning_rate=0.3)
    assert os.readlink(tmp_path / "cache_last.pt") == f"cache-step{result.best_step}.pt"
    keys, values, _ = read_torch_file(tmp_path / "cache_last.pt")
    assert same(KVPrefix(tuple(keys), tuple(values)), result.prefix)


def test_progress_and_log(loaded: LoadedModel, init: KVPrefix, tmp_path: Path) -> None:
    heard: list[Progress] = []
    run(loaded, init, tmp_path, progress=heard.append)
    assert [item.step for item in heard] == list(range(1, 13))
    assert all(item.steps == 12 and item.rows_per_second > 0 and item.eta_seconds >= 0 for item in heard)
    assert heard[-1].eta_seconds == 0
    assert heard[0].held_out is not None
    steps = [line for line in log(tmp_path) if "loss" in line and "ended" not in line]
    assert [line["loss"] for line in steps] == [item.loss for item in heard]
    assert log(tmp_path)[-1]["ended"] == "steps"


def test_two_runs_in_one_folder(loaded: LoadedModel, init: KVPrefix, tmp_path: Path) -> None:
    lock = files.DataDirLock(tmp_path)
    lock.acquire()
    try:
        with pytest.raises(TrainerError, match="is being trained in by process"):
            run(loaded, init, tmp_path)
    finally:
        lock.release()


def test_a_full_disk_is_said_and_survived(
    loaded: LoadedModel,
    init: KVPrefix,
    tmp_path: Path,
    whole: tuple[TrainingResult, list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write = training_checkpoint.write_torch_file

    def full(path: Path, *arguments: Any) -> None:
        if path.name == "cache-step8.pt":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, *arguments)

    monkeypatch.setattr(training_checkpoint, "write_torch_file", full)
    with pytest.raises(TrainerDiskFull, match="goes on from its last checkpoint"):
        run(loaded, init, tmp_path)
    monkeypatch.undo()
    assert same(run(loaded, init, tmp_path).prefix, whole[0].prefix)


# What is broken.


def test_nan_names_the_rows_and_keeps_the_last_good_checkpoint(
    loaded: LoadedModel, init: KVPrefix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from memory.distillation import student

    real, steps = student.target_losses, 0

    def broken(logits: torch.Tensor, top_ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        nonlocal steps
        found = real(logits, top_ids, *rest)
        if torch.is_grad_enabled():
            steps += 1
            if steps == 7:
                found = found * torch.tensor([float("nan"), *[1.0] * (len(found) - 1)])
        return found

    monkeypatch.setattr(student, "target_losses", broken)
    with pytest.raises(
        TrainerDiverged, match=r"step 7: loss nan.*rows at fault: train row \d .content_key \w+\)\. "
    ) as error:
        run(loaded, init, tmp_path)
    assert str(error.value).count("content_key") == 1
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step-000004"]
    keys, _, _ = read_torch_file(tmp_path / "cache_last.pt")
    assert all(tensor.isfinite().all() for tensor in keys)
    monkeypatch.undo()
    assert run(loaded, init, tmp_path).finished


def test_a_bad_row_is_named(loaded: LoadedModel, init: KVPrefix, tmp_path: Path) -> None:
    bad = Row((RowMessage("user", "a"), RowMessage("assistant", "x", token_ids=(99_999,))))
    with pytest.raises(BadRow, match="train row 8: it has tokens outside the vocabulary"):
        run(loaded, init, tmp_path, rows_of=[*gold_rows(), bad])


def test_a_prefix_of_another_model_is_refused(loaded: LoadedModel, init: KVPrefix, tmp_path: Path) -> None:
    other = KVPrefix(init.keys[:1], init.values[:1])
    with pytest.raises(PrefixMismatch, match="does not fit the model tiny-llama"):
        run(loaded, other, tmp_path)
    with pytest.raises(TrainerError, match=r"16 slots, but training.slots is 32"):
        run(loaded, init, tmp_path, slots=32)


def test_rows_must_fit_into_the_context(tmp_path: Path) -> None:
    import dataclasses

    loaded = dataclasses.replace(tiny_loaded(tmp_path / "model"), context_length=40)
    with pytest.raises(TrainerError, match="exceed the context of tiny-llama"):
        run(loaded, text_prefix(loaded, "a", 16), tmp_path / "run")


def test_threads_are_those_asked_for_and_given_back(loaded: LoadedModel, init: KVPrefix, tmp_path: Path) -> None:
    before, seen = torch.get_num_threads(), set()
    run(loaded, init, tmp_path, threads=2, max_steps=3, progress=lambda _p: seen.add(torch.get_num_threads()))
    assert seen == {2}
    assert torch.get_num_threads() == before


def test_the_folder_can_be_thrown_away(loaded: LoadedModel, init: KVPrefix, tmp_path: Path) -> None:
    first = run(loaded, init, tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    assert same(run(loaded, init, tmp_path / "run").prefix, first.prefix)
