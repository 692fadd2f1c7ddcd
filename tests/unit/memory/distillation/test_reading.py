"""Many prompts at once give what one at a time gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from memory.distillation import reading
from memory.distillation.encoding import Encoder
from memory.distillation.initialisers import text_prefix
from memory.distillation.reading import Reader
from tests.support.tiny_cartridges import tiny_loaded
from workspace.engine import Engine
from workspace.models import LoadedModel
from workspace.prefix import KVPrefix, prefix_of_tokens
from workspace.sampling import SamplingParams

QUESTIONS = ("Is Bern the capital?", "fox", "The lazy dog, and why it does not mind", "Paris", "dog?", "cat?")


@pytest.fixture(scope="module", params=["llama", "gemma3", "gpt_oss"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return tiny_loaded(tmp_path_factory.mktemp("tiny"), request.param)


def prompts_of(loaded: LoadedModel, memory: list[dict[str, str]], *, after: bool) -> list[list[int]]:
    encoder = Encoder(loaded)
    return [encoder.prompt([*memory, {"role": "user", "content": text}], after_prefix=after) for text in QUESTIONS]


@pytest.mark.parametrize("with_prefix", [True, False])
def test_greedy_answers_are_the_engines(
    with_prefix: bool, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "CHUNK", 9)
    monkeypatch.setattr(reading, "MOST_PLACES", 200)
    memory = [{"role": "user", "content": "Who sleeps?"}, {"role": "assistant", "content": "The lazy dog."}]
    prefix: KVPrefix | None = text_prefix(loaded, "The quick brown fox jumps", 16) if with_prefix else None
    prompts = prompts_of(loaded, memory, after=with_prefix)
    reader, found = Reader(loaded, prefix), {}
    for group in reader.groups(prompts, room=8):
        for index, said in zip(group.indices, reader.greedy(group, 8), strict=True):
            found[index] = tuple(said)
    engine = Engine(loaded, max_active=1, max_waiting=1, threads=1)
    engine.start()
    try:
        params = SamplingParams(max_tokens=8, temperature=0)
        expected = {
            index: engine.submit(prompt, params, prefix=prefix).result().token_ids
            for index, prompt in enumerate(prompts)
        }
    finally:
        engine.stop()
    assert found == expected


def test_scores_are_those_of_one_answer_alone(loaded: LoadedModel) -> None:
    prefix = text_prefix(loaded, "The quick brown fox jumps", 16)
    prompts = prompts_of(loaded, [], after=True)
    answers = [[[5, 6, 7, 8], [9], [200, 4]], *([[[3, 1]]] * 5)]
    reader, found = Reader(loaded, prefix), {}
    for group in reader.groups(prompts, room=4):
        for index, scores in zip(group.indices, reader.scores(group, [answers[i] for i in group.indices]), strict=True):
            found[index] = scores
    for index, prompt in enumerate(prompts):
        assert len(found[index]) == len(answers[index])
        for score, answer in zip(found[index], answers[index], strict=True):
            ids = [*prompt, *answer]
            past = DynamicCache(list(zip(prefix.keys, prefix.values, strict=True)))
            positions = torch.arange(16, 16 + len(ids))[None]
            with torch.no_grad():
                logits = loaded.model(torch.tensor([ids]), past_key_values=past, position_ids=positions).logits[0]
            logs = logits.log_softmax(-1)
            expected = sum(float(logs[len(prompt) - 1 + place, token]) for place, token in enumerate(answer))
            assert score == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_groups_are_bounded_and_of_equal_length_where_there_are_windows(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "MOST_PLACES", 120)
    prompts = prompts_of(loaded, [], after=False)
    groups = list(Reader(loaded).groups(prompts, room=4))
    assert sorted(index for group in groups for index in group.indices) == list(range(len(QUESTIONS)))
    assert any(len(group.indices) > 1 for group in groups)
    for group in groups:
        lengths = {len(prompts[index]) for index in group.indices}
        assert group.mask.numel() <= 120 or len(group.indices) == 1
        if loaded.model.config.model_type != "llama":
            assert len(lengths) == 1
        assert group.lengths.tolist() == [len(prompts[index]) for index in group.indices]


def test_prompts_without_anything_in_common_and_no_prefix(tmp_path: Path) -> None:
    """Padding in front of everything, under torch's fused kernel: rows that see nothing must not make NaN."""
    loaded = tiny_loaded(tmp_path, base="sdpa")
    prompts = [[7, 8, 9, 10, 11], [20, 21], [30]]
    reader = Reader(loaded)
    (group,) = reader.groups(prompts)
    for row, index in enumerate(group.indices):
        with torch.no_grad():
            expected = loaded.model(torch.tensor([prompts[index]])).logits[0, -1]
        torch.testing.assert_close(group.logits[row], expected, rtol=1e-3, atol=1e-3)


def test_the_prefix_is_not_changed(loaded: LoadedModel) -> None:
    prefix = prefix_of_tokens(loaded, list(range(2, 18)))
    before = [tensor.clone() for tensor in (*prefix.keys, *prefix.values)]
    reader = Reader(loaded, prefix)
    for group in reader.groups(prompts_of(loaded, [], after=True), room=4):
        reader.greedy(group, 4)
        reader.scores(group, [[[3, 4]]] * len(group.indices))
    assert all(torch.equal(one, two) for one, two in zip(before, (*prefix.keys, *prefix.values), strict=True))
