"""Which layers are hooked, what is refused, and that hooks come off again."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    SmolLM3Config,
)

from tests.support.architectures import HEADS, HIDDEN, WIDTH, hooked_model, loaded, segment, stock_model
from workspace.attention import adopt_attention
from workspace.context import Context, Delta, Recorder
from workspace.errors import InvalidWorkspace, RequestError, UnsupportedModel
from workspace.hooking import HookedModel, default_layers, hookable_layers


@pytest.mark.parametrize(
    ("config", "hookable", "default"),
    [
        (GptOssConfig(num_hidden_layers=24), tuple(range(1, 24, 2)), (1, 5, 9, 13, 17, 21)),  # gpt-oss-20b
        (GptOssConfig(num_hidden_layers=36), tuple(range(1, 36, 2)), (1, 7, 13, 19, 25, 31)),  # gpt-oss-120b
        (LlamaConfig(num_hidden_layers=30), tuple(range(30)), (0, 5, 10, 15, 20, 25)),  # SmolLM2-135M
        (LlamaConfig(num_hidden_layers=2), (0, 1), (0,)),
        (Gemma3TextConfig(num_hidden_layers=26), (5, 11, 17, 23), (5, 17)),  # Gemma 3 1B
        (MistralConfig(num_hidden_layers=4), (), ()),  # a window of 4096 on every layer
        (MistralConfig(num_hidden_layers=4, sliding_window=None), (0, 1, 2, 3), (0, 2)),
        (
            Qwen2Config(num_hidden_layers=4, use_sliding_window=True, sliding_window=64, max_window_layers=2),
            (0, 1),
            (0,),
        ),
        (SmolLM3Config(num_hidden_layers=8), (0, 1, 2, 4, 5, 6), (0, 2, 5)),  # every fourth layer has no RoPE
    ],
)
def test_layers_follow_from_the_configuration(config: Any, hookable: tuple[int, ...], default: tuple[int, ...]) -> None:
    assert hookable_layers(config) == hookable
    assert default_layers(config) == default


@pytest.mark.parametrize("layers", range(1, 100))
def test_defaults_are_few_spread_out_and_hookable(layers: int) -> None:
    chosen = default_layers(LlamaConfig(num_hidden_layers=layers))
    assert 1 <= len(chosen) <= 6
    assert chosen[0] == 0
    assert len({b - a for a, b in pairwise(chosen)}) <= 1
    assert all(b - a >= 2 for a, b in pairwise(chosen))


def test_a_hooked_model_tells_its_shape() -> None:
    hooked = HookedModel(loaded(adopted(stock_model("gpt_oss"))))
    assert hooked.layers == (1,)
    assert (hooked.kv_heads, hooked.head_dim, hooked.hidden_size, hooked.num_layers) == (HEADS, WIDTH, HIDDEN, 4)
    hooked.check_invariants()


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([0], "layer 0 of tiny is sliding_attention; virtual tokens need one of 1, 3"),
        ([1, 4], "there is no layer 4: tiny has layers 0 to 3"),
        ([-1], "there is no layer -1"),
        ([1, 1], "a layer is named twice: 1, 1"),
        ([], "was given no layers"),
    ],
)
def test_layers_that_cannot_be_hooked_are_refused_by_name(layers: list[int], message: str) -> None:
    model = adopted(stock_model("gpt_oss"))
    with pytest.raises(InvalidWorkspace, match=message) as caught:
        HookedModel(loaded(model), layers)
    assert isinstance(caught.value, RequestError)
    assert caught.value.param == "workspace"
    assert hook_count(model) == 0


def test_a_model_without_any_fitting_layer_is_refused() -> None:
    model = adopted(stock_model("mistral", sliding_window=8))
    with pytest.raises(InvalidWorkspace, match="has no full-attention layer"):
        HookedModel(loaded(model))


def test_models_of_an_unknown_build_are_refused_and_left_as_they_were() -> None:
    small = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 99,
    }
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    models = [
        (GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99)), "no decoder with layers"),
        (PhiForCausalLM(PhiConfig(**small)), "PhiForCausalLM has no decoder with layers"),
        (CohereForCausalLM(CohereConfig(**small, pad_token_id=0)), "does not rotate dimension i"),
        (LlamaForCausalLM(LlamaConfig(**small, rope_parameters=dynamic)), "frequencies change with the length"),
    ]
    for model, message in models:
        assert adopt_attention(model), type(model)
        with pytest.raises(UnsupportedModel, match=message):
            HookedModel(loaded(model), [0])
        assert hook_count(model) == 0


def test_an_attention_function_of_somebody_else_is_refused() -> None:
    model = stock_model("llama")
    with pytest.raises(UnsupportedModel, match="runs 'eager' attention, which cannot be extended"):
        HookedModel(loaded(model))


def test_hooks_come_off_and_may_be_put_on_again_but_not_twice() -> None:
    hooked = hooked_model("gemma3", layers=[1])
    model = hooked.loaded.model
    installed = hook_count(model)
    assert installed == 5  # two on the attention, one on each of two norms, one on the model
    with pytest.raises(InvalidWorkspace, match="layer 1 is hooked already"):
        HookedModel(hooked.loaded, [1])
    assert hook_count(model) == installed
    other = HookedModel(hooked.loaded, [3])  # other layers are free, though each model then checks for its own
    other.remove()
    hooked.remove()
    hooked.remove()
    hooked.check_invariants()
    assert hook_count(model) == 0
    HookedModel(hooked.loaded, [1, 3]).check_invariants()


@pytest.mark.parametrize(
    "context",
    [
        Context({2: segment()}),
        Context(deltas={2: Delta(torch.zeros(1, HIDDEN), torch.tensor([0]))}),
        Context(recorder=Recorder([2])),
    ],
)
def test_what_is_meant_for_an_unhooked_layer_is_not_lost_silently(context: Context) -> None:
    hooked = hooked_model("llama", layers=[1, 3])
    with pytest.raises(InvalidWorkspace, match="layer 2 is not hooked; hooked are 1, 3"):
        hooked.loaded.model(torch.arange(4)[None], workspace=context)
    with pytest.raises(InvalidWorkspace, match="layer 2 is not hooked"):
        hooked.check(context)


def test_check_names_what_does_not_fit_the_model() -> None:
    hooked = hooked_model("llama")
    hooked.check(Context({0: segment()}, {1: Delta(torch.zeros(1, HIDDEN), torch.tensor([0]))}))
    wide = segment(keys=torch.zeros(1, HEADS, 5, 16), values=torch.zeros(1, HEADS, 5, 16))
    with pytest.raises(InvalidWorkspace, match="layer 0 have 2 heads of 16, but the model has 2 key-value heads of 8"):
        hooked.check(Context({0: wide}))
    with pytest.raises(InvalidWorkspace, match="delta of layer 3 has 7 dimensions, but the residual stream has 32"):
        hooked.check(Context(deltas={3: Delta(torch.zeros(1, 7), torch.tensor([0]))}))


def adopted(model: Any) -> Any:
    assert adopt_attention(model)
    return model


def hook_count(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
