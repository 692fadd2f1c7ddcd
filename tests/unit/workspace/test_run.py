"""The workspace in generations of tiny models: what is carried, decided, kept and left alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from workspace.engine import Engine
from workspace.generation import Finished, TokenChunk
from workspace.models import LoadedModel
from workspace.recall import Recollection
from workspace.run import WorkspaceRun
from workspace.sampling import SamplingParams
from workspace.steering import Steering
from workspace.steering_types import Toggles
from workspace.workspace_config import ControllerConfig, WorkspaceConfig

MakeEngine = Callable[..., Engine]
MakeSteering = Callable[..., Steering]
#: Acts as often as it can: every drive is always above its threshold.
EAGER = ControllerConfig(
    broadcast_entropy=0.01, retrieve_entropy=0.01, write_surprise=0.01, broadcast_gap=2, retrieve_gap=2, write_gap=2,
    release=0.999, halt_on_repetition=False,
)  # fmt: skip


@pytest.fixture
def make_steering() -> Iterator[MakeSteering]:
    made: list[Steering] = []

    def make(loaded: LoadedModel, recall: Any = None, **config: Any) -> Steering:
        persistence = {name: config.pop(name) for name in ("load", "save") if name in config}
        steering = Steering(loaded, WorkspaceConfig(**config), recall=recall, **persistence)
        made.append(steering)
        return steering

    yield make
    for steering in made:
        steering.store.check_invariants()
        steering.close()


def prompt_of(length: int) -> list[int]:
    return torch.randint(2, 300, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def answer(engine: Engine, run: WorkspaceRun | None, length: int = 24, tokens: int = 24) -> Finished:
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    finished = engine.submit(prompt_of(length), params, request_context=run).result(60)
    assert finished.reason in ("length", "stop"), finished.error
    return finished


def logprobs(engine: Engine, run: WorkspaceRun | None) -> torch.Tensor:
    """Of the tokens of a greedy answer, by the model as it served them."""
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, logprobs=True)
    generation = engine.submit(prompt_of(24), params, request_context=run)
    chunks = [event for event in generation.stream() if isinstance(event, TokenChunk)]
    return torch.tensor([chunk.logprob for chunk in chunks if chunk.logprob is not None])


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt_oss"])
def test_everything_off_is_the_stock_model(
    architecture: str, tiny_models: dict[str, LoadedModel], make_engine: MakeEngine, make_steering: MakeSteering
) -> None:
    loaded = tiny_models[architecture]
    engine = make_engine(loaded)
    stock = answer(engine, None)
    steering = make_steering(loaded)
    off = Toggles(virtual_kv=False, residual_delta=False, controller=False, memory=False)
    run = steering.run(session="s", toggles=off)
    assert answer(engine, run).token_ids == stock.token_ids
    assert run.report.virtual_tokens == 0
    assert answer(engine, None).token_ids == stock.token_ids, "hooks without a context"


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt_oss"])
def test_a_bias_of_minus_64_is_off_and_one_of_4_is_not(
    architecture: str, tiny_models: dict[str, LoadedModel], make_engine: MakeEngine, make_steering: MakeSteering
) -> None:
    loaded = tiny_models[architecture]
    engine = make_engine(loaded)
    stock = logprobs(engine, None)
    quiet = make_steering(loaded, kv_plan_bias=-64.0)  # scores of a random model are large
    run = quiet.run()
    torch.testing.assert_close(logprobs(engine, run), stock, atol=1e-4, rtol=0)
    assert run.report.virtual_tokens == 16 * len(quiet.layers)
    quiet.hooked.remove()
    loud = make_steering(loaded, kv_plan_bias=4.0)
    assert float((logprobs(engine, loud.run()) - stock).abs().max()) > 0.01


def test_the_controller_acts_and_the_report_says_so(
    tiny: LoadedModel, make_engine: MakeEngine, make_steering: MakeSteering
) -> None:
    steering = make_steering(tiny, thresholds=EAGER)
    run = steering.run(toggles=Toggles(trace=True, memory=False))
    answer(make_engine(tiny), run, tokens=20)
    report = run.report
    assert report.trace is not None
    assert len(report.trace) == 20 - 1, "the last token ends the answer: nothing is decided after it"
    assert report.writes == sum(entry["write"] for entry in report.trace) > 0
    assert report.broadcasts == 1 + sum(entry["broadcast"] for entry in report.trace) > 1
    assert report.slot_updates >= report.writes
    assert set(report.norms) == set(steering.layers)
    assert report.to_json()["toggles"] == {
        "virtual_kv": True,
        "residual_delta": True,
        "controller": True,
        "memory": False,
    }


def test_a_repeating_answer_is_halted(
    tiny_models: dict[str, LoadedModel], make_engine: MakeEngine, make_steering: MakeSteering
) -> None:
    """The tiny Gemma falls into a cycle by itself; the stock answer goes on to its limit."""
    loaded = tiny_models["gemma3"]
    engine = make_engine(loaded)
    stock = answer(engine, None, tokens=200)
    assert len(stock.token_ids) == 200
    run = make_steering(loaded, thresholds=ControllerConfig(halt_run=32, longest_cycle=32)).run()
    halted = answer(engine, run, tokens=200)
    assert halted.reason == "stop"
    assert 32 <= len(halted.token_ids) < 200
    assert run.report.halted
    assert halted.token_ids == stock.token_ids[: len(halted.token_ids)]


def test_a_session_keeps_one_segment_per_request_and_brings_it_along(
    tiny: LoadedModel, make_engine: MakeEngine, make_steering: MakeSteering
) -> None:
    steering, engine = make_steering(tiny), make_engine(tiny)
    first = steering.run(session="a", question="who?")
    answer(engine, first)
    assert (first.report.session_segments, first.report.saved_segment is not None) == (0, True)
    second = steering.run(session="a")
    answer(engine, second)
    assert second.report.session_segments == 1
    assert second.report.virtual_tokens > first.report.virtual_tokens
    other = steering.run(session="b")
    answer(engine, other)
    assert other.report.session_segments == 0
    segments = steering.store.segments("a")
    assert [segment.meta["question"] for segment in segments] == ["who?", ""]
    assert all(segment.born == 0 for segment in segments)


def test_a_request_without_memory_leaves_the_session_alone(
    tiny: LoadedModel, make_engine: MakeEngine, make_steering: MakeSteering
) -> None:
    steering, engine = make_steering(tiny), make_engine(tiny)
    answer(engine, steering.run(session="a"))
    run = steering.run(session="a", toggles=Toggles(memory=False))
    answer(engine, run)
    assert (run.report.session_segments, run.report.saved_segment) == (0, None)
    assert len(steering.store.segments("a")) == 1


def test_what_a_session_keeps_survives_a_restart(
    tiny: LoadedModel, make_engine: MakeEngine, make_steering: MakeSteering
) -> None:
    disk: dict[str, bytes] = {}

    def save(session: str, blob: bytes | None) -> None:
        if blob is None:
            disk.pop(session, None)
        else:
            disk[session] = blob

    steering, engine = make_steering(tiny, load=disk.get, save=save), make_engine(tiny)
    run = steering.run(session="a")
    answer(engine, run)
    run.save()
    assert list(disk) == ["a"]
    before = steering.store.view("a")
    steering.hooked.remove()
    again = make_steering(tiny, load=disk.get, save=save)
    after = again.store.view("a")
    assert all(torch.equal(before[layer].keys, after[layer].keys) for layer in before)
    again.forget("a")
    assert disk == {}


class _Memory:
    """Remembers one thing, whatever is asked."""

    def __init__(self, text: str, fail: bool = False):
        self.text, self.fail = text, fail
        self.asked: list[str] = []

    def __call__(self, query: str, *, session: str | None, domain: str | None, limit: int) -> Sequence[Recollection]:
        self.asked.append(query)
        if self.fail:
            raise RuntimeError("the disk is gone")
        return [Recollection(self.text, 1.0, "experience 1", torch.ones(8))]


def test_the_memory_is_asked_with_question_and_answer_and_reaches_slots_and_attention(
    tiny: LoadedModel, make_engine: MakeEngine, make_steering: MakeSteering
) -> None:
    memory = _Memory("the fox is lazy and the dog is quick")
    steering = make_steering(tiny, memory, thresholds=EAGER, embedding_width=8)
    engine = make_engine(tiny)
    stock = logprobs(engine, None)
    run = steering.run(question="who is lazy?", domain="dogs")
    told = logprobs(engine, run)
    assert memory.asked[0].startswith("who is lazy?\n")
    assert len(memory.asked[0]) > len("who is lazy?\n")
    assert run.report.retrievals >= 1
    assert run.report.recollections == ["experience 1"], "what came back once is not taken in twice"
    assert float((told - stock).abs().max()) > 0.01, "retrieved keys and values stand at full weight"


def test_a_memory_that_fails_has_nothing_to_say(
    tiny: LoadedModel, make_engine: MakeEngine, make_steering: MakeSteering
) -> None:
    steering = make_steering(tiny, _Memory("", fail=True), thresholds=EAGER)
    run = steering.run(question="?")
    assert run.recollect() == ()
    answer(make_engine(tiny), run)
    assert run.report.recollections == []
    assert run.report.retrievals >= 1


@pytest.mark.parametrize("architecture", ["llama", "gpt_oss"])
def test_a_capped_cache_stays_capped_in_the_engine(
    architecture: str, tiny_models: dict[str, LoadedModel], make_engine: MakeEngine, make_steering: MakeSteering
) -> None:
    loaded = tiny_models[architecture]
    steering = make_steering(loaded, chunk_size=48, virtual_tokens=8, slots=8)
    run = steering.run(toggles=Toggles(memory=False))
    finished = answer(make_engine(loaded), run, length=260, tokens=150)
    assert len(finished.token_ids) == 150
    settings = steering.window_settings
    assert run.report.evicted_tokens + run.report.cache_tokens == 260 + 150 - 1
    assert run.report.cache_tokens < settings.chunk_size + settings.block
    assert run.report.evicted_tokens >= 2 * settings.block


def test_generations_side_by_side_do_not_mix(
    tiny: LoadedModel, make_engine: MakeEngine, make_steering: MakeSteering
) -> None:
    steering, engine = make_steering(tiny, kv_plan_bias=1.0), make_engine(tiny)
    alone = [answer(engine, steering.run(), length=length).token_ids for length in (10, 17)]
    stock = answer(engine, None, length=10).token_ids
    params = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
    runs = [steering.run(), steering.run(), None]
    generations = [
        engine.submit(prompt_of(length), params, request_context=run)
        for run, length in zip(runs, (10, 17, 10), strict=True)
    ]
    assert [generation.result(60).token_ids for generation in generations] == [*alone, stock]
