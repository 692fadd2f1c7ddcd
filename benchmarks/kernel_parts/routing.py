"""routing: which of three domains does a text belong to, and does it belong to any?

Two worlds. *Topics*: three groups of six banking77 intents (cards, transfers, top-ups), the hard one, for all are
written by the customers of one bank. *Kinds*: the bank's messages, lines of tinyshakespeare, lines of this project's
Python. Every domain has 128 reference texts; 150 others of each are routed. Arms:

    byte hash          upstream's: a hash of the text as a point of the 64-simplex, nearest domain mean
    kernel, own        each kernel's basin of the text against the Fréchet mean of its own domain, in its own space
    kernels, product   Fisher-Rao distance of the product of all kernels' simplices, 3 nearest references
    kernels, nats      the kernel that predicts the text itself best (nats per byte of the observation)
    text basins        what Zeus uses: ``olympus.route_reference``

all by Fisher-Rao distance but the fourth; the last with the offsets that are described there. Detection: a text is
refused when its distance exceeds the 95 % quantile of the routed domain's own texts (for the text basins of left-out
references, as in the product; for the others of the routed texts themselves, which flatters them). The kernels are
nano, trained on message and intent, and have fewer references and tested texts, for their forward passes cost most.
"""

from __future__ import annotations

import hashlib
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.kernel_parts.common import ROOT, Options, banking77, spread, table, tinyshakespeare
from olympus.route_reference import ALPHA, Atlas, DomainReference
from qig_core.geometry import fisher_rao_distance, frechet_mean
from qig_core.inference import basin_of_texts
from qig_core.learning import Ema, TrainingDefaults, collate, supervised_loss
from qig_core.m8_kernel import KernelConfig, M8Kernel
from qig_core.vocabulary import PAD, encode_pair, encode_prompt

TOPICS = {
    "cards": "card_arrival card_delivery_estimate lost_or_stolen_card order_physical_card getting_spare_card "
    "card_about_to_expire",
    "transfers": "cancel_transfer failed_transfer pending_transfer transfer_timing "
    "transfer_not_received_by_recipient transfer_fee_charged",
    "top-ups": "pending_top_up top_up_failed top_up_reverted top_up_limits automatic_top_up top_up_by_cash_or_cheque",
}
REFERENCES, TESTED, STEPS = 128, 150, 120
#: A kernel's forward pass costs a hundred times a text basin: fewer texts for its arms.
KERNEL_REFERENCES, KERNEL_TESTED = 48, 40
#: What tells a line of code from a line of a docstring.
_CODE = ("(", " = ", "import ", "[")
Pair = tuple[str, str]


@dataclass(frozen=True)
class World:
    """Three domains with their pairs, shuffled by a seed, and texts that belong to none of them."""

    domains: dict[str, list[Pair]]
    outside: dict[str, list[str]]

    @property
    def names(self) -> list[str]:
        return list(self.domains)

    def references(self, name: str) -> list[str]:
        return [text for text, _ in self.domains[name][:REFERENCES]]

    def tested(self, name: str, count: int) -> list[str]:
        return [text for text, _ in self.domains[name][REFERENCES : REFERENCES + count]]

    def training(self, name: str) -> list[Pair]:
        """What a kernel learns from: the references and all that is not tested."""
        return self.domains[name][:REFERENCES] + self.domains[name][REFERENCES + TESTED :]


@dataclass(frozen=True)
class Score:
    """Shares: routed rightly; own texts refused; texts of each outside source refused."""

    accuracy: float
    refused: float
    detected: dict[str, float]


def run(options: Options) -> str:
    topics: dict[str, list[Score]] = {}
    kinds: dict[str, list[Score]] = {}
    milliseconds: list[float] = []
    for seed in options.seeds:
        hard, easy = _topics(options, seed), _kinds(options, seed)
        for world, scores in ((hard, topics), (easy, kinds)):
            scores.setdefault("byte hash", []).append(_nearest_mean(world, _hash_basins))
            score, cost = _text_basins(world)
            scores.setdefault("text basins", []).append(score)
            milliseconds.append(cost)
        for name, score in _kernels(hard, seed, 10 if options.quick else STEPS).items():
            topics.setdefault(name, []).append(score)
        print(f"routing: seed {seed}: {topics['text basins'][-1]}", file=sys.stderr, flush=True)
    order = ("byte hash", "kernel, own", "kernels, product", "kernels, nats", "text basins")
    parts = ["Three topics of one bank (a text of none of them should be refused):", _table(topics, order)]
    parts += ["Three kinds of text:", _table(kinds, order)]
    parts.append(f"Routing one text by text basins: {statistics.median(milliseconds):.2f} ms of CPU time.")
    return "\n\n".join(parts)


def _table(scores: dict[str, list[Score]], order: Sequence[str]) -> str:
    sources = list(next(iter(scores.values()))[0].detected)
    head = ["arm", "accuracy", "own texts refused", *(f"refused: {source}" for source in sources)]
    rows = []
    for name in (name for name in order if name in scores):
        runs = scores[name]
        cells = [spread([score.accuracy for score in runs]), spread([score.refused for score in runs])]
        rows.append([name, *cells, *(spread([score.detected[source] for score in runs]) for source in sources)])
    return table(head, rows)


# -- data -------------------------------------------------------------------------------------------------------


def _topics(options: Options, seed: int) -> World:
    draw, rows = random.Random(seed), banking77(options, "train")
    intents = {name: set(group.split()) for name, group in TOPICS.items()}
    domains = {name: [pair for pair in rows if pair[1] in group] for name, group in intents.items()}
    for pairs in domains.values():
        draw.shuffle(pairs)
    used = set.union(*intents.values())
    others = [text for text, intent in rows if intent not in used]
    outside = {"other intents": others, "shakespeare": _play(options), "Python": _code()}
    return World(domains, {name: draw.sample(texts, TESTED) for name, texts in outside.items()})


def _kinds(options: Options, seed: int) -> World:
    draw = random.Random(seed)
    bank = [text for text, _ in banking77(options, "train")]
    domains = {"bank": bank, "shakespeare": _play(options), "Python": _code()}
    chosen = {name: [(text, "") for text in draw.sample(texts, 600)] for name, texts in domains.items()}
    pages = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))]
    prose = [line for page in pages for line in page.splitlines() if len(line) > 60 and not line.startswith("|")]
    draws = ["".join(draw.choice("abcdefghijklmnopqrstuvwxyz    ") for _ in range(60)) for _ in range(TESTED)]
    return World(chosen, {"documentation": draw.sample(prose, min(TESTED, len(prose))), "random letters": draws})


def _play(options: Options) -> list[str]:
    return [line for line in tinyshakespeare(options).decode().splitlines() if len(line) > 20]


def _code() -> list[str]:
    folders = ("qig_core", "olympus", "workspace", "web", "storage")
    paths = [path for folder in folders for path in sorted((ROOT / folder).glob("*.py"))]
    lines = dict.fromkeys(line.strip() for path in paths for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if len(line) > 20 and any(mark in line for mark in _CODE)]


# -- arms -------------------------------------------------------------------------------------------------------


def _text_basins(world: World) -> tuple[Score, float]:
    """The score, and milliseconds of CPU time per text."""
    atlas = Atlas([DomainReference.fit(name, world.references(name)) for name in world.names])
    begun = time.thread_time()
    own = {name: atlas.locate(world.tested(name, TESTED)) for name in world.names}
    cost = 1e3 * (time.thread_time() - begun) / (TESTED * len(world.names))
    right = [places[0].domain == name for name, found in own.items() for places in found]
    refused = [places[0].p_value < ALPHA for found in own.values() for places in found]
    detected = {
        source: _share([places[0].p_value < ALPHA for places in atlas.locate(texts)])
        for source, texts in world.outside.items()
    }
    return Score(_share(right), _share(refused), detected), cost


def _nearest_mean(world: World, basins: Callable[[Sequence[str]], Tensor]) -> Score:
    means = torch.stack([frechet_mean(basins(world.references(name))) for name in world.names])
    own = {name: basins(world.tested(name, TESTED)) for name in world.names}
    outside = {name: basins(texts) for name, texts in world.outside.items()}
    return _score(world, lambda found: fisher_rao_distance(found[:, None], means), own, outside)


def _score(
    world: World, distance: Callable[[Tensor], Tensor], own: dict[str, Tensor], outside: dict[str, Tensor]
) -> Score:
    """``distance`` [N, ...] -> [N, domains]."""
    tables = {name: distance(found) for name, found in own.items()}
    right = [int(best) == index for index, found in enumerate(tables.values()) for best in found.argmin(1)]
    joined = torch.cat(list(tables.values()))
    nearest, chosen = joined.min(dim=1)
    quantiles = [nearest[chosen == index] for index in range(len(world.names))]
    limits = torch.stack([found.quantile(1 - ALPHA) if len(found) else torch.tensor(0.0) for found in quantiles])

    def refused(found: Tensor) -> float:
        least, index = found.min(dim=1)
        return float((least > limits[index]).double().mean())

    return Score(_share(right), refused(joined), {name: refused(distance(found)) for name, found in outside.items()})


def _hash_basins(texts: Sequence[str]) -> Tensor:
    """Upstream's basin: 64 bytes of a hash, normalised."""
    digests = [hashlib.sha512(text.encode()).digest() for text in texts]
    raw = torch.tensor([list(digest) for digest in digests], dtype=torch.float32) + 1e-3
    return raw / raw.sum(dim=1, keepdim=True)


def _kernels(world: World, seed: int, steps: int) -> dict[str, Score]:
    kernels = [_trained(world.training(name), seed * 10 + i, steps) for i, name in enumerate(world.names)]
    references = [_views(kernels, world.references(name)[:KERNEL_REFERENCES]) for name in world.names]
    own = {name: _views(kernels, world.tested(name, KERNEL_TESTED)) for name in world.names}
    outside = {name: _views(kernels, texts[:KERNEL_TESTED]) for name, texts in world.outside.items()}
    means = torch.stack([frechet_mean(found[:, index, :-1]) for index, found in enumerate(references)])  # [K, V]

    def by_mean(found: Tensor) -> Tensor:
        return fisher_rao_distance(found[..., :-1], means)

    def by_product(found: Tensor) -> Tensor:
        columns = []
        for reference in references:
            apart = fisher_rao_distance(found[:, None, :, :-1], reference[None, :, :, :-1])  # [N, R, K]
            joint = torch.linalg.vector_norm(apart, dim=-1)
            columns.append(joint.topk(3, dim=1, largest=False).values.mean(dim=1))
        return torch.stack(columns, dim=1)

    arms = {"kernel, own": by_mean, "kernels, product": by_product, "kernels, nats": lambda found: found[..., -1]}
    return {name: _score(world, distance, own, outside) for name, distance in arms.items()}


def _trained(pairs: Sequence[Pair], seed: int, steps: int) -> M8Kernel:
    kernel, defaults, draw = M8Kernel(KernelConfig.preset("nano"), seed=seed), TrainingDefaults(), random.Random(seed)
    optimizer, average = defaults.optimizer(kernel), Ema(kernel)
    encoded = [encode_pair(text, intent, kernel.config.context) for text, intent in pairs]
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = defaults.lr_at(step)
        batch = collate(draw.sample(encoded, defaults.batch_size))
        optimizer.zero_grad()
        passes = defaults.passes_at(step, kernel.config.supervision_steps)
        loss = supervised_loss(kernel, batch.ids, batch.loss_mask, supervision_steps=passes).total
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        average.update(kernel)
    return average.shadow


@torch.no_grad()
def _views(kernels: Sequence[M8Kernel], texts: Sequence[str]) -> Tensor:
    """[N, K, V + 1]: every kernel's basin of every text and, last, its nats per byte of the text itself."""
    columns = []
    for kernel in kernels:
        rows = []
        for start in range(0, len(texts), 16):
            prompts = [encode_prompt(text, kernel.config.context) for text in texts[start : start + 16]]
            rows.append(torch.cat((basin_of_texts(kernel, prompts), _nats(kernel, prompts)), dim=1))
        columns.append(torch.cat(rows))
    return torch.stack(columns, dim=1)


def _nats(kernel: M8Kernel, prompts: Sequence[list[int]]) -> Tensor:
    """[N, 1] nats per symbol of the observation."""
    rows = [torch.tensor(prompt) for prompt in prompts]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    nats = F.cross_entropy(kernel(ids).logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    real = ids[:, 1:] != PAD
    return ((nats * real).sum(dim=1) / real.sum(dim=1)).unsqueeze(1)


def _share(values: Sequence[bool]) -> float:
    return sum(values) / max(len(values), 1)
