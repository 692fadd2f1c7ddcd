"""Part "stream": 10,003 customer messages in a random order, each chunk tested first and trained on then.

Every arm gets the same messages in the same order in chunks of 16: it answers which of the 77 intents each message of
the chunk has (prequential accuracy), and then learns from the chunk. At the end it answers 1,000 fixed messages of
the test file (held-out accuracy).

- ``kernel``: an M8 kernel as it is trained in the product, from its own experience buffer: after each chunk ``STEPS``
  steps of ``BATCH`` experiences, which are old and new ones. It answers in bytes: greedily along the names of the 77
  intents, from the averaged weights. The action of an experience is the intent's name as it stands in the file.
- ``n-grams``: scikit-learn's online logistic regression (``SGDClassifier(loss="log_loss")``, ``partial_fit`` once per
  chunk) on hashed character n-grams of sizes 2 to 5, 2^18 of them.
- ``most frequent``: the intent seen most often so far.

Both learning rates are swept on a seed and on the first messages only, and are then fixed. The smaller table takes
parts of the kernel away, on the sweep seed.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from benchmarks.kernel_parts.common import SWEEP_SEED, MissingData, Options, banking77, spread, table
from memory.history import Record, content_hash
from olympus.experience_buffer import ExperienceBuffer
from olympus.rehearsal import Rehearsal
from qig_core.inference import run_to_halt
from qig_core.learning import Ema, TrainingDefaults, supervised_loss
from qig_core.m8_kernel import KernelConfig, M8Kernel
from qig_core.vocabulary import EOS, PAD, encode_prompt

CHUNK = 16
STEPS = 3
BATCH = 32
SWEEP_MESSAGES = 640
ABLATION_MESSAGES = 1280
HELD_OUT = 1000
LOOKED_AT = 500
_QUICK = 48  # messages of everything in a run that only shows that it runs
KERNEL_LR = (2e-3, 4e-3, 8e-3)
NGRAM_LR = (1.0, 3.0, 10.0)

Row = tuple[str, str]


@dataclass(frozen=True)
class Result:
    """Accuracies of one arm on one seed, and its CPU seconds without the held-out part."""

    right: list[bool]
    held_out: float
    seconds: float
    parameters: int = 0

    @property
    def prequential(self) -> float:
        """Over the whole stream."""
        return sum(self.right) / len(self.right)

    @property
    def last(self) -> float:
        """Over the last tenth of the stream."""
        tail = self.right[-max(len(self.right) // 10, 1) :]
        return sum(tail) / len(tail)


class Arm:
    """Something that answers and learns."""

    parameters = 0

    def answer(self, texts: Sequence[str]) -> list[str]:
        """The intent of each text."""
        raise NotImplementedError

    def learn(self, rows: Sequence[Row]) -> None:
        """Take in new messages with their intents."""
        raise NotImplementedError


# -- the kernel -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KernelRecipe:
    """How a kernel is made and fed."""

    network: dict[str, Any] = field(default_factory=lambda: {"preset_name": "nano", "blocks": 1, "association": 96})
    lr: float = 4e-3
    ema_decay: float = 0.99
    steps: int = STEPS
    batch: int = BATCH
    priority_share: float = 0.0
    der_alpha: float = 0.0
    capacity: int = 16_384
    code: bool = False  # two letters instead of the intent's name: what the length of the action costs


class KernelArm(Arm):
    """An M8 kernel with its buffer; no database, no thread."""

    def __init__(self, recipe: KernelRecipe, intents: Sequence[str], seed: int):
        network = dict(recipe.network)
        self._config = KernelConfig.preset(network.pop("preset_name"), context=192, **network)
        self._training = TrainingDefaults(lr=recipe.lr, batch_size=recipe.batch, ema_decay=recipe.ema_decay)
        self._recipe = recipe
        self._kernel = M8Kernel(self._config, seed=seed).train()
        self._ema = Ema(self._kernel, recipe.ema_decay)
        self._optimizer = self._training.optimizer(self._kernel)
        self._seed = seed
        self._step = 0
        self._last_id = 0
        self.forget()
        self._names = {name: f"{number:02d}" if recipe.code else name for number, name in enumerate(sorted(intents))}
        self._intents = {spelled: name for name, spelled in self._names.items()}
        self._tree = spelling_tree(list(self._intents))
        self.parameters = self._kernel.parameter_count()

    def forget(self) -> None:
        """An empty buffer; the weights stay."""
        recipe = self._recipe
        self._buffer = ExperienceBuffer(recipe.capacity, 5, self._seed, priority_share=recipe.priority_share)
        self._rehearsal = Rehearsal(self._buffer, self._config.context, recipe.der_alpha)

    def answer(self, texts: Sequence[str]) -> list[str]:
        return [self._intents[said] for said in choose(self._ema.shadow, texts, self._tree)]

    def learn(self, rows: Sequence[Row]) -> None:
        for text, intent in rows:
            self._last_id += 1
            self._buffer.add(_record(self._last_id, text, self._names[intent]))
        for _ in range(self._recipe.steps if self._buffer.training() else 0):
            lesson = self._rehearsal.lesson(self._recipe.batch, self._step)
            self._training.set_lr(self._optimizer, self._step)
            self._optimizer.zero_grad(set_to_none=True)
            loss = supervised_loss(
                self._kernel,
                lesson.batch.ids,
                lesson.batch.loss_mask,
                lesson.weights,
                supervision_steps=self._training.passes_at(self._step, self._config.supervision_steps),
                distillation=lesson.distillation,
            )
            loss.total.backward()
            self._optimizer.step()
            self._ema.update(self._kernel)
            self._rehearsal.learned(lesson, loss.item_nats)
            self._step += 1


Tree = dict[int, "Tree"]


def spelling_tree(names: Sequence[str]) -> Tree:
    """The bytes of all names, EOS included, as a tree."""
    tree: Tree = {}
    for name in names:
        node = tree
        for symbol in [*name.encode(), EOS]:
            node = node.setdefault(symbol, {})
    return tree


@torch.no_grad()
def choose(kernel: M8Kernel, texts: Sequence[str], tree: Tree) -> list[str]:
    """Which name of the tree the kernel gives to each text: greedy at every branching, silent in between."""
    prompts = [encode_prompt(text, kernel.config.context, reserve=64) for text in texts]
    rows, nodes = [list(prompt) for prompt in prompts], [tree] * len(texts)
    for row in range(len(rows)):
        nodes[row] = _spell(rows[row], nodes[row])
    while open_rows := [row for row, node in enumerate(nodes) if node]:
        longest = max(len(rows[row]) for row in open_rows)
        ids = torch.tensor([rows[row] + [PAD] * (longest - len(rows[row])) for row in open_rows])
        logits = run_to_halt(kernel, ids).logits
        for place, row in enumerate(open_rows):
            choices = list(nodes[row])
            best = choices[int(logits[place, len(rows[row]) - 1, choices].argmax())]
            rows[row].append(best)
            nodes[row] = _spell(rows[row], nodes[row][best])
    return [bytes(row[len(prompt) : -1]).decode() for row, prompt in zip(rows, prompts, strict=True)]


def _spell(row: list[int], node: Tree) -> Tree:
    """Append what is not a choice; the node where there is one, or the empty one at the end."""
    while len(node) == 1:
        symbol, node = next(iter(node.items()))
        row.append(symbol)
    return node


def _record(number: int, text: str, action: str) -> Record:
    return Record(
        id=number,
        domain="banking",
        source="api",
        observation=text,
        action=action,
        feedback=None,
        score=None,
        session_id=None,
        episode_id=None,
        messages=None,
        meta={},
        content_hash=content_hash(text, action),
        created_at=0.0,
        deleted=False,
    )


# -- what people would use instead ----------------------------------------------------------------------------


class NgramArm(Arm):
    """Online logistic regression on hashed character n-grams."""

    def __init__(self, lr: float, intents: Sequence[str], seed: int):
        from sklearn.feature_extraction.text import HashingVectorizer
        from sklearn.linear_model import SGDClassifier

        self._intents = sorted(intents)
        self._features = HashingVectorizer(analyzer="char", ngram_range=(2, 5), n_features=2**18, alternate_sign=False)
        self._model = SGDClassifier(loss="log_loss", alpha=1e-6, learning_rate="constant", eta0=lr, random_state=seed)
        self._began = False
        self.parameters = len(self._intents) * (2**18 + 1)

    def answer(self, texts: Sequence[str]) -> list[str]:
        if not self._began:
            return [self._intents[0]] * len(texts)
        return [str(name) for name in self._model.predict(self._features.transform(texts))]

    def learn(self, rows: Sequence[Row]) -> None:
        texts, names = [text for text, _ in rows], [name for _, name in rows]
        self._model.partial_fit(self._features.transform(texts), names, classes=self._intents)
        self._began = True


class FrequentArm(Arm):
    """Always the intent seen most often so far."""

    def __init__(self, intents: Sequence[str]):
        self._seen = Counter(dict.fromkeys(sorted(intents), 0))

    def answer(self, texts: Sequence[str]) -> list[str]:
        return [self._seen.most_common(1)[0][0]] * len(texts)

    def learn(self, rows: Sequence[Row]) -> None:
        self._seen.update(name for _, name in rows)


# -- the stream -----------------------------------------------------------------------------------------------


def test_then_train(arm: Arm, stream: Sequence[Row], held_out: Sequence[Row]) -> Result:
    """Chunk by chunk: answer, then learn; at the end the held-out messages."""
    right: list[bool] = []
    begun = time.process_time()
    for start in range(0, len(stream), CHUNK):
        chunk = stream[start : start + CHUNK]
        said = arm.answer([text for text, _ in chunk])
        right += [answer == intent for answer, (_, intent) in zip(said, chunk, strict=True)]
        arm.learn(chunk)
    seconds = time.process_time() - begun
    good = 0
    for start in range(0, len(held_out), 50):
        part = held_out[start : start + 50]
        said = arm.answer([text for text, _ in part])
        good += sum(answer == intent for answer, (_, intent) in zip(said, part, strict=True))
    return Result(right, good / len(held_out), seconds, arm.parameters)


def run(options: Options) -> str:
    """The part. Raises MissingData without the data set or scikit-learn."""
    try:
        import sklearn
    except ImportError:
        raise MissingData("scikit-learn is not installed; it comes with requirements-dev.txt") from None
    rows, held_out = banking77(options, "train"), _held_out(options)
    intents = sorted({intent for _, intent in rows})
    messages = _QUICK if options.quick else len(rows)
    sweep = _shuffled(rows, SWEEP_SEED)[: _QUICK if options.quick else SWEEP_MESSAGES]
    recipe, kernel_sweep = _best(
        [KernelRecipe(lr=lr) for lr in KERNEL_LR], lambda r: KernelArm(r, intents, SWEEP_SEED), sweep, held_out
    )
    ngram_lr, ngram_sweep = _best(NGRAM_LR, lambda lr: NgramArm(lr, intents, SWEEP_SEED), sweep, held_out)
    results: dict[str, list[Result]] = {"kernel": [], "n-grams": [], "most frequent": []}
    for seed in options.seeds:
        stream = _shuffled(rows, seed)[:messages]
        results["kernel"].append(test_then_train(KernelArm(recipe, intents, seed), stream, held_out))
        results["n-grams"].append(test_then_train(NgramArm(ngram_lr, intents, seed), stream, held_out))
        results["most frequent"].append(test_then_train(FrequentArm(intents), stream, held_out))
    parts = [
        f"{messages:,} messages, {len(intents)} intents, {len(held_out):,} held out, chunks of {CHUNK}; "
        f"scikit-learn {sklearn.__version__}.",
        _table(results),
        _ratios(results),
        f"Learning rates, chosen by prequential accuracy over {len(sweep)} messages of the sweep seed: "
        f"kernel {kernel_sweep}; n-grams {ngram_sweep}.",
        _ablations(recipe, rows, held_out, intents, options),
    ]
    return "\n\n".join(parts)


def _held_out(options: Options) -> list[Row]:
    """Not the first of them: those were looked at while the recipe was being chosen."""
    mixed = _shuffled(banking77(options, "test"), seed=0)
    fresh = mixed[min(LOOKED_AT, len(mixed) // 3) :]
    return fresh[: _QUICK if options.quick else HELD_OUT]


def _shuffled(rows: Sequence[Row], seed: int) -> list[Row]:
    mixed = list(rows)
    random.Random(seed).shuffle(mixed)
    return mixed


def _best(
    choices: Sequence[Any], make: Callable[[Any], Arm], stream: Sequence[Row], held_out: Sequence[Row]
) -> tuple[Any, str]:
    """The choice with the best prequential accuracy, and all of them for people to read."""
    scores = [test_then_train(make(choice), stream, held_out[:50]).prequential for choice in choices]
    shown = [getattr(choice, "lr", choice) for choice in choices]
    text = ", ".join(f"{lr:g}: {score:.3f}" for lr, score in zip(shown, scores, strict=True))
    return choices[scores.index(max(scores))], text


def _table(results: dict[str, list[Result]]) -> str:
    body = [
        [
            name,
            spread([each.prequential for each in runs]),
            spread([each.last for each in runs]),
            spread([each.held_out for each in runs]),
            f"{runs[0].parameters:,}",
            spread([each.seconds for each in runs], 0),
        ]
        for name, runs in results.items()
    ]
    return table(["arm", "prequential accuracy", "last tenth", "held-out accuracy", "parameters", "CPU seconds"], body)


def _ratios(results: dict[str, list[Result]]) -> str:
    pairs = list(zip(results["kernel"], results["n-grams"], strict=True))
    first = spread([kernel.prequential / max(ngram.prequential, 1e-9) for kernel, ngram in pairs])
    second = spread([kernel.held_out / max(ngram.held_out, 1e-9) for kernel, ngram in pairs])
    return f"Kernel / n-grams: prequential {first}, held-out {second} (wanted: at least 0.9)."


def _ablations(
    recipe: KernelRecipe, rows: Sequence[Row], held_out: Sequence[Row], intents: Sequence[str], options: Options
) -> str:
    """What matters, one change at a time, over the first messages of the sweep seed."""
    network = recipe.network
    arms = {
        "as above": recipe,
        "without the linear path": replace(recipe, network={**network, "association": 0}),
        "n-grams in the input instead": replace(recipe, network={**network, "association": 0, "ngram_buckets": 32_768}),
        "two blocks": replace(recipe, network={**network, "blocks": 2}),
        "batches of 16": replace(recipe, batch=16),
        "one step per chunk": replace(recipe, steps=1),
        "a quarter by priority": replace(recipe, priority_share=0.25),
        "half by priority": replace(recipe, priority_share=0.5),
        "codes instead of names": replace(recipe, code=True),
    }
    stream = _shuffled(rows, SWEEP_SEED)[: _QUICK if options.quick else ABLATION_MESSAGES]
    body = []
    for name, changed in arms.items():
        result = test_then_train(KernelArm(changed, intents, SWEEP_SEED), stream, held_out)
        shown = [f"{value:.3f}" for value in (result.prequential, result.last, result.held_out)]
        body.append([name, *shown, f"{result.seconds:.0f}"])
    head = [f"kernel, first {len(stream):,} messages", "prequential", "last tenth", "held out", "CPU seconds"]
    return table(head, body)
