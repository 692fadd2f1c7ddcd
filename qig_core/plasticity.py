"""Can a kernel still learn? Dormant units, effective rank and weight norm on a probe batch.

Networks that learn for a long time lose the ability to learn (Dohare et al. 2024, Nature 632:768): units fall silent,
their activity collapses into few directions, weights grow. Three numbers make that visible:

- **Dead units**: hidden units of the SwiGLU whose mean absolute activity is at most ``DORMANT`` times that of the
  average unit of their block (the dormancy score of Sokar et al. 2023, arXiv 2302.12902, definition 3.1).
- **Effective rank**: exp of the entropy of the normalised singular values (Roy and Vetterli 2007) of the outer state
  over all positions of the probe. It lies in [1, min(positions, width)].
- **Weight norm**: root of the sum of squares over the recursion's weights.

It only looks. Renewing units (continual backpropagation, shrink-and-perturb) is not here: nothing that we measured
shows yet that a kernel of this size and age needs it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qig_core.errors import InvalidInput
from qig_core.m8_kernel import Block, M8Kernel
from qig_core.vocabulary import PAD

DORMANT = 0.025


@dataclass(frozen=True, slots=True)
class Plasticity:
    """See the module docstring. ``units``: hidden units of all blocks; ``width``: the largest possible rank."""

    dead_units: int
    units: int
    eff_rank: float
    width: int
    weight_norm: float


@torch.no_grad()
def measure_plasticity(kernel: M8Kernel, ids: Tensor) -> Plasticity:
    """One pass over the probe ids [B, T], padded right. Leaves the kernel as it was. Raises InvalidInput for no ids."""
    real = ids != PAD
    if not bool(real.any()):
        raise InvalidInput("the probe holds no symbol to measure plasticity on")
    blocks = [block.down for block in kernel.blocks if isinstance(block, Block)]
    activity = [torch.zeros(layer.in_features, dtype=torch.float64, device=ids.device) for layer in blocks]
    skip = kernel.config.memory_tokens

    def listen(total: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            hidden = inputs[0][:, skip:]  # [B, T, H]: what the SwiGLU hands to its output layer, in every loop
            total.add_(hidden[real].abs().sum(0).double())

        return hook

    was_training = kernel.training
    kernel.eval()
    handles = [layer.register_forward_pre_hook(listen(total)) for layer, total in zip(blocks, activity, strict=True)]
    try:
        state = kernel(ids, state_loops=True).loops[-1][real]  # [S, D]
    finally:
        for handle in handles:
            handle.remove()
        kernel.train(was_training)
    dead = sum(int((total <= DORMANT * total.mean()).sum()) for total in activity)
    square = sum(float(p.double().square().sum()) for p in kernel.blocks.parameters())
    return Plasticity(
        dead_units=dead,
        units=sum(len(total) for total in activity),
        eff_rank=effective_rank(state),
        width=state.shape[1],
        weight_norm=square**0.5,
    )


def effective_rank(rows: Tensor) -> float:
    """exp(H(s / sum s)) of the singular values s of rows [S, D]; 1 for a matrix of zeros."""
    values = torch.linalg.svdvals(rows.double())
    total = values.sum()
    if float(total) <= 0.0:
        return 1.0
    share = values / total
    return float(torch.special.entr(share).sum().exp())
