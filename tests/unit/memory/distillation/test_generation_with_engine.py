"""Data generation with a real engine as teacher: exact tokens, exact budget, and the same rows again."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lm.engine_client import EngineClient
from memory.distillation.config import make_distill_config
from memory.distillation.data_generation import generate_dataset
from memory.distillation.dataset import read_dataset
from memory.distillation.leftovers import DATASET
from tests.support.experiences import tagged
from tests.support.tiny_model import save_tiny_model
from workspace.engine import Engine
from workspace.models import load_model


def test_an_engine_teaches(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", context_length=512)
    loaded = load_model(str(folder), cache_dir=folder, dtype="float32", device="cpu")
    engine = Engine(loaded, max_active=2, max_waiting=1, threads=1, batching="exact")
    config = make_distill_config(
        {
            "top_logprobs": 8,
            "teacher": {"max_tokens": 6, "max_prompt_tokens": 300, "parallel": 3},
            "data": {"self_study": {"rows": 1, "memory_records": 3, "question_tokens": 8}},
        }
    )
    engine.start()
    try:
        datasets = []
        for name in ("one", "two"):
            report = generate_dataset(
                tagged(10),
                config,
                tmp_path / name,
                teacher=EngineClient(engine, timeout=30),
                count=lambda messages: len(engine.render(messages)),
            )
            assert report.bad == []
            datasets.append(read_dataset(tmp_path / name / DATASET))
    finally:
        assert engine.stop()
    rows = datasets[0]
    assert rows == datasets[1]
    assert len(rows) == 11
    for row in rows[:10]:
        answer = row.answer
        assert answer.token_ids is not None
        assert answer.top_logprobs is not None
        assert answer.top_logprobs.shape == (6, 8)
        assert 200 < row.metadata["teacher_tokens"] <= 300
        assert row.metadata["dropped"] + row.metadata["memory"] == 9
        first = answer.top_logprobs.token_id[np.unique(answer.top_logprobs.token_idx, return_index=True)[1]]
        assert tuple(first.tolist()) == answer.token_ids, "greedy: the likeliest candidate is what was said"
    assert loaded.tokenizer.decode(rows[0].answer.token_ids) == rows[0].answer.content
