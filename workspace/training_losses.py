"""What training minimises. Means are over the predicted tokens of a batch that a term is about, in nats.

For a token t with context c, of which the student S sees a part besides its virtual tokens, and the model M all:

    cross-entropy   CE   = mean_t  -log S(t)                            texts that somebody else wrote
    distillation    KD   = mean_t  sum_{v in top k} M(v) log(M(v) / S(v)) + M(rest) log(M(rest) / S(rest))
    broadcast       B    = mean_rows max(0, CE_row(S) - CE_row(M))      only where S sees the whole context
    controller      K    = mean_t  sum_{a in actions} KL(heuristic_a || network_a)     of Bernoulli variables
    total                = w_ce CE + w_kd KD + w_b B + w_k K

The model's own samples are for KD alone: as targets they would teach it nothing but the temperature at which they were
drawn. Other texts are for KD only where S lacks context, because with the whole of it KD would just pull S back to M.
KD takes what is not among the k most probable tokens as one token, so it never exceeds the full divergence. B is the
change in log perplexity that appended virtual tokens cost; where they gain, it is zero and has no gradient.

Shapes: R rows, F tokens, V vocabulary, k teacher's tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from workspace.training_config import LossWeights
from workspace.training_data import Batch

_LEAST = 1e-6  # probability of the rest: below it, its logarithm would have no stable gradient


@dataclass(frozen=True, slots=True, eq=False)
class Losses:
    """The terms of one batch: scalars, None where a term was not computed."""

    total: Tensor
    cross_entropy: Tensor | None = None
    distillation: Tensor | None = None
    broadcast: Tensor | None = None
    controller: Tensor | None = None

    def numbers(self) -> dict[str, float]:
        """For logs."""
        names = ("total", "cross_entropy", "distillation", "broadcast", "controller")
        return {name: float(value.detach()) for name in names if (value := getattr(self, name)) is not None}


def token_losses(logits: Tensor, target_ids: Tensor) -> Tensor:
    """``logits`` [R, F, V] and targets [R, F] -> -log probability [R, F] in float32."""
    flat = functional.cross_entropy(
        logits.float().flatten(0, 1), target_ids.flatten().to(logits.device), reduction="none"
    )
    return flat.view(target_ids.shape)


def row_means(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens of each row, [R]."""
    return (values * mask).sum(dim=1) / mask.sum(dim=1).clamp_min(1)


def distillation(logs: Tensor, top_ids: Tensor, top_logprobs: Tensor) -> Tensor:
    """KD of each token [R, F] from the student's log-probabilities [R, F, V] and the teacher's best [R, F, k]."""
    student = logs.gather(2, top_ids)  # [R, F, k]
    teacher = top_logprobs.exp()
    kept = (teacher * (top_logprobs - student)).sum(dim=-1)
    teacher_rest = (1 - teacher.sum(dim=-1)).clamp_min(_LEAST)
    student_rest = (1 - student.exp().sum(dim=-1)).clamp_min(_LEAST)
    return kept + teacher_rest * (teacher_rest.log() - student_rest.log())


def controller_divergence(logits: Tensor, targets: Tensor) -> Tensor:
    """KL of the network's Bernoulli variables from ``targets`` [..., 4] (probabilities), summed over actions [...]."""
    cross = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    own = functional.binary_cross_entropy(targets, targets, reduction="none")  # their entropy
    return (cross - own).sum(dim=-1)


def losses_of(batch: Batch, logits: Tensor | None, controller_logits: Tensor | None, weights: LossWeights) -> Losses:
    """All terms with a weight. ``logits`` [R, F, V] of the student, ``controller_logits`` [R, F, 4]."""
    terms: dict[str, Tensor] = {}
    if logits is not None:
        mask, sampled = batch.target_mask.to(logits.device), batch.sampled.to(logits.device)[:, None]  # [R, F], [R, 1]
        logs = logits.float().log_softmax(dim=-1)
        nll = -logs.gather(2, batch.target_ids.to(logits.device)[..., None])[..., 0]  # [R, F]
        _add(terms, "cross_entropy", nll, mask & ~sampled)
        if weights.distillation and batch.top_ids is not None and batch.top_logprobs is not None:
            kd = distillation(logs, batch.top_ids.to(logits.device), batch.top_logprobs.to(logits.device))
            _add(terms, "distillation", kd, mask & sampled if batch.whole else mask)
        if weights.broadcast and batch.whole and batch.base_loss is not None:
            added = row_means(nll, mask) - row_means(batch.base_loss.to(logits.device), mask)
            terms["broadcast"] = added.clamp_min(0).mean()
    if controller_logits is not None and batch.controller_targets is not None:
        mask = batch.target_mask.to(controller_logits.device)
        divergence = controller_divergence(controller_logits, batch.controller_targets.to(controller_logits.device))
        terms["controller"] = (divergence * mask).sum() / mask.sum()
    weighted = [getattr(weights, name) * term for name, term in terms.items() if getattr(weights, name)]
    return Losses(total=torch.stack(weighted).sum() if weighted else _nothing(logits, controller_logits), **terms)


def _add(terms: dict[str, Tensor], name: str, values: Tensor, mask: Tensor) -> None:
    """The mean over the tokens that a term is about; no term without any."""
    count = mask.sum()
    if count:
        terms[name] = (values * mask).sum() / count


def _nothing(*outputs: Tensor | None) -> Tensor:
    """Zero with a zero gradient, for a batch that no term is about (own samples without distillation)."""
    return torch.stack([output.float().sum() * 0.0 for output in outputs if output is not None]).sum()
