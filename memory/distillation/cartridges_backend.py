"""Training by the Cartridges library (HazyResearch, arXiv 2506.06266), for those who have it and a GPU.

The library is not a dependency: it is imported when it is asked for. Our configuration becomes its ``TrainConfig`` by
``library_config``, as plain data; rows become a file that it reads, in which every message has token ids, and answers
without a teacher have probability 1 on their tokens. The initial prefix is handed over as tensors, because the library
reads the number of frozen slots of a file from the wrong axis (``TrainableCache.from_pretrained``).

Source of names and defaults: shizhehe/cartridges ``cartridges/train.py`` and ``cache.py``, October 2025. What it has no
field for is named in the log and not done: row weights, early stopping, a time budget, stopping, going on after a kill.
Its loss is ``upstream`` whatever ``training.loss`` says.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from memory.cartridges.torch_format import read_torch_file
from memory.distillation.config import TrainingConfig
from memory.distillation.dataset import write_dataset
from memory.distillation.encoding import Encoder, Example, row_name
from memory.distillation.errors import BackendMissing, TrainerError
from memory.distillation.rows import FlatTopLogprobs, Row, RowMessage
from memory.distillation.trainer import FINAL_SHARE, TrainingResult
from workspace.models import LoadedModel
from workspace.prefix import KVPrefix, fit_prefix

logger = logging.getLogger(__name__)

#: The library's own model classes, by the type of model.
MODEL_CLASSES = {"llama": "FlexLlamaForCausalLM", "qwen3": "FlexQwen3ForCausalLM"}
_PACK = 128  # FlexAttention works in blocks of so many tokens
_MODULES = (
    "cartridges.train",
    "cartridges.cache",
    "cartridges.datasets",
    "cartridges.models",
    "cartridges.models.config",
)


def train_with_library(
    loaded: LoadedModel,
    train: Sequence[Row],
    evaluation: Sequence[Row],
    config: TrainingConfig,
    init: KVPrefix,
    *,
    folder: Path,
) -> TrainingResult:
    """Run ``cartridges.train.train`` and read its last file. Raises ``BackendMissing`` and ``TrainerError``."""
    kind = str(loaded.model.config.get_text_config().model_type)
    if kind not in MODEL_CLASSES:
        raise BackendMissing(
            f"the cartridges library trains {' and '.join(MODEL_CLASSES)} models, not {kind}; use training.trainer: "
            "inprocess"
        )
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("CARTRIDGES_OUTPUT_DIR", str(folder))  # read while the library is imported
    os.environ.setdefault("CARTRIDGES_DIR", str(folder))
    library = import_library()
    for lacking in not_honoured(config, train):
        logger.warning("the cartridges library has no field for %s; it is ignored", lacking)
    encoder = Encoder(loaded)
    examples = [_example(encoder, row, index, config) for index, row in enumerate(train)]
    held_out = [_example(encoder, row, index, config) for index, row in enumerate(evaluation)]
    paths = {"train": folder / "library_train.parquet", "eval": folder / "library_eval.parquet"}
    write_dataset(paths["train"], [library_row(encoder, row, ex) for row, ex in zip(train, examples, strict=True)])
    if held_out:
        write_dataset(
            paths["eval"], [library_row(encoder, row, ex) for row, ex in zip(evaluation, held_out, strict=True)]
        )
    plan = library_config(
        config,
        name=folder.name,
        model=str(loaded.model.config._name_or_path or loaded.name),
        model_class=MODEL_CLASSES[kind],
        train=paths["train"],
        evaluation=paths["eval"] if held_out else None,
        folder=folder,
        rows=len(examples),
        row_tokens=sum(example.fed for example in examples) / len(examples),
    )
    run = _instantiate(library, plan, fit_prefix(loaded, init))
    library["cartridges.train"].train(run)
    return _result(Path(run.run_dir), loaded, config)


def library_config(
    config: TrainingConfig,
    *,
    name: str,
    model: str,
    model_class: str,
    train: Path,
    evaluation: Path | None,
    folder: Path,
    rows: int,
    row_tokens: float,
) -> dict[str, Any]:
    """Our numbers under the library's names; what are objects there are nested mappings here.

    A step of the library is one packed sequence, so its length is what a step of ours reads. ``rows`` and
    ``row_tokens``: how many there are, and their mean length.
    """
    packed = max(_PACK, math.ceil(config.rows * row_tokens / _PACK) * _PACK)
    steps_per_epoch = max(1, math.ceil(rows / config.rows))
    epochs = math.ceil(config.max_steps / steps_per_epoch)
    dataset = {
        "data_sources": [{"path": str(train), "type": "local"}],
        "top_k_logits": config.top_k,
        "targets": "logits",
        "packing_mode": "pad",
        "packed_seq_length": packed,
    }
    held_out = [] if evaluation is None else [{"path": str(evaluation), "type": "local"}]
    return {
        "name": name,
        "output_dir": str(folder),
        "model": {"pretrained_model_name_or_path": model, "model_cls": model_class, "tuning_method": "custom_prefix"},
        "wandb": None,
        "dataset": dataset,
        "loss_eval_every_n_steps": config.evaluate_every if held_out else None,
        "loss_evals": [
            {"dataset": dataset | {"data_sources": [source]}, "name_for_wandb": "held_out"} for source in held_out
        ],
        "generate_eval_every_n_steps": None,
        "global_batch_size": 1,
        "epochs": epochs if config.epochs is None else min(epochs, config.epochs),
        "optimizer": "adam",
        "lr": config.learning_rate,
        "lr_scheduler": {
            "max_steps": config.max_steps,
            "warmup_steps": max(1, config.warmup_steps),
            "warmup_min_lr": 0.0,
            "alpha_f": FINAL_SHARE,
        },
        "weight_decay": 0.0,
        "kv_cache_initializer": {"num_frozen_tokens": config.frozen},
        "save_every_n_steps": config.save_every,
        "save_after_training": True,
        "keep_last_n_saved": config.keep_last,
        "save_to_wandb": False,
        "seed": config.seed,
    }


def not_honoured(config: TrainingConfig, rows: Sequence[Row]) -> list[str]:
    """What of our configuration the library has no field for, where it differs from doing nothing."""
    found = []
    if any(row.weight != 1 for row in rows) or config.gold_weight != 1:
        found.append("weights of rows")
    if config.step_size == "relative":
        found.append("training.step_size: relative, so that learning_rate is used as it is")
    if config.loss != "upstream":
        found.append(f"training.loss {config.loss}")
    if config.early_stop_patience:
        found.append("training.early_stop_patience")
    if config.time_budget_seconds is not None:
        found.append("training.time_budget_seconds")
    return found


def library_row(encoder: Encoder, row: Row, example: Example) -> Row:
    """``row`` as the library reads it: token ids everywhere, and the answer's targets as log-probabilities."""
    messages = [
        RowMessage(message.role, message.content, token_ids=tuple(encoder.plain(message.content)))
        for message in row.messages[:-1]
    ]
    targets = example.targets
    kept = np.isfinite(targets.top_logprobs)
    answer = example.token_ids[example.start :]
    top = FlatTopLogprobs(
        np.repeat(targets.offsets, kept.sum(axis=1)).astype(np.int32),
        targets.top_ids[kept].astype(np.int32),
        targets.top_logprobs[kept],
        (len(answer), targets.top_ids.shape[1]),
    )
    messages.append(RowMessage("assistant", row.answer.content, token_ids=answer, top_logprobs=top))
    return dataclasses.replace(row, messages=tuple(messages))


def import_library() -> dict[str, Any]:
    """The library's modules. Raises ``BackendMissing`` that says what is lacking."""
    try:
        return {name: importlib.import_module(name) for name in _MODULES}
    except (ImportError, KeyError) as error:
        raise BackendMissing(
            f"training.trainer is cartridges, but that library cannot be imported ({error}); install it from its "
            "repository (HazyResearch/cartridges; Python 3.12, a CUDA GPU), or use training.trainer: inprocess"
        ) from error


def _instantiate(library: dict[str, Any], plan: dict[str, Any], init: KVPrefix) -> Any:
    """The library's own objects for ``plan``; the initial prefix is handed over as it is."""
    train, cache, datasets = (library[f"cartridges.{name}"] for name in ("train", "cache", "datasets"))
    models = library["cartridges.models"]

    class FromPrefix(cache.KVCacheFactory):  # type: ignore[misc, name-defined]
        class Config(cache.KVCacheFactory.Config):  # type: ignore[misc, name-defined]
            pass

        def initialize_kv_cache(self, tokenizer: Any, model: Any, attn_config: Any) -> Any:
            dtype = next(model.parameters()).dtype
            return cache.TrainableCache(
                config=attn_config,
                init_keys=[keys.to(dtype) for keys in init.keys],
                init_values=[values.to(dtype) for values in init.values],
                num_frozen_tokens=self.config.num_frozen_tokens,
            )

    def dataset(values: dict[str, Any]) -> Any:
        sources = [datasets.DataSource(**source) for source in values["data_sources"]]
        return datasets.TrainDataset.Config(**{**values, "data_sources": sources})

    model = dict(plan["model"])
    model["model_cls"] = getattr(models, model["model_cls"])
    return train.TrainConfig(
        **{
            **plan,
            "model": library["cartridges.models.config"].HFModelConfig(**model),
            "dataset": dataset(plan["dataset"]),
            "loss_evals": [
                train.LossEvalConfig(**{**item, "dataset": dataset(item["dataset"])}) for item in plan["loss_evals"]
            ],
            "lr_scheduler": train.CosWithWarmup.Config(**plan["lr_scheduler"]),
            "kv_cache_initializer": FromPrefix.Config(**plan["kv_cache_initializer"]),
        }
    )


def _example(encoder: Encoder, row: Row, index: int, config: TrainingConfig) -> Example:
    return encoder.example(row, name=row_name(index, row), top_k=config.top_k, max_tokens=config.max_tokens)


def _result(folder: Path, loaded: LoadedModel, config: TrainingConfig) -> TrainingResult:
    """What the library left. Its frozen count is checked, as its own reader gets it wrong."""
    found = sorted(folder.glob("cache-step*.pt"), key=lambda path: int(path.stem.removeprefix("cache-step")))
    if not found:
        raise TrainerError(f"the cartridges library ended without a file cache-step*.pt in {folder}; see its log")
    keys, values, frozen = read_torch_file(found[-1])
    if frozen != config.frozen:
        raise TrainerError(f"{found[-1]} has {frozen} frozen slots, but training.frozen is {config.frozen}")
    step = int(found[-1].stem.removeprefix("cache-step"))
    prefix = fit_prefix(loaded, KVPrefix(tuple(keys), tuple(values)))
    return TrainingResult(prefix, frozen, step, step, "steps", found[-1], {"steps": step, "trainer": "cartridges"})
