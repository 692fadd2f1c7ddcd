"""Which trainer is taken, and our configuration in the words of the other one."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memory.cartridges.torch_format import write_torch_file
from memory.distillation.cartridges_backend import library_config, library_row, not_honoured
from memory.distillation.config import TrainingConfig
from memory.distillation.dataset import read_dataset
from memory.distillation.encoding import Encoder
from memory.distillation.errors import BackendMissing
from memory.distillation.initialisers import text_prefix
from memory.distillation.train_adapter import train
from tests.support.tiny_cartridges import TRAINING, gold_rows, teacher_row, tiny_loaded
from workspace.models import LoadedModel

LIBRARY = TRAINING.model_copy(update={"trainer": "cartridges"})


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return tiny_loaded(tmp_path_factory.mktemp("tiny"), num_hidden_layers=2)


def test_in_process_is_the_default(loaded: LoadedModel, tmp_path: Path) -> None:
    config = TRAINING.model_copy(update={"max_steps": 3})
    result = train(loaded, gold_rows(4), [], config, text_prefix(loaded, "a", 16), folder=tmp_path)
    assert result.step == 3
    assert result.file == tmp_path / "cache-step3.pt"


def test_an_absent_library_is_said(loaded: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(BackendMissing, match=r"cannot be imported .*training.trainer: inprocess"):
        train(loaded, gold_rows(4), [], LIBRARY, text_prefix(loaded, "a", 16), folder=tmp_path)


def test_a_model_that_the_library_does_not_know_is_said(tmp_path: Path) -> None:
    loaded = tiny_loaded(tmp_path / "model", "gemma3")
    with pytest.raises(BackendMissing, match="llama and qwen3 models, not gemma3"):
        train(loaded, gold_rows(4), [], LIBRARY, text_prefix(loaded, "a", 16), folder=tmp_path)


def plan(config: TrainingConfig, **changes: Any) -> dict[str, Any]:
    options: dict[str, Any] = {
        "name": "run", "model": "org/model", "model_class": "FlexLlamaForCausalLM", "train": Path("/d/train.parquet"),
        "evaluation": Path("/d/eval.parquet"), "folder": Path("/d"), "rows": 240, "row_tokens": 61.0,
    }  # fmt: skip
    return library_config(config, **{**options, **changes})


def test_mapping() -> None:
    config = TrainingConfig(
        trainer="cartridges", slots=128, frozen=4, learning_rate=2e-2, warmup_steps=7, max_steps=100, rows=16,
        top_k=10, evaluate_every=11, save_every=13, keep_last=3, seed=5,
    )  # fmt: skip
    found = plan(config)
    assert found["model"] == {
        "pretrained_model_name_or_path": "org/model",
        "model_cls": "FlexLlamaForCausalLM",
        "tuning_method": "custom_prefix",
    }
    assert found["dataset"]["data_sources"] == [{"path": "/d/train.parquet", "type": "local"}]
    assert found["dataset"]["packed_seq_length"] == 1024  # 16 rows of 61 tokens, in blocks of 128
    assert found["dataset"]["top_k_logits"] == 10
    assert found["global_batch_size"] == 1
    assert found["epochs"] == 7  # 15 steps each
    assert found["lr"] == 2e-2
    assert found["lr_scheduler"] == {"max_steps": 100, "warmup_steps": 7, "warmup_min_lr": 0.0, "alpha_f": 0.1}
    assert found["kv_cache_initializer"] == {"num_frozen_tokens": 4}
    assert (found["save_every_n_steps"], found["keep_last_n_saved"], found["seed"]) == (13, 3, 5)
    assert found["loss_eval_every_n_steps"] == 11
    assert found["loss_evals"][0]["dataset"]["data_sources"][0]["path"] == "/d/eval.parquet"
    assert plan(config, evaluation=None)["loss_evals"] == []
    assert plan(config.model_copy(update={"epochs": 2}))["epochs"] == 2


def test_what_the_library_cannot_do_is_named() -> None:
    config = TrainingConfig(early_stop_patience=0, loss="upstream", step_size="absolute")
    assert not_honoured(config, gold_rows(2)) == []
    full = TrainingConfig(time_budget_seconds=5, gold_weight=0.5)
    assert len(not_honoured(full, gold_rows(2))) == 5
    assert not_honoured(config, gold_rows(2, weight=2.0)) == ["weights of rows"]


def test_rows_have_tokens_and_targets_everywhere(loaded: LoadedModel) -> None:
    encoder = Encoder(loaded)
    taught = teacher_row(loaded, [], "who?")
    for row in (gold_rows(1)[0], taught):
        example = encoder.example(row, name="x", top_k=8, max_tokens=64)
        found = library_row(encoder, row, example)
        assert all(message.token_ids for message in found.messages)
        assert loaded.tokenizer.decode(found.messages[0].token_ids) == row.messages[0].content
        top = found.answer.top_logprobs
        assert top is not None
        assert top.shape[0] == len(found.answer.token_ids or ())
        if row is taught:
            assert top == taught.answer.top_logprobs
        else:
            assert top.token_id.tolist() == list(found.answer.token_ids or ())
            np.testing.assert_array_equal(top.logprobs, 0)


class _Values:
    """Takes any fields, as the library's configurations do."""

    def __init__(self, **fields: Any):
        self.__dict__.update(fields)


def test_the_library_is_called_with_its_own_objects(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in with the names of the library's modules: what reaches ``train``, and what comes back."""
    modules = {
        name: types.ModuleType(name)
        for name in (
            "cartridges", "cartridges.train", "cartridges.cache", "cartridges.datasets", "cartridges.models",
            "cartridges.models.config",
        )
    }  # fmt: skip
    seen: list[Any] = []

    class TrainConfig(_Values):
        run_dir = str(tmp_path / "out")

    class Factory:
        Config = _Values

        def __init__(self, config: Any):
            self.config = config

    def library_train(config: Any) -> None:
        seen.append(config)
        factory = type(config.kv_cache_initializer).__qualname__
        assert factory.endswith("FromPrefix.Config")
        Path(config.run_dir).mkdir()
        write_torch_file(Path(config.run_dir) / "cache-step9.pt", init.keys, init.values, 1, "float32")

    modules["cartridges.train"].__dict__.update(
        train=library_train, TrainConfig=TrainConfig, LossEvalConfig=_Values,
        CosWithWarmup=types.SimpleNamespace(Config=_Values),
    )  # fmt: skip
    modules["cartridges.cache"].__dict__.update(KVCacheFactory=Factory, TrainableCache=_Values)
    modules["cartridges.datasets"].__dict__.update(
        DataSource=_Values, TrainDataset=types.SimpleNamespace(Config=_Values)
    )
    modules["cartridges.models"].__dict__.update(FlexLlamaForCausalLM=object)
    modules["cartridges.models.config"].__dict__.update(HFModelConfig=_Values)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    init = text_prefix(loaded, "a", 16)
    result = train(loaded, gold_rows(4), gold_rows(2), LIBRARY, init, folder=tmp_path)
    assert (result.step, result.frozen, result.finished) == (9, 1, True)
    (config,) = seen
    assert config.model.model_cls is object
    rows = read_dataset(config.dataset.data_sources[0].path)
    assert len(rows) == 4
    assert all(row.answer.top_logprobs is not None for row in rows)
