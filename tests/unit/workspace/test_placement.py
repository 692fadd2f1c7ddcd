"""Models that accelerate spreads over devices: its hooks wrap ours and move what they find in keyword arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from transformers import DynamicCache

from tests.support.architectures import HIDDEN, hooked_model, loaded, segments, stock_model
from workspace.attention import adopt_attention
from workspace.context import BACKENDS, Context, Delta, Recorder
from workspace.hooking import HookedModel


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
def test_layers_on_disk_carry_the_same(name: str, backend: Any, tmp_path: Path) -> None:
    plain = hooked_model(name)
    spread = stock_model(name)
    assert adopt_attention(spread)
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{layer}": "disk" if layer in (1, 2) else "cpu" for layer in range(4)}
    if name == "gemma3":  # whose embeddings and head are one tensor
        spread.tie_weights()
    dispatch_model(spread, places, main_device="cpu", offload_dir=tmp_path)
    assert spread.model.layers[1].self_attn.q_proj.weight.device.type == "meta"
    hooked = HookedModel(loaded(spread), plain.layers)

    def passes(which: HookedModel, carried: bool) -> tuple[list[torch.Tensor], list[Recorder]]:
        cache = DynamicCache(config=which.loaded.model.config)
        found, recorders = [], []
        for start, end in ((0, 11), (11, 12), (12, 13)):
            recorder = Recorder(which.layers, queries=True)
            deltas = {layer: Delta(torch.full((1, HIDDEN), 0.2), torch.tensor([10])) for layer in which.layers}
            context = Context(segments(which), deltas, backend, recorder) if carried else None
            with torch.inference_mode():
                ids, at = torch.arange(start, end)[None], torch.arange(start, end)[None]
                found.append(which.loaded.model(ids, position_ids=at, past_key_values=cache, workspace=context).logits)
            recorders.append(recorder)
        return found, recorders

    for carried in (False, True):
        expected, expected_records = passes(plain, carried)
        found, records = passes(hooked, carried)
        assert all(map(torch.equal, found, expected))
        for left, right in zip(records, expected_records, strict=True):
            assert set(left.residuals) == (set(plain.layers) if carried else set())
            for layer in left.residuals:
                assert torch.equal(left.residuals[layer], right.residuals[layer])
                assert torch.equal(left.queries[layer], right.queries[layer])
