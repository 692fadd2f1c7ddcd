"""The student's pass is what serving does: its logits equal those of the decode loop, token by token."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.workspace_training import WORKSPACE, captured
from workspace.capture_blob import Blob
from workspace.engine import Engine
from workspace.held_out import steered
from workspace.hooking import HookedModel
from workspace.models import LoadedModel
from workspace.modules import PARTS, Part, WorkspaceModules
from workspace.projector import ModuleShape
from workspace.run import WorkspaceRun
from workspace.sampling import SamplingParams
from workspace.steering import Steering
from workspace.steering_types import Toggles
from workspace.training_config import TrainingConfig
from workspace.training_data import Draw, assemble, fixed_rows
from workspace.training_forward import DeltaMaker, Student, slots_after
from workspace.workspace_config import ControllerConfig, WorkspaceConfig

#: A controller that never acts, so that slots and virtual tokens stay what the prompt made of them.
CALM = ControllerConfig(
    broadcast_entropy=20, broadcast_trend=20, retrieve_entropy=20, write_surprise=50, halt_on_repetition=False
)
CONFIG = WORKSPACE.model_copy(update={"thresholds": CALM, "kv_plan_bias": 3.0, "update_every": 1000})


def save_state(loaded: LoadedModel, path: Path, config: WorkspaceConfig, parts: Sequence[Part]) -> Path:
    """Weights that look trained, with virtual tokens and deltas of an effect."""
    hooked = HookedModel(loaded)
    modules = WorkspaceModules(ModuleShape.of(hooked), config, seed=2)
    hooked.remove()
    with torch.no_grad():
        modules.projector.gate.fill_(0.05)
        modules.projector.static_values.normal_(generator=torch.Generator().manual_seed(1))
        modules.projector.static_bias.fill_(-config.kv_plan_bias)
        modules.projector.key_norms.fill_(4.0)
        modules.projector.value_norms.fill_(2.0)
    modules.save(
        path,
        model_name=loaded.name,
        fingerprints=[loaded.fingerprint],
        step=1,
        parts=parts,
        data_digest="d" * 64,
        metrics={},
    )
    return path


@pytest.fixture
def steer(tiny: LoadedModel, tmp_path: Path) -> Iterator[Callable[..., Steering]]:
    """``steer(*parts)``: a steering with weights of these parts; all are closed at the end."""
    made: list[Steering] = []

    def make(*parts: Part, **changes: Any) -> Steering:
        config = CONFIG.model_copy(update=changes)
        path = save_state(tiny, tmp_path / f"state-{len(made)}", config, parts)
        made.append(Steering(tiny, config.model_copy(update={"state_path": path})))
        return made[-1]

    yield make
    for steering in made:
        steering.close()


class Listening(WorkspaceRun):
    """Keeps the logits that each answer token was sampled from."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.heard: list[torch.Tensor] = []

    def chosen(self, logits: torch.Tensor, token: int) -> bool:
        self.heard.append(logits.clone())
        return super().chosen(logits, token)


def served(steering: Steering, blob: Blob, toggles: Toggles, count: int) -> tuple[torch.Tensor, Blob]:
    """Logits [count, V] of the decode loop behind the blob's prompt, and the blob with the answer that came."""
    run = Listening(steering, None, None, "", toggles)
    engine = Engine(steering.loaded, max_active=1, max_waiting=0, threads=1)
    engine.start()
    try:
        prompt = blob.input_ids[: blob.prompt_tokens].tolist()
        params = SamplingParams(max_tokens=count + 1, temperature=0, ignore_eos=True)  # the last one is not heard
        finished = engine.submit(prompt, params, request_context=run).result()
    finally:
        engine.stop()
    assert finished.reason == "length"
    ids = torch.tensor([*prompt, *finished.token_ids[:-1]])
    return torch.stack(run.heard), dataclasses.replace(blob, input_ids=ids, statistics=None, teacher=None)


def recipe(*parts: str, **changes: Any) -> TrainingConfig:
    workspace = CONFIG if "static_tokens" in parts else CONFIG.model_copy(update={"static_tokens": 0})
    return TrainingConfig.model_validate(
        {"parts": parts, "workspace": workspace, "least_targets": 1, "keep": (4,), **changes}
    )


def taught(steering: Steering, blobs: list[Blob], draws: list[Draw], config: TrainingConfig) -> torch.Tensor:
    student, modules = Student(steering.hooked), steering.modules
    batch = assemble(blobs, draws, config)
    with torch.no_grad():
        slots = slots_after(modules, batch.updates)
        broadcast, static = steered(modules, slots, batch.births, steering.loaded.dtype, config.parts)
        deltas = DeltaMaker(modules, slots, config.delta_rounds) if "residual_delta" in config.parts else None
        return student.logits(batch, broadcast, static, deltas)


@pytest.fixture
def blobs(tiny: LoadedModel, tmp_path: Path) -> list[Blob]:
    capture = captured(tiny, tmp_path, CONFIG)
    chat = next(entry for entry in capture.entries if entry.kind == "chat")
    return [capture.read(entry) for entry in (capture.entries[0], chat)]


OFF = Toggles(virtual_kv=False, residual_delta=False, controller=False, memory=False)


def test_virtual_tokens_act_as_in_serving(steer: Callable[..., Steering], blobs: list[Blob]) -> None:
    steering = steer("virtual_kv")
    pairs = [served(steering, blob, Toggles(memory=False), 8) for blob in blobs]
    texts = [blob for _, blob in pairs]
    found = taught(steering, texts, fixed_rows(texts, None), recipe("virtual_kv"))
    for row, (heard, _) in enumerate(pairs):
        torch.testing.assert_close(found[row, :8], heard, atol=2e-4, rtol=2e-4)
    bare, _ = served(steering, blobs[0], OFF, 8)
    torch.testing.assert_close(found[0, 0], bare[0], atol=2e-4, rtol=2e-4)  # before their birth they do nothing
    assert not torch.allclose(found[0, 1], bare[1], atol=0.05)  # after the same first token


def test_static_tokens_act_on_the_prompt_as_well(steer: Callable[..., Steering], blobs: list[Blob]) -> None:
    """A bias of -64 silences the heuristic broadcast that serving makes without trained virtual tokens."""
    steering = steer("static_tokens", kv_plan_bias=-64.0)
    pairs = [served(steering, blob, Toggles(memory=False), 8) for blob in blobs]
    texts = [blob for _, blob in pairs]
    found = taught(steering, texts, fixed_rows(texts, None), recipe("static_tokens"))
    bare, _ = served(steering, blobs[0], OFF, 1)
    for row, (heard, _) in enumerate(pairs):
        torch.testing.assert_close(found[row, :8], heard, atol=2e-4, rtol=2e-4)
    assert not torch.allclose(found[0, 0], bare[0], atol=0.05)


def test_deltas_come_near_to_those_of_serving(steer: Callable[..., Steering], blobs: list[Blob]) -> None:
    """Each further round sees more of what the deltas before have changed."""
    steering = steer("residual_delta")
    toggles = Toggles(virtual_kv=False, memory=False)
    heard, text = served(steering, blobs[0], toggles, 8)
    errors = []
    for rounds in (1, 2, 4):
        config = recipe("residual_delta", delta_rounds=rounds)
        found = taught(steering, [text], fixed_rows([text], None), config)[0, :8]
        errors.append(float((found - heard).abs().max()))
    with torch.inference_mode():
        ids = text.input_ids[None]
        bare = steering.loaded.model(ids).logits[0, text.prompt_tokens - 1 : -1]
    effect = float((bare - heard).abs().max())
    assert effect > 0.1
    assert errors[0] < effect / 2
    assert errors[2] <= errors[1] <= errors[0]
    assert errors[2] < effect / 20


def test_a_student_that_kept_little_sees_only_that(steer: Callable[..., Steering], blobs: list[Blob]) -> None:
    """Without virtual tokens it is the stock model on the kept tokens; positions shift nothing."""
    steering = steer("virtual_kv")
    student = Student(steering.hooked)
    for keep in (1, 3, 9):
        batch = assemble(blobs, fixed_rows(blobs, keep), recipe("virtual_kv"))
        with torch.no_grad():
            found = student.logits(batch, {}, {})
        for row, blob in enumerate(blobs):
            kept = blob.input_ids[blob.prompt_tokens - keep :]
            with torch.inference_mode():
                expected = steering.loaded.model(kept[None]).logits[0, keep - 1 : -1]
            torch.testing.assert_close(found[row, : expected.shape[0]], expected, atol=2e-4, rtol=2e-4)


def test_gradients_reach_every_trained_part_and_nothing_else(steer: Callable[..., Steering], blobs: list[Blob]) -> None:
    steering = steer(*PARTS[:3])
    modules = steering.modules
    modules.requires_grad_(True)
    config = recipe(*PARTS[:3])
    batch = assemble(blobs, [Draw(blobs[0].prompt_tokens + 2, 4), Draw(blobs[1].prompt_tokens, 4)], config)
    slots = slots_after(modules, batch.updates)
    broadcast, static = steered(modules, slots, batch.births, torch.float32, config.parts)
    logits = Student(steering.hooked).logits(batch, broadcast, static, DeltaMaker(modules, slots))
    logits.float().log_softmax(-1)[..., 0].mean().backward()
    untouched = {name for name, p in modules.named_parameters() if p.grad is None or not p.grad.any()}
    assert untouched == {
        name for name, _ in modules.named_parameters() if name.startswith(("controller", "features.mem"))
    }
    assert all(parameter.grad is None for parameter in steering.loaded.model.parameters())


def test_deltas_begin_with_the_answer_however_the_prompt_is_cut(steer: Callable[..., Steering]) -> None:
    """The first answer token was sampled without one; each later pass carries one from its own position on."""
    steering = steer("residual_delta")
    carried: dict[int, list[int]] = {}

    class Watching(WorkspaceRun):
        def forward_kwargs(self, start: int, count: int) -> Mapping[str, Any]:
            extra = super().forward_kwargs(start, count)
            carried[start] = [int(delta.first) for delta in extra["workspace"].deltas.values()]
            return extra

    engine = Engine(steering.loaded, max_active=1, max_waiting=0, threads=1, prefill_chunk=16)
    engine.start()
    try:
        run = Watching(steering, None, None, "", Toggles(memory=False))
        params = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
        engine.submit(list(range(5, 45)), params, request_context=run).result()
    finally:
        engine.stop()
    layers = len(steering.layers)
    assert carried == {0: [], 16: [], 32: [], 40: [40] * layers, 41: [41] * layers}
