"""DiagonalFisherOptimizer: natural-gradient descent with a diagonal Fisher information, as a torch optimizer.

    f   = EMA of the diagonal Fisher, bias-corrected
    d   = m / (f^p + lambda^p),  m = bias-corrected EMA of the gradient
    d  <- d * min(1, c / RMS(d))                        trust clip, per tensor
    d  <- d * min(1, sqrt(2 kappa / (lr^2 d' f d)))     optional KL trust region, over all tensors
    theta <- theta - lr (d + w theta)                   decoupled decay

p = 1 is the natural gradient (Amari 1998), p = 1/2 the robust default; with p = 1/2, lambda = eps^2, c = inf it is
Adam (tested to 1e-6). The trust clip is FAdam's (Hwang 2024, arXiv 2405.12807), the sampled Fisher is the
Gauss-Newton-Bartlett estimator of Sophia (Liu et al. 2023, arXiv 2305.14342, algorithm 2).

Which Fisher runs is said by its name:
- ``fisher="empirical"``: squares of the batch-mean gradient of the data loss, every step. Cheap; not the Fisher
  (Kunstner, Balles, Hennig, NeurIPS 2019).
- ``fisher="model"``: squares of gradients on labels drawn from the model, an unbiased estimate of the true diagonal.
  Protocol: ``if optimizer.fisher_due: optimizer.update_fisher(closure, samples)`` before ``step``; due every k steps.

Groups with ``simplex=True`` hold rows that are distributions; they take the exponentiated-gradient step.
Needs dense gradients; does no learning-rate schedule (set ``group["lr"]``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from qig_core.errors import FisherNotReady, InvalidConfig, InvalidInput
from qig_core.geometry import exponentiated_gradient_step

FisherKind = Literal["empirical", "model"]


@dataclass
class _Move:
    """One group's step: theta <- theta - lr * scales * momentum / root, one entry per tensor."""

    group: dict[str, Any]
    params: list[Tensor]
    momentum: list[Tensor]
    root: list[Tensor]  # f^p + lambda^p b^p
    fisher: list[Tensor]
    corrections: list[float]  # b: fisher / b is unbiased
    scales: list[float]

    def _ratios(self) -> list[Tensor]:
        return list(torch._foreach_div(self.momentum, self.root))

    def clip(self) -> int:
        """Scale tensors down to an RMS of ``trust``; how many it took."""
        norms = torch.stack(torch._foreach_norm(self._ratios())).tolist()
        clipped = 0
        for index, (p, norm) in enumerate(zip(self.params, norms, strict=True)):
            limit = self.group["trust"] * math.sqrt(p.numel())
            if self.scales[index] * norm > limit:
                self.scales[index] = limit / norm
                clipped += 1
        return clipped

    def curvature(self) -> float:
        """1/2 lr^2 d' f d in nats, of the direction as it is now."""
        ratios = self._ratios()
        weighted = torch._foreach_norm(torch._foreach_mul(torch._foreach_mul(ratios, ratios), self.fisher), 1)
        factors = [s * s / b for s, b in zip(self.scales, self.corrections, strict=True)]
        total = sum(w * k for w, k in zip(torch.stack(weighted).tolist(), factors, strict=True))
        return float(0.5 * self.group["lr"] ** 2 * total)


class DiagonalFisherOptimizer(torch.optim.Optimizer):
    """See the module docstring.

    ``damping``: lambda. ``relative_damping``: delta; adds delta * mean(f) per tensor to lambda. ``trust``: c in RMS
    units (inf: off). ``kl_limit``: kappa in nats (None: off). ``fisher_every``: k, for the model Fisher.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        fisher: FisherKind = "empirical",
        exponent: float = 0.5,
        damping: float = 1e-16,
        relative_damping: float = 0.0,
        trust: float = 1.0,
        weight_decay: float = 0.0,
        kl_limit: float | None = None,
        fisher_every: int = 10,
        simplex: bool = False,
    ):
        defaults = {
            "lr": lr,
            "betas": betas,
            "exponent": exponent,
            "damping": damping,
            "relative_damping": relative_damping,
            "trust": trust,
            "weight_decay": weight_decay,
            "simplex": simplex,
        }
        _check("fisher", fisher in ("empirical", "model"), f"'empirical' or 'model', not {fisher!r}")
        _check("kl_limit", kl_limit is None or kl_limit > 0, "positive, or None")
        _check("fisher_every", fisher_every >= 1, "at least 1")
        self._fisher_kind: FisherKind = fisher
        self._kl_limit = kl_limit
        self._fisher_every = fisher_every
        super().__init__(params, defaults)
        for group in self.param_groups:
            _check_group(group)
            group.update(fisher=fisher, fisher_updates=0, steps=0)
        self.grad_norm = 0.0  # of the last step, over all groups, before any clip
        self._clip_rate, self._kl_estimate = 0.0, math.nan

    # -- the Fisher ---------------------------------------------------------------------------------------------

    @property
    def fisher_due(self) -> bool:
        """True when the model Fisher should be estimated before the next ``step``; never for the empirical one."""
        group = self.param_groups[0]
        due = group["fisher_updates"] == 0 or group["steps"] % self._fisher_every == 0
        return self._fisher_kind == "model" and bool(due)

    def update_fisher(self, sampled_loss_closure: Callable[[], Tensor], samples: int) -> None:
        """Fold one Gauss-Newton-Bartlett estimate, samples * grad^2, into the Fisher.

        The closure returns the *mean* negative log-likelihood over ``samples`` labels drawn from the model itself.
        Gradients already on the parameters are kept.
        """
        if self._fisher_kind != "model":
            raise InvalidInput("update_fisher is for fisher='model'; the empirical Fisher updates itself in step()")
        if samples < 1:
            raise InvalidInput(f"samples must be at least 1, got {samples}")
        params = [p for group in self.param_groups if not group["simplex"] for p in group["params"] if p.requires_grad]
        with torch.enable_grad():
            grads = torch.autograd.grad(sampled_loss_closure(), params, allow_unused=True)
        squares = {id(p): g for p, g in zip(params, grads, strict=True) if g is not None}
        with torch.no_grad():
            for group in self.param_groups:
                if group["simplex"]:
                    continue
                group["fisher_updates"] += 1
                for p in group["params"]:
                    self._prepare(p)
                    fisher = self.state[p]["fisher"].mul_(group["betas"][1])
                    if id(p) in squares:
                        g = squares[id(p)]
                        fisher.addcmul_(g, g, value=samples * (1 - group["betas"][1]))

    def _prepare(self, p: Tensor) -> None:
        if not self.state[p]:
            self.state[p]["step"] = 0
            self.state[p]["momentum"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            self.state[p]["fisher"] = torch.zeros_like(p, memory_format=torch.preserve_format)

    # -- the step -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update from the gradients at hand. Raises FisherNotReady for a model Fisher that was never estimated."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moves: list[_Move] = []
        squares = 0.0
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            group["steps"] += 1
            if not params:
                continue
            grads = [_gradient(p) for p in params]
            squares += _sum_of_squares(grads)
            if group["simplex"]:
                for p, gradient in zip(params, grads, strict=True):
                    p.copy_(exponentiated_gradient_step(p, gradient, group["lr"]))
                continue
            moves.append(self._move(group, params, grads))
        self.grad_norm = math.sqrt(squares)
        self._apply(moves)
        return loss

    def _move(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> _Move:
        """Fold the gradients into momentum and Fisher, and divide one by the other.

        The bias corrections b = 1 - beta2^t and c = 1 - beta1^t stay out of the tensors, which saves two passes:
        (m / c) / ((f / b)^p + lambda^p) = (b^p / c) m / (f^p + lambda^p b^p).
        """
        beta1, beta2 = group["betas"]
        exponent: float = group["exponent"]
        if self._fisher_kind == "model" and group["fisher_updates"] == 0:
            raise FisherNotReady("call update_fisher(closure, samples) before the first step, whenever fisher_due")
        for p in params:
            self._prepare(p)
        states = [self.state[p] for p in params]
        for state in states:
            state["step"] += 1
        momentum = [state["momentum"] for state in states]
        fisher = [state["fisher"] for state in states]
        torch._foreach_lerp_(momentum, grads, 1 - beta1)
        if self._fisher_kind == "empirical":
            torch._foreach_mul_(fisher, beta2)
            torch._foreach_addcmul_(fisher, grads, grads, 1 - beta2)
            corrections = [1 - beta2 ** state["step"] for state in states]
        else:
            corrections = [1 - beta2 ** group["fisher_updates"]] * len(params)
        root = list(torch._foreach_sqrt(fisher) if exponent == 0.5 else torch._foreach_pow(fisher, exponent))
        damping, relative = group["damping"], group["relative_damping"]
        if relative > 0:
            level = [(damping * b + relative * f.mean()) ** exponent for f, b in zip(fisher, corrections, strict=True)]
            torch._foreach_add_(root, level)
        else:
            torch._foreach_add_(root, [(damping * b) ** exponent for b in corrections])
        scales = [b**exponent / (1 - beta1 ** s["step"]) for b, s in zip(corrections, states, strict=True)]
        return _Move(group, params, momentum, root, fisher, corrections, scales)

    def _apply(self, moves: list[_Move]) -> None:
        """Clip, bound the divergence, and step."""
        clipped = tensors = 0
        curvature = 0.0
        for move in moves:
            tensors += len(move.params)
            if math.isfinite(move.group["trust"]):
                clipped += move.clip()
            if self._kl_limit is not None:
                curvature += move.curvature()
        shrink = 1.0
        if self._kl_limit is not None and curvature > self._kl_limit:
            shrink = math.sqrt(self._kl_limit / curvature)
        for move in moves:
            lr, decay = move.group["lr"], move.group["weight_decay"]
            if decay > 0:
                torch._foreach_mul_(move.params, 1 - lr * decay)
            steps = [-lr * shrink * scale for scale in move.scales]
            torch._foreach_addcdiv_(move.params, move.momentum, move.root, steps)
        self._clip_rate = clipped / max(tensors, 1)
        self._kl_estimate = curvature * shrink**2 if self._kl_limit is not None else math.nan

    @property
    def statistics(self) -> dict[str, float]:
        """Of the last step: ``fisher_mean`` (bias-corrected; read from the state, so ask for it now and then, not every
        step), ``clip_rate`` over tensors, ``grad_norm``, and ``kl_estimate`` in nats (nan without a limit)."""
        total, elements = 0.0, 0
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state.get(p)
                if state:
                    updates = state["step"] if self._fisher_kind == "empirical" else group["fisher_updates"]
                    # max: another thread may ask between the birth of a state and its first step.
                    corrected = float(state["fisher"].sum()) / (1 - group["betas"][1] ** max(updates, 1))
                    total, elements = total + corrected, elements + p.numel()
        return {
            "fisher_mean": total / max(elements, 1),
            "clip_rate": self._clip_rate,
            "grad_norm": self.grad_norm,
            "kl_estimate": self._kl_estimate,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but refuses a state of the other Fisher kind: the numbers mean different things."""
        saved = {group.get("fisher") for group in state_dict["param_groups"]}
        if saved != {self._fisher_kind}:
            raise InvalidInput(f"the saved state holds the Fisher {saved}, this optimizer runs {self._fisher_kind!r}")
        super().load_state_dict(state_dict)

    def check_invariants(self) -> None:
        """Raises AssertionError for a negative or non-finite Fisher, or rows that left the simplex."""
        for group in self.param_groups:
            for p in group["params"]:
                if group["simplex"]:
                    assert bool((p >= 0).all()), "a simplex row has a negative entry"
                    assert torch.allclose(p.sum(-1), torch.ones_like(p.sum(-1)), atol=1e-4), "a row does not sum to 1"
                elif self.state[p]:
                    fisher = self.state[p]["fisher"]
                    assert bool(((fisher >= 0) & fisher.isfinite()).all()), "the Fisher is negative or not finite"


def _gradient(p: Tensor) -> Tensor:
    assert p.grad is not None
    if p.grad.is_sparse:
        raise InvalidInput("DiagonalFisherOptimizer needs dense gradients; use embeddings with sparse=False")
    return p.grad


def _sum_of_squares(tensors: list[Tensor]) -> float:
    return float(torch.stack(torch._foreach_norm(tensors)).square().sum())


def _check(name: str, holds: bool, rule: str) -> None:
    if not holds:
        raise InvalidConfig(f"optimizer option {name} must be {rule}")


def _check_group(group: dict[str, Any]) -> None:
    _check("lr", group["lr"] >= 0, "at least 0")
    _check("betas", all(0 <= beta < 1 for beta in group["betas"]), "two numbers in [0, 1)")
    _check("exponent", 0 < group["exponent"] <= 1, "in (0, 1]")
    _check("damping", group["damping"] >= 0, "at least 0")
    _check("relative_damping", group["relative_damping"] >= 0, "at least 0")
    _check("trust", group["trust"] > 0, "positive (inf: off)")
    _check("weight_decay", group["weight_decay"] >= 0, "at least 0")
