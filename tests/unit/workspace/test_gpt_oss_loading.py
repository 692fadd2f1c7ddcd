"""gpt-oss as it is published: MXFP4 through the true loader, and weights in several places."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import GptOssForCausalLM, PreTrainedTokenizerFast
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.support.mxfp4 import BLOCK, MAGNITUDES, pack, save_mxfp4, unpack
from tests.support.tiny_gpt_oss import build_gpt_oss
from workspace.context import Context, Segment
from workspace.engine import Engine
from workspace.errors import UnsupportedModel
from workspace.footprint import measure
from workspace.forward import Forward
from workspace.hooking import HookedModel
from workspace.models import LoadedModel, load_model
from workspace.placement import stored_values
from workspace.sampling import SamplingParams

PROMPT = list(range(3, 40))
SPREAD = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.layers.2": "disk",
    "model.layers.3": "cpu",
    "model.norm": "cpu",
    "lm_head": "disk",
}


def build() -> GptOssForCausalLM:
    return build_gpt_oss(
        vocabulary=320, hidden=64, num_hidden_layers=4, eos_token_id=1, pad_token_id=0, initializer_range=0.3
    )


# The packer itself.


#: Scales are powers of two above 2^-127: weights that small are zero.
WEIGHTS = st.floats(-1e4, 1e4, width=32).map(lambda number: number if abs(number) > 1e-30 else 0.0)


@given(st.lists(WEIGHTS, min_size=BLOCK, max_size=BLOCK))
@settings(deadline=None)
def test_packing_is_to_the_nearest_number_of_the_block(numbers: list[float]) -> None:
    weight = torch.tensor(numbers).reshape(1, BLOCK, 1)
    blocks, scales = pack(weight)
    assert blocks.shape == (1, 1, 1, BLOCK // 2)
    found = unpack(blocks, scales)
    step = (scales.float() - 127).exp2().item()
    largest = weight.abs().max().item()
    # Above the largest magnitude, 6, numbers of the next binade up to 8 are cut; below it the gap is at most 2.
    assert (found - weight).abs().max().item() <= 2 * step or largest == 0
    assert set((found / step).abs().flatten().tolist()) <= set(MAGNITUDES.tolist())
    assert torch.equal(found, unpack(*pack(found))), "what is stored is stored again as it is"


def test_the_packer_and_transformers_agree_on_the_format() -> None:
    torch.manual_seed(3)
    blocks, scales = pack(torch.randn(3, 64, 10))
    assert (blocks.shape, scales.shape) == ((3, 10, 2, 16), (3, 10, 2))
    assert torch.equal(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32), unpack(blocks, scales))
    one = torch.zeros(1, BLOCK, 1)
    one[0, 0, 0], one[0, 1, 0] = 1.5, -6.0
    blocks, scales = pack(one)
    assert (blocks[0, 0, 0, 0].item(), scales.item()) == (0b1111_0011, 127), "the first number in the low half"


# Loading.


@pytest.fixture(scope="module")
def published(
    tmp_path_factory: pytest.TempPathFactory, make_tokenizer: Callable[[], PreTrainedTokenizerFast]
) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint as OpenAI publishes it, and its experts' true weights."""
    folder = tmp_path_factory.mktemp("mxfp4")
    expected = save_mxfp4(build(), folder)
    make_tokenizer().save_pretrained(folder)
    return folder, expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_mxfp4_checkpoint_equals_its_dequantised_weights(
    dtype: Literal["float32", "bfloat16"],
    published: tuple[Path, dict[str, torch.Tensor]],
    tmp_path: Path,
    make_engine: Callable[..., Engine],
) -> None:
    folder, expected = published
    loaded = load_model(str(folder), cache_dir=tmp_path, dtype=dtype, device="cpu")
    wanted = build().bfloat16().to(loaded.dtype)
    wanted.load_state_dict(expected, strict=False)
    for name, value in expected.items():
        assert torch.equal(stored_values(loaded.model, name).float(), value)
    wanted.model.rotary_emb = build().model.rotary_emb  # its frequencies were rounded with the rest
    with torch.inference_mode():
        ids = torch.tensor([PROMPT])
        assert torch.equal(loaded.model(ids).logits, wanted.eval()(ids).logits)
        greedy = wanted.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
    finished = make_engine(loaded).submit(PROMPT, SamplingParams(max_tokens=24, temperature=0)).result(60)
    assert list(finished.token_ids) == greedy[0, len(PROMPT) :].tolist()


def test_without_kernels_mxfp4_becomes_full_numbers_and_the_footprint_says_so(
    published: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    loaded = load_model(str(published[0]), cache_dir=tmp_path, dtype="bfloat16", device="cpu")
    found = measure(loaded.model)
    stored = (published[0] / "model.safetensors").stat().st_size
    assert set(found.by_dtype) <= {"bfloat16", "float32"}
    assert found.by_dtype["bfloat16"] == sum(value.numel() * 2 for value in loaded.model.parameters())
    assert found.resident > 1.5 * stored


def test_a_checkpoint_with_a_missing_scale_is_refused(
    published: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((published[0] / name).read_bytes())
    tensors = load_file(published[0] / "model.safetensors")
    tensors["model.layers.0.mlp.experts.down_proj_scales"] = tensors["model.layers.0.mlp.experts.down_proj_scales"][:1]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModel, match="cannot be loaded"):
        load_model(str(folder), cache_dir=tmp_path, device="cpu")


# Several places.


@pytest.fixture(scope="module", params=["mxfp4", "plain"])
def pair(
    request: pytest.FixtureRequest,
    published: tuple[Path, dict[str, torch.Tensor]],
    tmp_path_factory: pytest.TempPathFactory,
    make_tokenizer: Callable[[], PreTrainedTokenizerFast],
) -> tuple[LoadedModel, LoadedModel]:
    """The same weights in memory, and partly on disk."""
    folder = published[0]
    if request.param == "plain":
        folder = tmp_path_factory.mktemp("plain")
        build().save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
    cache = tmp_path_factory.mktemp("cache")
    whole = load_model(str(folder), cache_dir=cache, dtype="float32", device="cpu")
    return whole, load_model(str(folder), cache_dir=cache, dtype="float32", device_map=SPREAD)


def test_weights_on_disk_give_the_same_logits_and_answers(
    pair: tuple[LoadedModel, LoadedModel], make_engine: Callable[..., Engine]
) -> None:
    whole, spread = pair
    assert spread.fingerprint == whole.fingerprint
    assert spread.device == torch.device("cpu")
    assert measure(whole.model).offloaded == 0
    assert measure(spread.model).offloaded > 0.4 * measure(whole.model).resident
    with torch.inference_mode():
        forwards = [Forward(loaded) for loaded in pair]
        caches = [forward.new_cache() for forward in forwards]
        for start, ids in ((0, PROMPT), (len(PROMPT), [7]), (len(PROMPT) + 1, [8])):
            logits = [forward(ids, cache, start, {}) for forward, cache in zip(forwards, caches, strict=True)]
            assert torch.equal(*logits)
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    answers = [make_engine(loaded, prefill_chunk=16).submit(PROMPT, params).result(60) for loaded in pair]
    assert answers[0].token_ids == answers[1].token_ids
    with torch.inference_mode():
        assert stored_values(spread.model, "lm_head.weight").device.type == "cpu"


def test_virtual_tokens_reach_layers_wherever_they_are(pair: tuple[LoadedModel, LoadedModel]) -> None:
    """Hooked layer 1 is on disk, layer 3 in memory; what a request carries travels through accelerate's hooks."""
    torch.manual_seed(5)
    segments = {
        layer: Segment(
            keys=torch.randn(1, 2, 3, 16),
            values=torch.randn(1, 2, 3, 16),
            bias=torch.zeros(1, 1, 3),
            birth=torch.zeros(1, 3, dtype=torch.int64),
        )
        for layer in (1, 3)
    }
    context = Context(segments)
    found = []
    for loaded in pair:
        hooked = HookedModel(loaded, (1, 3))
        forward = Forward(loaded)
        with torch.inference_mode():
            plain = forward(PROMPT, forward.new_cache(), 0, {})
            steered = forward(PROMPT, forward.new_cache(), 0, {"workspace": context})
        assert not torch.allclose(plain, steered, atol=1e-3)
        found.append(steered)
        hooked.check_invariants()
        hooked.remove()
    assert torch.equal(*found)


def test_places_that_are_not_there_are_refused(tmp_path: Path, published: tuple[Path, dict[str, torch.Tensor]]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    for options in (
        {"device": "split"},
        {"device_map": {"model": 0, "lm_head": "cpu"}},
        {"device_map": {"": "cuda:1"}},
    ):
        with pytest.raises(UnsupportedModel, match="no CUDA device"):
            load_model(str(published[0]), cache_dir=tmp_path, **options)  # type: ignore[arg-type]
