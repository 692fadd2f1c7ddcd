"""Tables of the long-context proof: what closes how much of the gap, and how much of that is memory.

Every interval is a bootstrap over windows, paired: an arm and what it is compared with are drawn together, and so is
the gap that a difference is divided by.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.kernel_parts.common import table

Losses = dict[str, list[float]]  # per arm, in the order of the windows


def closed(losses: Losses, rows: Sequence[str], window: str, seed: int = 0, draws: int = 4000) -> list[list[str]]:
    """Table rows: loss, difference to ``window`` and part of the gap closed, with 95 % bootstrap intervals."""
    full, base = torch.tensor(losses["full context"]), torch.tensor(losses[window])
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(full), (draws, len(full)), generator=generator)
    gaps = (base - full)[picks].mean(dim=1)
    lines = []
    for name in rows:
        gain = base - torch.tensor(losses[name])
        gains = gain[picks].mean(dim=1)
        low, high = (float(gains.quantile(q)) for q in (0.025, 0.975))
        part_low, part_high = (float((gains / gaps).quantile(q)) for q in (0.025, 0.975))
        share = float(gain.mean() / (base - full).mean())
        lines.append(
            [
                name,
                f"{sum(losses[name]) / len(full):.4f}",
                f"{float(gain.mean()):+.4f} [{low:+.4f}, {high:+.4f}]",
                f"{share:.0%} [{part_low:.0%}, {part_high:.0%}]",
            ]
        )
    return lines


def memory(losses: Losses, seed: int = 0, draws: int = 4000) -> list[list[str]]:
    """Table rows: what the own summary is worth against another window's, and as part of the gap."""
    lines = []
    for name in losses:
        other, base = f"{name}: another window's at the end", f"{name.split(':')[0]}: sinks + window"
        if other not in losses:
            continue
        gain = torch.tensor(losses[other]) - torch.tensor(losses[name])
        gap = torch.tensor(losses[base]) - torch.tensor(losses["full context"])
        picks = torch.randint(len(gap), (draws, len(gap)), generator=torch.Generator().manual_seed(seed))
        gains, shares = gain[picks].mean(dim=1), gain[picks].mean(dim=1) / gap[picks].mean(dim=1)
        ends = [float(values.quantile(q)) for values in (gains, shares) for q in (0.025, 0.975)]
        lines.append(
            [
                name,
                f"{float(gain.mean()):+.4f} [{ends[0]:+.4f}, {ends[1]:+.4f}]",
                f"{float(gain.mean() / gap.mean()):.0%} [{ends[2]:.0%}, {ends[3]:.0%}]",
            ]
        )
    return lines


def report(losses: Losses) -> str:
    """A table for each way to get there, and one of what is memory."""
    parts = []
    for way in ("cut", "streamed"):
        rows = ["full context", *(name for name in losses if name.startswith(way))]
        head = [way, "loss", "better than sinks + window [95 %]", "part of the gap closed [95 %]"]
        parts.append(table(head, closed(losses, rows, f"{way}: sinks + window")))
    if found := memory(losses):
        parts.append(table(["own summary against another window's", "better [95 %]", "part of the gap [95 %]"], found))
    return "\n\n".join(parts)
