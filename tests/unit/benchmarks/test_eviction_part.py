"""Training-free compression: what is kept and where it stands then; keeping everything changes nothing."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from benchmarks.distillation_parts.eviction import Continuing, evicted, repeated
from benchmarks.distillation_parts.recall import _turns, load_recall_model
from benchmarks.distillation_parts.recall_world import history
from memory.distillation.encoding import Encoder
from tests.support.architectures import loaded as adopt
from tests.support.architectures import stock_model
from workspace.models import LoadedModel
from workspace.prefix import KVPrefix, prefix_of_tokens


@pytest.fixture(params=["llama", "gpt_oss"])
def loaded(request: pytest.FixtureRequest) -> LoadedModel:
    return adopt(stock_model(request.param, "eager"))


TEXT = [5, 17, 3, 60, 8, 41, 22, 9, 77, 30, 12, 64]
AGAIN = [2, 90, *TEXT]


def test_where_nothing_is_left_out_it_is_the_text(loaded: LoadedModel) -> None:
    kept, whole = evicted(loaded, TEXT, AGAIN, len(TEXT)), prefix_of_tokens(loaded, TEXT)
    for mine, wanted in zip(kept.keys, whole.keys, strict=True):
        torch.testing.assert_close(mine, wanted, atol=1e-4, rtol=1e-4)
    for mine, wanted in zip(kept.values, whole.values, strict=True):
        torch.testing.assert_close(mine, wanted)


def test_kept_keys_stand_in_the_slots_in_their_order(loaded: LoadedModel) -> None:
    """In the first layer a key is that of its token alone: at its slot it is what this token would have there."""
    kept = evicted(loaded, TEXT, AGAIN, 4)
    assert kept.slots == 4
    for head in range(kept.keys[0].shape[1]):
        found = []
        for slot in range(4):
            own = kept.keys[0][0, head, slot]
            there = [prefix_of_tokens(loaded, [token] * (slot + 1)).keys[0][0, head, slot] for token in TEXT]
            distances = torch.stack([(own - key).norm() / key.norm() for key in there])
            assert distances.min() < 1e-3
            found.append(int(distances.argmin()))
        assert found == sorted(set(found))


def answer(loaded: LoadedModel, prefix: KVPrefix, asked: list[int]) -> int:
    cache = DynamicCache()
    prefix.fill(cache)
    with torch.no_grad():
        return int(loaded.model(torch.tensor([asked]), past_key_values=cache).logits[0, -1].argmax())


def test_what_the_queries_ask_for_is_kept() -> None:
    """Of 16 pairs the one that is asked for can be recalled from 16 of 66 tokens; the first 16 hold four."""
    loaded = load_recall_model()
    encoder = Encoder(loaded)
    pairs = history(16, seed=3)
    turns = _turns(pairs)
    text = encoder.conversation(turns)
    right = 0
    for key, value in pairs[4:12]:
        whole = encoder.prompt([*turns, {"role": "user", "content": key}], after_prefix=False)
        asked = whole[len(text) :]
        wanted = encoder.answer([*turns, {"role": "user", "content": key}], value, after_prefix=False)[0]
        assert answer(loaded, prefix_of_tokens(loaded, text), asked) == wanted
        assert answer(loaded, prefix_of_tokens(loaded, text[:16]), asked) != wanted
        right += answer(loaded, evicted(loaded, text, asked, 16), asked) == wanted
    assert right >= 7


def test_the_repetition_is_the_whole_text_again() -> None:
    loaded, turns = load_recall_model(), _turns(history(3, seed=1))
    text, again = repeated(loaded, turns)
    assert text == Encoder(loaded).conversation(turns)
    assert again[-len(text) :] == text
    assert len(again) > len(text)


def test_a_conversation_goes_on_where_the_text_ends() -> None:
    loaded, turns = load_recall_model(), _turns(history(3, seed=1))
    plain = Encoder(loaded)
    going_on = Continuing(loaded, plain.conversation(turns))
    asked = [*turns, {"role": "user", "content": turns[0]["content"]}]
    text, whole = plain.conversation(turns), plain.prompt(asked, after_prefix=False)
    assert text + going_on.prompt(asked, after_prefix=True) == whole
    said = turns[1]["content"]
    assert going_on.answer(asked, said, after_prefix=True) == plain.answer(asked, said, after_prefix=False)
    with pytest.raises(ValueError, match="begin"):
        going_on.prompt(asked[2:], after_prefix=True)
