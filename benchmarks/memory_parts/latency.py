"""How long a search takes beside bare FAISS, and which form of index is worth having when."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import faiss
import numpy as np

from benchmarks.kernel_parts.common import SWEEP_SEED, Options, table
from benchmarks.memory_parts.common import Messages, filled, more_of
from memory.catalog import Filters
from memory.embedding import Matrix, MiniLM
from memory.episodic import EpisodicMemory

LIMIT = 10


def run(options: Options, model: MiniLM, known: Messages, asked: Messages) -> str:
    """Markdown."""
    sizes = (2_000, 5_000) if options.quick else (10_000, 100_000)
    rows, full = [], []
    for size in sizes:
        messages = known if size <= len(known.texts) else more_of(known, size, SWEEP_SEED)
        messages = Messages(messages.texts[:size], messages.intents[:size], messages.vectors[:size])
        with filled(messages, model.floor, asked) as memory:
            rows += _beside_faiss(options, memory, messages, asked)
            full += _whole(options, memory, size, asked)
    embedding = _milliseconds([lambda text=text: model.embed([text]) for text in asked.texts[:100]])
    return "\n\n".join(
        [
            "Vectors alone, no embedding of the question: `EpisodicMemory.nearest` (filters, the lock, what was "
            f"removed left out) beside a bare FAISS index of the same form with the same vectors, {LIMIT} results, one "
            "question at a time, the two in turns. Ratio: of the sums; recall@10 against looking at every vector.",
            table(("vectors", "index", "seed", "FAISS p50 / p95 ms", "ours p50 / p95 ms", "ratio", "recall@10"), rows),
            "The whole search: words and vectors, fusion, rows read from the database, snippets (the question's vector "
            f"is known; embedding it with MiniLM takes {statistics.median(embedding):.1f} ms more).",
            table(("entries", "filter", "p50 ms", "p95 ms"), full),
            _forms(options, known, asked),
        ]
    )


def _beside_faiss(options: Options, memory: EpisodicMemory, messages: Messages, asked: Messages) -> list[list[object]]:
    size, width = messages.vectors.shape
    flat = faiss.IndexFlatIP(width)
    flat.add(messages.vectors)
    kind = str(memory.status()["index"])
    held = memory._index.vectors._index  # the very lists, without what is around them
    parameters = faiss.SearchParametersIVF(nprobe=64) if "lists" in kind else None
    bare = held if parameters is not None else flat
    rows: list[list[object]] = []
    for seed in options.seeds:
        queries = asked.vectors[np.random.default_rng(seed).permutation(len(asked.texts))[:400]]
        ours: list[float] = []
        theirs: list[float] = []
        for turn, query in enumerate(queries):
            one = np.ascontiguousarray(query[None])
            arms: list[tuple[list[float], Callable[[], object]]] = [
                (theirs, lambda one=one: bare.search(one, LIMIT, params=parameters)),
                (ours, lambda query=query: memory.nearest(query, LIMIT)),
            ]
            for times, arm in arms if turn % 2 else arms[::-1]:
                begun = time.perf_counter()
                arm()
                times.append((time.perf_counter() - begun) * 1e3)
        exact = flat.search(queries, LIMIT)[1] + 1
        found = [set(memory.nearest(query, LIMIT)[0].tolist()) for query in queries]
        hits = sum(len(set(row.tolist()) & ids) for row, ids in zip(exact, found, strict=True))
        ratio = f"{sum(ours) / sum(theirs):.2f}"
        rows.append([f"{size:,}", kind, seed, _pair(theirs), _pair(ours), ratio, f"{hits / LIMIT / len(queries):.3f}"])
    return rows


def _whole(options: Options, memory: EpisodicMemory, size: int, asked: Messages) -> list[list[object]]:
    filters = {
        "none": Filters(),
        "a domain (half)": Filters(domain="a"),
        "all but one session": Filters(without_session="s3"),
        "a session": Filters(session="s3"),
    }
    order = np.random.default_rng(options.seeds[0]).permutation(len(asked.texts))[:200]
    rows: list[list[object]] = []
    for name, chosen in filters.items():
        times = _milliseconds(
            [lambda index=index, chosen=chosen: memory.search(asked.texts[index], chosen, LIMIT) for index in order]
        )
        rows.append([f"{size:,}", name, f"{statistics.median(times):.2f}", f"{np.quantile(times, 0.95):.2f}"])
    return rows


def _forms(options: Options, known: Messages, asked: Messages) -> str:
    """Exact, lists and a graph at growing sizes; first the messages themselves, which lie further apart."""
    rows: list[list[object]] = []
    sets = [(f"{len(known.texts):,} messages", known.vectors, asked.vectors[:200])]
    for size in (3_000,) if options.quick else (20_000, 50_000, 100_000):
        queries = more_of(known, 200, SWEEP_SEED + 1).vectors
        sets.append((f"{size:,} variants", more_of(known, size, SWEEP_SEED).vectors, queries))
    for title, vectors, queries in sets:
        size = len(vectors)
        width = vectors.shape[1]
        lists = int(4 * size**0.5)
        flat, inverted = (
            faiss.IndexFlatIP(width),
            faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, lists, faiss.METRIC_INNER_PRODUCT),
        )
        inverted.cp.niter, inverted.cp.min_points_per_centroid = 10, 1
        forms: list[tuple[str, object, object]] = [("every vector", flat, None)]
        forms += [(f"{lists} lists, 64 looked at", inverted, faiss.SearchParametersIVF(nprobe=64))]
        if size <= 20_000:
            graph = faiss.IndexHNSWFlat(width, 32, faiss.METRIC_INNER_PRODUCT)
            graph.hnsw.efConstruction = 80
            forms += [("HNSW, M 32, ef 128", graph, faiss.SearchParametersHNSW(efSearch=128))]
        exact: list[set[int]] = []
        for name, index, parameters in forms:
            begun = time.perf_counter()
            if not index.is_trained:
                index.train(vectors[: lists * 40])
            index.add(vectors)
            built = time.perf_counter() - begun
            times, found = _searched(index, parameters, queries)
            exact = exact or found
            recall = sum(len(one & other) for one, other in zip(exact, found, strict=True)) / LIMIT / len(queries)
            rows.append([title, name, _pair(times), f"{recall:.3f}", f"{built:.1f}"])
    return "Forms of an index, bare FAISS:\n\n" + table(
        ("vectors", "form", "p50 / p95 ms", "recall@10", "built in s"), rows
    )


def _searched(index: object, parameters: object, queries: Matrix) -> tuple[list[float], list[set[int]]]:
    times: list[float] = []
    found: list[set[int]] = []
    for query in queries:
        begun = time.perf_counter()
        _, ids = index.search(query[None], LIMIT, params=parameters)
        times.append((time.perf_counter() - begun) * 1e3)
        found.append(set(ids[0].tolist()))
    return times, found


def _milliseconds(calls: list[Callable[[], object]]) -> list[float]:
    times: list[float] = []
    for call in calls:
        begun = time.perf_counter()
        call()
        times.append((time.perf_counter() - begun) * 1e3)
    return times


def _pair(times: list[float]) -> str:
    return f"{statistics.median(times):.2f} / {np.quantile(times, 0.95):.2f}"
