"""Hooks on real weights: without a context nothing changes, with one only what is carried matters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from workspace.context import Context, Delta, Recorder, Segment
from workspace.engine import Engine
from workspace.forward import PassiveContext
from workspace.hooking import HookedModel
from workspace.models import LoadedModel
from workspace.packaged import PACKAGED, ensure_packaged
from workspace.sampling import SamplingParams

pytestmark = pytest.mark.model

PROMPT = [{"role": "user", "content": "Write a short story about a lighthouse keeper who finds a letter."}]


@pytest.fixture(scope="module")
def hooked(smollm2: LoadedModel) -> Iterator[HookedModel]:
    hooked = HookedModel(smollm2)
    yield hooked
    hooked.remove()  # other modules share the model


@pytest.fixture(scope="module")
def engine(smollm2: LoadedModel) -> Iterator[Engine]:
    engine = Engine(smollm2, max_active=2, max_waiting=2, threads=1)
    engine.start()
    yield engine
    assert engine.stop()


class Carrying(PassiveContext):
    """A request's context that carries the same for every pass."""

    def __init__(self, context: Context):
        self.context = context
        self.passes = 0

    def forward_kwargs(self, start: int, count: int) -> Mapping[str, Any]:
        self.passes += 1
        return {"workspace": self.context}


def carried(hooked: HookedModel, tokens: int = 16, bias: float = 0.0) -> dict[int, Segment]:
    """Random keys and values of the size of real ones."""
    random = torch.Generator().manual_seed(0)
    shape = (1, hooked.kv_heads, tokens, hooked.head_dim)
    return {
        layer: Segment(
            keys=torch.randn(shape, generator=random),
            values=0.3 * torch.randn(shape, generator=random),
            bias=torch.full((1, 1, tokens), bias),
            birth=torch.zeros(1, tokens, dtype=torch.long),
        )
        for layer in hooked.layers
    }


def test_prompt_and_steps_have_the_logits_of_the_stock_model(hooked: HookedModel, model_cache: Any) -> None:
    """In the default dtype, against a model that never saw this package."""
    model = hooked.loaded.model
    folder = ensure_packaged(PACKAGED["smollm2-135m-instruct"], model_cache)
    base = {"workspace": "eager", "workspace_fused": "sdpa"}[model.config._attn_implementation]
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=hooked.loaded.dtype, attn_implementation=base).eval()
    ids = torch.tensor([hooked.loaded.tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True)["input_ids"]])
    recorder = Recorder(hooked.layers, queries=True)
    far = Delta(torch.ones(1, hooked.hidden_size), torch.tensor([10**6]))
    unborn = {
        layer: Segment(each.keys, each.values, each.bias, each.birth + 10**6) for layer, each in carried(hooked).items()
    }
    nothings = {
        "no keyword": {},
        "an empty context": {"workspace": Context()},
        "a recorder": {"workspace": Context(recorder=recorder)},
        "what is to come": {"workspace": Context(unborn, dict.fromkeys(hooked.layers, far))},
    }
    with torch.inference_mode():
        found = {}
        for what, kwargs in {"stock": {}, **nothings}.items():
            which, cache, token, position = stock if what == "stock" else model, DynamicCache(), ids, 0
            logits = []
            for _ in range(4):
                positions = torch.arange(position, position + token.shape[1])[None]
                out = which(token, position_ids=positions, past_key_values=cache, use_cache=True, **kwargs).logits
                logits.append(out)
                position, token = position + token.shape[1], out[:, -1:].argmax(-1)
            found[what] = torch.cat(logits, dim=1)
    for what in nothings:
        assert torch.equal(found[what], found["stock"]), what
    assert set(recorder.residuals) == set(recorder.queries) == set(hooked.layers) == {0, 5, 10, 15, 20, 25}
    assert recorder.residuals[0].shape == (1, 576)


def test_greedy_text_of_200_tokens_is_the_same_with_an_empty_context(hooked: HookedModel, engine: Engine) -> None:
    params = SamplingParams(max_tokens=200, temperature=0, ignore_eos=True)
    empty = Carrying(Context())
    pair = [engine.submit(PROMPT, params), engine.submit(PROMPT, params, request_context=empty)]
    plain, same = (generation.result(timeout=280) for generation in pair)
    assert len(plain.token_ids) == 200
    assert empty.passes == 200  # the prompt is one chunk and gives the first token
    assert same.token_ids == plain.token_ids
    assert same.text == plain.text
    few = SamplingParams(max_tokens=10, temperature=0, ignore_eos=True)
    full = engine.submit(PROMPT, few, request_context=Carrying(Context(carried(hooked)))).result(timeout=60)
    assert full.reason == "length"
    assert full.token_ids != plain.token_ids[:10]


def test_the_back_ends_agree_on_real_weights(hooked: HookedModel) -> None:
    """In the default dtype: their difference is that of rounding, far below the effect of what is carried."""
    ids = torch.tensor([hooked.loaded.tokenizer.apply_chat_template(PROMPT)["input_ids"]])
    with torch.inference_mode():
        results = {
            backend: hooked.loaded.model(ids, workspace=Context(carried(hooked), backend=backend)).logits.float()
            for backend in ("eager", "fused", "merge")
        }
        stock = hooked.loaded.model(ids).logits.float()
    effect = (results["eager"] - stock).abs().mean()
    for backend in ("fused", "merge"):
        assert (results[backend] - results["eager"]).abs().mean() < 0.1 * effect, backend
