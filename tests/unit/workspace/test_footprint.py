"""What a model occupies, and quantisation that only the configuration knows of."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GptOssForCausalLM, Mxfp4Config, PreTrainedTokenizerFast
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from tests.support.mxfp4 import NOT_CONVERTED
from tests.support.tiny_gpt_oss import build_gpt_oss
from workspace.errors import UnsupportedModel
from workspace.footprint import check_claim, claim_of, measure
from workspace.models import load_model

BITSANDBYTES = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def tiny(**changes: Any) -> GptOssForCausalLM:
    return build_gpt_oss(vocabulary=320, hidden=32, eos_token_id=1, pad_token_id=0, **changes)


def expert_bytes(model: GptOssForCausalLM) -> int:
    return sum(value.nbytes for name, value in model.named_parameters() if name.endswith("_proj"))


def pack_experts(model: GptOssForCausalLM) -> None:
    """Fused experts in bytes, two numbers each, as bitsandbytes would have to store them."""
    for layer in model.model.layers:
        for name in ("gate_up_proj", "down_proj"):
            count = getattr(layer.mlp.experts, name).numel() // 2
            packed = nn.Parameter(torch.zeros(count, 1, dtype=torch.uint8), requires_grad=False)
            setattr(layer.mlp.experts, name, packed)


def pack_attention(model: GptOssForCausalLM) -> None:
    """Linear layers in bytes: what bitsandbytes does quantise."""
    for layer in model.model.layers:
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj, layer.self_attn.o_proj):
            count = linear.weight.numel() // 2
            linear.weight = nn.Parameter(torch.zeros(count, 1, dtype=torch.uint8), requires_grad=False)


def test_bytes_are_counted_by_type_and_shared_ones_once() -> None:
    model = tiny()
    found = measure(model)
    expected = sum(value.nbytes for value in (*model.parameters(), *model.buffers()))
    assert found.by_dtype == {"float32": expected}
    assert (found.resident, found.offloaded) == (expected, 0)
    model.lm_head.weight = model.model.embed_tokens.weight
    assert measure(model).resident == expected - model.lm_head.weight.nbytes
    model.model.norm.to("meta")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().bfloat16())
    found = measure(model)
    assert found.offloaded == 32 * 4
    assert found.by_dtype["bfloat16"] == 320 * 32 * 2
    assert str(found).startswith(f"{found.resident / 1000:.1f} kB resident (20.5 kB bfloat16, ")
    assert str(found).endswith("and 128 B on disk")


def test_experts_that_bitsandbytes_left_out_are_noticed() -> None:
    """The defect of bitsandbytes-foundation/bitsandbytes#1849: linear layers packed, fused experts not."""
    model = tiny(num_local_experts=8)
    pack_attention(model)
    model.config.quantization_config = BITSANDBYTES
    with pytest.raises(UnsupportedModel, match=r"^m claims to be quantised to 4 bits \(bitsandbytes\), but ") as caught:
        check_claim("m", model)
    assert "gate_up_proj" in str(caught.value)
    assert "MXFP4" in str(caught.value)
    pack_experts(model)
    assert check_claim("m", model).by_dtype["uint8"] > 0


def test_what_a_configuration_exempts_may_stay_full() -> None:
    model = tiny()
    pack_experts(model)
    model.config.quantization_config = {"quant_method": "mxfp4"}
    with pytest.raises(UnsupportedModel, match="full numbers: weight"):
        check_claim("m", model)
    model.config.quantization_config = {"quant_method": "mxfp4", "modules_to_not_convert": NOT_CONVERTED}
    check_claim("m", model)


def test_experts_of_mxfp4_kernels_are_counted_though_they_are_no_parameters() -> None:
    model = tiny()
    plain = measure(model).resident - expert_bytes(model)
    model.config.quantization_config = {"quant_method": "mxfp4", "modules_to_not_convert": NOT_CONVERTED}
    size = 0
    for layer in model.model.layers:
        experts = layer.mlp.experts
        for name in ("gate_up_proj", "down_proj"):
            blocks, scales = torch.zeros(4, 64, 16, dtype=torch.uint8), torch.zeros(4, 64, 1, dtype=torch.uint8)
            del experts._parameters[name]
            # Triton's wrapper as transformers 5.23 stores it: tensor.storage.data, and the scales beside it.
            setattr(experts, name, SimpleNamespace(storage=SimpleNamespace(data=blocks)))
            scale = SimpleNamespace(storage=SimpleNamespace(data=scales))
            setattr(experts, f"{name}_precision_config", SimpleNamespace(weight_scale=scale))
            size += blocks.nbytes + scales.nbytes
    found = check_claim("m", model)
    assert found.by_dtype["uint8"] == size
    assert found.resident == plain + size


@pytest.mark.parametrize(
    ("config", "bits"),
    [
        (None, None),
        ({"quant_method": "mxfp4"}, 4),
        (Mxfp4Config(), 4),
        (Mxfp4Config(dequantize=True), None),
        (BITSANDBYTES, 4),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 8),
        ({"quant_method": "gptq", "bits": 3}, 3),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, None),
    ],
)
def test_claims(config: Any, bits: int | None) -> None:
    claim = claim_of(SimpleNamespace(quantization_config=config))
    assert (None if claim is None else claim.bits) == bits


@pytest.fixture
def lying_method() -> Iterator[str]:
    """A quantisation method known to transformers that quantises nothing."""

    class LyingConfig(QuantizationConfigMixin):
        def __init__(self, bits: int = 4, **kwargs: Any):
            self.quant_method = "lying"  # type: ignore[assignment]
            self.bits = bits
            self.modules_to_not_convert = None

    class LyingQuantizer(HfQuantizer):
        requires_calibration = False

        def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            return False

    register_quantization_config("lying")(LyingConfig)
    register_quantizer("lying")(LyingQuantizer)
    yield "lying"
    del AUTO_QUANTIZATION_CONFIG_MAPPING["lying"], AUTO_QUANTIZER_MAPPING["lying"]


def test_a_false_claim_is_refused_by_the_loader_and_a_true_size_is_logged(
    lying_method: str,
    tmp_path: Path,
    make_tokenizer: Callable[[], PreTrainedTokenizerFast],
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = tiny()
    model.save_pretrained(tmp_path / "m")
    make_tokenizer().save_pretrained(tmp_path / "m")
    with caplog.at_level(logging.INFO, logger="workspace.models"):
        load_model(str(tmp_path / "m"), cache_dir=tmp_path, dtype="float32", device="cpu")
    (line,) = [record.getMessage() for record in caplog.records if "resident" in record.getMessage()]
    assert f"{measure(model).resident / 1000:.1f} kB resident" in line
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": lying_method, "bits": 4}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match=r"claims to be quantised to 4 bits \(lying\)"):
        load_model(str(tmp_path / "m"), cache_dir=tmp_path, dtype="float32", device="cpu")
