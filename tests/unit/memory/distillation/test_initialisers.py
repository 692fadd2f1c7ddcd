"""What slots hold before training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from memory.distillation.config import CacheInit
from memory.distillation.encoding import Encoder
from memory.distillation.errors import TrainerError
from memory.distillation.initialisers import initial_prefix, random_prefix, resized_prefix, text_prefix
from tests.support.tiny_cartridges import tiny_loaded
from workspace.errors import PrefixMismatch
from workspace.models import LoadedModel
from workspace.prefix import KVPrefix, prefix_of_tokens

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all. Paris is the capital of France."


@pytest.fixture(scope="module", params=["llama", "gemma3", "gpt_oss"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return tiny_loaded(tmp_path_factory.mktemp("tiny"), request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return tiny_loaded(tmp_path_factory.mktemp("tiny"))


def same(one: KVPrefix, other: KVPrefix) -> bool:
    return all(torch.equal(a, b) for a, b in zip((*one.keys, *one.values), (*other.keys, *other.values), strict=True))


def test_text_is_the_first_tokens_of_a_system_message(loaded: LoadedModel) -> None:
    """All of them in all layers, also where the window is 8."""
    ids = Encoder(loaded).conversation([{"role": "system", "content": TEXT}])
    found = text_prefix(loaded, TEXT, 32)
    assert len(ids) > 32
    assert same(found, prefix_of_tokens(loaded, ids[:32]))
    assert {tensor.shape[2] for tensor in (*found.keys, *found.values)} == {32}


def test_history_is_rendered_in_turns(llama: LoadedModel) -> None:
    history = [{"role": "user", "content": "Who sleeps?"}, {"role": "assistant", "content": "The lazy dog."}] * 3
    ids = Encoder(llama).conversation(history)
    found = initial_prefix(llama, CacheInit(), 32, history=history)
    assert same(found, prefix_of_tokens(llama, ids[:32]))


def test_a_short_text_is_repeated(llama: LoadedModel) -> None:
    ids = Encoder(llama).conversation([{"role": "system", "content": "fox"}])
    assert len(ids) < 16
    assert same(text_prefix(llama, "fox", 48), prefix_of_tokens(llama, (ids * 9)[:48]))


def test_text_of_the_configuration_comes_before_the_history(llama: LoadedModel) -> None:
    history = [{"role": "user", "content": "Who sleeps?"}]
    found = initial_prefix(llama, CacheInit(text=TEXT), 16, history=history)
    assert same(found, text_prefix(llama, TEXT, 16))
    assert initial_prefix(llama, CacheInit(), 16).slots == 16  # neither of them


def test_a_template_without_a_system_role_gets_a_users_turn(tmp_path: Path) -> None:
    loaded = tiny_loaded(tmp_path)
    loaded.tokenizer.chat_template = (
        "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "{{ message['content'] }}{% endfor %}"
    )
    ids = loaded.tokenizer.encode(TEXT, add_special_tokens=False)
    assert same(text_prefix(loaded, TEXT, 16), prefix_of_tokens(loaded, ids[:16]))


def test_empty_text(llama: LoadedModel) -> None:
    with pytest.raises(TrainerError, match="has no tokens"):
        text_prefix(llama, "  ", 16)


def test_noise_has_the_size_of_real_keys_and_values(loaded: LoadedModel) -> None:
    real = text_prefix(loaded, TEXT, 48)
    found = random_prefix(real, frozen=2, seed=1)
    assert same(found, random_prefix(real, frozen=2, seed=1))
    assert not same(found, random_prefix(real, frozen=2, seed=2))
    pairs = zip((*real.keys, *real.values), (*found.keys, *found.values), strict=True)
    for true, noise in pairs:
        assert torch.equal(noise[:, :, :2], true[:, :, :2])  # never noise
        assert not torch.equal(noise[:, :, 2:], true[:, :, 2:])
        wanted = true[:, :, 2:].norm(dim=-1).mean(dim=2)  # [1, H]
        torch.testing.assert_close(noise[:, :, 2:].norm(dim=-1).mean(dim=2), wanted, rtol=1e-4, atol=1e-5)
        direction = torch.nn.functional.cosine_similarity(noise[:, :, 2:].mean(2), true[:, :, 2:].mean(2), dim=-1)
        assert (direction > 0.3).all()  # the heads' common direction is kept


def test_random_by_configuration(llama: LoadedModel) -> None:
    history = [{"role": "user", "content": TEXT}]
    found = initial_prefix(llama, CacheInit(type="random"), 16, frozen=1, history=history, seed=3)
    assert same(found, random_prefix(text_prefix(llama, history, 16), frozen=1, seed=3))


def test_previous_cartridge(llama: LoadedModel) -> None:
    previous = random_prefix(text_prefix(llama, TEXT, 32), frozen=1, seed=5)
    init = CacheInit(type="pretrained")
    assert same(initial_prefix(llama, init, 32, previous=previous), previous)
    smaller = initial_prefix(llama, init, 16, previous=previous)
    assert same(
        smaller, KVPrefix(tuple(k[:, :, :16] for k in previous.keys), tuple(v[:, :, :16] for v in previous.values))
    )
    larger = initial_prefix(llama, init, 48, previous=previous, history=[{"role": "user", "content": TEXT}])
    text = text_prefix(llama, [{"role": "user", "content": TEXT}], 48)
    for part, before, other in zip(larger.keys, previous.keys, text.keys, strict=True):
        assert torch.equal(part[:, :, :32], before)
        assert torch.equal(part[:, :, 32:], other[:, :, 32:])
    with pytest.raises(TrainerError, match="cannot be filled"):
        resized_prefix(previous, 48)


def test_without_a_previous_cartridge_it_is_text_unless_one_was_named(llama: LoadedModel) -> None:
    assert same(initial_prefix(llama, CacheInit(type="pretrained"), 16), initial_prefix(llama, CacheInit(), 16))
    with pytest.raises(TrainerError, match="cartridge a_v0001 was not found"):
        initial_prefix(llama, CacheInit(type="pretrained", cartridge="a_v0001"), 16)


def test_a_previous_cartridge_of_another_model(llama: LoadedModel) -> None:
    previous = text_prefix(llama, TEXT, 16)
    other = KVPrefix(previous.keys[:2], previous.values[:2])
    with pytest.raises(PrefixMismatch):
        initial_prefix(llama, CacheInit(type="pretrained"), 16, previous=other)
