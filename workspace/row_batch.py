"""What a pass carries that takes one token of each of several sequences: their caches, and each one's own context.

It travels where a ``Context`` travels, as the keyword argument ``workspace``. The attention function (``attention.py``)
and the hooks (``residuals.py``) take it apart row by row, so a row is shown, steered and recorded as if it were alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from workspace.context import Context
from workspace.row_cache import Rows


@dataclass(frozen=True, slots=True, eq=False)
class RowBatch:
    """Made for one pass. A row whose context is None, or has nothing for a layer, is the stock model's there."""

    rows: Rows
    contexts: tuple[Context | None, ...]

    def on(self, layer: int) -> list[tuple[int, Context]]:
        """(row, context) of those that do something on ``layer``."""
        return [
            (row, context) for row, context in enumerate(self.contexts) if context is not None and _acts(context, layer)
        ]


def _acts(context: Context, layer: int) -> bool:
    recorder = context.recorder
    recorded = recorder is not None and layer in recorder.layers
    return recorded or layer in context.segments or layer in context.deltas
