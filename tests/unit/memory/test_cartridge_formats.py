"""Cartridges in every file format: the same numbers come back, and what is no cartridge is refused by name."""

from __future__ import annotations

import json
import os
import re
import threading
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from torch.nn import Parameter, ParameterList
from transformers import DynamicCache

from memory.cartridges.cartridge import Cartridge, check_model, make_cartridge
from memory.cartridges.errors import (
    CartridgeDamaged,
    CartridgeFileInvalid,
    CartridgeMismatch,
    CartridgeNotExportable,
    InvalidCartridgeId,
)
from memory.cartridges.files import load_cartridge, load_manifest, save_cartridge
from memory.cartridges.ids import check_id, domain_part, make_id, sanitize
from memory.cartridges.peft_format import from_peft, to_peft
from memory.cartridges.tokasaurus_folder import export_tokasaurus, validate_tokasaurus_folder
from memory.cartridges.torch_format import read_torch_file, write_torch_file
from tests.support.architectures import loaded, stock_model
from workspace.errors import PrefixMismatch
from workspace.models import LoadedModel
from workspace.prefix import KVPrefix, prefix_of_tokens


class _WithVocabulary:
    chat_template = "{{ messages }}"

    def get_vocab(self) -> dict[str, int]:
        return {"a": 0, "b": 1}


def model_of(name: str = "llama", fingerprint: str = "f" * 32, **config: Any) -> LoadedModel:
    return replace(loaded(stock_model(name, **config)), tokenizer=_WithVocabulary(), fingerprint=fingerprint)


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return model_of()


def cartridge_of(model: LoadedModel, slots: int = 16, frozen: int = 1, **more: Any) -> Cartridge:
    return make_cartridge(model, prefix_of_tokens(model, list(range(2, 2 + slots))), domain="d", frozen=frozen, **more)


def same(one: KVPrefix, keys: Any, values: Any, dtype: torch.dtype = torch.float32) -> None:
    assert len(one.keys) == len(keys) == len(values)
    for mine, theirs in zip((*one.keys, *one.values), (*keys, *values), strict=True):
        assert torch.equal(mine.to(dtype), theirs)


# Ids.


@pytest.mark.parametrize(
    ("cartridge_id", "folder"),
    [
        ("memory_v0007", "memory_v0007"),
        ("my.cart--v1", "my_cart_v1"),
        ("a/b\\c", "a_b_c"),
        ("../../etc/passwd", "_etc_passwd"),
        ("x:|?*<>\"'y", "x_y"),
        ("a\x00b", "a_b"),
    ],
)
def test_folders_are_named_as_tokasaurus_names_them(cartridge_id: str, folder: str) -> None:
    assert sanitize(cartridge_id) == folder


@pytest.mark.parametrize("nothing", ["", "...", "///", "__"])
def test_an_id_of_nothing_has_no_folder(nothing: str) -> None:
    with pytest.raises(InvalidCartridgeId):
        sanitize(nothing)


def test_domains_become_parts_of_ids_and_stay_apart() -> None:
    assert make_id("finance_tags", 7) == "finance_tags_v0007"
    assert make_id("d", 12345) == "d_v12345"
    names = ["finance tags", "finance-tags", "Finance_Tags", "finance_tags", "§", "¤", "_finance_tags_"]
    found = {domain_part(name) for name in names}
    assert len(found) == len(names)
    for name in names:
        made = make_id(name, 1)
        assert check_id(made) == made == sanitize(made)


@pytest.mark.parametrize(
    "bad",
    ["", "memory", "memory_v7", "../memory_v0007", "memory_v0007/..", "Memory_v0007", "a__b_v0001", "a_v0001\n",
     "a" * 95 + "_v0001", "a_v0001\x00", "_v0001"],
)  # fmt: skip
def test_what_is_no_id_is_refused(bad: str) -> None:
    with pytest.raises(InvalidCartridgeId):
        check_id(bad)


# Our own folder.


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_gives_back_what_was_saved(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = model_of(name)
    prefix = prefix_of_tokens(model, list(range(2, 22)))
    prefix = KVPrefix(tuple(k.to(dtype) for k in prefix.keys), tuple(v.to(dtype) for v in prefix.values))
    cartridge = make_cartridge(
        model, prefix, domain="d", frozen=4, steps=7, metrics={"loss": 0.5}, experience_ids=[9, 3, 9], parent="d_v0001"
    )
    assert cartridge.experience_ids == (3, 9)
    written = save_cartridge(tmp_path / "c", cartridge)
    back = load_cartridge(tmp_path / "c")
    same(prefix, back.prefix.keys, back.prefix.values, dtype)
    assert (back.frozen, back.experience_ids, back.manifest) == (4, (3, 9), written)
    assert back.manifest.layer_types == tuple(getattr(model.model.config, "layer_types", None) or ())
    assert back.manifest.sliding_window == (None if name == "llama" else 8)
    assert back.manifest.rope
    assert set(back.manifest.files) == {"prefix.safetensors", "experiences.json"}
    assert load_manifest(tmp_path / "c") == written
    with pytest.raises(FileExistsError):
        save_cartridge(tmp_path / "c", cartridge)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["c"], "nothing half written is left"


def test_damage_is_found_and_named(model: LoadedModel, tmp_path: Path) -> None:
    def damaged(name: str, change: Callable[[bytes], bytes | None]) -> str:
        folder = tmp_path / f"c{len(list(tmp_path.iterdir()))}"
        save_cartridge(folder, cartridge_of(model, experience_ids=[1]))
        data = change((folder / name).read_bytes())
        if data is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(data)
        with pytest.raises(CartridgeDamaged) as caught:
            load_cartridge(folder)
        assert str(folder) in str(caught.value)
        return str(caught.value)

    assert "SHA-256" in damaged("prefix.safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1]))
    assert "SHA-256" in damaged("prefix.safetensors", lambda data: data[:-5])
    assert "prefix.safetensors" in damaged("prefix.safetensors", lambda _: None)
    assert "SHA-256" in damaged("experiences.json", lambda _: b"[2]\n")
    assert "experiences.json is missing" in damaged("experiences.json", lambda _: None)
    assert "not JSON" in damaged("manifest.json", lambda data: data[: len(data) // 2])
    assert "manifest.json" in damaged("manifest.json", lambda _: None)
    assert "schema 2" in damaged("manifest.json", lambda data: data.replace(b'"schema": 1', b'"schema": 2'))
    assert "extra" in damaged("manifest.json", lambda data: data.replace(b'"steps"', b'"extra": 1, "steps"', 1))
    assert "the manifest says" in damaged("manifest.json", lambda data: data.replace(b'"slots": 16', b'"slots": 17'))
    assert "holds NaN" in damaged("manifest.json", lambda data: data.replace(b'"steps": 0', b'"steps": NaN'))


def test_numbers_that_are_not_finite_are_not_saved(model: LoadedModel, tmp_path: Path) -> None:
    cartridge = cartridge_of(model)
    cartridge.prefix.values[1][0, 0, 3, 0] = float("inf")
    with pytest.raises(ValueError, match="layer 1: the values hold NaN or infinity"):
        save_cartridge(tmp_path / "c", cartridge)
    assert list(tmp_path.iterdir()) == []


def test_manifest_and_tensors_must_agree(model: LoadedModel) -> None:
    cartridge = cartridge_of(model)
    with pytest.raises(ValueError, match="the manifest says"):
        Cartridge(cartridge.prefix, 2, cartridge.manifest)
    with pytest.raises(ValueError, match="experience ids"):
        replace(cartridge, experience_ids=(1,))
    with pytest.raises(ValueError, match="frozen"):
        cartridge_of(model, frozen=17)
    with pytest.raises(PrefixMismatch, match=r"4 layers .* 3 layers"):
        make_cartridge(model_of(num_hidden_layers=3), cartridge.prefix, domain="d")


def test_another_model_is_refused_with_both_names(model: LoadedModel) -> None:
    manifest = cartridge_of(model).manifest
    check_model(manifest, model)
    other = replace(model_of(fingerprint="a" * 32), name="other")
    with pytest.raises(CartridgeMismatch, match=r"model tiny .*ffffffffffff.* other .*aaaaaaaaaaaa"):
        check_model(manifest, other)


# The .pt file.


@pytest.mark.parametrize(("slots", "frozen"), [(16, 1), (16, 4), (5, 0), (3, 3)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_torch_file_gives_back_slots_and_frozen_count(
    model: LoadedModel, slots: int, frozen: int, dtype: Any, tmp_path: Path
) -> None:
    prefix = prefix_of_tokens(model, list(range(2, 2 + slots)))
    write_torch_file(tmp_path / "cache-step3.pt", prefix.keys, prefix.values, frozen, dtype)
    back = read_torch_file(tmp_path / "cache-step3.pt")
    assert back.frozen == frozen, "from dim 2, not from the heads"
    same(prefix, back.keys, back.values, getattr(torch, dtype))


def test_the_library_finds_what_it_looks_for(model: LoadedModel, tmp_path: Path) -> None:
    """What ``TrainableCache.from_pretrained`` and Tokasaurus do with such a file."""
    prefix = prefix_of_tokens(model, list(range(2, 18)))
    path = tmp_path / "cache_last.pt"
    write_torch_file(path, prefix.keys, prefix.values, 1)
    found = torch.load(path, weights_only=False)
    assert set(found) == {"frozen_keys", "frozen_values", "trainable_keys", "trainable_values"}
    assert all(isinstance(item, ParameterList) and len(item) == 4 for item in found.values())
    assert found["frozen_keys"][0].shape == (1, 2, 1, 8)
    assert found["trainable_keys"][0].shape == (1, 2, 15, 8)
    assert found["trainable_keys"][0].dtype == torch.bfloat16
    assert [found[f"{kind}_keys"][0].requires_grad for kind in ("frozen", "trainable")] == [False, True]
    assert path.stat().st_size < 2 * prefix.nbytes, "no tensor drags another behind it"


def content(model: LoadedModel, frozen: int = 1, slots: int = 4) -> dict[str, Any]:
    prefix = prefix_of_tokens(model, list(range(2, 2 + slots)))
    found: dict[str, Any] = {}
    for part, tensors in (("keys", prefix.keys), ("values", prefix.values)):
        found[f"frozen_{part}"] = ParameterList(
            [Parameter(item[:, :, :frozen].clone(), requires_grad=False) for item in tensors] if frozen else []
        )
        found[f"trainable_{part}"] = ParameterList([Parameter(item[:, :, frozen:].clone()) for item in tensors])
    return found


def test_files_of_others_are_read(model: LoadedModel, tmp_path: Path) -> None:
    whole = prefix_of_tokens(model, [2, 3, 4, 5])
    older = {name.replace("frozen", "fixed"): value for name, value in content(model).items()}
    plain = {name: [item.detach() for item in value] for name, value in content(model).items()}
    none_frozen = content(model, frozen=0)
    for number, (found, frozen) in enumerate(((older, 1), (plain, 1), (none_frozen, 0))):
        torch.save(found, tmp_path / f"{number}.pt")
        slots = read_torch_file(tmp_path / f"{number}.pt")
        assert slots.frozen == frozen
        same(whole, slots.keys, slots.values)


def test_no_torch_file_is_opened_without_the_restricted_reader() -> None:
    root = Path(__file__).resolve().parents[3]
    floors = (
        "agents",
        "cli",
        "lm",
        "memory",
        "olympus",
        "qig_core",
        "scripts",
        "storage",
        "telemetry",
        "web",
        "workspace",
    )
    places = [
        (path.relative_to(root).as_posix(), line)
        for floor in floors
        for path in (root / floor).rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"(?<!safetensors\.)torch\.load\(", line)
    ]
    assert {place for place, _ in places} == {"memory/cartridges/torch_format.py", "workspace/capture_blob.py"}
    assert all("weights_only=True" in line for _, line in places)


class Evil:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def test_a_malicious_pickle_is_refused_and_does_nothing(model: LoadedModel, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    for number, found in enumerate(
        (
            Evil(trap),
            {**content(model), "extra": Evil(trap)},
            {**content(model), "trainable_keys": [Evil(trap)]},
            {**content(model), "trainable_keys": torch.nn.Linear(2, 2)},
        )
    ):
        path = tmp_path / f"{number}.pt"
        torch.save(found, path)
        with pytest.raises(CartridgeFileInvalid, match="restricted reader refuses it"):
            read_torch_file(path)
    assert not trap.exists()


def test_a_parameter_list_with_a_strange_state_is_refused(model: LoadedModel, tmp_path: Path) -> None:
    found = content(model)
    vars(found["trainable_keys"])["_parameters"] = {"0": "text", "x": 1}
    torch.save(found, tmp_path / "c.pt")
    with pytest.raises(CartridgeFileInvalid, match="ParameterList"):
        read_torch_file(tmp_path / "c.pt")


def _renamed(found: dict[str, Any]) -> Any:
    return {name.upper(): value for name, value in found.items()}


def _bomb(found: dict[str, Any]) -> Any:
    huge = torch.zeros(1).expand(1, 2, 1 << 24, 8)
    return {**found, "trainable_keys": [huge] * 4, "trainable_values": [huge] * 4}


def _with(name: str, layer: int, change: Callable[[torch.Tensor], Any]) -> Callable[[dict[str, Any]], Any]:
    def changed(found: dict[str, Any]) -> Any:
        items = [item.detach().clone() for item in found[name]]
        items[layer] = change(items[layer])
        return {**found, name: items}

    return changed


def _nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor[0, 0, 0, 0] = float("nan")
    return tensor


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda found: [found], "a list, expected a dict"),
        (_renamed, "expected trainable_keys"),
        (lambda found: {k: v for k, v in found.items() if k != "frozen_keys"}, "expected trainable_keys"),
        (lambda found: {**found, "trainable_keys": ParameterList()}, "0 layers"),
        (lambda found: {**found, "trainable_values": found["trainable_values"][:2]}, "4 layers and trainable_values 2"),
        (lambda found: {**found, "frozen_values": ParameterList()}, "both must have 4, or none"),
        (lambda found: {**found, "trainable_keys": torch.zeros(4)}, "expected a list of tensors"),
        (lambda found: {**found, "trainable_keys": ["text"] * 4}, "no tensor"),
        (_with("trainable_keys", 2, lambda t: t[0]), r"trainable_keys\[2\]"),
        (_with("trainable_keys", 1, lambda t: t.repeat(2, 1, 1, 1)), r"trainable_keys\[1\]"),
        (_with("trainable_values", 3, lambda t: t[:, :1]), r"\[3\]: keys and values have different shapes"),
        (_with("frozen_keys", 0, lambda t: t.repeat(1, 1, 2, 1)), r"frozen_keys"),
        (_with("trainable_values", 0, lambda t: t[..., :4]), r"\[0\]: keys and values have different shapes"),
        (_with("trainable_keys", 0, lambda t: t.double()), "float64"),
        (_with("trainable_keys", 0, lambda t: t.to(torch.int8)), "int8"),
        (_with("trainable_values", 1, _nan), r"trainable_values\[1\] holds NaN"),
        (_with("trainable_keys", 0, lambda t: t.to_sparse()), r"trainable_keys\[0\]"),
        (_with("trainable_keys", 0, lambda t: t.to("meta")), r"trainable_keys\[0\]|restricted"),
        (_bomb, "claim"),
    ],
)
def test_a_torch_file_of_another_shape_is_refused(
    model: LoadedModel, tmp_path: Path, change: Callable[[dict[str, Any]], Any], problem: str
) -> None:
    path = tmp_path / "c.pt"
    torch.save(change(content(model)), path)
    with pytest.raises(CartridgeFileInvalid, match=problem) as caught:
        read_torch_file(path)
    assert str(path) in str(caught.value)


def test_what_is_no_torch_file_is_refused(model: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    torch.save(content(model), path)
    good = path.read_bytes()
    for data in (b"", b"not a zip", good[: len(good) // 2], good[:-30]):
        path.write_bytes(data)
        with pytest.raises(CartridgeFileInvalid):
            read_torch_file(path)
    torch.save(content(model), path, _use_new_zipfile_serialization=False)  # the format of before 1.6
    with pytest.raises(CartridgeFileInvalid, match="a zip"):
        read_torch_file(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("c/data.pkl", b"\0" * (64 << 20))
    with pytest.raises(CartridgeFileInvalid, match="compressed"):
        read_torch_file(path)
    with pytest.raises(CartridgeFileInvalid):
        read_torch_file(tmp_path / "absent.pt")


def test_many_readers_at_once_do_not_disturb_each_other(model: LoadedModel, tmp_path: Path) -> None:
    torch.save(content(model), tmp_path / "c.pt")
    problems: list[BaseException] = []

    def read() -> None:
        try:
            for _ in range(5):
                assert read_torch_file(tmp_path / "c.pt").frozen == 1
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []


@pytest.mark.parametrize(("frozen", "slots"), [(5, 4), (-1, 4)])
def test_nonsense_is_not_written(model: LoadedModel, tmp_path: Path, frozen: int, slots: int) -> None:
    prefix = prefix_of_tokens(model, list(range(2, 2 + slots)))
    with pytest.raises(ValueError, match="frozen"):
        write_torch_file(tmp_path / "c.pt", prefix.keys, prefix.values, frozen)
    assert list(tmp_path.iterdir()) == []


# Tokasaurus.


def registered(cartridge: Cartridge, cartridge_id: str = "d_v0003") -> Cartridge:
    manifest = cartridge.manifest.model_copy(update={"id": cartridge_id, "version": 3})
    return replace(cartridge, manifest=manifest)


def test_an_exported_folder_is_one_that_tokasaurus_loads(model: LoadedModel, tmp_path: Path) -> None:
    cartridge = registered(cartridge_of(model, slots=32, frozen=2))
    folder = export_tokasaurus(tmp_path, cartridge)
    assert folder == tmp_path / "d_v0003"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["kv_cache_initializer"]["max_tokens"] == 32
    proved = validate_tokasaurus_folder(folder)
    assert (proved.id, proved.slots.frozen, proved.model) == ("d_v0003", 2, "tiny")
    same(cartridge.prefix, proved.slots.keys, proved.slots.values)


@pytest.mark.parametrize(("slots", "frozen"), [(20, 1), (16, 0)])
def test_what_tokasaurus_could_not_serve_is_not_exported(
    model: LoadedModel, tmp_path: Path, slots: int, frozen: int
) -> None:
    with pytest.raises(CartridgeNotExportable, match="multiple of 16"):
        export_tokasaurus(tmp_path, registered(cartridge_of(model, slots=slots, frozen=frozen)))
    assert list(tmp_path.iterdir()) == []


def asks_for(slots: int) -> dict[str, Any]:
    return {"kv_cache_initializer": {"max_tokens": slots}}


def folder_of(
    tmp_path: Path, model: LoadedModel, config: Any, *, name: str = "c", slots: int = 16, frozen: int = 1
) -> Path:
    made = tmp_path / name
    made.mkdir()
    prefix = prefix_of_tokens(model, list(range(2, 2 + slots)))
    write_torch_file(made / "cartridge.pt", prefix.keys, prefix.values, frozen)
    (made / "config.yaml").write_text(config if isinstance(config, str) else yaml.safe_dump(config))
    return made


def test_the_other_form_of_a_configuration_is_understood(model: LoadedModel, tmp_path: Path) -> None:
    nested = {"kv_cache_initializer": {"value": {"max_tokens": 16}}, "wandb_version": 1}
    assert validate_tokasaurus_folder(folder_of(tmp_path, model, nested)).slots.frozen == 1


@pytest.mark.parametrize(
    ("config", "more", "problem"),
    [
        (asks_for(16), {"name": "my.cart--v1"}, "rename"),
        (asks_for(20), {"slots": 20}, "pages of 16"),
        (asks_for(16), {"frozen": 0}, "frozen"),
        (asks_for(32), {}, "max_tokens is 32, but"),
        ({"kv_cache_initializer": {}}, {}, "max_tokens is missing"),
        ({"kv_cache_initializer": {"max_tokens": "16"}}, {}, "max_tokens is missing"),
        ("a: [", {}, "YAML"),
        ("!!python/object/apply:os.system ['true']", {}, "YAML"),
        ("a" * (65 << 10), {}, "larger"),
    ],
)
def test_a_folder_that_its_loader_would_trip_over_is_refused(
    model: LoadedModel, tmp_path: Path, config: Any, more: dict[str, Any], problem: str
) -> None:
    made = folder_of(tmp_path, model, config, **more)
    with pytest.raises(CartridgeFileInvalid, match=problem):
        validate_tokasaurus_folder(made)


def test_a_folder_without_its_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CartridgeFileInvalid, match=r"cartridge.pt and config.yaml missing"):
        validate_tokasaurus_folder(tmp_path)


# PEFT. The library asks the model for a property by a name that transformers will give up.

_old_name = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


@_old_name
@pytest.mark.parametrize(("name", "frozen"), [("llama", 0), ("qwen3", 1), ("gemma3", 4), ("gpt_oss", 1)])
def test_peft_reads_what_is_exported_and_gives_the_same_logits(name: str, frozen: int, tmp_path: Path) -> None:
    """With the real library, on the stock model."""
    peft = pytest.importorskip("peft")
    model = model_of(name)
    cartridge = cartridge_of(model, slots=6, frozen=frozen)
    to_peft(tmp_path / "adapter", cartridge)
    text = torch.tensor([[7, 8, 9, 10]])
    cache = DynamicCache(config=model.model.config)
    cartridge.prefix.fill(cache)
    with torch.no_grad():
        expected = model.model(text, past_key_values=cache).logits
        theirs = peft.PeftModel.from_pretrained(stock_model(name), str(tmp_path / "adapter"))
        found = theirs(input_ids=text, attention_mask=torch.ones_like(text)).logits
    torch.testing.assert_close(found[:, -4:], expected, atol=1e-5, rtol=1e-5)
    encoder = theirs.prompt_encoder["default"]
    assert (encoder.num_frozen_tokens, encoder.num_trainable_tokens) == (frozen, 6 - frozen)


@_old_name
def test_an_adapter_that_peft_saved_is_read(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.CartridgeConfig(num_virtual_tokens=5, num_frozen_tokens=2, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(stock_model("llama"), config)
    theirs.save_pretrained(str(tmp_path))
    slots = from_peft(tmp_path)
    model = model_of()
    cache = DynamicCache()
    KVPrefix(slots.keys, slots.values).fill(cache)
    text = torch.tensor([[7, 8, 9]])
    with torch.no_grad():
        expected = theirs(input_ids=text, attention_mask=torch.ones_like(text)).logits[:, -3:]
        found = model.model(text, past_key_values=cache).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert slots.frozen == 2


def test_there_and_back_again_nothing_has_moved(model: LoadedModel, tmp_path: Path) -> None:
    cartridge = cartridge_of(model, slots=6, frozen=2)
    back = from_peft(to_peft(tmp_path / "a", cartridge))
    assert back.frozen == 2
    same(cartridge.prefix, back.keys, back.values)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"peft_type": "LORA"}, "LORA"),
        ({"num_virtual_tokens": 7}, "prompt_embeddings is"),
        ({"num_frozen_tokens": 7}, "more than"),
        ({"num_layers": "4"}, "num_layers"),
        ({"num_layers": 10**9}, "num_layers"),
        ({"token_dim": 15, "num_attention_heads": 2}, "multiple"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
    ],
)
def test_an_adapter_that_contradicts_itself_is_refused(
    model: LoadedModel, tmp_path: Path, changes: dict[str, Any], problem: str
) -> None:
    folder = to_peft(tmp_path / "a", cartridge_of(model, slots=6))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(CartridgeFileInvalid, match=problem):
        from_peft(folder)


def test_a_broken_adapter_is_refused(model: LoadedModel, tmp_path: Path) -> None:
    folder = to_peft(tmp_path / "a", cartridge_of(model, slots=6))
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    tensors["prompt_embeddings"][0, 0] = float("nan")
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(CartridgeFileInvalid, match="NaN"):
        from_peft(folder)
    (folder / "adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(CartridgeFileInvalid, match="safetensors"):
        from_peft(folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(CartridgeFileInvalid, match="no JSON"):
        from_peft(folder)
