"""What untrained virtual tokens cost: loss on held-out text with each kind of them, at several biases.

    python -m benchmarks.workspace_parts.heuristics [--text shared/data/tinyshakespeare/input.txt] [--windows 6]

The model reads 256 tokens, forgets them, and is asked for the 256 after. Beside nothing at all it gets 16 virtual
tokens in each hooked layer, made of the first 256: by a random projection of the slots, by its own projections of
averaged residuals, by averages of its own projections (``heuristic_kv``), and with the values that were in its cache.
A good heuristic costs nothing; only training gains. The numbers stand in ``workspace/heuristic_kv.py``.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from settings import load_settings, prepare_process_environment  # noqa: E402

prepare_process_environment()  # before torch is imported

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional  # noqa: E402

from workspace.context import Context, Recorder, Segment  # noqa: E402
from workspace.heuristic_kv import heuristic_kv, pool_tokens  # noqa: E402
from workspace.hooking import HookedModel  # noqa: E402
from workspace.models import load_model  # noqa: E402
from workspace.modules import WorkspaceModules  # noqa: E402
from workspace.projector import ModuleShape  # noqa: E402
from workspace.workspace_config import WorkspaceConfig  # noqa: E402

SPAN = 256
TOKENS = 16
DISTANCE = 64
BIASES = (-16.0, -4.0, -2.0, 0.0)
KV = Mapping[int, tuple[Tensor, Tensor]]


def loss(hooked: HookedModel, ids: Tensor, kv: KV, bias: float) -> float:
    """Mean cross-entropy of ``ids`` [1, T] at positions after the forgotten span."""
    birth = torch.zeros(1, TOKENS, dtype=torch.int64)
    segments = {
        layer: Segment(keys, values, torch.full((1, 1, TOKENS), bias), birth, distance=DISTANCE)
        for layer, (keys, values) in kv.items()
    }
    positions = torch.arange(SPAN, SPAN + ids.shape[1])[None]
    out = hooked.loaded.model(ids, position_ids=positions, use_cache=False, workspace=Context(segments))
    return functional.cross_entropy(out.logits[0, :-1].float(), ids[0, 1:]).item()


def kinds(hooked: HookedModel, modules: WorkspaceModules, ids: Tensor) -> dict[str, KV]:
    """Every kind of virtual tokens made of ``ids`` [1, T]."""
    recorder = Recorder(hooked.layers, whole=True)
    cache = hooked.loaded.model(ids, use_cache=True, workspace=Context({}, recorder=recorder)).past_key_values
    seen = recorder.residuals
    for layer in hooked.layers:
        modules.projector.observe(layer, cache.layers[layer].keys, cache.layers[layer].values)
    layers = {layer: hooked.loaded.model.model.layers[layer] for layer in hooked.layers}
    dtype = hooked.loaded.dtype
    random = modules.projector.kv(modules.update(seen).slots)
    directions = {layer: functional.rms_norm(residual.float(), residual.shape[-1:]) for layer, residual in seen.items()}
    first = {layer: pool_tokens(rows[:, None], TOKENS)[:, 0] for layer, rows in directions.items()}
    averaged = heuristic_kv(seen, layers, TOKENS)
    values = {layer: pool_tokens(cache.layers[layer].values, TOKENS) for layer in hooked.layers}
    return {
        "random projection of slots": {layer: (kv[0].to(dtype), kv[1].to(dtype)) for layer, kv in random.items()},
        "residuals averaged, then projected": heuristic_kv(first, layers, TOKENS),
        "residuals projected, then averaged": averaged,
        "the same keys, real values": {layer: (averaged[layer][0], values[layer]) for layer in averaged},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=ROOT.parent / "shared" / "data" / "tinyshakespeare" / "input.txt")
    parser.add_argument("--windows", type=int, default=6)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    settings = load_settings(environ={})
    hooked = HookedModel(load_model(settings.model.name, cache_dir=ROOT / settings.model.cache_dir, device="cpu"))
    modules = WorkspaceModules(ModuleShape.of(hooked), WorkspaceConfig(kv_plan_bias=0.0))
    text = chosen.text.read_text(encoding="utf-8")[300_000 : 300_000 + 4000 * chosen.windows]
    ids = torch.tensor(hooked.loaded.tokenizer(text, verbose=False)["input_ids"])
    found: dict[tuple[str, float], list[float]] = defaultdict(list)
    bare: list[float] = []
    with torch.inference_mode():
        for start in range(0, 600 * chosen.windows, 600):
            before, after = ids[None, start : start + SPAN], ids[None, start + SPAN : start + 2 * SPAN]
            bare.append(loss(hooked, after, {}, 0.0))
            for kind, kv in kinds(hooked, modules, before).items():
                for bias in BIASES:
                    found[kind, bias].append(loss(hooked, after, kv, bias) - bare[-1])
    print(f"{hooked.loaded.name}, {hooked.loaded.dtype}, layers {hooked.layers}, {chosen.windows} windows")
    print(f"nothing: {sum(bare) / len(bare):.3f} nats; more with {TOKENS} virtual tokens at bias")
    print(f"{'':36}" + "".join(f"{bias:9.0f}" for bias in BIASES))
    for kind in dict.fromkeys(kind for kind, _ in found):
        means = [sum(found[kind, bias]) / chosen.windows for bias in BIASES]
        print(f"{kind:36}" + "".join(f"{mean:+9.3f}" for mean in means))


if __name__ == "__main__":
    main()
