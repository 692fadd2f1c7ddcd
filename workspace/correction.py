"""What compaction misses on average, learnt: a low-rank correction of the virtual tokens of a capped cache.

Compaction matches the attention of each layer by itself, for queries of the past. How its errors add up over layers
and blocks is the same from text to text, and can be learnt through the frozen model (``compaction_training.py``). For
layer l and key-value head h, with content keys k and values v of the summary,

    k' = k + k A_lh B_lh        v' = v + v C_lh E_lh        b' = b + beta_lh

where A and C are [D, r] and B, E [r, D] start as zeros: untrained, it changes nothing to the bit. It only maps what
was remembered; it holds no tokens of its own, so it cannot add anything where the summary is empty.

On disk it is a state directory (``state_files.py``); weights of another model are refused. Not here: training, and
where virtual tokens stand (``window.py``).

Shapes: L hooked layers, H key-value heads, M virtual tokens, D head size, r rank.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from workspace.errors import StateMismatch
from workspace.hooking import HookedModel
from workspace.state_files import StateShape, TrainedModel, TrainingRecord, read_manifest, read_tensors, write_state

PART = "window_correction"
SHIPPED = (
    Path(__file__).resolve().parent / "weights"
)  #: <model>/window, made by benchmarks/workspace_parts/long_context.py


class SummaryCorrection(nn.Module):
    """The correction for one set of hooked layers; float32. ``record`` says how it was trained, None: it was not."""

    def __init__(self, layers: tuple[int, ...], kv_heads: int, head_dim: int, rank: int = 8, *, seed: int = 0):
        super().__init__()
        self.layers, self.rank = layers, rank
        self.record: TrainingRecord | None = None
        random = torch.Generator().manual_seed(seed)

        def down() -> nn.Parameter:
            shape = (len(layers), kv_heads, head_dim, rank)
            return nn.Parameter(torch.randn(shape, generator=random) * head_dim**-0.5)

        def up() -> nn.Parameter:
            return nn.Parameter(torch.zeros(len(layers), kv_heads, rank, head_dim))

        self.key_down, self.key_up = down(), up()
        self.value_down, self.value_up = down(), up()
        self.bias = nn.Parameter(torch.zeros(len(layers), kv_heads, 1))

    def forward(self, keys: Tensor, values: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Content ``keys``, ``values`` [L, H, M, D] and ``bias`` [L, H, M], corrected."""
        return (
            keys + keys @ self.key_down @ self.key_up,
            values + values @ self.value_down @ self.value_up,
            bias + self.bias,
        )


def save_correction(
    path: Path, correction: SummaryCorrection, hooked: HookedModel, *, fingerprints: tuple[str, ...]
) -> None:
    """Write ``correction``, which must have a ``record``, to the directory ``path``.

    ``fingerprints`` are those of the model in every dtype it may be used in. Raises ``StateError``, ``OSError``.
    """
    assert correction.record is not None, "only what was trained is saved"
    write_state(
        path,
        dict(correction.state_dict()),
        model=TrainedModel(name=hooked.loaded.name, fingerprints=fingerprints),
        shape=_shape(hooked),
        config={"rank": correction.rank},
        training=correction.record,
    )


def load_correction(path: Path, hooked: HookedModel) -> SummaryCorrection:
    """The correction in ``path``, for ``hooked`` and frozen.

    Raises ``StateNotFound``, ``StateDamaged`` or ``StateMismatch``, which name the path.
    """
    manifest = read_manifest(path)
    if hooked.loaded.fingerprint not in manifest.model.fingerprints:
        raise StateMismatch(
            f"{path} was trained on {manifest.model.name}, whose weights are not those of {hooked.loaded.name}; train "
            "a correction for this model, or use the window without one"
        )
    if manifest.shape != _shape(hooked):
        raise StateMismatch(
            f"{path} is for the hooked layers {', '.join(map(str, manifest.shape.layers))}, but hooked are "
            f"{', '.join(map(str, hooked.layers))}; hook those, or use the window without it"
        )
    correction = SummaryCorrection(hooked.layers, hooked.kv_heads, hooked.head_dim, int(manifest.config.get("rank", 0)))
    tensors = read_tensors(path, manifest)
    expected = {name: tuple(tensor.shape) for name, tensor in correction.state_dict().items()}
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != expected:
        raise StateMismatch(f"{path} does not hold the tensors of a window correction; train it again")
    correction.load_state_dict(tensors)
    correction.record = manifest.training
    return correction.requires_grad_(False).eval()


def shipped_correction(hooked: HookedModel) -> SummaryCorrection | None:
    """The correction that comes with this program for exactly this model and these layers, or None.

    Raises ``StateDamaged`` or ``StateMismatch`` if its files are not what they were.
    """
    for path in sorted(SHIPPED.glob("*/window")):
        manifest = read_manifest(path)
        if hooked.loaded.fingerprint in manifest.model.fingerprints and manifest.shape == _shape(hooked):
            return load_correction(path, hooked)
    return None


def _shape(hooked: HookedModel) -> StateShape:
    return StateShape(
        hidden_size=hooked.hidden_size, kv_heads=hooked.kv_heads, head_dim=hooked.head_dim, layers=hooked.layers
    )
