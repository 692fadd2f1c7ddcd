"""Held-out rows, divided: some that training watches, and others that the gate asks.

Training keeps the prefix whose loss on held-out rows was the lowest. A gate that asked the same rows would judge a
candidate on what it was chosen by, and a little too kindly. So no observation is on both sides.
"""

from __future__ import annotations

from collections.abc import Sequence

from memory.distillation.config import GateConfig
from memory.distillation.rows import Row

WATCHED_SHARE = 1 / 3  #: Of the observations that the gate may ask, so many go to training.


def divide(rows: Sequence[Row], gate: GateConfig, least: int) -> tuple[list[Row], list[Row]]:
    """The held-out ``rows`` that are watched in training, and those that the gate asks.

    By content key, in the order of the keys, which are hashes: the same in every attempt. The gate comes first: it gets
    ``min_rows`` observations where there are as many, and never more than ``max_rows``. What the gate does not ask
    (questions of self-study) is watched. Fewer than ``least`` rows choose by noise: then none are watched, so that
    training goes to its last step, and all are asked.
    """
    held_out = [row for row in rows if row.split == "eval"]
    replay = [row for row in held_out if row.type == "replay"]
    keys = sorted({_key(row) for row in replay})
    count = min(gate.max_rows, max(gate.min_rows, len(keys) - int(len(keys) * WATCHED_SHARE)))
    for most in (count, gate.max_rows):
        asked = set(keys[:most])
        watched = [row for row in held_out if _key(row) not in asked]
        if len(watched) >= least:
            break
    else:
        watched = []
    return watched, [row for row in replay if _key(row) in asked]


def _key(row: Row) -> str:
    return str(row.metadata.get("content_key", ""))
