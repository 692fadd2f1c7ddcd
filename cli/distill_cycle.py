"""The whole way by one command: an agent lives, its history is distilled, and the next question is answered with it.

    server starts -> memoryless examination -> N episodes over HTTP, each judged -> the schedule's trigger fires ->
    dataset -> training -> gate -> swap -> the same examination by an agent whose memory is the new cartridge

Nothing is restarted and no agent is changed in between: the server's own schedule starts the run, and ``KVMemoryAgent``
asks the server which cartridge serves its domain, as it does every time.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from agents.base import AgentConfig, MemoryAgent
from agents.environments.base import Environment, Task, judge
from agents.environments.intent_tagging import intent_tagging
from agents.episodes import EpisodeRunner, EpisodesConfig, Score
from agents.over_http import OlympusServer, ServerLog
from agents.registry import make_agent
from lm.openai_client import OpenAIClient
from lm.transport import Transport
from memory.distillation.config import load_distill_config
from memory.distillation.errors import DistillationError
from memory.kv_cache_memory import KVCacheMemory
from settings import ROOT

DOMAIN = "house-style"
_START_SECONDS = 600.0
_TRIGGER_SECONDS = 60.0
_RUN_SECONDS = 3600.0
#: What the agent carries while it lives: a few turns, so that an episode takes a fraction of a second.
_LIVING = AgentConfig(max_tokens=12, max_prompt_tokens=256)
_ENDS = ("promoted", "rejected", "skipped", "failed", "cancelled")

Tell = Callable[[str], None]


class CycleError(DistillationError):
    """The cycle could not be brought to its end; the message says where it stood."""


@dataclass(frozen=True)
class Examination:
    """Held-out questions that were asked one by one, over HTTP."""

    right: int
    asked: int
    prompt_tokens: float  #: mean
    slots: int
    ttft_ms: float  #: median, of the whole way there and back where the server does not say
    cartridges: list[str]

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        return {**self.__dict__, "share": self.right / self.asked}


@dataclass(frozen=True)
class Cycle:
    """What is done; ``run`` does it."""

    episodes: int
    labels: str
    data: Path | None
    preset: str
    overrides: Mapping[str, Any]
    examine: int
    seed: int
    data_dir: Path | None = None

    def run(self, tell: Tell) -> dict[str, Any]:
        """All of it; the numbers, and under ``passed`` whether the cartridge serves and is right more often."""
        if self.labels not in ("codes", "semantic"):
            raise CycleError(f"labels must be codes or semantic, not {self.labels!r}")
        environment = intent_tagging(
            None if self.data is None else self.data / "banking77",
            labels="codes" if self.labels == "codes" else "semantic",
            seed=self.seed,
        )
        begun = time.monotonic()
        with ExitStack() as stack:
            folder = self.data_dir or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="olympus-cycle-")))
            folder.mkdir(parents=True, exist_ok=True)
            server = stack.enter_context(serving(folder, self._settings(folder, environment), tell))
            told = _Cycle(self, environment, server.url, folder, tell, stack).run()
        told["seconds"] = round(time.monotonic() - begun, 1)
        told["summary"] += f" It took {told['seconds'] / 60:.1f} minutes."
        return told

    def _settings(self, folder: Path, environment: Environment) -> dict[str, str]:
        """A preset for the domain whose trigger fires after the last episode, and a schedule that looks often."""
        config = load_distill_config(self.preset, self.overrides).model_dump(mode="json")
        config["system_prompt"] = environment.system_prompt
        config["schedule"] = {"enabled": True, "cooldown_seconds": 0, "when": {"every_episodes": self.episodes}}
        path = folder / "cycle.yaml"
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        return {
            "OLYMPUS_DISTILLATION__DOMAINS": f"{{{DOMAIN}: {path}}}",
            "OLYMPUS_DISTILLATION__CHECK_SECONDS": "1",
            "OLYMPUS_KERNELS__SPAWN_DEFAULT": "false",
            "OLYMPUS_KERNELS__AUTO_SPAWN": "false",
            "OLYMPUS_MEMORY__EPISODIC__ENABLED": "false",
        }


class _Cycle:
    """One run of it, against a server."""

    def __init__(
        self, cycle: Cycle, environment: Environment, url: str, folder: Path, tell: Tell, stack: ExitStack
    ) -> None:
        self._cycle, self._environment, self._folder, self._tell = cycle, environment, folder, tell
        self._server = stack.enter_context(OlympusServer(url))
        self._transport = stack.enter_context(Transport(url))
        model = self._transport.get("/v1/models")["data"][0]["id"]
        # The agents keep their own record, with what came of each action: the chats themselves are not stored.
        self._lm = stack.enter_context(
            OpenAIClient(f"{url}/v1", model, accepts_cartridges=True, extra={"store": False})
        )
        self._config = _LIVING.model_copy(update={"system_prompt": environment.system_prompt})

    def run(self) -> dict[str, Any]:
        tasks = self._environment.evaluation(self._cycle.episodes)[: self._cycle.examine]
        log = ServerLog(self._server, DOMAIN, newest=16)
        before = self._examination(make_agent("memoryless", self._lm, log=log, config=self._config), tasks)
        self._tell(f"without a memory: {before.right} of {before.asked} right")
        mean = self._live(log)
        run = self._follow()
        memory = KVCacheMemory(domain=DOMAIN, source=self._server)
        if run["state"] != "promoted":
            why = run["error"] or run["progress"].get("detail", "")
            return self._told(before, None, mean, run, f"The run ended as {run['state']}: {why}.")
        after = self._examination(make_agent("kv", self._lm, memory=memory, config=self._config), tasks)
        said = (
            f"{self._cycle.episodes} episodes, then {run['progress']['cartridge']} was promoted. "
            f"Held-out messages right: {before.right} of {before.asked} without a memory, "
            f"{after.right} of {after.asked} with the cartridge of {after.slots} slots."
        )
        return self._told(before, after, mean, run, said)

    def _told(
        self, before: Examination, after: Examination | None, mean: float | None, run: Mapping[str, Any], said: str
    ) -> dict[str, Any]:
        return {
            "passed": after is not None and after.right > before.right,
            "summary": said,
            "environment": self._environment.name,
            "seed": self._cycle.seed,
            "episodes": self._cycle.episodes,
            "mean_score_while_living": mean,
            "memoryless": before.to_json(),
            "cartridge": None if after is None else after.to_json(),
            "run": dict(run),
        }

    def _live(self, log: ServerLog) -> float | None:
        """N judged episodes over HTTP; the agent adds each to the server's history."""
        agent = make_agent(
            "hybrid",
            self._lm,
            log=log,
            memory=KVCacheMemory(domain=DOMAIN, source=self._server),
            config=self._config.model_copy(update={"recent": 0}),
        )
        every = max(1, self._cycle.episodes // 10)

        def progress(score: Score) -> None:
            if score.mode == "train" and (score.episode + 1) % every == 0:
                self._tell(f"lived {score.episode + 1} of {self._cycle.episodes} episodes")

        config = EpisodesConfig(episodes=self._cycle.episodes, eval_tasks=1)
        name = f"cycle-{self._cycle.seed}"
        runner = EpisodeRunner(agent, self._environment, self._folder / "life", config, life=name, progress=progress)
        return runner.run().mean_train

    def _follow(self) -> dict[str, Any]:
        """Wait for the run that the trigger starts, and for its end."""
        begun = time.monotonic()
        last = ""
        while True:
            found = self._transport.get("/olympus/distillation/runs", {"domain": DOMAIN, "limit": "1"})["runs"]
            waited = time.monotonic() - begun
            if not found:
                if waited > _TRIGGER_SECONDS:
                    told = self._transport.get("/olympus/distillation/outlook", {"domain": DOMAIN})
                    raise CycleError(f"no trigger fired: {told['reason']}; triggers: {told['triggers']}")
            else:
                run: dict[str, Any] = found[0]
                stage = f"{run['progress'].get('stage')}, {run['progress'].get('fraction', 0):.0%}"
                if stage != last:
                    self._tell(f"{run['id']} ({run['trigger']}): {stage} {run['progress'].get('detail', '')}")
                    last = stage
                if run["state"] in _ENDS:
                    return run
                if waited > _RUN_SECONDS:
                    raise CycleError(f"run {run['id']} did not end within {_RUN_SECONDS:.0f} s: {run['progress']}")
            time.sleep(1.0)

    def _examination(self, agent: MemoryAgent, tasks: Sequence[Task]) -> Examination:
        right, prompts, firsts, slots, used = 0, [], [], 0, set[str]()
        for task in tasks:
            act = agent.clone_for_episode(training=False).act(task.observation)
            right += judge(task, act.text).score == 1.0
            prompts.append(act.reply.prompt_tokens)
            firsts.append(act.reply.ttft_seconds or act.reply.seconds)
            slots = max(slots, act.reply.cartridge_slots)
            used.update(item.id for item in act.cartridges)
        return Examination(
            right=right,
            asked=len(tasks),
            prompt_tokens=sum(prompts) / len(prompts),
            slots=slots,
            ttft_ms=round(1000 * sorted(firsts)[len(firsts) // 2], 1),
            cartridges=sorted(used),
        )


class OwnServer:
    """A server on this machine, ``python app.py`` on a free port, which stays the same over ``kill`` and ``start``."""

    def __init__(self, data_dir: Path, environ: Mapping[str, str], tell: Tell):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        self.url = f"http://127.0.0.1:{port}"
        own = {"OLYMPUS_DATA_DIR": str(data_dir), "PORT": str(port), "OLYMPUS_SERVER__HOST": "127.0.0.1"}
        self._environ = {**os.environ, **own, **environ}
        self._log = data_dir / "server.log"
        self._tell = tell
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Of the process that was started last, whose child is the one that answers."""
        if self._process is None:
            raise CycleError("the server was not started")
        return self._process.pid

    def start(self) -> None:
        """Start it, and wait until it is ready. Raises ``CycleError`` with the end of its log."""
        options: dict[str, Any] = {"cwd": ROOT, "env": self._environ, "start_new_session": True}
        with open(self._log, "ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "app.py"], stdout=output, stderr=subprocess.STDOUT, **options
            )
        self._tell(f"a server starts at {self.url}, its log is {self._log}")
        _wait_ready(self.url, self._process, self._log)

    def kill(self) -> None:
        """``kill -9`` of all its processes at the same moment."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def stop(self) -> None:
        """In an orderly way where it answers to that."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(40)
        except subprocess.TimeoutExpired:
            self.kill()


@contextmanager
def serving(data_dir: Path, environ: Mapping[str, str], tell: Tell) -> Iterator[OwnServer]:
    """A server of its own for as long as the block lasts."""
    server = OwnServer(data_dir, environ, tell)
    try:
        server.start()
        yield server
    finally:
        server.stop()


def _wait_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    import httpx

    while time.monotonic() < deadline:
        if process.poll() is not None:
            tail = log.read_text(encoding="utf-8", errors="replace")[-2000:]
            raise CycleError(f"the server ended with {process.returncode}; its log ends:\n{tail}")
        try:
            if httpx.get(f"{url}/readyz", timeout=5, trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.3)
    raise CycleError(f"the server was not ready within {_START_SECONDS:.0f} s; see {log}")
