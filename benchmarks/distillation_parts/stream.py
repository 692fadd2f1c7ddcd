"""Agent stream: a life in three phases, distilled while it goes on. Family A, family B, then both with other codes.

Real messages (banking77) that have to be tagged with arbitrary codes; after each answer the agent is told what would
have been right. Arms: no memory, the full history in the prompt, a window of the newest, the nearest experiences, and
the hybrid, which has a few of the nearest beside its cartridge and is distilled by its server's own schedule. After
each phase all of them answer the same held-out questions with their memory frozen. One seed, the first that is given.
All lives are lived side by side, the hybrid's on a server of its own.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agents.base import MemoryAgent
from agents.environments.drifting_conventions import DriftingConventions
from agents.episodes import EpisodesConfig, Score
from agents.kv_memory_agent import KVMemoryAgent
from agents.over_http import OlympusServer
from benchmarks.distillation_parts import stream_report as report
from benchmarks.distillation_parts.house import load
from benchmarks.distillation_parts.stream_hybrid import BESIDE, DOMAIN, PATIENCE, HybridLife, Killed, settings
from benchmarks.distillation_parts.stream_lives import ARMS, live, local_arms, own_history
from benchmarks.distillation_parts.stream_swap import CLIENTS, Swapped, swap_under_clients
from benchmarks.kernel_parts.common import MissingData, Options
from cli.distill_cycle import serving
from lm.transport import Transport
from memory.distillation.config import make_distill_config
from workspace.engine import Engine

HYBRID = "hybrid"
_GATE_PROMPT = 256  #: tokens at most of the long prompt that the gate compares with; a whole one costs a training
_CACHE_BYTES = 1 << 30  #: of keys and values of prompts; the whole history are 0.15 GB in the end


@dataclass(frozen=True)
class Size:
    """How long everything is."""

    per_phase: int = 60
    block: int = 15
    questions: int = 4  #: held-out messages of each intent
    every: int = 30  #: episodes between two distillations
    steps: int = 60
    asked: int = 12  #: questions of the gate at most
    kill_in: int = 3  #: the run in which the server is killed
    swaps: int = 4


QUICK = Size(per_phase=4, block=4, questions=1, every=5, steps=4, asked=2, kill_in=0, swaps=2)


def run(options: Options) -> str:
    """One seed. Raises ``MissingData`` without the messages."""
    if options.data is None or not (options.data / "banking77").is_dir():
        raise MissingData("banking77 is not on this machine; set OLYMPUS_SHARED_DATA to the folder that holds it")
    size, seed = (QUICK if options.quick else Size()), options.seeds[0]
    environment = DriftingConventions(
        options.data / "banking77", per_phase=size.per_phase, eval_per_intent=size.questions, seed=seed
    )
    config = EpisodesConfig(episodes=3 * size.per_phase, eval_every=size.per_phase, eval_tasks=6 * size.questions)
    with tempfile.TemporaryDirectory(prefix="olympus-stream-") as name, ThreadPoolExecutor(1) as beside:
        folder = Path(name)
        local = beside.submit(_local, options, environment, folder, config)
        lives, runs, killed, swapped = _hybrid(environment, folder, config, size, seed)
        return told({**local.result(), **lives}, runs, killed, swapped, size, seed)


def preset(system_prompt: str, size: Size, seed: int) -> dict[str, Any]:
    """What the server distils by: learning from feedback, often and shortly, each time from the cartridge before.

    The gate's margin is wide: with five to eight questions a finer one rejects 63 % against 37 % (seen in a trial).
    """
    wanted = {
        "system_prompt": system_prompt,
        "seed": seed,
        "teacher": {"max_prompt_tokens": _GATE_PROMPT},
        "data": {
            "targets": "feedback",
            "eval_share": 0.2,
            "half_life": size.per_phase,
            "apply_corrections": True,
            "recent_turns": BESIDE,
            "recent_choice": "nearest",
            "recent_share": 1.0,
        },
        "cache_init": {"type": "pretrained"},
        "training": {
            "slots": 64,
            "learning_rate": 1e-2,
            "warmup_steps": min(5, size.steps - 1),
            "max_steps": size.steps,
            "rows": 8,
            "max_tokens": 384,
            "failure_weight": 1.0,
            "early_stop_patience": 0,
            "save_every": 10,
        },
        "gate": {"metric": "exact", "min_rows": 1, "max_rows": size.asked, "margin": 0.5},
        "schedule": {
            "enabled": True,
            "cooldown_seconds": 0,
            "when": {"every_episodes": size.every, "max_history_tokens": 1500, "plateau": 10},
        },
    }
    return make_distill_config(wanted).model_dump(mode="json")


def _hybrid(
    environment: DriftingConventions, folder: Path, config: EpisodesConfig, size: Size, seed: int
) -> tuple[dict[str, list[Score]], list[dict[str, Any]], Killed | None, Swapped | None]:
    data = folder / "server"
    data.mkdir()
    with ExitStack() as stack:
        environ = settings(folder, preset(environment.system_prompt, size, seed))
        server = stack.enter_context(serving(data, environ, _tell))
        life = HybridLife(server, environment, folder / HYBRID, size.kill_in, size.steps // 2, _tell)
        stack.callback(life.close)
        lived = life.run(config)
        _tell(_summary(HYBRID, lived))
        served = [run["progress"]["cartridge"] for run in life.runs if run["state"] == "promoted"]
        swapped = None
        if len(served) > 1:
            lm = stack.enter_context(life.client())
            swapped = swap_under_clients(
                stack.enter_context(OlympusServer(server.url, patience=PATIENCE)),
                stack.enter_context(Transport(server.url, patience=PATIENCE)),
                DOMAIN,
                (served[-2], served[-1]),
                environment.evaluation(config.episodes)[:8],
                lambda memory: KVMemoryAgent(lm, memory, life.agent_config),
                swaps=size.swaps,
            )
    return {HYBRID: lived}, life.runs, life.killed, swapped


def _local(
    options: Options, environment: DriftingConventions, folder: Path, config: EpisodesConfig
) -> dict[str, list[Score]]:
    """All arms at once, each with an engine of its own around the one model."""
    loaded = load(options)
    with ExitStack() as stack:
        engines = []
        for _ in range(ARMS):
            engine = Engine(loaded, max_active=1, max_waiting=8, threads=1, prefix_cache_bytes=_CACHE_BYTES)
            engine.start()
            stack.callback(engine.stop)
            engines.append(engine)
        history = stack.enter_context(own_history(folder))

        def one(number: int, name: str, agent: MemoryAgent) -> list[Score]:
            scores = live(agent, environment, folder / f"life-{number}", config)
            _tell(_summary(name, scores))
            return scores

        arms = local_arms(engines, history, environment.system_prompt)
        with ThreadPoolExecutor(ARMS) as pool:
            lives = {name: pool.submit(one, n, name, agent) for n, (name, agent) in enumerate(arms.items())}
        return {name: life.result() for name, life in lives.items()}


def told(
    scores: Mapping[str, list[Score]],
    runs: list[dict[str, Any]],
    killed: Killed | None,
    swapped: Swapped | None,
    size: Size,
    seed: int,
) -> str:
    """The page."""
    promoted = sum(run["state"] == "promoted" for run in runs)
    rejected = sum(run["state"] == "rejected" for run in runs)
    trained = sum(run["progress"].get("training", {}).get("seconds", 0.0) for run in runs)
    paid = sum(run["cpu_seconds"] for run in runs)
    return "\n\n".join(
        [
            f"Seed {seed}; {size.per_phase} episodes a phase. Reward is 1 for the right code, 0 for any other answer. "
            "The prompts of all arms show right answers in place of their own mistakes. The full history is read "
            "through the engine's cache of what prompts begin with. The hybrid acts with its cartridge and the "
            f"{BESIDE} nearest experiences, before there is one with these alone, and waits while it is distilled; a "
            f"run trains {size.steps} steps of 8 rows, which show the same, beginning with the cartridge that serves.",
            report.by_phase(scores, size.per_phase),
            f"Reward in blocks of {size.block} episodes, and in brackets the sum so far.",
            report.by_block(scores, size.block),
            "Paired by episode:",
            report.against(scores, HYBRID, size.per_phase),
            "Held-out messages, asked with the memory frozen.",
            report.forgetting(scores, size.per_phase),
            f"Distillations: {len(runs)}, {promoted} promoted, {rejected} rejected; {paid:.0f} CPU s in all, dataset "
            f"and gate included; the training alone {trained:.0f} s of wall time. The gate's long prompt has at most "
            f"{_GATE_PROMPT} tokens.",
            report.distillations(runs),
            _kill_told(killed),
            _swap_told(swapped),
        ]
    )


def _kill_told(killed: Killed | None) -> str:
    if killed is None:
        return "No kill was tried."
    once = "every step once and in order" if killed.steps_once else "STEPS MISSING OR REPEATED"
    before, after = killed.experiences
    return (
        f"Kill: SIGKILL to the server after step {killed.at_step} of {killed.run}. It went on "
        f"{killed.again_seconds:.0f} s later (its lease has to run out); the log of the "
        f"run has {once}; it ended as {killed.state}. Experiences before and after: {before}, {after}."
    )


def _swap_told(swapped: Swapped | None) -> str:
    if swapped is None:
        return "No swap under clients was tried: fewer than two versions were promoted."
    each = ", ".join(f"{count} of {name}" for name, count in swapped.of_each.items())
    return (
        f"Swaps under {CLIENTS} clients: {swapped.swaps} swaps, {swapped.answers} answers ({each}), {swapped.across} "
        f"of them under way at a swap; {swapped.mixed} that their version does not give alone. The two versions say "
        f"different things to {swapped.telling} of the questions."
    )


def _summary(name: str, scores: list[Score]) -> str:
    """What a life came to, for whoever waits for the others."""
    size, lives = len(report.lived(scores)) // 3, {name: scores}
    return f"{name} has lived:\n{report.by_phase(lives, size)}\n{report.forgetting(lives, size)}"


def _tell(message: str) -> None:
    print(f"  {message}", file=sys.stderr, flush=True)
