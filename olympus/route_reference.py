"""What Zeus knows of the domains' geometry: where each lies on the simplex of texts, and how far its own texts stray.

A domain is a set of reference basins (``text_basin``) with their Fréchet mean. The distance of a text is

    d^2 = (d_FR(text, mean)^2 + d_near^2) / 2,    d_near: mean d_FR to the 3 nearest references,

the centre for what the domain is about, the neighbours for the many things that it may be about. It lies in [0, pi].
Three numbers are read off it:

- **share**: exp(-beta d^2 - b_D), normalised over the domains. A domain of many kinds of text lies further from each of
  its own than a narrow one does; its offset b_D allows for that. beta and the offsets are fitted by maximum
  likelihood to the domains' own texts, each measured against a reference it was left out of. The nearest domain is
  the one with the greatest share (``benchmarks/kernel_parts/routing.py`` has the accuracy).
- **p-value**: the part of the domain's own texts, left out in the same way (8 folds), that lie at least as far away.
  Conformal anomaly detection (Laxhammar and Falkman 2015): below ``ALPHA`` for the nearest domain, the text belongs to
  none that is known, and of the domain's own texts one in twenty is refused.
- **confidence**: the share, times p / ``ALPHA`` where that is below 1; the rest of all domains goes to "unknown".

Pure geometry. Not here: which texts, when to look again, which kernel serves a domain (``routing``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from olympus.text_basin import text_basins
from qig_core.geometry import fisher_rao_distance, frechet_mean

ALPHA = 0.05
#: A p-value below ALPHA needs at least this many own texts.
LEAST_TEXTS = 20
#: Reference texts of one domain, and of all together.
MOST_TEXTS, MOST_IN_ALL = 128, 4096
_NEIGHBOURS = 3
_FOLDS = 8
#: Left-out texts of all domains together that beta and the offsets are fitted to.
_MOST_FITTED = 2048
_BETA, _LEAST_BETA = 3.0, 0.1
#: Pulls the offsets towards 0, as if it had been seen that domains are alike.
_SHRINK = 0.01


@dataclass(frozen=True, eq=False)
class DomainReference:
    """One domain: square roots of its basins [N, V] (points of the sphere), their Fréchet mean, own distances."""

    domain: str
    roots: Tensor  # [N, V], unit vectors
    mean: Tensor  # [V], a distribution
    own: Tensor  # [N] distance of each of its texts to the others

    @classmethod
    def fit(cls, domain: str, texts: Sequence[str]) -> DomainReference:
        """From at least ``LEAST_TEXTS`` texts. Deterministic."""
        assert len(texts) >= LEAST_TEXTS, f"{domain}: {len(texts)} texts cannot be told from chance"
        basins = text_basins(texts)
        own = torch.empty(len(basins))
        for fold in range(_FOLDS):
            left_out = torch.arange(len(basins)) % _FOLDS == fold
            rest = basins[~left_out]
            own[left_out] = _distance(basins[left_out].sqrt(), rest.sqrt(), frechet_mean(rest))
        return cls(domain, basins.sqrt(), frechet_mean(basins), own)

    def distance(self, roots: Tensor) -> Tensor:
        """[M] distances in [0, pi] of texts given as roots of their basins [M, V]."""
        return _distance(roots, self.roots, self.mean)

    def p_value(self, distance: float) -> float:
        """Share of own texts at least as far away, the text itself counted among them."""
        return (1 + int((self.own >= distance).sum())) / (len(self.own) + 1)


@dataclass(frozen=True)
class Place:
    """Where one text lies with respect to one domain."""

    domain: str
    distance: float
    p_value: float
    share: float
    confidence: float


class Atlas:
    """All domains at one moment. Immutable, so it may be read by all threads."""

    def __init__(self, references: Sequence[DomainReference]):
        self.references = tuple(references)
        self.beta, self.offsets = self._fit()

    def locate(self, texts: Sequence[str]) -> list[list[Place]]:
        """For each text, its place in every domain, the greatest share first."""
        if not self.references:
            return [[] for _ in texts]
        distances = self._distances(text_basins(texts).sqrt())  # [N, D]
        shares = torch.softmax(-self.beta * distances.square() - self.offsets, dim=1)
        return [self._places(row, share) for row, share in zip(distances.tolist(), shares.tolist(), strict=True)]

    def between(self) -> Mapping[tuple[str, str], float]:
        """Fisher-Rao distance of the means of every two domains."""
        pairs = [(a, b) for i, a in enumerate(self.references) for b in self.references[i + 1 :]]
        return {(a.domain, b.domain): float(fisher_rao_distance(a.mean, b.mean)) for a, b in pairs}

    def _places(self, distances: list[float], shares: list[float]) -> list[Place]:
        places = []
        for reference, distance, share in zip(self.references, distances, shares, strict=True):
            p_value = reference.p_value(distance)
            places.append(Place(reference.domain, distance, p_value, share, share * min(1.0, p_value / ALPHA)))
        return sorted(places, key=lambda place: place.share, reverse=True)

    def _distances(self, roots: Tensor) -> Tensor:
        return torch.stack([reference.distance(roots) for reference in self.references], dim=1)

    def _fit(self) -> tuple[float, Tensor]:
        """beta and the offsets [D] that give the domains' own texts, each left out, the greatest likelihood."""
        count = len(self.references)
        if count < 2:
            return _BETA, torch.zeros(count)
        squared, truth = self._left_out(max(LEAST_TEXTS, _MOST_FITTED // count))
        beta = torch.tensor(_BETA, requires_grad=True)
        offsets = torch.zeros(count, requires_grad=True)
        solver = torch.optim.LBFGS([beta, offsets], max_iter=50, line_search_fn="strong_wolfe")

        def nats() -> Tensor:
            solver.zero_grad()
            scores = -beta.clamp_min(_LEAST_BETA) * squared - offsets
            loss = F.cross_entropy(scores, truth) + _SHRINK * offsets.square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        solver.step(nats)  # type: ignore[no-untyped-call]
        return max(float(beta.detach()), _LEAST_BETA), offsets.detach()

    def _left_out(self, most: int) -> tuple[Tensor, Tensor]:
        """Squared distances [N, D] of up to ``most`` texts of each domain, and their domains [N]."""
        tables, truths = [], []
        for index, reference in enumerate(self.references):
            picked = torch.linspace(0, len(reference.roots) - 1, min(most, len(reference.roots))).long()
            table = self._distances(reference.roots[picked])
            table[:, index] = reference.own[picked]
            tables.append(table)
            truths += [index] * len(picked)
        return torch.cat(tables).square(), torch.tensor(truths)


def texts_per_domain(domains: int) -> int:
    """How many reference texts each of ``domains`` may keep."""
    return max(LEAST_TEXTS, min(MOST_TEXTS, MOST_IN_ALL // max(domains, 1)))


def _distance(roots: Tensor, references: Tensor, mean: Tensor) -> Tensor:
    """[M] of roots [M, V] against references [N, V] and their mean [V]; angles between unit vectors, doubled."""
    near = 2 * torch.acos((roots @ references.T).clamp(-1, 1))  # [M, N]
    nearest = near.topk(min(_NEIGHBOURS, len(references)), dim=1, largest=False).values.mean(dim=1)
    centre = fisher_rao_distance(roots.square(), mean)
    return ((centre.square() + nearest.square()) / 2).sqrt().clamp(max=math.pi)
