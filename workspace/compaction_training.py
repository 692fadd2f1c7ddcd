"""Training of ``SummaryCorrection``: a capped cache learns to predict what the full context predicts.

Every text is read twice by the frozen model. The teacher sees all of it. The student reads it in blocks through an
``ActiveWindow``, as serving does; from the first eviction on, each block is one step: the gradient of

    KL(teacher || student), mean over the tokens of the block

goes through the virtual keys, values and biases of that block into the correction, and nowhere else. What the cache
and the summary hold is not differentiated, so a step costs one forward and one backward pass of one block. The
student walks on with the cache that its corrected virtual tokens have shaped: it is trained where it will be used.

Targets are the teacher's whole distributions, not the text: the correction is asked to remember, not to learn the
genre. How much of it is memory is a question for the benchmark (long_context.py: the summary of another text).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from workspace.context import Context
from workspace.correction import PART, SummaryCorrection
from workspace.errors import InvalidWorkspace
from workspace.hooking import HookedModel
from workspace.state_files import TrainingRecord
from workspace.window import ActiveWindow, WindowSettings

logger = logging.getLogger(__name__)

Progress = Callable[[int, float], None]


@dataclass(frozen=True, slots=True)
class CorrectionTraining:
    """The recipe. Texts are taken in the order in which they come."""

    steps: int = 600  #: blocks that are learnt from
    learning_rate: float = 3e-3  #: of Adam; warmed up over 10 steps, then falling linearly to a twentieth
    rank: int = 8
    clip: float = 1.0  #: longest gradient
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.rank < 1 or self.learning_rate <= 0 or self.clip <= 0:
            raise InvalidWorkspace(f"training needs steps, rank, learning_rate and clip above 0, got {self}")


def train_correction(
    hooked: HookedModel,
    texts: Iterable[Tensor],
    recipe: CorrectionTraining | None = None,
    settings: WindowSettings | None = None,
    *,
    progress: Progress | None = None,
) -> SummaryCorrection:
    """Learn from ``texts``, token ids [T] each, longer than ``chunk_size + block``; at most ``recipe.steps`` blocks.

    ``progress(step, KL)`` hears every step. The result carries its record; ``metrics`` has the mean KL of the first
    and the last quarter of the steps. Raises ``InvalidWorkspace`` when no text is long enough.
    """
    recipe, settings = recipe or CorrectionTraining(), settings or WindowSettings()
    correction = SummaryCorrection(hooked.layers, hooked.kv_heads, hooked.head_dim, recipe.rank, seed=recipe.seed).to(
        hooked.loaded.device
    )
    optimizer = torch.optim.Adam(correction.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.99))
    history: list[float] = []
    digest = hashlib.sha256()
    for ids in texts:
        if len(history) >= recipe.steps:
            break
        digest.update(ids.to(torch.int64).cpu().numpy().tobytes())
        teacher = _teacher(hooked, ids, settings.chunk_size + settings.block)
        for loss in _blocks(hooked, ids, teacher, correction, settings):
            step = len(history)
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * min(1, (step + 1) / 10) * max(0.05, 1 - step / recipe.steps)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(correction.parameters(), recipe.clip)
            optimizer.step()
            history.append(float(loss.detach()))
            if progress is not None:
                progress(step, history[-1])
            if len(history) >= recipe.steps:
                break
    if not history:
        raise InvalidWorkspace(
            f"nothing to learn from: no text is longer than {settings.chunk_size + settings.block} tokens"
        )
    quarter = max(1, len(history) // 4)
    correction.record = TrainingRecord(
        step=len(history),
        parts=(PART,),
        data_digest=digest.hexdigest(),
        metrics={
            "kl_first_quarter": sum(history[:quarter]) / quarter,
            "kl_last_quarter": sum(history[-quarter:]) / quarter,
            "learning_rate": recipe.learning_rate,
            "seed": recipe.seed,
        },
    )
    return correction.requires_grad_(False).eval()


@torch.no_grad()
def _teacher(hooked: HookedModel, ids: Tensor, start: int) -> Tensor:
    """Logits [T - start, V] of the model that sees all of ``ids``, at positions from ``start``; its own dtype."""
    if len(ids) <= start:
        return ids.new_zeros((0, 1))
    output = hooked.loaded.model(ids[None].to(hooked.loaded.device), use_cache=False, logits_to_keep=len(ids) - start)
    return output.logits[0]  # type: ignore[no-any-return]


def _blocks(
    hooked: HookedModel, ids: Tensor, teacher: Tensor, correction: SummaryCorrection, settings: WindowSettings
) -> Iterable[Tensor]:
    """KL of every block that sees virtual tokens; the caller steps in between."""
    model, device = hooked.loaded.model, hooked.loaded.device
    window = ActiveWindow(hooked, DynamicCache(config=model.config), settings, correction=correction)
    start = settings.chunk_size + settings.block
    for first, count in window.pieces(len(ids)):
        learns = window.summary is not None
        with torch.set_grad_enabled(learns):
            recorder = window.recorder(count)
            context = Context(segments=window.segments(count), recorder=recorder)
            logits = model(
                ids[None, first : first + count].to(device),
                past_key_values=window.cache,
                position_ids=torch.arange(first, first + count, device=device)[None],
                workspace=context,
                logits_to_keep=0 if learns else 1,
            ).logits[0]
            wanted = F.log_softmax(teacher[first - start : first - start + count].float(), dim=-1) if learns else None
            if wanted is not None:
                loss = (wanted.exp() * (wanted - F.log_softmax(logits.float(), dim=-1))).sum(dim=-1).mean()
        if wanted is not None:
            yield loss
        for layer in window.cache.layers:  # the next block must not differentiate this one
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
        window.advance(count, recorder)
