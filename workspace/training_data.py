"""From captured texts to batches: which texts when, what a student sees of each, everything padded into tensors.

A *row* is one text with a *birth*: the position from which a broadcast is visible. Before it is context, which the
slots have seen through their probes; from it on the next ``F`` tokens are predicted. A student keeps the whole context
or its last ``keep`` tokens. Births are the prompt's end, or by chance a place within the answer, where the slots have
been written several times, as they are in serving: once with the prompt, then with every ``update_every`` tokens.

Order and chances come from the seed, the epoch and one generator, which belongs to the checkpoint. Texts of similar
length share a batch. Shapes: R rows, K kept context tokens before the first that is fed (padded on the left), F fed
tokens (padded on the right), N inputs of one update, k teacher's tokens.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from workspace.capture_blob import Blob
from workspace.capture_folder import Capture, CaptureEntry, Split
from workspace.controller import heuristic_drives, network_inputs, soft_targets
from workspace.errors import CaptureMismatch, TrainingConfigError
from workspace.projector import ModuleShape
from workspace.signals import SignalTracker
from workspace.training_config import TrainingConfig
from workspace.workspace_config import ControllerConfig

_SORTED = 8  # batches whose texts are sorted by length together


class Draw(NamedTuple):
    """What chance decides about one row. ``keep`` None: the whole context."""

    birth: int
    keep: int | None


class Update(NamedTuple):
    """Inputs of one update of the slots."""

    residuals: dict[int, Tensor]  #: layer -> [R, N, hidden]
    mask: Tensor  #: [R, N] bool


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Rows made ready for a forward pass."""

    prefix_ids: Tensor  #: [R, K]
    prefix_mask: Tensor  #: [R, K] 1 where there is a token
    fed_ids: Tensor  #: [R, F] from the token before the birth on
    target_ids: Tensor  #: [R, F] what followed each of them
    target_mask: Tensor  #: [R, F] bool
    first: Tensor  #: [R] position of the first fed token, birth - 1
    updates: tuple[Update, ...]
    top_ids: Tensor | None  #: [R, F, k]
    top_logprobs: Tensor | None  #: [R, F, k]
    base_loss: Tensor | None  #: [R, F] loss of the model with its whole context and no virtual tokens, nats
    whole: bool  #: the student has the whole context
    sampled: Tensor  #: [R] bool: the model wrote this continuation itself
    controller_inputs: Tensor | None  #: [R, F, 6]
    controller_targets: Tensor | None  #: [R, F, 4] probabilities

    @property
    def rows(self) -> int:
        """R"""
        return int(self.fed_ids.shape[0])

    @property
    def births(self) -> Tensor:
        """[R]"""
        return self.first + 1


def of_split(capture: Capture, split: Split) -> tuple[CaptureEntry, ...]:
    """The texts of one split."""
    return tuple(entry for entry in capture.entries if entry.split == split)


def check_model(capture: Capture, fingerprints: Sequence[str]) -> None:
    """Raise ``CaptureMismatch`` unless the texts were captured from this model."""
    header = capture.header
    if header is not None and header.fingerprint not in fingerprints:
        raise CaptureMismatch(
            f"{capture.manifest} was captured from {header.model} (fingerprint {header.fingerprint}), the loaded model "
            f"has {', '.join(fingerprints)}; capture again with this model, or load that one in the same dtype"
        )


def check_layers(capture: Capture, shape: ModuleShape) -> None:
    """Raise ``CaptureMismatch`` unless the texts have residuals of the hooked layers. Without a header (texts of
    another program) those of the first text count."""
    header = capture.header
    if header is not None:
        layers, size = header.layers, header.hidden_size
    else:
        residuals = capture.read(capture.entries[0]).residuals
        layers, size = tuple(residuals), next(iter(residuals.values())).shape[1]
    if layers != shape.layers or size != shape.hidden_size:
        raise CaptureMismatch(
            f"{capture.manifest} has residuals of layers {list(layers)} with {size} numbers, hooked are "
            f"{list(shape.layers)} with {shape.hidden_size}; capture again, or hook those (workspace.hooked_layers)"
        )


def epoch_batches(entries: Sequence[CaptureEntry], rows: int, seed: int, epoch: int) -> list[list[CaptureEntry]]:
    """All texts once, in batches of ``rows`` of similar length, in an order that seed and epoch decide.

    What does not fill the last batch is left out of this epoch; of fewer texts than ``rows`` there is one small batch.
    """
    chance = random.Random(f"{seed}:{epoch}")
    order = list(entries)
    chance.shuffle(order)
    whole = len(order) // rows * rows or len(order)
    batches = []
    for start in range(0, whole, rows * _SORTED):
        near = sorted(order[start : min(start + rows * _SORTED, whole)], key=lambda entry: entry.tokens)
        batches += [near[i : i + rows] for i in range(0, len(near), rows)]
    chance.shuffle(batches)
    return batches


def draw_rows(blobs: Sequence[Blob], config: TrainingConfig, generator: torch.Generator) -> tuple[list[Draw], bool]:
    """Chances of one step: the same kind of student for all rows, a birth for each. Returns the draws and ``whole``."""
    numbers = torch.rand(2 + 2 * len(blobs), generator=generator, dtype=torch.float64).tolist()
    whole = numbers[0] < config.whole_share
    keep = None if whole else config.keep[int(numbers[1] * len(config.keep))]
    draws = []
    for place, blob in enumerate(blobs):
        share, where = numbers[2 + 2 * place : 4 + 2 * place]
        earliest, latest = blob.prompt_tokens + 1, blob.tokens - config.least_targets
        within = share < config.mid_answer_share and latest >= earliest
        birth = earliest + int(where * (latest - earliest + 1)) if within else blob.prompt_tokens
        draws.append(Draw(birth, keep))
    return draws, whole


def fixed_rows(blobs: Sequence[Blob], keep: int | None) -> list[Draw]:
    """No chance: every birth is its prompt's end."""
    return [Draw(blob.prompt_tokens, keep) for blob in blobs]


def assemble(blobs: Sequence[Blob], draws: Sequence[Draw], config: TrainingConfig) -> Batch:
    """The batch of these rows. Raises ``TrainingConfigError`` for texts that lack what the losses need."""
    rows = len(blobs)
    prefixes, feds, targets = [], [], []
    for blob, draw in zip(blobs, draws, strict=True):
        first = draw.birth - 1
        start = 0 if draw.keep is None else max(0, draw.birth - draw.keep)
        end = min(blob.tokens - 1, first + config.most_targets)  # the last fed token predicts the token at ``end``
        prefixes.append(blob.input_ids[start:first])
        feds.append(blob.input_ids[first:end])
        targets.append(blob.input_ids[first + 1 : end + 1])
    counts = [len(fed) for fed in feds]
    most = max(counts)
    target_mask = torch.arange(most)[None] < torch.tensor(counts)[:, None]
    longest = max(len(prefix) for prefix in prefixes)
    prefix_ids = torch.zeros(rows, longest, dtype=torch.long)
    prefix_mask = torch.zeros(rows, longest, dtype=torch.long)
    for row, prefix in enumerate(prefixes):
        prefix_ids[row, longest - len(prefix) :] = prefix
        prefix_mask[row, longest - len(prefix) :] = 1
    whole = all(draw.keep is None for draw in draws)
    teacher = _teacher(blobs, draws, counts, most, config) if config.losses.distillation else (None, None)
    signals = _controller(blobs, draws, counts, most, config) if config.losses.controller else (None, None)
    return Batch(
        prefix_ids=prefix_ids,
        prefix_mask=prefix_mask,
        fed_ids=_padded(feds, most),
        target_ids=_padded(targets, most),
        target_mask=target_mask,
        first=torch.tensor([draw.birth - 1 for draw in draws]),
        updates=tuple(_updates(blobs, draws, config.workspace.update_every)),
        top_ids=teacher[0],
        top_logprobs=teacher[1],
        base_loss=_base_loss(blobs, draws, counts, most),
        whole=whole,
        sampled=torch.tensor([blob.metadata.seed is not None for blob in blobs]),
        controller_inputs=signals[0],
        controller_targets=signals[1],
    )


def _padded(pieces: Sequence[Tensor], most: int) -> Tensor:
    """Stack [n, ...] of different n, zeros behind: [R, most, ...]."""
    out = pieces[0].new_zeros(len(pieces), most, *pieces[0].shape[1:])
    for row, piece in enumerate(pieces):
        out[row, : piece.shape[0]] = piece
    return out


def _updates(blobs: Sequence[Blob], draws: Sequence[Draw], every: int) -> list[Update]:
    """The prompt first, then what the answer showed between updates, as far as they came before the birth."""
    per_row = [_groups(blob, draw, every) for blob, draw in zip(blobs, draws, strict=True)]
    found = []
    for number in range(max(len(groups) for groups in per_row)):
        chosen = [groups[number] if number < len(groups) else torch.zeros(0, dtype=torch.long) for groups in per_row]
        most = max(len(places) for places in chosen)
        if most == 0:
            continue
        mask = torch.stack([torch.arange(most) < len(places) for places in chosen])
        residuals = {
            layer: _padded([blob.residuals[layer][places] for blob, places in zip(blobs, chosen, strict=True)], most)
            for layer in blobs[0].residuals
        }
        found.append(Update(residuals, mask))
    return found


def _groups(blob: Blob, draw: Draw, every: int) -> list[Tensor]:
    """Indices into the probes of one row, update by update.

    Updates are those of the capture where a workspace made some, else they come as ``WorkspaceRun`` would make them:
    after ``every`` chosen tokens, the last of which was not fed yet.
    """
    prompt, places = blob.prompt_tokens, blob.probe_positions
    recorded = [] if blob.updates is None else [place for place in blob.updates.tolist() if place > prompt]
    ends = recorded or range(prompt + every - 1, blob.tokens, every)
    bounds = [0, prompt, *(end for end in ends if end <= draw.birth)]
    return [((places >= start) & (places < end)).nonzero()[:, 0] for start, end in pairwise(bounds)]


def _answer_rows(blob: Blob, draw: Draw, count: int) -> slice:
    """Rows of the blob's per-answer tensors for the targets of a row."""
    start = draw.birth - blob.prompt_tokens
    return slice(start, start + count)


def _teacher(
    blobs: Sequence[Blob], draws: Sequence[Draw], counts: Sequence[int], most: int, config: TrainingConfig
) -> tuple[Tensor, Tensor]:
    ids, logprobs = [], []
    k = min(config.top_k, *(blob.teacher.ids.shape[1] if blob.teacher else 0 for blob in blobs))
    for blob, draw, count in zip(blobs, draws, counts, strict=True):
        if blob.teacher is None:
            raise TrainingConfigError(
                "losses.distillation needs the teacher's distributions, and a text was captured without; capture with "
                "top_k above 0, or set the weight to 0"
            )
        rows = _answer_rows(blob, draw, count)
        ids.append(blob.teacher.ids[rows, :k])
        logprobs.append(blob.teacher.logprobs[rows, :k])
    return _padded(ids, most), _padded(logprobs, most)


def _base_loss(blobs: Sequence[Blob], draws: Sequence[Draw], counts: Sequence[int], most: int) -> Tensor | None:
    if any(blob.statistics is None for blob in blobs):
        return None
    pieces = [
        blob.statistics[_answer_rows(blob, draw, count), 3]
        for blob, draw, count in zip(blobs, draws, counts, strict=True)
        if blob.statistics is not None
    ]
    return _padded(pieces, most)


def _controller(
    blobs: Sequence[Blob], draws: Sequence[Draw], counts: Sequence[int], most: int, config: TrainingConfig
) -> tuple[Tensor, Tensor]:
    inputs, targets = [], []
    for blob, draw, count in zip(blobs, draws, counts, strict=True):
        if blob.statistics is None:
            raise TrainingConfigError("losses.controller needs the statistics of captured texts; capture them again")
        seen, wanted = controller_examples(blob, config.workspace.thresholds, draw.birth)
        inputs.append(seen[:count])
        targets.append(wanted[:count])
    return _padded(inputs, most), _padded(targets, most)


def controller_examples(blob: Blob, config: ControllerConfig, birth: int) -> tuple[Tensor, Tensor]:
    """What the network sees after each answer token from ``birth`` on [n, 6], and what the heuristics say [n, 4].

    Smoothed signals begin with the answer, as they do in serving; ``birth`` counts as a broadcast.
    """
    assert blob.statistics is not None
    tracker = SignalTracker(config)
    inputs, targets = [], []
    since = 0
    rows: Mapping[int, list[float]] = dict(enumerate(blob.statistics.tolist()))
    for place, token in enumerate(blob.input_ids[blob.prompt_tokens :].tolist()):
        entropy, top1, margin, surprise = rows[place]
        signals = tracker.take(entropy, top1, margin, surprise, token)
        if blob.prompt_tokens + place < birth:
            continue
        drives = heuristic_drives(signals, config)
        inputs.append(network_inputs(signals, since))
        targets.append(soft_targets(drives))
        since = 0 if drives[0] >= 1 and since >= config.broadcast_gap else since + 1
    return torch.tensor(inputs), torch.tensor(targets)
