"""The core: eight units that carry everything a kernel takes from one outer cycle to the next.

Between two outer cycles the state z_H of a position *is* its core, c [units], written into the width of the network by
a fixed orthonormal basis U: the very read-out in which Phi is measured, so that nothing of the state is hidden from the
measurement. z_L starts afresh in every cycle. A cycle proposes h = f(z_H + z_L), and the core takes it in:

    c <- Q norm(c + k norm(W h))        z_H <- U c        c starts as norm(W x)

Q is a fixed orthogonal matrix, as in unitary recurrent networks (Arjovsky, Shah, Bengio 2016, arXiv 1511.06464): what a
unit holds is spread evenly over the others before the next cycle reads it. Q^T = 1: over the T cycles of a pass each
content returns to where it stood, so that all passes look alike to the shared blocks (with a Q of no such order the
same kernel needed about twice the steps). The gate k in (0, 1) is learned. W, k and the blocks are trained by the
task's loss and by nothing else; the ablation with other designs is in docs/kernels.md.

What it does not do: measure anything; see ``integration.py`` for Phi.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qig_core.read_out import projection

MIXINGS = ("orthogonal", "identity")


class IntegratingCore(nn.Module):
    """See the module docstring. ``mixing="identity"``: Q = 1, each unit remembers itself only (the control)."""

    basis: Tensor
    turn: Tensor

    def __init__(self, units: int, width: int, mixing: str, cycles: int, gate: float, generator: torch.Generator):
        super().__init__()
        self.units = units
        self.read = nn.Linear(width, units, bias=False)  # W
        nn.init.orthogonal_(self.read.weight, generator=generator)
        self.gate = nn.Parameter(torch.tensor(math.log(gate / (1 - gate))))  # k = sigmoid(gate)
        # Rows of RMS 1 for a core of RMS 1, as all states of the network have.
        self.register_buffer("basis", (projection(width, units) * math.sqrt(width / units)).float())
        self.register_buffer("turn", mixer(units, cycles) if mixing == "orthogonal" else torch.eye(units))

    def start(self, x: Tensor) -> Tensor:
        """Input [..., D] -> the first z_H [..., D]."""
        return self.lift(F.rms_norm(self.read(x), (self.units,)))

    def forward(self, state: Tensor, proposal: Tensor) -> Tensor:
        """z_H [..., D] that lies in the core, and the cycle's proposal h [..., D] -> the next z_H [..., D]."""
        taken = F.rms_norm(self.read(proposal), (self.units,))
        held = F.rms_norm(self.units_of(state) + torch.sigmoid(self.gate) * taken, (self.units,))
        return self.lift(held @ self.turn.T)

    def units_of(self, state: Tensor) -> Tensor:
        """The core [..., units] of a state that lies in it."""
        return state @ self.basis * (self.units / state.shape[-1])

    def lift(self, units: Tensor) -> Tensor:
        """Core [..., units] -> state [..., D]."""
        return units @ self.basis.T


def mixer(units: int, cycles: int) -> Tensor:
    """Q [units, units]: orthogonal, spreads a unit evenly over the others, and Q^cycles = 1. ``units``: a power of two.

    Two cycles: Sylvester's Hadamard matrix. More: cos(a) 1 + sin(a) J, where J is the skew matrix with J^2 = -1 and
    equal entries off the diagonal (a skew-Hadamard matrix without its diagonal, Williamson 1944), and a is the
    multiple of 360 / cycles degrees nearest to 90.
    """
    one, matrix = torch.eye(units), torch.ones(1, 1)
    if cycles == 2:
        while len(matrix) < units:
            matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
        return matrix / math.sqrt(units)
    while len(matrix) < units:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((-matrix.T, matrix.T), 1)))
    angle = 2 * math.pi * max(1, math.floor(cycles / 4 + 0.5)) / cycles
    return math.cos(angle) * one + math.sin(angle) * (matrix - one) / math.sqrt(units - 1)
