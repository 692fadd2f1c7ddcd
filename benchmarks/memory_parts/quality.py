"""What is found: messages of the same intent, and one message by its number, by words, by meaning, and by both."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.kernel_parts.common import ROOT, SWEEP_SEED, Options, spread, table
from benchmarks.memory_parts.common import Messages, filled
from memory.embedding import EngineEmbedding, MiniLM
from memory.episodic import NOTHING_ASKED, EpisodicMemory, fuse

LIMIT = 10
WEIGHTS = (0.5, 1.0, 2.0, 4.0)
FIXED = (0.25, 0.5, 1.0)
Ranking = Callable[[int], list[int]]


def run(options: Options, model: MiniLM, known: Messages, asked: Messages) -> str:
    """Markdown."""
    with filled(known, model.floor, asked) as memory:
        arms = _arms(memory, asked)
        sweep = _queries(asked, SWEEP_SEED, 300)
        swept = {weight: _precision(_fused(memory, asked, weight), sweep, known, asked) for weight in WEIGHTS}
        fixed = {weight: _precision(_plain(memory, asked, weight), sweep, known, asked) for weight in FIXED}
        chosen = memory.options.words_weight
        arms[f"both, words weigh {chosen} (as served)"] = _fused(memory, asked, chosen)
        rows = []
        for name, arm in arms.items():
            values = [_precision(arm, _queries(asked, seed, 500), known, asked) for seed in options.seeds]
            rows.append([name, spread(values)])
    plain = ", ".join(f"{weight}: {value:.3f}" for weight, value in fixed.items())
    sweeps = ", ".join(f"{weight}: {value:.3f}" for weight, value in swept.items())
    return "\n\n".join(
        [
            f"banking77: {len(known.texts):,} messages of the training split are remembered, 500 of the test split are "
            "asked. Precision@10: the share of the first ten results that have the question's intent (of 77).",
            table(("ranking", "precision@10, same intent"), rows),
            f"Weight of words, on the sweep seed: {sweeps}. With one fixed weight: {plain}.",
            _numbers(options, model, known),
            _engine(options, known, asked, model),
        ]
    )


def _arms(memory: EpisodicMemory, asked: Messages) -> dict[str, Ranking]:
    def words(query: int) -> list[int]:
        return [known for known, _ in memory._index.best_words(asked.texts[query], LIMIT, NOTHING_ASKED)]

    def meaning(query: int) -> list[int]:
        return memory.nearest(asked.vectors[query], LIMIT)[0].tolist()

    return {"words (BM25)": words, "meaning (MiniLM)": meaning}


def _fused(memory: EpisodicMemory, asked: Messages, weight: float) -> Ranking:
    """As ``EpisodicMemory.search`` ranks, at another weight."""

    def both(query: int) -> list[int]:
        words = memory._index.best_words(asked.texts[query], 50, NOTHING_ASKED)
        ids, cosines = memory.nearest(asked.vectors[query], 50)
        meanings = list(zip(ids.tolist(), cosines.tolist(), strict=True))
        return [known for known, *_ in fuse(words, meanings, weight)[:LIMIT]]

    return both


def _plain(memory: EpisodicMemory, asked: Messages, weight: float) -> Ranking:
    """Reciprocal rank fusion with one weight for all that words find."""

    def both(query: int) -> list[int]:
        scores: dict[int, float] = {}
        words = [known for known, _ in memory._index.best_words(asked.texts[query], 50, NOTHING_ASKED)]
        for ranking, share in ((words, weight), (memory.nearest(asked.vectors[query], 50)[0].tolist(), 1.0)):
            for rank, known in enumerate(ranking, 1):
                scores[known] = scores.get(known, 0.0) + share / (60 + rank)
        return sorted(scores, key=lambda known: -scores[known])[:LIMIT]

    return both


def _queries(asked: Messages, seed: int, count: int) -> Sequence[int]:
    return np.random.default_rng(seed).permutation(len(asked.texts))[:count].tolist()


def _precision(arm: Ranking, queries: Sequence[int], known: Messages, asked: Messages) -> float:
    """Results that are not there count as wrong."""
    right = sum(known.intents[found - 1] == asked.intents[query] for query in queries for found in arm(query))
    return float(right / LIMIT / len(queries))


def _numbers(options: Options, model: MiniLM, known: Messages) -> str:
    """One message among 2,000 by the case number that stands in it."""
    drawer = np.random.default_rng(SWEEP_SEED)
    cases = drawer.choice(np.arange(10_000, 99_999), 2000, replace=False)
    texts = [f"{text} My case is {case}." for text, case in zip(known.texts, cases, strict=False)]
    cases = cases[: len(texts)]
    vectors = np.concatenate([model.embed(texts[begin : begin + 32]) for begin in range(0, len(texts), 32)])
    questions = [f"What is the state of case {case}?" for case in cases[:200]]
    asked = Messages(questions, np.array(["case"] * len(questions)), model.embed(questions))
    remembered = Messages(texts, np.array(["case"] * len(texts)), vectors)
    with filled(remembered, model.floor, asked) as memory:
        arms = {**_arms(memory, asked), "both (as served)": _fused(memory, asked, memory.options.words_weight)}
        arms |= {f"both, fixed weight {weight}": _plain(memory, asked, weight) for weight in FIXED}
        rows = []
        for name, arm in arms.items():
            found = [arm(query) for query in range(len(questions))]
            first = np.mean([ids[:1] == [query + 1] for query, ids in enumerate(found)])
            ten = np.mean([query + 1 in ids for query, ids in enumerate(found)])
            rows.append([name, f"{first:.3f}", f"{ten:.3f}"])
    return f"One of {len(texts):,} messages by the case number in it, {len(questions)} questions:\n\n" + table(
        ("ranking", "first", "among ten"), rows
    )


def _engine(options: Options, known: Messages, asked: Messages, model: MiniLM) -> str:
    """The served model's own states, on fewer messages: it is the slower embedding."""
    from workspace.models import load_model

    count = 100 if options.quick else 600
    drawer = np.random.default_rng(SWEEP_SEED)
    intents = set(drawer.choice(sorted(set(known.intents.tolist())), 20, replace=False).tolist())
    few, questions = _only(known, intents, count), _only(asked, intents, count // 4)
    engine = EngineEmbedding(load_model("smollm2-135m-instruct", cache_dir=ROOT / ".cache", device="cpu"))
    rows = []
    for name, embedding in (("MiniLM", model), ("SmolLM2-135M's states", engine)):
        texts = few.texts + questions.texts
        vectors = np.concatenate([embedding.embed(texts[begin : begin + 32]) for begin in range(0, len(texts), 32)])
        mine = Messages(few.texts, few.intents, vectors[: len(few.texts)])
        theirs = Messages(questions.texts, questions.intents, vectors[len(few.texts) :])
        with filled(mine, embedding.floor, theirs) as memory:
            every = range(len(theirs.texts))
            arms = {**_arms(memory, theirs), "both": _fused(memory, theirs, memory.options.words_weight)}
            words, meaning, both = (_precision(arm, every, mine, theirs) for arm in arms.values())
        rows.append([name, f"{embedding.floor:.3f}", f"{words:.3f}", f"{meaning:.3f}", f"{both:.3f}"])
    return f"{len(few.texts)} messages of 20 intents, {len(questions.texts)} asked, by embedding:\n\n" + table(
        ("embedding", "floor", "words", "meaning", "both"), rows
    )


def _only(messages: Messages, intents: set[str], count: int) -> Messages:
    chosen = [index for index, intent in enumerate(messages.intents) if intent in intents][:count]
    return Messages([messages.texts[index] for index in chosen], messages.intents[chosen], messages.vectors[chosen])
