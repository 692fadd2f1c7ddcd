"""What a cartridge is trained to minimise, at each target t with the teacher's candidates K_t.

    kl        l_t = sum_{v in K_t} p(v) log(p(v) / q(v)) + p(rest) log(p(rest) / q(rest))
    upstream  l_t = - sum_{v in K_t} p(v) log q(v)

p is the teacher's distribution, q the student's; what is not among the candidates counts as one token ("rest"), so
``kl`` never exceeds the full divergence, is never negative, and is zero only where both agree. ``upstream`` is the loss
of the Cartridges library (arXiv 2506.06266): cross-entropy against the truncated teacher, without its tail. Where only
the answer is known, K_t is its token with p = 1, and both are its negative log-likelihood.

A step minimises the mean, weighted by rows r:

    L = sum_t w_r(t) l_t / sum_r w_r n_r      n_r: targets of the row (kl), or all its candidates (upstream)

Nats, float32. Shapes: N targets, K candidates (padded with log-probability minus infinity), V vocabulary.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from memory.distillation.encoding import Example

LossName = Literal["kl", "upstream"]
#: The student's probability of the rest is taken as at least this: below it a logarithm has no stable gradient.
LEAST = 1e-6


def target_losses(logits: Tensor, top_ids: Tensor, top_logprobs: Tensor, loss: LossName = "kl") -> Tensor:
    """l_t [N] from ``logits`` [N, V] and candidates [N, K]."""
    logs = logits.float().log_softmax(dim=-1).gather(1, top_ids)  # [N, K]
    teacher = top_logprobs.exp()  # 0 where there is no candidate
    if loss == "upstream":
        return -(teacher * logs).sum(dim=-1)
    known = torch.where(teacher > 0, top_logprobs, 0.0)
    kept = (teacher * (known - logs)).sum(dim=-1)
    rest = 1 - teacher.sum(dim=-1)  # [N]; rounding can make it negative
    there = rest > LEAST
    student = torch.where(teacher > 0, logs, -torch.inf).logsumexp(dim=-1)  # log of what the candidates have together
    student_rest = -torch.expm1(student.clamp_max(-LEAST))
    safe = rest.clamp_min(LEAST)
    return kept + torch.where(there, safe * (safe.log() - student_rest.log()), 0.0)


def amount(example: Example, loss: LossName = "kl") -> float:
    """w_r n_r: what the row adds to the denominator."""
    return example.weight * (len(example.targets.offsets) if loss == "kl" else example.pairs)
