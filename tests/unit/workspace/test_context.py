"""A context that exists is consistent; what is not is refused with the shapes at fault."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch

from tests.support.architectures import segment
from workspace.context import Context, Delta, Recorder, Segment
from workspace.errors import InvalidWorkspace


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keys": torch.zeros(2, 5, 8)}, "keys must have 4 dimensions, got shape \\(2, 5, 8\\)"),
        ({"values": torch.zeros(1, 2, 4, 8)}, "keys \\(1, 2, 5, 8\\) and values \\(1, 2, 4, 8\\) differ"),
        ({"bias": torch.zeros(1, 2, 4)}, "bias has shape \\(1, 2, 4\\), which does not fit \\(1, 2, 5\\)"),
        ({"bias": torch.zeros(1, 2, 1)}, "bias has shape"),
        ({"bias": torch.zeros(1, 3, 5)}, "bias has shape"),
        ({"bias": torch.zeros(1, 2, 5).long()}, "must be floating point"),
        ({"birth": torch.zeros(1, 5)}, "birth must be int64, got torch.float32"),
        ({"birth": torch.zeros(1, 4).long()}, "birth has shape"),
        ({"mask": torch.ones(1, 5)}, "mask must be bool"),
        ({"mask": torch.ones(5).bool()}, "mask must have 2 dimensions"),
        ({"distance": torch.zeros(4).long()}, "distance must be an int or int64 of shape \\(5,\\)"),
        ({"distance": torch.zeros(5)}, "distance must be an int or int64"),
    ],
)
def test_a_segment_whose_tensors_contradict_each_other_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidWorkspace, match=message):
        segment(5, **fields)


def test_a_segment_without_tokens_is_refused() -> None:
    empty = torch.zeros(1, 2, 0, 8)
    with pytest.raises(InvalidWorkspace, match="at least one virtual token; leave the layer out"):
        Segment(empty, empty, torch.zeros(1, 1, 0), torch.zeros(1, 0).long())


def test_rows_and_heads_may_be_shared() -> None:
    one = segment(5, bias=torch.zeros(1, 1, 5), birth=torch.zeros(4, 5).long(), mask=torch.ones(4, 5).bool())
    assert one.tokens == 5
    segment(5, rows=4, bias=torch.zeros(1, 2, 5), birth=torch.zeros(1, 5).long(), mask=torch.ones(1, 5).bool())
    with pytest.raises(InvalidWorkspace, match="mask has shape"):
        segment(5, rows=4, mask=torch.ones(3, 5).bool())


def test_deltas_are_checked() -> None:
    Delta(torch.zeros(3, 8), torch.zeros(3).long())
    Delta(torch.zeros(3, 8), torch.zeros(1).long())
    with pytest.raises(InvalidWorkspace, match="vector must have 2 dimensions"):
        Delta(torch.zeros(8), torch.zeros(1).long())
    with pytest.raises(InvalidWorkspace, match="first has shape \\(2,\\), which does not fit \\(3,\\)"):
        Delta(torch.zeros(3, 8), torch.zeros(2).long())
    with pytest.raises(InvalidWorkspace, match="first int64"):
        Delta(torch.zeros(3, 8), torch.zeros(3))


def test_contexts_are_frozen_and_know_when_they_are_empty() -> None:
    assert Context().empty
    assert not Context({0: segment()}).empty
    assert not Context(deltas={0: Delta(torch.zeros(1, 8), torch.zeros(1).long())}).empty
    assert not Context(recorder=Recorder([0])).empty
    with pytest.raises(InvalidWorkspace, match="unknown attention back end 'flash'; known are eager, fused, merge"):
        Context(backend="flash")  # type: ignore[arg-type]
    with pytest.raises(FrozenInstanceError):
        Context().backend = "eager"  # type: ignore[misc]


def test_nothing_that_travels_has_a_method_to() -> None:
    """accelerate calls ``to`` on every keyword argument that has it."""
    for carried in (Context(), segment(), Recorder([0])):
        assert not hasattr(carried, "to")
