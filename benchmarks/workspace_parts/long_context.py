"""The long-context proof: what virtual tokens recover of the text that left a capped cache.

    python -m benchmarks.workspace_parts.long_context [--windows 64] [--dtype bfloat16] [--arms TEXT,...] [--write]
    python -m benchmarks.workspace_parts.long_context --train DIRECTORY

SmolLM2-135M-Instruct on the last tenth of tinyshakespeare, which nothing was tuned or trained on: 896 tokens of
context, mean loss of the next 128. The gap is between the full context and a cache of 4 sinks and the last 252 tokens;
an arm closes the part of it by which it is better than that cache. Intervals are paired bootstraps over windows.

Two ways to get there. *Cut*: the context passes whole, then the cache is cut once; the keys and values that stay were
made in sight of everything. *Streamed*: the cache is capped all along, blocks of 128 tokens pass and are evicted, so
that nothing ever sees more than 384 tokens and the summary; this is what serving does.

Controls: random virtual tokens with the norms of the true ones; the most attended tokens as they are, without any
fitting; as many real tokens more; the summary of another window (what is left then is not memory).

*Corrected* arms use the trained correction (``workspace/correction.py``) that ships with the model, or ``--weights``.
``--train`` makes it anew: 320 blocks of the first nine tenths of the text and of banking77's training messages, mixed
three to one so that it learns the model's weaknesses rather than the genre; about ten minutes on a free core.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from settings import prepare_process_environment  # noqa: E402

prepare_process_environment()  # before torch is imported

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import DynamicCache  # noqa: E402

from benchmarks.kernel_parts.common import (  # noqa: E402
    MissingData,
    Options,
    banking77,
    cache_folder,
    data_folder,
    tinyshakespeare,
)
from benchmarks.workspace_parts.long_context_report import Losses, report  # noqa: E402
from workspace.compaction import CompactionSettings  # noqa: E402
from workspace.compaction_training import CorrectionTraining, train_correction  # noqa: E402
from workspace.context import Context, Segment  # noqa: E402
from workspace.correction import (  # noqa: E402
    SummaryCorrection,
    load_correction,
    save_correction,
    shipped_correction,
)
from workspace.hooking import HookedModel, default_layers  # noqa: E402
from workspace.models import LoadedModel, load_model  # noqa: E402
from workspace.window import ActiveWindow, WindowSettings  # noqa: E402

MODEL = "smollm2-135m-instruct"
CONTEXT, TARGETS = 896, 128
FED = CONTEXT - 1  # the last token of the context is the first query: it predicts the first target
HELD_OUT = 0.1
DEVELOPMENT = 272_000  # tokens of the training text before its development part
WHOLE = CONTEXT + TARGETS  # a block that never fills: nothing is evicted before it is asked for
SELECTED = CompactionSettings(choice="mass", match_mass=False, match_values=False)


@dataclass(frozen=True)
class Arm:
    """One way to feed the context. ``layers`` None hooks all; ``others``: also score it with these segments."""

    name: str
    settings: WindowSettings
    layers: str = "all"
    controls: bool = False
    corrected: bool = False


CUT = WindowSettings(block=WHOLE)
STREAMED = WindowSettings()
ARMS = (
    Arm("cut: sinks + window", replace(CUT, virtual_tokens=0)),
    Arm("cut: window without sinks", replace(CUT, virtual_tokens=0, sinks=0)),
    Arm("cut: 16 more tokens of window", replace(CUT, virtual_tokens=0, chunk_size=272)),
    Arm("cut: 16 most attended tokens", replace(CUT, compaction=SELECTED)),
    Arm("cut: 16 matched", CUT, controls=True),
    Arm("cut: 64 matched", replace(CUT, virtual_tokens=64)),
    Arm("cut: 16 matched and corrected", CUT, corrected=True),
    Arm("streamed: sinks + window", replace(STREAMED, virtual_tokens=0)),
    Arm("streamed: 16 more tokens of window", replace(STREAMED, virtual_tokens=0, chunk_size=272)),
    Arm("streamed: 16 most attended tokens", replace(STREAMED, compaction=SELECTED)),
    Arm("streamed: 16 matched, 6 layers", STREAMED, layers="default"),
    Arm("streamed: 16 matched, 15 layers", STREAMED, layers="half"),
    Arm("streamed: 16 matched", STREAMED, controls=True),
    Arm("streamed: 16 matched and corrected", STREAMED, controls=True, corrected=True),
    Arm("streamed: 64 matched", replace(STREAMED, virtual_tokens=64)),
)


def encode(loaded: LoadedModel, text: str) -> Tensor:
    """Token ids of ``text`` without special tokens, [N]."""
    return torch.tensor(loaded.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def held_out(loaded: LoadedModel, options: Options, source: str) -> Tensor:
    """Text that nothing was trained on: the last tenth of tinyshakespeare, or banking77's test messages in lines."""
    if source == "banking77":
        return encode(loaded, "\n".join(text for text, _ in banking77(options, "test")))
    text = tinyshakespeare(options).decode()
    return encode(loaded, text[int(len(text) * (1 - HELD_OUT)) :])


def training_texts(loaded: LoadedModel, options: Options, seed: int = 0) -> list[Tensor]:
    """Pieces of CONTEXT + TARGETS tokens in random order: three of Shakespeare, one of bank customers, and so on.

    The last tenth of the first nine tenths of Shakespeare is left out: choices of this design were made on it.
    """
    text = tinyshakespeare(options).decode()
    plays = encode(loaded, text[: int(len(text) * (1 - HELD_OUT))])[:DEVELOPMENT].split(WHOLE)[:-1]
    messages = [text for text, _ in banking77(options, "train")]
    random.Random(seed).shuffle(messages)
    bank = encode(loaded, "\n".join(messages)).split(WHOLE)[:-1]
    mixed = []
    order = torch.randperm(len(plays), generator=torch.Generator().manual_seed(seed)).tolist()
    for number, place in enumerate(order):
        mixed.append(plays[place])
        if number % 3 == 2 and number // 3 < len(bank):
            mixed.append(bank[number // 3])
    return mixed


def train(options: Options, folder: Path) -> None:
    """The committed recipe: make ``folder`` hold a correction for the packaged model, for both its dtypes."""
    cache = cache_folder()
    loaded = load_model(MODEL, cache_dir=cache, dtype="bfloat16")
    fingerprints = (loaded.fingerprint, load_model(MODEL, cache_dir=cache, dtype="float32").fingerprint)
    losses: list[float] = []

    def progress(step: int, loss: float) -> None:
        losses.append(loss)
        if step % 20 == 19:
            print(f"step {step + 1}: KL {sum(losses[-20:]) / 20:.4f}", file=sys.stderr, flush=True)

    with hooked_on(loaded, "all") as hooked:
        recipe = CorrectionTraining(steps=320)
        correction = train_correction(hooked, training_texts(loaded, options), recipe, STREAMED, progress=progress)
        save_correction(folder, correction, hooked, fingerprints=fingerprints)


def windows(ids: Tensor, count: int) -> list[Tensor]:
    """``count`` windows of CONTEXT + TARGETS tokens, evenly spaced, whose targets do not overlap."""
    most = (len(ids) - CONTEXT) // TARGETS
    if count > most:
        raise SystemExit(f"the text holds {most} windows, not {count}")
    places = torch.linspace(0, len(ids) - CONTEXT - TARGETS, count).long().tolist()
    return [ids[place : place + CONTEXT + TARGETS] for place in places]


@torch.no_grad()
def feed(
    hooked: HookedModel, ids: Tensor, settings: WindowSettings, correction: SummaryCorrection | None = None
) -> ActiveWindow:
    """A window that has seen all of the context but its last token."""
    model = hooked.loaded.model
    window = ActiveWindow(hooked, DynamicCache(config=model.config), settings, correction=correction)
    for first, count in window.pieces(FED):
        recorder = window.recorder(count)
        context = Context(segments=window.segments(count), recorder=recorder)
        positions = torch.arange(first, first + count)[None]
        model(
            ids[None, first : first + count],
            past_key_values=window.cache,
            position_ids=positions,
            workspace=context,
            logits_to_keep=1,
        )
        window.advance(count, recorder)
    window.evict()
    window.check_invariants()
    return window


@torch.no_grad()
def loss(
    hooked: HookedModel, ids: Tensor, window: ActiveWindow, segments: Mapping[int, Segment] | None = None
) -> float:
    """Mean loss of the targets in one pass behind ``window``, whose cache is left as it was."""
    before = [(layer.keys, layer.values) for layer in window.cache.layers]
    shown = window.segments(TARGETS) if segments is None else segments
    logits = hooked.loaded.model(
        ids[None, FED:-1],
        past_key_values=window.cache,
        position_ids=torch.arange(FED, FED + TARGETS)[None],
        workspace=Context(segments=shown),
    ).logits
    for layer, (keys, values) in zip(window.cache.layers, before, strict=True):
        layer.keys, layer.values = keys, values
    return float(F.cross_entropy(logits[0].float(), ids[CONTEXT:]))


def random_like(segments: Mapping[int, Segment], seed: int) -> dict[int, Segment]:
    """Segments of random direction with the norms of ``segments`` and their biases."""
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Tensor) -> Tensor:
        drawn = torch.randn(like.shape, generator=generator)
        return drawn / drawn.norm(dim=-1, keepdim=True) * like.norm(dim=-1, keepdim=True)

    return {
        layer: replace(segment, keys=noise(segment.keys), values=noise(segment.values))
        for layer, segment in segments.items()
    }


def measure(loaded: LoadedModel, samples: Sequence[Tensor], arms: Sequence[Arm], weights: Path | None) -> Losses:
    """Loss of every arm on every window."""
    losses: Losses = {"full context": []}
    with hooked_on(loaded, "all") as hooked:
        correction = shipped_correction(hooked) if weights is None else load_correction(weights, hooked)
        if correction is None:
            print("corrected arms are left out: there are no trained weights", file=sys.stderr)
            arms = [arm for arm in arms if not arm.corrected]
        cuts = [arm for arm in arms if arm.settings.block == WHOLE]
        _measure_cuts(hooked, samples, cuts, correction, losses)
    for arm in arms:
        if arm in cuts:
            continue
        with hooked_on(loaded, arm.layers) as hooked:
            fed = [feed(hooked, ids, arm.settings, correction if arm.corrected else None) for ids in samples]
            _score(hooked, samples, fed, arm, losses)
    return losses


def in_groups(
    loaded: LoadedModel,
    samples: Sequence[Tensor],
    arms: Sequence[Arm],
    weights: Path | None = None,
    partial: Path | None = None,
) -> Losses:
    """``measure`` for eight windows at a time, far apart; goes on from ``partial`` and keeps it up to date."""
    groups = max(1, len(samples) // 8)
    losses: Losses = {}
    if partial is not None and partial.exists():
        losses = json.loads(partial.read_text(encoding="utf-8"))
    done = len(losses.get("full context", []))
    for group in range(groups):
        members = samples[group::groups]
        if done >= sum(len(samples[earlier::groups]) for earlier in range(group + 1)):
            continue
        begun = time.perf_counter()
        for name, values in measure(loaded, members, arms, weights).items():
            losses.setdefault(name, []).extend(values)
        print(f"group {group + 1} of {groups}: {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
        if partial is not None:
            partial.write_text(json.dumps(losses), encoding="utf-8")
    return losses


def _measure_cuts(
    hooked: HookedModel,
    samples: Sequence[Tensor],
    arms: Sequence[Arm],
    correction: SummaryCorrection | None,
    losses: Losses,
) -> None:
    """The context passes once for each window; every arm then cuts the same cache."""
    fed: dict[str, list[ActiveWindow]] = {arm.name: [] for arm in arms}
    for ids in samples:
        window = feed(hooked, ids, replace(CUT, chunk_size=WHOLE))
        losses["full context"].append(loss(hooked, ids, window))
        for arm in arms:
            fed[arm.name].append(window.fork(arm.settings, correction=correction if arm.corrected else None))
            fed[arm.name][-1].evict()
    for arm in arms:
        _score(hooked, samples, fed.pop(arm.name), arm, losses)


def _score(
    hooked: HookedModel, samples: Sequence[Tensor], fed: Sequence[ActiveWindow], arm: Arm, losses: Losses
) -> None:
    """The arm's loss behind each of its windows; for an arm with controls, also with other virtual tokens than its own.

    The windows themselves have seen their own summaries while they were fed (streamed arms): what a control takes away
    is only what the last pass is shown.
    """
    shown = [window.segments(TARGETS) for window in fed]
    losses[arm.name] = [loss(hooked, *pair) for pair in zip(samples, fed, strict=True)]
    if not arm.controls:
        return
    half = len(samples) // 2 or 1
    controls = {
        "none shown at the end": [{} for _ in shown],
        "random ones at the end": [random_like(own, number) for number, own in enumerate(shown)],
        "another window's at the end": shown[half:] + shown[:half],
    }
    for name, others in controls.items():
        losses[f"{arm.name}: {name}"] = [
            loss(hooked, ids, window, other) for ids, window, other in zip(samples, fed, others, strict=True)
        ]


@contextmanager
def hooked_on(loaded: LoadedModel, layers: str) -> Iterator[HookedModel]:
    """The model hooked on "all" layers, "half" of them (every second), or its "default" ones."""
    count = int(loaded.model.config.num_hidden_layers)
    chosen = {"all": range(count), "half": range(0, count, 2), "default": default_layers(loaded.model.config)}[layers]
    hooked = HookedModel(loaded, list(chosen))
    try:
        yield hooked
    finally:
        hooked.remove()


def run(options: Options) -> str:
    """All arms, as a part of ``benchmarks/workspace.py``. Raises MissingData without the model or the text."""
    loaded = load_model(MODEL, cache_dir=cache_folder(), dtype="bfloat16")
    samples = windows(held_out(loaded, options, "tinyshakespeare"), 4 if options.quick else 48)
    losses = in_groups(loaded, samples, ARMS)
    return f"{MODEL} in bfloat16, {len(samples)} windows.\n\n{report(losses)}"


def main() -> int:
    arguments = _arguments()
    torch.set_num_threads(1)
    options = Options(data=data_folder())
    try:
        if arguments.train is not None:
            train(options, arguments.train)
            return 0
        loaded = load_model(MODEL, cache_dir=cache_folder(), dtype=arguments.dtype)
        samples = windows(held_out(loaded, options, arguments.text), arguments.windows)
    except MissingData as missing:
        print(f"skipped: {missing}")
        return 0
    needed = [arm for arm in ARMS if arm.settings.virtual_tokens == 0 and arm.name.endswith("sinks + window")]
    chosen = [arm for arm in ARMS if arm in needed or any(word in arm.name for word in arguments.arms)]
    losses = in_groups(loaded, samples, chosen, arguments.weights, arguments.partial)
    circumstances = (
        f"{MODEL} in {arguments.dtype} on {arguments.text}, torch {torch.__version__}, {platform.machine()}, 1 thread; "
        f"{len(samples)} windows, bootstrap of 4,000 draws with seed 0"
    )
    text = f"# workspace: long context\n\n{circumstances}\n\n{report(losses)}\n"
    print(text)
    if arguments.write:
        suffix = "" if arguments.text == "tinyshakespeare" else f"_{arguments.text}"
        target = ROOT / "benchmarks" / "results" / "workspace" / f"long_context{suffix}.md"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--text", choices=("tinyshakespeare", "banking77"), default="tinyshakespeare")
    parser.add_argument("--arms", type=lambda text: tuple(text.split(",")), default=("",), help="parts of their names")
    parser.add_argument("--weights", type=Path, help="directory of a trained correction; default: the shipped one")
    parser.add_argument("--train", type=Path, metavar="DIRECTORY", help="train a correction and exit")
    parser.add_argument("--partial", type=Path, metavar="FILE", help="keep losses here and go on from them")
    parser.add_argument("--write", action="store_true", help="keep the result in benchmarks/results/workspace")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
