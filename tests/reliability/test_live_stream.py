"""Fifty tabs on the live stream of the real server: cut off and resumed, nobody misses or hears twice; memory is flat.

The short version of ``benchmarks/dashboard.py --parts stream``, which does it for ten minutes.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.dashboard_parts.stream import watch
from benchmarks.dashboard_parts.world import served

WATCHERS = 50
ALLOWED_MIB = 24.0  # of noise: fifty threads and their buffers come and go


def test_fifty_tabs_resume_without_a_gap_or_a_duplicate(tmp_path: Path) -> None:
    with served(tmp_path / "data") as server:
        watch(server, watchers=WATCHERS, seconds=3.0, patience=(0.5, 1.5), seed=7)  # warm
        found = watch(server, watchers=WATCHERS, seconds=12.0, patience=(0.5, 3.0), seed=1)
    assert [told.error for told in found.watchers if told.error] == []
    assert [told.refused for told in found.watchers] == [0] * WATCHERS
    assert [told.resets for told in found.watchers] == [0] * WATCHERS
    assert all(told.connections >= 2 for told in found.watchers[1:]), "everybody but the first was cut off"
    assert len(found.watchers[0].states) >= 4, "there was something to miss"
    assert all(told.states for told in found.watchers)
    assert found.gaps == 0
    assert found.duplicates == 0
    assert found.left_open == 0, "places are given back"
    assert found.growth_mib < ALLOWED_MIB
