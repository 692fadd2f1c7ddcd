"""Integration of a kernel: geometric integrated information Phi_G between consecutive recursive states.

Phi_G (Oizumi, Tsuchiya, Amari 2016, PNAS 113:14817) is the information that the whole state X carries about the next
state Y beyond what the parts of a partition carry about themselves: the divergence from the full model
p(x) p(y | x) to the nearest model in which A' has no entry between parts. Gaussian: ``partition_solver.py``.

    value       Phi_G at the minimum-information bipartition (MIB), nats
    normalised  1 - exp(-2 Phi_G / K), K = coordinates of the smaller part; in [0, 1)
    MIB         the bipartition with the smallest normalised value, so that lopsided cuts are not favoured
    kappa       tr(W (A-A') S_X (A-A')') / tr(W A S_X A'), W = S_E'^-1: cross-part share of the causal influence

Gradient-free by construction: everything runs under ``no_grad`` on detached copies in float64, no parameter enters,
the read-out is fixed. Phi is therefore moved by nothing but the dynamics; it belongs in no loss.

Conventions, stated once: units are standardised; observation noise of ``snr_db`` (20 dB: 1 % of each unit's variance)
is added to the covariances in closed form; a unit that does not vary is pure noise; surrogates pair each state with
the successor of another; at least 20 k^2 state pairs, otherwise ``phi`` is None with a reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from qig_core import gaussian
from qig_core.errors import InvalidInput
from qig_core.m8_kernel import M8Kernel
from qig_core.partition_solver import MAX_ITERATIONS, TOLERANCE, Disconnected, solve
from qig_core.read_out import projection
from qig_core.vocabulary import PAD

Parts = tuple[tuple[int, ...], tuple[int, ...]]

MAX_UNITS = 10
SAMPLES_PER_SQUARE = 20  # N >= 20 k^2: the bias of Phi on white noise is then below 0.005
_DEAD = 1e-5  # a unit whose deviation is below this share of its magnitude is constant up to rounding
_SURROGATES = 2
# A measurement looks at every bipartition roughly, then exactly at those that may be the weakest: a sixth of the time.
# After five iterations the weakest cut was within 4 % of the lowest value seen (kernels and rotations, 15 systems).
_ROUGH_ITERATIONS = 5
_ROUGH_MARGIN = 1.15
_FINE_TOLERANCE = 1e-6  # nats that one more step would gain; finite samples leave 0.005 open


@dataclass(frozen=True)
class PhiResult:
    """Phi_G of given covariances. ``a`` holds A' of every partition solved, to warm-start the next measurement."""

    value_nats: float
    normalised: float
    partition: Parts  # units of the smaller part first
    kappa: float
    mutual_information: float
    iterations: int
    converged: bool
    values: Tensor  # [P] nats for each partition tried, in the order of ``partitions``
    partitions: tuple[Parts, ...]
    a: Tensor  # [P, d, d]


@dataclass(frozen=True)
class IntegrationReport:
    """One measurement. ``phi`` is None, with a ``reason``, where it could not be measured; never a guess."""

    phi: float | None
    reason: str | None
    raw_nats: float | None
    surrogate: float | None  # mean Phi_G of the surrogates at the same bipartition, nats; subtracted before normalising
    kappa: float | None
    units: int
    partition: Parts | None
    samples: int
    snr_db: float
    read_out: str
    total_correlation: float | None = None
    o_information: float | None = None
    stochastic_interaction: float | None = None
    mutual_information: float | None = None


@lru_cache(maxsize=16)
def bipartitions(units: int) -> tuple[Parts, ...]:
    """All 2^(units-1) - 1 ways to cut the units in two, the smaller part first."""
    cuts: list[Parts] = []
    for code in range(1, 2 ** (units - 1)):
        one = tuple(i for i in range(units) if code >> i & 1)
        two = tuple(i for i in range(units) if not code >> i & 1)
        cuts.append((one, two) if len(one) <= len(two) else (two, one))
    return tuple(cuts)


def _labels(partitions: Sequence[Parts], groups: Sequence[Sequence[int]]) -> Tensor:
    """[P, d] bool: coordinate belongs to the first part."""
    size = sum(len(group) for group in groups)
    labels = torch.zeros(len(partitions), size, dtype=torch.bool)
    for row, (one, _) in enumerate(partitions):
        for unit in one:
            labels[row, list(groups[unit])] = True
    return labels


@torch.no_grad()
def phi_g(
    cov_x: Tensor,
    cov_yx: Tensor,
    cov_y: Tensor,
    parts: Sequence[Parts] | None = None,
    groups: Sequence[Sequence[int]] | None = None,
    start: Tensor | None = None,
    tolerance: float = TOLERANCE,
    max_iterations: int = MAX_ITERATIONS,
    between: Callable[[], None] | None = None,
) -> PhiResult:
    """Phi_G of a stationary or non-stationary Gaussian pair (X, Y) from its covariances.

    ``cov_x``, ``cov_y`` [d, d]; ``cov_yx`` [d, d] = E[y x'], rows belong to Y. ``groups``: coordinates of each unit
    (default: every coordinate is a unit). ``parts``: bipartitions of the units to try, as pairs of index tuples
    (default: all). ``start``: ``PhiResult.a`` of an earlier call with the same partitions. ``between`` is called before
    each iteration of the solver (see there). Values in nats, float64.
    Raises InvalidInput for shapes that do not fit and for covariances that are not positive definite.
    """
    cov_x, cov_yx, cov_y = (m.detach().double() for m in (cov_x, cov_yx, cov_y))
    d = cov_x.shape[-1]
    if any(m.shape != (d, d) for m in (cov_x, cov_yx, cov_y)):
        raise InvalidInput(f"covariances must all be [{d}, {d}], got {[list(m.shape) for m in (cov_x, cov_yx, cov_y)]}")
    groups = [[i] for i in range(d)] if groups is None else groups
    if sorted(i for group in groups for i in group) != list(range(d)):
        raise InvalidInput(f"the groups must cover the {d} coordinates, each once")
    if not 2 <= len(groups) <= MAX_UNITS:
        raise InvalidInput(f"Phi is measured on 2 to {MAX_UNITS} units, got {len(groups)}; read the state out first")
    partitions = bipartitions(len(groups)) if parts is None else tuple(_checked(cut, len(groups)) for cut in parts)
    law = gaussian.regress(cov_x, cov_yx, cov_y)
    information = gaussian.mutual_information(law)  # also proves the covariances positive definite
    labels = _labels(partitions, groups).to(cov_x.device)
    free = labels.unsqueeze(-1) == labels.unsqueeze(-2)  # [P, d, d]
    found = solve(law, free, start, tolerance, max_iterations, between)
    smaller = torch.minimum(labels.sum(-1), (~labels).sum(-1)).double()  # K of each partition
    best = int((found.value / smaller).argmin())
    return PhiResult(
        value_nats=float(found.value[best]),
        normalised=normalise(float(found.value[best]), int(smaller[best])),
        partition=partitions[best],
        kappa=_kappa(law, found, best),
        mutual_information=information,
        iterations=found.iterations,
        converged=bool(found.converged.all()),
        values=found.value,
        partitions=partitions,
        a=found.a,
    )


def _checked(cut: Parts, units: int) -> Parts:
    one, two = (tuple(sorted(part)) for part in cut)
    if not one or not two or sorted(one + two) != list(range(units)):
        raise InvalidInput(f"{cut} is not a cut of {units} units into two parts that are not empty")
    return (one, two) if len(one) <= len(two) else (two, one)


def normalise(nats: float, smaller: int) -> float:
    """1 - exp(-2 Phi / K): Linfoot's informational correlation squared, per coordinate of the smaller part."""
    return -math.expm1(-2.0 * max(nats, 0.0) / smaller)


def _kappa(law: gaussian.Regression, found: Disconnected, best: int) -> float:
    w = torch.linalg.inv(found.cov_e[best])
    gap = law.a - found.a[best]
    total = float((w @ law.a @ law.cov_x @ law.a.mT).diagonal().sum())
    cross = float((w @ gap @ law.cov_x @ gap.mT).diagonal().sum())
    return min(max(cross / total, 0.0), 1.0) if total > 1e-12 else 0.0


def _read(x: Tensor, y: Tensor, k: int, read_out: str) -> tuple[Tensor, Tensor]:
    """Units [N, k] of both states. ``blocks``: mean of k equal contiguous blocks, which together cover the state."""
    width = x.shape[-1]
    if read_out == "projection":
        basis = projection(width, k).to(x.device)
    elif read_out == "blocks":
        if width % k:
            raise InvalidInput(f"a state of width {width} has no {k} equal blocks; use read_out='projection'")
        basis = torch.eye(k, dtype=torch.float64, device=x.device).repeat_interleave(width // k, dim=0) * (k / width)
    else:
        raise InvalidInput(f"unknown read_out {read_out!r}; choose 'projection' or 'blocks'")
    return x @ basis, y @ basis


def _standardise(units: Tensor) -> Tensor:
    """Mean 0 and variance 1 per unit of [N, k]; a unit that is constant up to rounding becomes 0."""
    centred = units - units.mean(0)
    deviation = centred.square().mean(0).sqrt()
    dead = deviation <= _DEAD * units.square().mean(0).sqrt()
    return torch.where(dead, torch.zeros_like(centred), centred / deviation.clamp_min(1e-300))


def _covariances(x: Tensor, y: Tensor, snr_db: float) -> tuple[Tensor, Tensor, Tensor]:
    """S_X, S_YX, S_Y of standardised units under observation noise; a dead unit keeps unit variance, all noise."""
    noise = 10.0 ** (-snr_db / 10.0)
    cov_x, cov_yx, cov_y = x.mT @ x / len(x), y.mT @ x / len(x), y.mT @ y / len(x)
    for cov in (cov_x, cov_y):
        variance = cov.diagonal()
        variance += torch.where(variance == 0, 1.0, noise)
    return cov_x, cov_yx, cov_y


@torch.no_grad()
def measure_integration(
    x: Tensor,
    y: Tensor,
    k: int = 8,
    read_out: str = "projection",
    snr_db: float = 20.0,
    generator: torch.Generator | None = None,
    between: Callable[[], None] | None = None,
) -> IntegrationReport:
    """Phi and its companions from state pairs x, y [N, D] (row n of y follows row n of x).

    ``generator`` draws the surrogates (default: a fixed seed, so that equal states give equal numbers). ``between`` is
    called every few milliseconds of the work: a caller that shares the processor may wait there.
    """
    if x.shape != y.shape or x.dim() != 2:
        raise InvalidInput(f"state pairs must be two tensors [N, D], got {list(x.shape)} and {list(y.shape)}")
    if not 2 <= k <= MAX_UNITS:
        raise InvalidInput(f"Phi is measured on 2 to {MAX_UNITS} units, got k={k}")
    samples, needed = len(x), SAMPLES_PER_SQUARE * k * k
    reason = None
    if samples < needed:
        reason = f"{samples} state pairs, needs {needed} (20 k^2) for k={k}"
    elif not (bool(x.isfinite().all()) and bool(y.isfinite().all())):
        reason = "the states are not finite"
    if reason is not None:
        return IntegrationReport(None, reason, None, None, None, k, None, samples, snr_db, read_out)
    units_x, units_y = (_standardise(u) for u in _read(x.detach().double(), y.detach().double(), k, read_out))
    cov_x, cov_yx, cov_y = _covariances(units_x, units_y, snr_db)
    result = _weakest_cut(cov_x, cov_yx, cov_y, between)
    surrogate = _surrogate(units_x, units_y, snr_db, result.partition, generator, between)
    law = gaussian.regress(cov_x, cov_yx, cov_y)
    return IntegrationReport(
        phi=normalise(result.value_nats - surrogate, len(result.partition[0])),
        reason=None,
        raw_nats=result.value_nats,
        surrogate=surrogate,
        kappa=result.kappa,
        units=k,
        partition=result.partition,
        samples=samples,
        snr_db=snr_db,
        read_out=read_out,
        total_correlation=gaussian.total_correlation(cov_y),
        o_information=gaussian.o_information(cov_y),
        stochastic_interaction=gaussian.stochastic_interaction(law, result.partition),
        mutual_information=result.mutual_information,
    )


def _weakest_cut(cov_x: Tensor, cov_yx: Tensor, cov_y: Tensor, between: Callable[[], None] | None) -> PhiResult:
    """``phi_g`` over all bipartitions, exact only for those that come near the weakest."""
    rough = phi_g(cov_x, cov_yx, cov_y, max_iterations=_ROUGH_ITERATIONS, between=between)
    per_coordinate = rough.values / torch.tensor([len(one) for one, _ in rough.partitions], device=rough.values.device)
    near = torch.nonzero(per_coordinate <= _ROUGH_MARGIN * per_coordinate.min() + 1e-4).squeeze(-1)
    parts = [rough.partitions[index] for index in near.tolist()]
    start = rough.a[near]
    return phi_g(cov_x, cov_yx, cov_y, parts=parts, start=start, tolerance=_FINE_TOLERANCE, between=between)


def _surrogate(
    x: Tensor,
    y: Tensor,
    snr_db: float,
    cut: Parts,
    generator: torch.Generator | None,
    between: Callable[[], None] | None,
) -> float:
    """Mean Phi_G at the same cut when successors are shuffled in time: what finite samples alone produce."""
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    values = []
    for _ in range(_SURROGATES):
        order = torch.randperm(len(y), generator=generator).to(y.device)
        values.append(phi_g(*_covariances(x, y[order], snr_db), parts=[cut], between=between).value_nats)
    return sum(values) / len(values)


@torch.no_grad()
def kernel_states(
    kernel: M8Kernel,
    ids: Tensor,
    max_pairs: int = 4096,
    passes: int = 1,
    generator: torch.Generator | None = None,
    noise: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """State pairs (x, y), each [N, D]: z_H after the last two outer cycles, at the valid positions of probe ids [B, T].

    ``passes``: which pass is observed (1: the first). At most ``max_pairs`` positions, drawn without replacement
    (default: a fixed seed). ``noise``: the recursion runs with its own noise, if it has any (default: without). The
    kernel's training mode is left as it is; use it in eval mode.
    """
    carry = None
    output = kernel(ids, state_loops=True, noise=noise)
    for _ in range(passes - 1):
        carry = output.carry
        output = kernel(ids, carry, state_loops=True, noise=noise)
    valid = ids != PAD
    x, y = output.loops[-2][valid], output.loops[-1][valid]  # [N, D]
    if len(x) > max_pairs:
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        keep = torch.randperm(len(x), generator=generator)[:max_pairs].to(x.device)
        x, y = x[keep], y[keep]
    return x, y
