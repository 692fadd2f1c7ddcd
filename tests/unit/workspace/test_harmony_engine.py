"""A gpt-oss with the true vocabulary through the engine: Harmony prompt in, channels out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.support.harmony import CALL, RETURN, harmony_encoding, harmony_tokenizer
from tests.support.tiny_gpt_oss import END_OF_TEXT, build_gpt_oss, scripted
from workspace.channels import ToolCall
from workspace.engine import Engine
from workspace.generation import Finished, Generation, TokenChunk
from workspace.models import LoadedModel, adopt_model
from workspace.sampling import SamplingParams

MakeEngine = Callable[..., Engine]
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is the capital of France?"}]
THOUGHT = "<|channel|>analysis<|message|>Easy: Paris.<|end|><|start|>assistant"


@pytest.fixture(scope="module")
def gpt_oss() -> LoadedModel:
    return adopt_model("tiny-gpt-oss", build_gpt_oss(), harmony_tokenizer())


def encode(text: str) -> list[int]:
    return list(harmony_encoding().encode(text, allowed_special="all"))


def greedy(**more: object) -> SamplingParams:
    return SamplingParams(temperature=0, **{"max_tokens": 200, **more})  # type: ignore[arg-type]


def run(engine: Engine, answer: str, **more: object) -> tuple[list[TokenChunk], Finished]:
    """The events of a generation that says ``answer``; checks that they agree with its result."""
    engine.warm_up()  # what an engine tries out at its first passes is not scripted
    with scripted(engine.loaded.model, encode(answer)):
        generation = engine.submit(MESSAGES, greedy(**more))
        events = list(generation.stream())
    return check(generation, events)


def check(generation: Generation, events: list[object]) -> tuple[list[TokenChunk], Finished]:
    chunks = [event for event in events if isinstance(event, TokenChunk)]
    finished = events[-1]
    assert isinstance(finished, Finished)
    assert "".join(chunk.text for chunk in chunks) == finished.text
    assert "".join(chunk.reasoning for chunk in chunks) == finished.reasoning
    arguments = ["" for _ in finished.tool_calls]
    for delta in (delta for chunk in chunks for delta in chunk.tool_calls):
        arguments[delta.index] += delta.arguments
    assert arguments == [call.arguments for call in finished.tool_calls]
    assert finished.usage.completion_tokens == len(finished.token_ids)
    generation.check_invariants()
    return chunks, finished


def test_ends_are_those_of_the_format(gpt_oss: LoadedModel) -> None:
    assert gpt_oss.eos_ids == {RETURN, END_OF_TEXT, CALL}
    assert gpt_oss.vocabulary_size == 201_088


def test_an_answer_of_nonsense_equals_generate_and_leaks_nothing(gpt_oss: LoadedModel, make_engine: MakeEngine) -> None:
    engine = make_engine(gpt_oss)
    assert engine.warm_up() > 0
    prompt = engine.render(MESSAGES, reasoning_effort="low")
    assert harmony_encoding().decode(prompt).endswith("What is the capital of France?<|end|><|start|>assistant")
    generation = engine.submit(MESSAGES, greedy(max_tokens=24), reasoning_effort="low")
    _, finished = check(generation, list(generation.stream()))
    assert generation.prompt_ids == tuple(prompt)
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        wanted = gpt_oss.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
    assert list(finished.token_ids) == wanted[0, len(prompt) :].tolist()
    assert "<|" not in finished.text + finished.reasoning
    assert finished.usage.reasoning_tokens is not None


def test_reasoning_then_an_answer(gpt_oss: LoadedModel, make_engine: MakeEngine) -> None:
    chunks, finished = run(make_engine(gpt_oss), f"{THOUGHT}<|channel|>final<|message|>It is Paris.<|return|>")
    assert (finished.reason, finished.text, finished.reasoning) == ("stop", "It is Paris.", "Easy: Paris.")
    assert finished.token_ids[-1] == RETURN
    assert finished.usage.reasoning_tokens == len(encode("Easy: Paris."))
    assert [chunk.text for chunk in chunks if chunk.channel == "content"] == ["It", " is", " Paris", "."]
    assert [chunk.reasoning for chunk in chunks if chunk.channel == "reasoning"] == ["Easy", ":", " Paris", "."]


def test_end_does_not_end_but_call_does(gpt_oss: LoadedModel, make_engine: MakeEngine) -> None:
    call = '<|channel|>commentary to=functions.find <|constrain|>json<|message|>{"q": "Paris"}<|call|>'
    _, finished = run(make_engine(gpt_oss), THOUGHT + call)
    assert finished.reason == "stop"
    assert finished.tool_calls == (ToolCall("find", '{"q": "Paris"}'),)
    assert (finished.text, finished.reasoning, finished.token_ids[-1]) == ("", "Easy: Paris.", CALL)


def test_someone_elses_turn_ends_the_generation(gpt_oss: LoadedModel, make_engine: MakeEngine) -> None:
    _, finished = run(
        make_engine(gpt_oss), "<|channel|>final<|message|>Paris.<|end|><|start|>user<|message|>And Italy?"
    )
    assert (finished.reason, finished.text) == ("stop", "Paris.")
    assert len(finished.token_ids) < 12


def test_stop_strings_stand_for_the_answer_only(gpt_oss: LoadedModel, make_engine: MakeEngine) -> None:
    answer = f"{THOUGHT}<|channel|>final<|message|>It is Paris. Yes.<|return|>"
    _, finished = run(make_engine(gpt_oss), answer, stop=(" Paris",))
    assert (finished.reason, finished.text, finished.reasoning) == ("stop", "It is", "Easy: Paris.")
    chunks, finished = run(make_engine(gpt_oss), answer, stop=("Yes, no",))
    assert finished.text == "It is Paris. Yes."
    assert chunks[-1].text == " Yes." or chunks[-1].text == "Yes."


def test_a_limit_or_a_cancel_within_reasoning_keeps_it(gpt_oss: LoadedModel, make_engine: MakeEngine) -> None:
    engine = make_engine(gpt_oss)
    _, finished = run(engine, f"{THOUGHT}<|channel|>final<|message|>x<|return|>", max_tokens=6)
    assert (finished.reason, finished.text, finished.reasoning) == ("length", "", "Easy: Paris")
    assert finished.usage.reasoning_tokens == 3
    _, finished = run(engine, "Paris", max_tokens=1)
    assert (finished.reason, finished.text) == ("length", "Paris"), "an answer without a header, cut off"
    _, finished = run(engine, "<|channel|>final Paris", max_tokens=3)
    assert (finished.reason, finished.text) == ("length", ""), "cut off within a header"
    _, finished = run(engine, "<|channel|>final Paris<|return|>")
    assert (finished.reason, finished.text) == ("stop", "Paris"), "ended within a header: that was the text"


def test_log_probabilities_say_to_which_channel_they_belong(gpt_oss: LoadedModel, make_engine: MakeEngine) -> None:
    chunks, _ = run(make_engine(gpt_oss), f"{THOUGHT}<|channel|>final<|message|>Paris.<|return|>", logprobs=True)
    content = [chunk for chunk in chunks if chunk.channel == "content"]
    assert [chunk.token_id for chunk in content] == encode("Paris.")
    assert all(chunk.logprob is not None for chunk in chunks)
    assert [chunk.channel for chunk in chunks][:3] == [None, None, None]


def test_other_models_are_all_content(tiny: LoadedModel, make_engine: MakeEngine) -> None:
    generation = make_engine(tiny).submit([5, 6, 7], greedy(max_tokens=20, ignore_eos=True), reasoning_effort="none")
    chunks, finished = check(generation, list(generation.stream()))
    assert {chunk.channel for chunk in chunks if chunk.token_id is not None} == {"content"}
    assert (finished.reasoning, finished.tool_calls, finished.usage.reasoning_tokens) == ("", (), None)
