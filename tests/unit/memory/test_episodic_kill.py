"""kill -9 wherever it hits: rows and vectors agree after the next start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import sqlalchemy as sa

from memory.episodic import EpisodicMemory, EpisodicOptions
from memory.history import History
from storage import migrate
from storage.database import Database
from storage.models import EpisodicVector
from tests.support.letters import Letters

ROOT = Path(__file__).resolve().parents[3]

_LIFE = """
    import os, signal, sys, threading
    from memory.episodic import EpisodicMemory, EpisodicOptions
    from memory.history import History, NewExperience
    from storage.database import Database
    from tests.support.letters import Letters

    url, where = sys.argv[1:]

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    class Dying(Letters):  # the rows are committed, their vectors are not
        def embed(self, texts):
            if where == "embed" and any("fatal" in text for text in texts):
                die()
            return super().embed(texts)

    database = Database(url)
    history = History(database)
    memory = EpisodicMemory(database, history, EpisodicOptions(), default_domain="general", embedding=Dying())
    if where == "saved":  # committed, and not in the index yet
        add = memory._index.add_vectors
        memory._index.add_vectors = lambda ids, vectors: die() if 3 in ids else add(ids, vectors)
    if where == "deleted":  # the tombstone is committed, nobody has heard of it
        history.subscribe_changes(lambda ids: die())
    memory.start()

    def tell(text):
        return history.append([NewExperience(text, "a", "general", "test")])[0].id

    first = tell("the first herring")
    tell("the second herring")
    memory.wait_until_settled(20)
    print("ready", flush=True)
    if where == "deleted":
        history.delete(experience_id=first)
    tell("the third and fatal herring")
    while True:  # until it is killed from outside, or by itself
        number = tell("one more herring")
        if number % 2:
            history.delete(experience_id=number)
        memory.search("herring")
        print(number, flush=True)
"""


@pytest.mark.parametrize("where", ["embed", "saved", "deleted", "anywhere"])
def test_rows_and_vectors_agree_after_kill_9(tmp_path: Path, where: str) -> None:
    url = f"sqlite:///{tmp_path}/test.db"
    database = Database(url)
    migrate.upgrade(database)
    arguments = [sys.executable, "-c", textwrap.dedent(_LIFE), url, where]
    life = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert life.stdout is not None
    assert life.stdout.readline() == "ready\n"
    if where == "anywhere":
        for _ in range(8):
            life.stdout.readline()
        os.kill(life.pid, signal.SIGKILL)
    life.stdout.read()
    assert life.wait(60) == -signal.SIGKILL
    life.stdout.close()
    vectors = _vectors(database)
    history = History(database)
    living = {record.id for record in history.page(limit=200)}
    assert vectors <= living, "there is no vector of anything deleted, whoever asks the table"
    if where == "embed":
        assert 3 in living - vectors, "it was killed between the row and its vector"
    if where == "deleted":
        assert 1 not in living | vectors
    memory = EpisodicMemory(database, history, EpisodicOptions(), default_domain="general", embedding=Letters())
    memory.start()
    assert memory.wait_until_settled(20)
    assert _vectors(database) == living
    found = {item.experience.id for item in memory.search("herring", limit=200)}
    nearest, _ = memory.nearest(Letters().embed(["herring"])[0], 200)
    assert found == set(nearest.tolist()) == living
    memory.stop()
    memory.check_invariants()
    database.close()


def _vectors(database: Database) -> set[int]:
    with database.read() as session:
        ids = list(session.scalars(sa.select(EpisodicVector.experience_id)))
    assert len(ids) == len(set(ids))
    return set(ids)
