"""The hybrid's life: over HTTP on a server of its own, whose schedule distils it, and which is killed once meanwhile.

The agent knows nothing of distillation: it acts with the cartridge that serves its domain and a few experiences that it
looks up, and appends to the history.
After each episode it waits until a run that a trigger has started is over, so that the curve does not depend on how
fast the machine trains; on a real server life goes on meanwhile.

In one run the server is killed with SIGKILL in the middle of training and started again on the same data.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from agents.base import AgentConfig
from agents.environments.base import Environment
from agents.episodes import EpisodeRunner, EpisodesConfig, Score
from agents.over_http import OlympusServer, ServerLog
from agents.registry import make_agent
from benchmarks.distillation_parts.stream_lives import MAX_TOKENS, NEIGHBOURS
from cli.distill_cycle import CycleError, OwnServer, Tell
from lm.openai_client import OpenAIClient
from lm.transport import Patience, Transport
from memory.kv_cache_memory import KVCacheMemory

DOMAIN = "stream"
_RUN_SECONDS = 7200.0
#: A niced server on a busy machine takes its time, and an answer that is asked for twice is paid for twice.
PATIENCE = Patience(timeout=900.0)
#: Experiences that it is shown beside its cartridge, looked up by their words, and before there is one.
BESIDE = NEIGHBOURS[1]


@dataclass(frozen=True)
class Killed:
    """What came of the kill."""

    run: str
    at_step: int
    again_seconds: float  #: from the kill until the run went on; the lease of the dead process has to run out
    steps_once: bool  #: the log of the whole run has every step once, in order
    state: str  #: how the run ended
    experiences: tuple[int, int]  #: in the history, before the kill and after it


@dataclass
class HybridLife:
    """``run`` it once. ``kill_in``: number of the run (from 1) that is interrupted, 0 for none, at ``kill_step``."""

    server: OwnServer
    environment: Environment
    folder: Path
    kill_in: int
    kill_step: int
    tell: Tell
    runs: list[dict[str, Any]] = field(default_factory=list)
    killed: Killed | None = None

    def __post_init__(self) -> None:
        self._transport = Transport(self.server.url, patience=PATIENCE)
        self._olympus = OlympusServer(self.server.url, patience=PATIENCE)
        self._model = self._transport.get("/v1/models")["data"][0]["id"]
        self._known: set[str] = set()
        self._paid = 0.0  #: CPU seconds of processes that were killed

    @property
    def agent_config(self) -> AgentConfig:
        """The prompt that the cartridge is trained with: the nearest experiences beside it."""
        return AgentConfig(
            system_prompt=self.environment.system_prompt,
            max_tokens=MAX_TOKENS,
            apply_corrections=True,
            recent=BESIDE,
            recent_choice="nearest",
        )

    def client(self) -> OpenAIClient:
        """Of the server's chat, which is not to write down what the agent itself does."""
        extra = {"store": False}
        url = f"{self.server.url}/v1"
        return OpenAIClient(url, self._model, accepts_cartridges=True, extra=extra, patience=PATIENCE)

    def run(self, config: EpisodesConfig) -> list[Score]:
        """Live."""
        with self.client() as lm:
            agent = make_agent(
                "hybrid",
                lm,
                log=ServerLog(self._olympus, DOMAIN),
                memory=KVCacheMemory(domain=DOMAIN, source=self._olympus),
                config=self.agent_config,
            )
            runner = EpisodeRunner(agent, self.environment, self.folder, config, life="hybrid", progress=self._settle)
            runner.run()
        return runner.scores()

    def close(self) -> None:
        """The connections."""
        self._olympus.close()
        self._transport.close()

    def _settle(self, score: Score) -> None:
        """Wait for what the episode has triggered."""
        if score.mode != "train":
            return
        begun, before = time.monotonic(), self._cpu()
        while True:
            told = self._transport.get("/olympus/distillation/outlook", {"domain": DOMAIN})
            run = told["situation"]["open_run"]
            if run is None and told["would_start"] is None:
                break
            if run is not None and self.killed is None and len(self._known) + 1 == self.kill_in:
                self._kill(run)
            if time.monotonic() - begun > _RUN_SECONDS:
                raise CycleError(f"after {score.episode + 1} episodes no end: {told['reason']}")
            time.sleep(0.5)
        for run in self._ended():
            run["cpu_seconds"] = self._cpu() - before
            run["episodes"] = score.episode + 1
            before = self._cpu()
            self.runs.append(run)
            self.tell(
                f"{score.episode + 1} episodes, run {len(self.runs)} ({run['trigger']}): {run['state']}, "
                f"{run['cpu_seconds']:.0f} CPU s. {run['progress'].get('detail', '')}"
            )

    def _ended(self) -> list[dict[str, Any]]:
        found = self._transport.get("/olympus/distillation/runs", {"domain": DOMAIN, "limit": "100"})["runs"]
        fresh = [run for run in found[::-1] if run["id"] not in self._known]
        self._known.update(run["id"] for run in fresh)
        return fresh

    def _kill(self, run: str) -> None:
        """When enough steps are done: kill the server, start it again, and see the run through."""
        at = max(self._steps(run), default=0)
        if at < self.kill_step:
            return
        lived = len(self._olympus.records(DOMAIN, 10_000))
        self._paid = self._cpu()
        self.server.kill()
        begun = time.monotonic()
        self.tell(f"killed after step {at} of {run}")
        self.server.start()
        self._paid -= self._process_cpu()  # starting again is no part of the distillation
        again = 0.0
        while (told := self._transport.get(f"/olympus/distillation/runs/{run}"))["finished_at"] is None:
            if not again and int(told["progress"].get("attempts", 0)) > 1 and told["state"] == "running":
                again = time.monotonic() - begun
            if time.monotonic() - begun > _RUN_SECONDS:
                raise CycleError(f"run {run} did not go on after the kill: {told['progress']}")
            time.sleep(0.2)
        steps = self._steps(run)
        self.killed = Killed(
            run=run,
            at_step=at,
            again_seconds=again,
            steps_once=bool(steps) and steps == list(range(1, len(steps) + 1)),
            state=told["state"],
            experiences=(lived, len(self._olympus.records(DOMAIN, 10_000))),
        )

    def _steps(self, run: str) -> list[int]:
        """The steps of the training so far, as its log has them."""
        lines = self._transport.get(f"/olympus/distillation/runs/{run}/metrics")["metrics"]
        return [line["step"] for line in lines if "learning_rate" in line]

    def _cpu(self) -> float:
        return self._paid + self._process_cpu()

    def _process_cpu(self) -> float:
        """CPU seconds of the server's processes so far."""
        parent = psutil.Process(self.server.pid)
        return sum(sum(item.cpu_times()[:2]) for item in (parent, *parent.children(recursive=True)))


def settings(folder: Path, preset: Mapping[str, Any]) -> dict[str, str]:
    """Environment of a server that distils ``DOMAIN`` by ``preset`` and has nothing else to do."""
    path = folder / "stream.yaml"
    path.write_text(yaml.safe_dump(dict(preset)), encoding="utf-8")
    return {
        "OLYMPUS_DISTILLATION__DOMAINS": f"{{{DOMAIN}: {path}}}",
        "OLYMPUS_DISTILLATION__CHECK_SECONDS": "0.5",
        "OLYMPUS_DISTILLATION__NICENESS": "0",  # nobody is served meanwhile
        "OLYMPUS_ENGINE__BATCHING": "exact",  # an answer is the same to the bit, alone and beside others
        "OLYMPUS_MODEL__DTYPE": "bfloat16",
        "OLYMPUS_MODEL__THREADS": "1",
        "OLYMPUS_KERNELS__SPAWN_DEFAULT": "false",
        "OLYMPUS_KERNELS__AUTO_SPAWN": "false",
        "OLYMPUS_MEMORY__EPISODIC__ENABLED": "false",
    }
