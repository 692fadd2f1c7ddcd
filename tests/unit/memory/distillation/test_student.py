"""The student's numbers: those of a plain pass over each row, whatever is shared, padded or cut into pieces."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from memory.distillation import student as student_module
from memory.distillation.encoding import Encoder, Example, gold_targets
from memory.distillation.errors import TrainerError
from memory.distillation.losses import amount, target_losses
from memory.distillation.student import PassingCache, Student
from memory.distillation.trainable import TrainablePrefix
from memory.distillation.training_batches import common_length
from tests.support.tiny_cartridges import gold_rows, teacher_row, tiny_loaded
from workspace.engine import Engine
from workspace.models import LoadedModel
from workspace.prefix import prefix_of_tokens
from workspace.sampling import SamplingParams

MEMORY = [{"role": "user", "content": "Who sleeps?"}, {"role": "assistant", "content": "The lazy dog."}]
SLOTS = 16


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma3", "gpt_oss"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return tiny_loaded(tmp_path_factory.mktemp("tiny"), request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return tiny_loaded(tmp_path_factory.mktemp("tiny"))


def examples_of(loaded: LoadedModel) -> list[Example]:
    """Rows of different lengths, from the teacher and from feedback, of different weights."""
    rows = [
        *gold_rows(3, weight=2.0),
        teacher_row(loaded, MEMORY, "Who is the quick brown fox, and why?"),
        teacher_row(loaded, MEMORY, "Paris?"),
    ]
    encoder = Encoder(loaded)
    return [encoder.example(row, name=str(number), top_k=20, max_tokens=64) for number, row in enumerate(rows)]


def trainable(loaded: LoadedModel, frozen: int = 1) -> TrainablePrefix:
    ids = Encoder(loaded).conversation([{"role": "system", "content": "The dog does not mind at all. " * 3}])
    return TrainablePrefix(prefix_of_tokens(loaded, ids[:SLOTS]), frozen)


def plain_loss(loaded: LoadedModel, prefix: TrainablePrefix, examples: list[Example]) -> torch.Tensor:
    """The definition: each row alone and whole, logits of all tokens, no sharing."""
    total = torch.zeros(())
    for example in examples:
        cache = DynamicCache(prefix.layers())
        ids = torch.tensor([example.token_ids[: example.fed]])
        positions = torch.arange(SLOTS, SLOTS + ids.shape[1])[None]
        logits = loaded.model(ids, past_key_values=cache, position_ids=positions).logits[0]
        chosen = logits[torch.from_numpy(example.places)]
        targets = example.targets
        losses = target_losses(chosen, torch.from_numpy(targets.top_ids), torch.from_numpy(targets.top_logprobs))
        total = total + example.weight * losses.sum()
    return total / sum(amount(example) for example in examples)


def gradients(prefix: TrainablePrefix) -> list[torch.Tensor]:
    found = [parameter.grad.clone() for parameter in prefix.parameters() if parameter.grad is not None]
    for parameter in prefix.parameters():
        parameter.grad = None
    return found


def test_loss_and_gradient_are_those_of_reading_every_row_whole(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shared beginning, padding, micro-batches and pieces of logits change nothing."""
    examples, prefix = examples_of(loaded), trainable(loaded)
    assert common_length(examples) > 3
    assert len({example.fed for example in examples}) > 2
    plain = plain_loss(loaded, prefix, examples)
    plain.backward()
    expected = gradients(prefix)
    monkeypatch.setattr(student_module, "MOST_TOKENS", {"cpu": 60})
    monkeypatch.setattr(student_module, "_MOST_LOGITS", 4 * loaded.vocabulary_size)
    student = Student(loaded)
    total = sum(amount(example) for example in examples)
    found = student.learn(prefix.layers(), examples, total)
    assert len(found) > 1
    assert sum(item.weighted() for item in found) / total == pytest.approx(plain.item(), rel=1e-4)
    got = gradients(prefix)
    assert len(got) == len(expected) == 2 * len(prefix.trained)
    assert any(gradient.abs().max() > 1e-4 for gradient in expected)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
    seen = student.losses(prefix.layers(), examples)
    assert sum(item.weighted() for item in seen) / total == pytest.approx(plain.item(), rel=1e-4)


def test_rows_together_have_the_losses_of_rows_alone(loaded: LoadedModel) -> None:
    examples, prefix, student = examples_of(loaded), trainable(loaded), Student(loaded)
    together = {e.name: x for item in student.losses(prefix.layers(), examples) for e, x in item.by_example()}
    for example in examples:
        (alone,) = student.losses(prefix.layers(), [example])
        torch.testing.assert_close(together[example.name], alone.losses, rtol=1e-4, atol=1e-5)


def test_gradient_reaches_trained_slots_only(loaded: LoadedModel) -> None:
    """And in sliding layers those within the window: a row of T tokens at p reaches back to p - 7."""
    examples, prefix = examples_of(loaded), trainable(loaded, frozen=3)
    before = [parameter.clone() for parameter in loaded.model.parameters()]
    Student(loaded).learn(prefix.layers(), examples, 10.0)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in loaded.model.parameters())
    assert all(torch.equal(one, other) for one, other in zip(before, loaded.model.parameters(), strict=True))
    types = getattr(loaded.model.config, "layer_types", None) or ["full_attention"] * 4
    for layer, (kind, (keys, values)) in enumerate(zip(types, prefix.trained, strict=True)):
        assert keys.shape[2] == values.shape[2] == SLOTS - 3
        assert values.grad is not None
        live = values.grad.abs().amax(dim=(0, 1, 3)) > 0  # [p - f]
        if kind == "sliding_attention":
            assert live[-7:].all(), layer
            assert not live[:-7].any(), layer
        else:
            assert live.all(), layer


def test_the_engine_says_what_the_student_saw(loaded: LoadedModel) -> None:
    """Greedy answers and their log-probabilities in service are the trainer's: positions, masks and prompt agree."""
    prefix = trainable(loaded)
    messages = [{"role": "user", "content": "Is Bern the capital?"}]
    engine = Engine(loaded, max_active=1, max_waiting=1, threads=1)
    engine.start()
    try:
        params = SamplingParams(max_tokens=10, temperature=0, ignore_eos=True, logprobs=True, top_logprobs=4)
        generation = engine.submit(messages, params, prefix=prefix.prefix(loaded.dtype))
        chunks = [item for item in generation.stream() if item is not None and hasattr(item, "token_id")]
        result = generation.result()
    finally:
        engine.stop()
    assert generation.prompt_ids == tuple(Encoder(loaded).prompt(messages, after_prefix=True))
    example = Example(
        "engine",
        (*generation.prompt_ids, *result.token_ids),
        len(generation.prompt_ids),
        gold_targets(result.token_ids),
    )
    (seen,) = Student(loaded).losses(prefix.layers(), [example])
    expected = [-chunk.logprob for chunk in chunks if chunk.logprob is not None]
    assert len(expected) == len(result.token_ids) == 10
    torch.testing.assert_close(seen.losses, torch.tensor(expected), rtol=1e-3, atol=1e-4)


def test_bfloat16_model_trains_float32_slots(tmp_path: Path) -> None:
    loaded = tiny_loaded(tmp_path, dtype=torch.bfloat16)
    examples, prefix = examples_of(loaded), trainable(loaded)
    plain = plain_loss(loaded, _in_model_dtype(prefix), examples)
    found = Student(loaded).learn(prefix.layers(), examples, sum(amount(example) for example in examples))
    loss = sum(item.weighted() for item in found) / sum(amount(example) for example in examples)
    assert loss == pytest.approx(plain.item(), rel=0.05)
    for parameter in prefix.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32


class _Cast(TrainablePrefix):
    def layers(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(keys.bfloat16(), values.bfloat16()) for keys, values in super().layers()]


def _in_model_dtype(prefix: TrainablePrefix) -> TrainablePrefix:
    return _Cast(prefix.prefix(torch.bfloat16), prefix.frozen)


def test_between_is_called_before_every_layer_forward_and_backward(llama: LoadedModel) -> None:
    calls: list[int] = []
    student = Student(llama, between=lambda: calls.append(1))
    examples = examples_of(llama)
    student.losses(trainable(llama).layers(), examples)
    forward = len(calls)
    assert forward == 2 * 4  # the common text and the rows, four layers each
    calls.clear()
    student.learn(trainable(llama).layers(), examples, 10.0)
    assert len(calls) == forward + 3 * 2  # backward through both, all layers but the first


def test_an_exception_of_between_leaves_a_backward_pass(llama: LoadedModel) -> None:
    class Enough(Exception):
        pass

    count = 0

    def between() -> None:
        nonlocal count
        count += 1
        if count > 10:  # within the backward pass
            raise Enough

    with pytest.raises(Enough):
        Student(llama, between=between).learn(trainable(llama).layers(), examples_of(llama), 10.0)
    assert count == 11


def test_nothing_of_a_pass_outlives_it(llama: LoadedModel) -> None:
    """A hook that held the cache kept whole graphs alive until a collection: gigabytes of a real model."""
    examples, prefix = examples_of(llama), trainable(llama)
    student = Student(llama, between=lambda: None)
    gc.collect()
    gc.disable()
    try:
        student.learn(prefix.layers(), examples, 10.0)
        student.losses(prefix.layers(), examples)
        assert not [item for item in gc.get_objects() if type(item) is PassingCache]
    finally:
        gc.enable()


def test_a_model_whose_logits_need_more_is_refused(tmp_path: Path) -> None:
    loaded = tiny_loaded(tmp_path)
    handle = loaded.model.register_forward_hook(lambda _m, _i, output: output | {"logits": output.logits * 3})
    try:
        with pytest.raises(TrainerError, match="does more to its logits"):
            Student(loaded)
    finally:
        handle.remove()


def test_soft_cap_of_logits_is_known(tmp_path: Path) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

    from tests.support.tiny_model import save_tiny_model
    from workspace.models import adopt_model

    tokenizer = PreTrainedTokenizerFast.from_pretrained(save_tiny_model(tmp_path))
    torch.manual_seed(1)
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0, initializer_range=0.4, eos_token_id=1,
        attn_implementation="eager",
    )  # fmt: skip
    Student(adopt_model("tiny-gemma2", Gemma2ForCausalLM(config), tokenizer))
