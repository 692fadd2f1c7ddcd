"""Quantised linears: what the packed product computes, when it is used, and that everything else stays as it was."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.architectures import hooked_model, segment, segments
from tests.support.tiny_model import save_tiny_model
from workspace import quantised
from workspace.context import Context
from workspace.errors import UnsupportedModel
from workspace.forward import Forward
from workspace.models import LoadedModel, load_model
from workspace.quantised import GROUP, Bits, QuantisedLinear, from_codes, pack, quantise, relative_error, to_codes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("quantised"))


def load(folder: Path, weights: Any, dtype: Any = "bfloat16") -> LoadedModel:
    return load_model(str(folder), cache_dir=folder, dtype=dtype, device="cpu", weights=weights)


def linear(outputs: int, inputs: int, *, bias: bool = False) -> nn.Linear:
    torch.manual_seed(outputs * 1009 + inputs)
    return nn.Linear(inputs, outputs, bias=bias, dtype=torch.bfloat16).requires_grad_(False)


def on_grid(outputs: int, inputs: int) -> Tensor:
    """Weights as a Q4_1 file has them: 16 levels in each group of 32, both ends among them."""
    torch.manual_seed(3)
    codes = torch.randint(0, 16, (outputs, inputs // GROUP, GROUP))
    codes[..., 0], codes[..., 1] = 0, 15
    scale, low = torch.rand(outputs, inputs // GROUP, 1) * 0.02 + 0.001, -torch.rand(outputs, inputs // GROUP, 1) * 0.1
    return (codes * scale + low).flatten(1).to(torch.bfloat16)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 32), (48, 64), (192, 576), (1040, 96)])
def test_the_packed_product_is_that_of_the_codes(
    outputs: int, inputs: int, bits: Bits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantised, "_AT_ONCE", 1 << 14)  # several blocks of rows
    plain = linear(outputs, inputs, bias=True)
    packed = QuantisedLinear(plain, *pack(plain.weight, bits), bits)
    packed.most_rows = 16
    weight = from_codes(*to_codes(plain.weight, bits), bits)
    for shape in ((1, 1, inputs), (3, 1, inputs), (1, 16, inputs), (inputs,)):
        x = torch.randn(shape).to(torch.bfloat16)
        wanted = nn.functional.linear(x.float(), weight, plain.bias.float())
        found = packed(x)
        assert found.shape == wanted.shape
        assert found.dtype == torch.bfloat16
        assert (found.float() - wanted).norm() <= 0.01 * wanted.norm()


def test_more_bits_lose_less_and_a_grid_of_four_bits_loses_next_to_nothing() -> None:
    weight = linear(256, 576).weight
    assert 0.05 < relative_error(weight, 4) < 0.12
    assert relative_error(weight, 8) < 0.007
    assert relative_error(on_grid(256, 576), 4) < 0.01
    assert relative_error(torch.zeros(16, 32, dtype=torch.bfloat16), 4) == 0


def test_many_rows_and_gradients_use_the_weights_as_they_are() -> None:
    plain = linear(64, 96)
    packed = QuantisedLinear(plain, *pack(plain.weight, 4), 4)
    many = torch.randn(1, packed.most_rows + 1, 96).to(torch.bfloat16)
    assert torch.equal(packed(many), plain(many))
    few = many[:, :1]
    assert not torch.equal(packed(few), plain(few))
    learnt = few.clone().requires_grad_()
    out = packed(learnt)
    assert torch.equal(out, plain(few))
    out.sum().backward()
    assert learnt.grad is not None
    assert torch.equal(learnt.grad[0, 0], torch.ones(64, dtype=torch.bfloat16) @ plain.weight)
    with torch.no_grad():
        assert torch.equal(packed(learnt), packed(few)), "what could learn, but does not now, is decoding as well"


def test_auto_takes_four_bits_where_a_model_has_them_already_and_eight_for_the_rest(folder: Path) -> None:
    loaded = load(folder, "auto")
    layers = loaded.model.model.layers
    assert not any(isinstance(module, QuantisedLinear) for module in loaded.model.modules()), "weights of all bits"
    for layer in layers:
        for module in (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp.gate_proj, layer.mlp.up_proj):
            module.weight.data = on_grid(*module.weight.shape)
    done = quantise("tiny", loaded.model, "auto")
    assert layers[0].self_attn.q_proj.bits == 4
    assert layers[0].self_attn.k_proj.bits == 8
    assert (done.four, done.eight, done.plain) == (8, 5, 2)  # down_proj has 48 inputs, which are no whole groups
    assert "8 linears decode with 4-bit weights, 5 with 8-bit" in str(done)


def test_auto_leaves_alone_what_memory_has_no_room_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised, "_SHARE_OF_FREE", 0.0)
    loaded = load(folder, "exact")
    for module in loaded.model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = on_grid(module.out_features, module.in_features + 16)[:, : module.in_features]
    assert quantise("tiny", loaded.model, "auto").plain == 15
    assert not any(isinstance(module, QuantisedLinear) for module in loaded.model.modules())


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_parameters_and_fingerprint_stay_and_tied_weights_stay_tied(folder: Path, weights: str) -> None:
    exact, loaded = load(folder, "exact"), load(folder, weights)
    assert isinstance(loaded.model.get_output_embeddings(), QuantisedLinear)
    assert loaded.fingerprint == exact.fingerprint
    wanted = exact.model.state_dict()
    found = loaded.model.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    tied = copy.deepcopy(exact.model)
    tied.lm_head.weight = tied.model.embed_tokens.weight
    quantise("tied", tied, "int8")
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


@torch.no_grad()
def test_a_model_reads_prompts_as_before_to_the_bit_and_decodes_the_nearer_the_more_bits(folder: Path) -> None:
    logits, keys = {}, {}
    for weights in ("exact", "int8", "int4"):
        forward = Forward(load(folder, weights))
        cache = forward.new_cache()
        forward(list(range(2, 42)), cache, 0, {})
        keys[weights] = cache.layers[1].keys.clone()
        logits[weights] = forward([5], cache, 40, {})
    assert torch.equal(keys["int8"], keys["exact"])
    assert torch.equal(keys["int4"], keys["exact"])
    wrong = {name: float((found - logits["exact"]).norm() / logits["exact"].norm()) for name, found in logits.items()}
    assert 0 < wrong["int8"] < 0.2 < wrong["int4"], wrong  # random weights, so small errors grow large


def siblings() -> tuple[nn.Module, nn.Module]:
    """Query, key and value of a layer, plain and quantised."""
    torch.manual_seed(1)
    plain = nn.Module()
    for name, outputs in (("q_proj", 192), ("k_proj", 64), ("v_proj", 64), ("o_proj", 64)):
        plain.add_module(
            name, nn.Linear(96, outputs, bias=name == "k_proj", dtype=torch.bfloat16).requires_grad_(False)
        )
    packed = copy.deepcopy(plain)
    packed.config = packed.dtype = None
    quantise("siblings", packed, "int4")
    return plain, packed


@torch.no_grad()
def test_linears_of_one_input_are_multiplied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _, packed = siblings()
    q, k, v, o = packed.q_proj, packed.k_proj, packed.v_proj, packed.o_proj
    assert q.joined is k.joined is v.joined is not None
    assert o.joined is None
    calls = []
    product = quantised._product
    monkeypatch.setattr(quantised, "_product", lambda *args: calls.append(args[0]) or product(*args))
    alone = copy.deepcopy(packed)
    for name in ("q_proj", "k_proj", "v_proj"):
        linear = getattr(alone, name)
        own = QuantisedLinear(linear, *pack(linear.weight, 4), 4)
        alone.set_submodule(name, own)
    x, y = torch.randn(2, 3, 96).to(torch.bfloat16).unbind()
    wanted = [[getattr(alone, name)(rows) for name in ("q_proj", "k_proj", "v_proj")] for rows in (x, y)]
    calls.clear()
    for _ in range(2):
        assert all(torch.equal(own(x), other) for own, other in zip((q, k, v), wanted[0], strict=True))
    assert len(calls) == 2, "once for the three, and once more the next time"
    # Others come between: another input, or only one of the three.
    assert torch.equal(q(x), wanted[0][0])
    assert torch.equal(q(y), wanted[1][0])
    assert torch.equal(k(x), wanted[0][1])
    assert torch.equal(v(y), wanted[1][2])
    assert q(x).shape == (3, 192)


@torch.no_grad()
def test_joined_linears_in_many_threads_give_what_each_gives_alone() -> None:
    _, packed = siblings()
    inputs = [torch.randn(1, 1, 96).to(torch.bfloat16) for _ in range(8)]
    names = ("q_proj", "k_proj", "v_proj")
    wanted = [[getattr(packed, name)(x).clone() for name in names] for x in inputs]

    def same(number: int) -> bool:
        with torch.no_grad():
            found = [getattr(packed, name)(inputs[number % 8]) for name in names]
            return all(torch.equal(one, other) for one, other in zip(found, wanted[number % 8], strict=True))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(same, range(400)))


def test_what_was_asked_for_and_cannot_be_says_what_to_do(folder: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"model.weights int4 needs bfloat16 .* set model.dtype to bfloat16"):
        load(folder, "int4", dtype="float32")
    loaded = load(folder, "auto", dtype="float32")
    assert not any(isinstance(module, QuantisedLinear) for module in loaded.model.modules())


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt_oss"])
def test_hooks_virtual_tokens_and_their_gradients_work_as_without(architecture: str) -> None:
    hooked = hooked_model(architecture, dtype=torch.bfloat16)
    model, ids = hooked.loaded.model, torch.arange(2, 8)[None]
    with torch.no_grad():
        exact = model(ids, workspace=Context(segments=segments(hooked))).logits.float()
    quantise(architecture, model, "int8")
    assert any(isinstance(module, QuantisedLinear) for module in model.modules())
    with torch.no_grad():
        plain = model(ids).logits
        assert torch.equal(plain, model(ids, workspace=Context()).logits), "off is off"
        shown = model(ids, workspace=Context(segments=segments(hooked))).logits.float()
    assert (shown - exact).norm() < 0.2 * exact.norm()
    assert (shown - exact).norm() < (plain.float() - exact).norm(), "nearer to itself than to having none"
    layer = hooked.layers[0]
    learnt = segment(seed=layer)
    learnt.keys.requires_grad_()
    model(ids, workspace=Context(segments={layer: learnt})).logits.float().square().sum().backward()
    assert learnt.keys.grad is not None
    assert float(learnt.keys.grad.norm()) > 0
    assert all(parameter.grad is None for parameter in model.parameters())
