"""Clients that ask while a domain's cartridge is swapped under them: each answer is one version's, whole.

Two versions are promoted in turn, through the server's own routes. Every client follows the domain, as an agent does.
Beforehand each version was asked each question alone; an answer that differs from what the version it was asked of says
alone would be a mixture.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from agents.environments.base import Task
from agents.kv_memory_agent import KVMemoryAgent
from agents.over_http import OlympusServer
from lm.transport import Transport
from lm.types import CartridgeRef
from memory.kv_cache_memory import KVCacheMemory

CLIENTS = 8


@dataclass(frozen=True)
class Swapped:
    """What the clients saw."""

    answers: int
    of_each: dict[str, int]  #: answers by version
    swaps: int
    across: int  #: answers that were under way at a swap
    mixed: int  #: answers that the version they were asked of does not give alone
    telling: int  #: questions to which the two versions say different things


def swap_under_clients(
    server: OlympusServer,
    transport: Transport,
    domain: str,
    versions: tuple[str, str],
    tasks: Sequence[Task],
    make: Callable[[KVCacheMemory], KVMemoryAgent],
    *,
    swaps: int = 6,
) -> Swapped:
    """Promote the ``versions`` in turn, ``swaps`` times, under ``CLIENTS`` clients.

    ``make`` makes an agent with a memory. The second version serves at the end when ``swaps`` is even.
    """
    alone = {}
    for name in versions:
        agent = make(KVCacheMemory([CartridgeRef(name)]))
        alone[name] = [agent.act(task.observation).text for task in tasks]
    seen: list[tuple[str, int, str, float, float]] = []
    over, count = threading.Event(), threading.Condition()

    def client(number: int) -> None:
        agent = make(KVCacheMemory(domain=domain, source=server))
        place = number
        while not over.is_set():
            begun = time.monotonic()
            act = agent.act(tasks[place % len(tasks)].observation)
            with count:
                seen.append((act.cartridges[0].id, place % len(tasks), act.text, begun, time.monotonic()))
                count.notify_all()
            place += 1

    moments = []
    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(client, number) for number in range(CLIENTS)]
        try:
            for number in range(swaps):
                wanted = (number + 1) * CLIENTS
                with count:
                    while len(seen) < wanted and not any(item.done() for item in clients):
                        count.wait(1.0)
                transport.post(f"/olympus/cartridges/{versions[number % 2]}/promote", {"force": True})
                moments.append(time.monotonic())
            with count:
                while len(seen) < (swaps + 1) * CLIENTS and not any(item.done() for item in clients):
                    count.wait(1.0)
        finally:
            over.set()
        for item in clients:
            item.result()
    return Swapped(
        answers=len(seen),
        of_each={name: sum(item[0] == name for item in seen) for name in versions},
        swaps=swaps,
        across=sum(any(begun < moment < ended for moment in moments) for *_, begun, ended in seen),
        mixed=sum(name not in alone or alone[name][place] != text for name, place, text, *_ in seen),
        telling=sum(one != other for one, other in zip(*(alone[name] for name in versions), strict=True)),
    )
