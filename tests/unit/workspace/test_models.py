"""From a name to a loaded model: what names mean, what is refused, and what is derived from a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
)

from workspace.errors import UnknownModel, UnsupportedModel
from workspace.forward import Forward
from workspace.models import LoadedModel, adopt_model, load_model, resolve_model
from workspace.plain_chat import PLAIN_STOP


@pytest.fixture
def saved(tiny: LoadedModel, tmp_path: Path) -> Path:
    """The tiny Llama as a ``from_pretrained`` directory."""
    folder = tmp_path / "saved"
    tiny.model.save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    return folder


def test_names_resolve_without_a_network(saved: Path) -> None:
    packaged = resolve_model("smollm2-135m-instruct").packaged
    assert packaged is not None
    assert packaged.licence == "Apache-2.0"
    assert resolve_model(str(saved)).directory == saved
    assert resolve_model("openai/gpt-oss-20b").hub_id == "openai/gpt-oss-20b"


@pytest.mark.parametrize("name", ["smolm2-135m-instruct", "gpt2", "", "../up", "a/b/c", "/nowhere/at/all"])
def test_unknown_names_are_refused_with_what_is_known(name: str) -> None:
    with pytest.raises(UnknownModel, match=r"gemma3-270m, smollm2-135m-instruct") as caught:
        resolve_model(name)
    assert ("did you mean smollm2-135m-instruct?" in str(caught.value)) == name.startswith("smol")


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match=r"config\.json"):
        resolve_model(str(tmp_path))


def test_a_hub_id_without_a_hub_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UnknownModel, match=r"known packaged names are .*hub id such as openai/gpt-oss-20b"):
        load_model("olympus-nobody/no-such-model", cache_dir=tmp_path)


def test_a_saved_directory_loads_in_the_dtype_asked_for(saved: Path, tiny: LoadedModel, tmp_path: Path) -> None:
    heard: list[str] = []
    loaded = load_model(
        str(saved), cache_dir=tmp_path, dtype="float32", device="cpu", progress=lambda stage, _: heard.append(stage)
    )
    assert heard == ["loading"]
    assert loaded.dtype == torch.float32
    assert loaded.device == torch.device("cpu")
    assert loaded.context_length == 512
    assert loaded.eos_ids == {1}
    assert loaded.chat_stop == ()
    assert loaded.fingerprint == tiny.fingerprint
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    half = load_model(str(saved), cache_dir=tmp_path, dtype="bfloat16", device="cpu")
    assert half.dtype == torch.bfloat16
    assert loaded.model.config._attn_implementation == "workspace_fused"  # stock: sdpa
    assert half.model.config._attn_implementation == "workspace"  # stock: eager
    # The dtype of the weights must not round RoPE's frequencies.
    assert half.model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert half.fingerprint != tiny.fingerprint


def test_pickled_weights_are_refused(saved: Path, tiny: LoadedModel, tmp_path: Path) -> None:
    (saved / "model.safetensors").unlink()
    torch.save(tiny.model.state_dict(), saved / "pytorch_model.bin")
    with pytest.raises(UnsupportedModel, match="safetensors weights are required"):
        load_model(str(saved), cache_dir=tmp_path, device="cpu")


def test_devices_that_are_not_there_are_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="unknown device 'toaster'"):
        load_model(str(saved), cache_dir=tmp_path, device="toaster")
    if not torch.cuda.is_available():
        with pytest.raises(UnsupportedModel, match="no CUDA device"):
            load_model(str(saved), cache_dir=tmp_path, device="cuda")


def test_a_model_without_a_template_gets_a_plain_transcript(
    make_tokenizer: Callable[[], PreTrainedTokenizerFast],
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, num_attention_heads=2))
    loaded = adopt_model("base", model, tokenizer)
    assert loaded.chat_stop == PLAIN_STOP
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>Be brief.\n\nUser: Hi\nAssistant:"


def test_the_fingerprint_tells_weights_and_vocabularies_apart(
    make_tokenizer: Callable[[], PreTrainedTokenizerFast],
) -> None:
    def build(seed: int, extra_token: bool = False) -> str:
        torch.manual_seed(seed)
        tokenizer = make_tokenizer()
        model = LlamaForCausalLM(LlamaConfig(vocab_size=400, hidden_size=16, num_attention_heads=2))
        if extra_token:
            tokenizer.add_tokens(["zzz"])
        return adopt_model("model", model, tokenizer).fingerprint

    assert build(1) == build(1)
    assert len({build(1), build(2), build(1, extra_token=True)}) == 3


def test_a_model_without_a_stated_context_is_refused(make_tokenizer: Callable[[], PreTrainedTokenizerFast]) -> None:
    """Bloom's configuration names no context length and its forward takes no position ids (it uses ALiBi)."""
    tokenizer = make_tokenizer()
    model = BloomForCausalLM(BloomConfig(vocab_size=len(tokenizer), hidden_size=16, n_head=2, n_layer=2))
    with pytest.raises(UnsupportedModel, match="context length"):
        adopt_model("bloom", model, tokenizer)
    tokenizer.model_max_length = 64
    loaded = adopt_model("bloom", model, tokenizer)
    assert loaded.context_length == 64
    forward = Forward(loaded)
    cache = forward.new_cache()
    forward([5, 6, 7], cache, 0, {})
    torch.testing.assert_close(forward([8], cache, 3, {}), model(torch.tensor([[5, 6, 7, 8]])).logits[0, -1])


def test_a_model_without_a_cache_is_refused(make_tokenizer: Callable[[], PreTrainedTokenizerFast]) -> None:
    model = MambaForCausalLM(MambaConfig(vocab_size=320, hidden_size=16, num_hidden_layers=1))
    with pytest.raises(UnsupportedModel, match="no key-value cache"):
        adopt_model("mamba", model, make_tokenizer())


def test_a_broken_directory_is_a_clear_error(saved: Path, tmp_path: Path) -> None:
    (saved / "model.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(UnsupportedModel, match="cannot be loaded"):
        load_model(str(saved), cache_dir=tmp_path, device="cpu")
    (saved / "config.json").write_text('{"model_type": "llama", "hidden_size": "wide"}')
    with pytest.raises(UnsupportedModel, match="cannot be loaded"):
        load_model(str(saved), cache_dir=tmp_path, device="cpu")
