"""Part "forgetting": a kernel learns one domain, then only another; what is left of the first?

Two domains of ``INTENTS`` banking77 intents each, ``MESSAGES`` messages of each. A kernel takes in those of A, chunk by
chunk, then those of B, as in the part "stream" (same network, same steps), with a buffer of ``CAPACITY`` experiences,
fewer than either domain sends. After each domain it answers the test messages of both, choosing among all intents.

- ``no replay``: when B begins, the buffer is emptied: the kernel sees B alone.
- ``replay``: the buffer as it is, half of each batch from the newest and half from the reservoir over all.
- ``replay + DER++``: the same, and the distance to the logits that were stored when an experience was known
  (Buzzega et al. 2020); its weight is swept on the sweep seed.

What was learned of B is shown as well: not to forget is easy for a kernel that does not learn.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.kernel_parts.common import SWEEP_SEED, Options, banking77, spread, table
from benchmarks.kernel_parts.stream import CHUNK, KernelArm, KernelRecipe, Row

INTENTS = 8
MESSAGES = 640
BATCH = 16
CAPACITY = 256
ALPHAS = (0.03, 0.3)
_QUICK_MESSAGES = 48


@dataclass(frozen=True)
class Memory:
    """Test accuracies: of A after A, then of A and B after B."""

    first: float
    kept: float
    second: float


@dataclass(frozen=True)
class Domains:
    """Training and test rows of A and B, and the intents of both."""

    train: tuple[list[Row], list[Row]]
    test: tuple[list[Row], list[Row]]
    intents: list[str]

    @classmethod
    def of(cls, options: Options, seed: int) -> Domains:
        """Two domains of intents drawn by the seed; their messages in an order drawn by the seed."""
        rows, held_out = banking77(options, "train"), banking77(options, "test")
        drawer = random.Random(seed)
        intents = drawer.sample(sorted({intent for _, intent in rows}), 2 * INTENTS)
        parts = [frozenset(intents[:INTENTS]), frozenset(intents[INTENTS:])]
        drawer.shuffle(rows)
        limit = _QUICK_MESSAGES if options.quick else MESSAGES
        train = [[row for row in rows if row[1] in part][:limit] for part in parts]
        test = [[row for row in held_out if row[1] in part][:limit] for part in parts]
        return cls((train[0], train[1]), (test[0], test[1]), intents)


def live_through(recipe: KernelRecipe, domains: Domains, seed: int, *, replay: bool) -> Memory:
    """Learn A, then B."""
    arm = KernelArm(replace(recipe, capacity=CAPACITY), domains.intents, seed)
    _teach(arm, domains.train[0])
    first = accuracy(arm, domains.test[0])
    if not replay:
        arm.forget()
    _teach(arm, domains.train[1])
    return Memory(first, accuracy(arm, domains.test[0]), accuracy(arm, domains.test[1]))


def accuracy(arm: KernelArm, rows: Sequence[Row]) -> float:
    """Share of the rows that are answered rightly."""
    right = 0
    for start in range(0, len(rows), 50):
        part = rows[start : start + 50]
        said = arm.answer([text for text, _ in part])
        right += sum(answer == intent for answer, (_, intent) in zip(said, part, strict=True))
    return right / len(rows)


def _teach(arm: KernelArm, rows: Sequence[Row]) -> None:
    for start in range(0, len(rows), CHUNK):
        arm.learn(rows[start : start + CHUNK])


def run(options: Options) -> str:
    """The part. Raises MissingData without the data set."""
    plain = KernelRecipe(batch=BATCH)
    sweep = Domains.of(options, SWEEP_SEED)
    swept = {alpha: live_through(replace(plain, der_alpha=alpha), sweep, SWEEP_SEED, replay=True) for alpha in ALPHAS}
    alpha = max(ALPHAS, key=lambda value: swept[value].kept + swept[value].second)
    arms = {
        "no replay": (plain, False),
        "replay": (plain, True),
        f"replay + DER++ (alpha {alpha:g})": (replace(plain, der_alpha=alpha), True),
    }
    results: dict[str, list[Memory]] = {name: [] for name in arms}
    for seed in options.seeds:
        domains = Domains.of(options, seed)
        for name, (recipe, replay) in arms.items():
            results[name].append(live_through(recipe, domains, seed, replay=replay))
    body = [
        [
            name,
            spread([each.first for each in runs]),
            spread([each.kept for each in runs]),
            spread([each.first - each.kept for each in runs]),
            spread([each.second for each in runs]),
        ]
        for name, runs in results.items()
    ]
    shown = ", ".join(f"{value:g}: {memory.kept:.3f} of A, {memory.second:.3f} of B" for value, memory in swept.items())
    return "\n\n".join(
        [
            f"{INTENTS} + {INTENTS} intents, {MESSAGES} messages of each, a buffer of {CAPACITY}; test accuracy.",
            table(["arm", "A after A", "A after B", "forgotten", "B after B"], body),
            f"Weight of the stored logits, on the sweep seed: {shown}.",
        ]
    )
