"""Two hundred clients that connect and vanish at random: nothing of them stays behind."""

from __future__ import annotations

import json
import random
import socket
import struct
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.support.server import Server, running
from tests.support.tiny_model import save_tiny_model

CLIENTS = 200
AT_ONCE = 32
REQUEST_THREADS = 24
SCHEDULER_THREADS = 10  # the most that APScheduler's pool makes, under the same name
SEED = 6


def test_nothing_stays_of_clients_that_vanish(tmp_path: Path) -> None:
    """Threads, slots and places in the engine return to what they were, and memory stays where a leak would be seen."""
    environ = {
        "OLYMPUS_MODEL__NAME": str(save_tiny_model(tmp_path / "tiny-llama")),
        "OLYMPUS_MODEL__THREADS": "1",
        "OLYMPUS_KERNELS__SPAWN_DEFAULT": "false",
        "OLYMPUS_MEMORY__EPISODIC__EMBEDDING": "none",
        # What is learned from the clients takes room, too, and is not the question here.
        "OLYMPUS_KERNELS__AUTO_SPAWN": "false",
        "OLYMPUS_DISTILLATION__AUTOMATIC": "false",
        # So few that the first clients have made most threads and filled the cache: what comes then is growth.
        "OLYMPUS_SERVER__THREADS": str(REQUEST_THREADS),
        "OLYMPUS_SERVER__MAX_CHATS": "10",
        "OLYMPUS_SERVER__MAX_STREAMS": "6",
        "OLYMPUS_ENGINE__PREFIX_CACHE_BYTES": "4194304",
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8",  # code that is compiled for each new shape, up to a thousand
    }
    with running(tmp_path / "data", environ) as server:
        vanish(server, 100, SEED)
        before, threads_before = at_rest(server), threads(server)
        done = vanish(server, CLIENTS, SEED + 1)
        after, threads_after = at_rest(server), threads(server)
        assert sum(done.values()) == CLIENTS
        assert min(done[way] for way in ("at once", "half a request", "before the answer", "in the answer")) > 10, done
        assert after["admission"]["chats"] == after["admission"]["streams"] == 0, (done, server.log)
        assert (after["engine"]["active"], after["engine"]["waiting"]) == (0, 0)
        # The pool grows up to its bound, whenever as many requests come at once; nothing else may grow.
        pool = threads_after.pop("ThreadPoolExecutor")
        assert pool <= max(threads_before.pop("ThreadPoolExecutor"), REQUEST_THREADS + SCHEDULER_THREADS), threads_after
        assert sum(threads_after.values()) <= sum(threads_before.values()) + 1, (threads_before, threads_after)
        grown = after["process"]["rss_bytes"] - before["process"]["rss_bytes"]
        # Measured: 24 MiB for these 200, 4 MiB for the 200 that come 400 later: allocators settle, nothing is kept.
        assert grown < 64 << 20, f"{grown >> 20} MiB more after {CLIENTS} clients"
        assert "Traceback" not in server.log
        answer = server.json("POST", "/v1/chat/completions", json=body(random.Random(SEED), stream=False, longest=4))
        assert answer["usage"]["completion_tokens"] == 4


def at_rest(server: Server) -> dict[str, Any]:
    """The server's own account, once it is idle; the last one that it gave when it does not become so."""
    pause, told = threading.Event(), {}
    for _ in range(600):
        told = server.json("GET", "/olympus/status")
        busy = told["admission"]["chats"] + told["admission"]["streams"] + told["engine"]["active"]
        if busy == 0 and told["engine"]["waiting"] == 0:
            break
        pause.wait(0.1)
    return dict(told)


def threads(server: Server) -> dict[str, int]:
    """How many threads have which name."""
    return {group["name"]: group["threads"] for group in server.json("GET", "/olympus/system")["threads"]}


def vanish(server: Server, count: int, seed: int) -> Counter[str]:
    """``count`` clients, ``AT_ONCE`` at a time; returns how many left in which way."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return Counter(pool.map(lambda number: one(server, random.Random(seed * 10_000 + number)), range(count)))


def body(chance: random.Random, *, stream: bool, longest: int = 100) -> dict[str, Any]:
    words = " ".join(chance.choice(["fox", "dog", "Paris", "Bern"]) for _ in range(20))
    message = {"role": "user", "content": words}
    return {"messages": [message], "max_tokens": longest, "temperature": 1.0, "stream": stream, "seed": 1}


def one(server: Server, chance: random.Random) -> str:
    """Connect, and leave in one of several ways: some say goodbye, some reset the connection."""
    stream = chance.random() < 0.7
    if chance.random() < 0.15:
        request = b"GET /olympus/stream HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    else:
        route = chance.choice(["/v1/chat/completions", "/v1/responses", "/v1/completions"])
        text = body(chance, stream=stream)
        if route == "/v1/responses":
            text = {"input": text["messages"], "max_output_tokens": text["max_tokens"], "stream": stream}
        elif route == "/v1/completions":
            text = {"prompt": text["messages"][0]["content"], "max_tokens": text["max_tokens"], "stream": stream}
        data = json.dumps(text).encode()
        head = f"POST {route} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        request = f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    try:
        way = chance.choice(["at once", "half a request", "before the answer", "in the answer", "in the answer"])
        if way == "half a request":
            connection.sendall(request[: len(request) // 2])
        elif way != "at once":
            connection.sendall(request)
        if way == "before the answer":
            time.sleep(chance.uniform(0, 0.3))
        elif way == "in the answer":
            read_some(connection, chance.randrange(1, 4000))
        if chance.random() < 0.5:  # RST instead of FIN, as when a process is killed
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return way
    finally:
        connection.close()


def read_some(connection: socket.socket, wanted: int) -> None:
    """The first ``wanted`` bytes, or what comes without a pause."""
    connection.settimeout(0.3)
    try:
        while wanted > 0 and (got := connection.recv(min(wanted, 512))):
            wanted -= len(got)
    except TimeoutError:
        pass
