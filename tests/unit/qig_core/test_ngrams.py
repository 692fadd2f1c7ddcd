"""Hashed n-grams: which rows a position reads, that it never looks ahead, and that unseen ones are silent."""

from __future__ import annotations

import torch

from qig_core.ngrams import LOOK_BACK, SIZES, NgramEmbedding


def _ids(rows: int = 2, length: int = 30, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 260, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_equal_ngrams_read_equal_rows_wherever_they_stand():
    embedding, ids = NgramEmbedding(4096, 8), _ids(1, 40)
    ids[0, 30:36] = ids[0, 10:16]
    rows = embedding.rows(ids)
    assert torch.equal(rows[0, 35], rows[0, 15])
    assert not torch.equal(rows[0, 35], rows[0, 16])


def test_rows_are_in_range_and_spread():
    buckets = 4096
    rows = NgramEmbedding(buckets, 8).rows(_ids(50, 200))
    assert int(rows.min()) >= 0
    assert int(rows.max()) < buckets
    used = torch.bincount(rows[:, LOOK_BACK:].flatten(), minlength=buckets)
    assert used[0] == 0
    # 48,750 draws over 4,095 rows: a fair hash leaves none empty and none far above its share of 12.
    assert int((used == 0).sum()) <= 3
    assert int(used.max()) < 40


def test_incomplete_ngrams_read_the_silent_row():
    rows = NgramEmbedding(64, 8).rows(_ids())
    for column, size in enumerate(SIZES):
        assert bool((rows[:, : size - 1, column] == 0).all())
        assert bool((rows[:, size - 1 :, column] > 0).all())


def test_a_row_depends_on_no_later_byte_and_on_exactly_its_own():
    embedding, ids = NgramEmbedding(1 << 15, 8), _ids(1, 30)
    edited = ids.clone()
    edited[0, 12] = (edited[0, 12] + 1) % 260
    changed = (embedding.rows(ids) != embedding.rows(edited))[0]  # [T, sizes]
    for column, size in enumerate(SIZES):
        assert torch.nonzero(changed[:, column]).flatten().tolist() == list(range(12, 12 + size))


def test_a_fresh_table_says_nothing_and_learns_only_the_rows_it_read():
    embedding, ids = NgramEmbedding(512, 8), _ids(1, 10)
    assert torch.equal(embedding(ids), torch.zeros(1, 10, 8))
    embedding(ids).sum().backward()
    grad = embedding.table.grad
    assert grad is not None
    read = embedding.rows(ids).unique()
    touched = torch.nonzero(grad.abs().sum(-1)).flatten()
    assert torch.equal(touched, read[read > 0])
