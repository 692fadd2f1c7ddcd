"""A life in episodes: act, be judged, now and then be examined with a frozen memory; every score a line on disk.

An episode is one task. After every ``eval_every`` of them a clone with frozen memory answers held-out tasks, so that
what is measured is the memory of that moment and the measuring changes nothing.

``scores.jsonl`` holds one object per action and is the runner's whole state: a life that was interrupted, even by
``kill -9``, goes on after its last line. The experience of an episode is written under a request id that its number
gives, so an episode that is repeated because its line was lost is neither remembered twice nor seen by itself.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from agents.base import Feedback, MemoryAgent
from agents.environments.base import Environment, Task, judge
from agents.errors import EpisodesMismatch, LogDamaged
from storage.files import append_line, write_json

SCORES, LIFE = "scores.jsonl", "life.json"


class EpisodesConfig(BaseModel):
    """How long a life is, and how often it is examined."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    episodes: int = Field(60, ge=1, description="Training tasks; from the front again when the environment has fewer.")
    eval_every: int = Field(0, ge=0, description="Episodes between examinations; 0: only at the end.")
    eval_at_start: bool = Field(False, description="Examine before the first episode as well.")
    eval_tasks: int = Field(60, ge=1, description="Held-out tasks of an examination, the first ones.")
    workers: int = Field(1, ge=1, le=64, description="Held-out tasks that are asked at once.")
    snapshots: bool = Field(False, description="Write the memory's snapshot at every examination.")


@dataclass(frozen=True, slots=True)
class Score:
    """One line of ``scores.jsonl``. ``episode``: training tasks lived through before (eval), or this one's number."""

    mode: Literal["train", "eval"]
    episode: int
    index: int  #: of the task within an examination; 0 in training
    environment: str
    agent: str
    group: str
    key: str
    answer: str
    action: str
    score: float
    seconds: float
    ttft_seconds: float | None
    prompt_tokens: int
    completion_tokens: int
    cartridge_slots: int
    cartridges: list[str]
    experiences: int
    at: float


@dataclass(frozen=True, slots=True)
class Summary:
    """What a life came to."""

    episodes: int
    mean_train: float | None  #: of the scores of all episodes
    examinations: dict[int, float]  #: episodes lived -> mean score of the held-out tasks
    finished: bool


class EpisodeRunner:
    """``agent`` lives in ``environment``; ``folder`` keeps the scores. One runner at a time for a folder.

    ``life`` names this life: its experiences' ids begin with it, so it must be another one for another life in the same
    history. Raises ``EpisodesMismatch`` when the folder is another life's.
    """

    def __init__(
        self,
        agent: MemoryAgent,
        environment: Environment,
        folder: Path,
        config: EpisodesConfig | None = None,
        *,
        life: str = "life",
        stop: threading.Event | None = None,
        progress: Callable[[Score], None] | None = None,
    ):
        self._agent = agent
        self._environment = environment
        self._folder = folder
        self._config = config or EpisodesConfig()
        self._life = life
        self._stop = stop or threading.Event()
        self._progress = progress or (lambda _: None)
        self._scores: list[Score] = []

    def run(self) -> Summary:
        """Live until the last episode, or until ``stop`` is set. Raises what the agent raises; what was lived stays."""
        self._open()
        lived = sum(1 for score in self._scores if score.mode == "train")
        tasks = self._environment.tasks("train")
        if lived == 0 and self._config.eval_at_start:
            self._examine(0)
        else:
            self._examine_if_due(lived)  # the one that was interrupted
        while lived < self._config.episodes and not self._stop.is_set():
            self._live(lived, tasks[lived % len(tasks)])
            lived += 1
            self._examine_if_due(lived)
        return self.summary()

    def summary(self) -> Summary:
        """What the scores say so far."""
        trained = [score.score for score in self._scores if score.mode == "train"]
        examined: dict[int, list[float]] = {}
        for score in self._scores:
            if score.mode == "eval":
                examined.setdefault(score.episode, []).append(score.score)
        return Summary(
            episodes=len(trained),
            mean_train=sum(trained) / len(trained) if trained else None,
            examinations={episode: sum(found) / len(found) for episode, found in sorted(examined.items())},
            finished=len(trained) >= self._config.episodes,
        )

    def scores(self) -> list[Score]:
        """All lines, oldest first."""
        return list(self._scores)

    def _live(self, episode: int, task: Task) -> None:
        living = self._agent.clone_for_episode(training=True, episode_id=f"{self._life}-{episode:06d}")
        score, feedback = self._ask(living, task, "train", episode, 0)
        living.observe(feedback)
        living.end_episode()
        self._write(score)  # after the experience: a crash between the two repeats the episode, and finds it written

    def _examine_if_due(self, lived: int) -> None:
        every = self._config.eval_every
        if lived and (lived == self._config.episodes or (every and lived % every == 0)):
            self._examine(lived)

    def _examine(self, lived: int) -> None:
        """Ask what was not asked yet of the examination after ``lived`` episodes."""
        known = {score.index for score in self._scores if score.mode == "eval" and score.episode == lived}
        tasks = self._environment.evaluation(lived)[: self._config.eval_tasks]
        open_tasks = [(index, task) for index, task in enumerate(tasks) if index not in known]
        if not open_tasks:
            return
        frozen = self._agent.clone_for_episode(training=False)
        if self._config.snapshots:
            frozen.save_snapshot(self._folder, f"ep_{lived:06d}")

        def ask(item: tuple[int, Task]) -> Score | None:
            if self._stop.is_set():
                return None
            index, task = item
            return self._ask(frozen_clone(frozen), task, "eval", lived, index)[0]

        with ThreadPoolExecutor(self._config.workers, thread_name_prefix="examination") as pool:
            for found in pool.map(ask, open_tasks):
                if found is not None:
                    self._write(found)

    def _ask(
        self, agent: MemoryAgent, task: Task, mode: Literal["train", "eval"], episode: int, index: int
    ) -> tuple[Score, Feedback]:
        started = time.perf_counter()
        act = agent.act(task.observation)
        seconds = time.perf_counter() - started
        feedback = judge(task, act.text)
        score = Score(
            mode=mode,
            episode=episode,
            index=index,
            environment=self._environment.name,
            agent=agent.name,
            group=task.group,
            key=task.key,
            answer=task.answer,
            action=act.text,
            score=feedback.score or 0.0,
            seconds=seconds,
            ttft_seconds=act.reply.ttft_seconds,
            prompt_tokens=act.reply.prompt_tokens,
            completion_tokens=act.reply.completion_tokens,
            cartridge_slots=act.reply.cartridge_slots,
            cartridges=[item.id for item in act.cartridges],
            experiences=act.experiences,
            at=time.time(),
        )
        return score, feedback

    def _open(self) -> None:
        """Read what was lived, after making sure that it was this life."""
        self._folder.mkdir(parents=True, exist_ok=True)
        mine = {
            "life": self._life,
            "agent": self._agent.name,
            "environment": self._environment.name,
            "first_tasks": [task.key for task in self._environment.tasks("train")[:3]],
        }
        path = self._folder / LIFE
        if not path.exists():
            write_json(path, mine)
        elif json.loads(path.read_text(encoding="utf-8")) != mine:
            raise EpisodesMismatch(
                f"{self._folder.name} holds another life (see {LIFE} there): give the same agent, environment, seed "
                "and name to go on with it, or another folder"
            )
        self._scores = read_scores(self._folder)

    def _write(self, score: Score) -> None:
        append_line(self._folder / SCORES, json.dumps(asdict(score)))
        self._scores.append(score)
        self._progress(score)


def frozen_clone(agent: MemoryAgent) -> MemoryAgent:
    """A clone for one question of an examination; of a frozen agent, so all of them see the same memory."""
    return agent.clone_for_episode(training=False)


def read_scores(folder: Path) -> list[Score]:
    """The whole lines of ``scores.jsonl`` in ``folder``; none when there is no file. Raises ``LogDamaged``."""
    path = folder / SCORES
    if not path.exists():
        return []
    found: list[Score] = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            found.append(Score(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise LogDamaged(f"{SCORES}, line {number}: not a score of ours ({error}); remove that line") from None
    return found


def mean_by_group(scores: Sequence[Score]) -> dict[str, float]:
    """The mean score of each group."""
    groups: dict[str, list[float]] = {}
    for score in scores:
        groups.setdefault(score.group, []).append(score.score)
    return {group: sum(found) / len(found) for group, found in sorted(groups.items())}
