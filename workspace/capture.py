"""Capture: run the frozen model over texts and keep what training needs, so that it never has to run them again.

For every text (``capture_prompts.py``) one blob (``capture_blob.py``): tokens, residuals of the hooked layers where the
slots will see them, what the model would have said next with its whole context, and when a workspace would have acted.
Answers that are not given are written by the model: by the stock model in batches, or, with ``workspace``, by the
workspace's own decode loop, whose broadcasts and updates then stand in the blob.

Probes are placed as in serving: in the prompt 16 evenly spaced positions of each pass of ``PASS`` tokens, in the
answer every ``answer_stride``-th token (1: as serving does, for four times the size). Residuals and logits are always
read from a pass without workspace, over all tokens at once; so one that was captured twice is equal to the bit.

Crash-safe: see ``capture_folder.py``. Numbers are those of the prompts' file; a generated answer depends on its seed
(the capture's plus its number) and on the others in its batch; batches are cut from the questions in their order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor
from transformers import DynamicCache

from workspace.answering import Answering
from workspace.batched_sampling import sample_batch
from workspace.capture_blob import SCHEMA, TOP_K, BlobMetadata, encode_blob
from workspace.capture_folder import CaptureEntry, CaptureFolder, CaptureHeader
from workspace.capture_prompts import Item, items, read_prompts
from workspace.context import Context, Recorder
from workspace.errors import CaptureError
from workspace.run import probe_places
from workspace.sampling import SamplingParams
from workspace.signals import token_statistics
from workspace.steering import Steering
from workspace.steering_types import Toggles

#: Tokens of one forward pass, as the server prefills by default: it decides where the probes of a prompt stand.
PASS = 256

Progress = Callable[[int, int, CaptureEntry], None]  #: (texts done, texts in all, the newest)


class CaptureOptions(BaseModel):
    """How to capture. Another option is another capture: a folder holds texts of one kind of capture."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    window: int = Field(384, ge=2, description="Tokens of a piece of running text.")
    context: int = Field(256, ge=1, description="The first tokens of a piece, which count as its prompt.")
    max_tokens: int = Field(1024, ge=2, description="Most tokens of prompt and answer.")
    max_answer: int = Field(128, ge=1, description="Most tokens of an answer that the model writes.")
    temperature: float = Field(0.8, ge=0, le=4)
    top_p: float = Field(0.95, gt=0, le=1)
    seed: int = Field(0, ge=0)
    batch: int = Field(16, ge=1, le=256, description="Answers that are written at once.")
    answer_stride: int = Field(4, ge=1, description="Tokens between two probes in the answer.")
    top_k: int = Field(TOP_K, ge=0, le=4096, description="Log-probabilities kept for each answer token; 0: none.")
    all_logits: bool = Field(False, description="Keep all logits instead (98 kB a token at 49,152 words).")
    workspace: bool = Field(False, description="Answers are written with the workspace on.")

    @model_validator(mode="after")
    def _context_leaves_room(self) -> CaptureOptions:
        if self.context >= self.window:
            raise ValueError(f"context ({self.context}) must be below window ({self.window})")
        if self.window > self.max_tokens:
            raise ValueError(f"window ({self.window}) must be at most max_tokens ({self.max_tokens})")
        return self


@dataclass(frozen=True, slots=True)
class CaptureSummary:
    """What a capture did. ``kept``: texts that were there from before."""

    manifest: Path
    captured: int
    kept: int
    tokens: int
    bytes: int


def capture(
    steering: Steering,
    prompts: Path,
    output: Path,
    options: CaptureOptions | None = None,
    *,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> CaptureSummary:
    """Capture the texts of ``prompts`` into the folder ``output``; what is there already stays. ``stop`` ends it early.

    Raises a ``CaptureError``: ``PromptsDamaged``, ``CaptureMismatch``, ``ManifestDamaged``.
    """
    options = options or CaptureOptions()
    loaded = steering.loaded
    lines, digest = read_prompts(prompts)
    most = min(options.max_tokens, loaded.context_length)
    room = most - (options.max_answer if any(line.text is None and line.answer is None for line in lines) else 0)
    wanted = list(items(lines, loaded, window=options.window, context=options.context, most=room))
    if not wanted:
        raise CaptureError(f"{prompts}: its texts are shorter than one window of {options.window} tokens; lower it")
    header = CaptureHeader(
        schema=1,
        model=loaded.name,
        fingerprint=loaded.fingerprint,
        layers=steering.layers,
        hidden_size=steering.hooked.hidden_size,
        prompts_sha256=digest,
        options=options.model_dump(mode="json"),
    )
    output.mkdir(parents=True, exist_ok=True)
    with CaptureFolder(output, header) as folder:
        before = len(folder.entries)
        reader = _Reader(steering, options, most)
        for item, answer, schedule in _answered(steering, options, wanted, folder, stop):
            data = reader.read(item, answer, schedule)
            entry = folder.add(
                item.index,
                data,
                {
                    "tokens": len(item.prompt_ids) + len(answer),
                    "prompt_tokens": len(item.prompt_ids),
                    "kind": item.kind,
                    "split": item.split,
                    "seed": None if item.answer_ids is not None else options.seed + item.index,
                },
            )
            if progress is not None:
                progress(len(folder.entries), len(wanted), entry)
        entries = folder.entries.values()
        return CaptureSummary(
            manifest=output / "manifest.jsonl",
            captured=len(folder.entries) - before,
            kept=before,
            tokens=sum(entry.tokens for entry in entries),
            bytes=sum(entry.bytes for entry in entries),
        )


@dataclass(frozen=True, slots=True)
class _Schedule:
    """When a workspace acted: positions of broadcasts and updates, and the first position with deltas."""

    births: tuple[int, ...]
    updates: tuple[int, ...]
    delta_first: int | None = None


def _answered(
    steering: Steering,
    options: CaptureOptions,
    wanted: Sequence[Item],
    folder: CaptureFolder,
    stop: threading.Event | None,
) -> Iterator[tuple[Item, tuple[int, ...], _Schedule]]:
    """What is not captured yet, with an answer. Whole batches are written anew, so that they round as before."""
    asked = [item for item in wanted if item.answer_ids is None]
    batch_of = {item.index: place // options.batch for place, item in enumerate(asked)}
    write = _write_steered if options.workspace else _write_stock
    written: dict[int, tuple[tuple[int, ...], _Schedule | None]] = {}
    for item in wanted:
        if folder.has(item.index):
            continue
        if stop is not None and stop.is_set():
            return
        schedule = None
        answer = item.answer_ids
        if answer is None:
            if item.index not in written:
                first = batch_of[item.index] * options.batch
                batch = asked[first : first + options.batch]
                made = write(steering, options, batch)
                written = {one.index: answer for one, answer in zip(batch, made, strict=True)}
            answer, schedule = written[item.index]
        end = len(item.prompt_ids)
        yield item, answer, schedule or _Schedule((end,), (end,))


def _params(options: CaptureOptions, item: Item) -> SamplingParams:
    return SamplingParams(
        max_tokens=options.max_answer,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed + item.index,
    )


def _write_stock(
    steering: Steering, options: CaptureOptions, writing: Sequence[Item]
) -> list[tuple[tuple[int, ...], _Schedule | None]]:
    prompts = [item.prompt_ids for item in writing]
    answers = sample_batch(steering.loaded, prompts, [_params(options, item) for item in writing])
    return [(tuple(answer), None) for answer in answers]


def _write_steered(
    steering: Steering, options: CaptureOptions, writing: Sequence[Item]
) -> list[tuple[tuple[int, ...], _Schedule | None]]:
    """One by one through the engine; the trace tells when the workspace acted."""
    made: list[tuple[tuple[int, ...], _Schedule | None]] = []
    toggles = Toggles(memory=False, trace=True)
    with Answering(steering.loaded, steering, prefill_chunk=PASS) as answering:
        for item in writing:
            answer = answering.answer(item.prompt_ids, _params(options, item), toggles)
            trace = [] if answer.report is None else answer.report.trace or []
            schedule = _schedule_of(trace, len(item.prompt_ids), steering.config.update_every)
            deltas = toggles.residual_delta and steering.modules.trained("residual_delta")
            made.append((answer.token_ids, _Schedule(*schedule, len(item.prompt_ids) if deltas else None)))
    return made


def _schedule_of(
    trace: Sequence[dict[str, Any]], prompt: int, update_every: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Births and updates from the controller's trace; the rule for updates is that of ``WorkspaceRun.chosen``."""
    births, updates, since = [prompt], [prompt], 0
    for place, entry in enumerate(trace):
        since += 1
        if (entry["write"] or since >= update_every) and place:
            updates.append(prompt + place)
            since = 0
        if entry["broadcast"]:
            births.append(prompt + place)
    return tuple(births), tuple(updates)


class _Reader:
    """Reads one text after the other into buffers that are made once."""

    def __init__(self, steering: Steering, options: CaptureOptions, most: int):
        self._steering, self._options = steering, options
        self._layers = steering.layers
        loaded = steering.loaded
        probes = 16 * -(-most // PASS) + -(-most // options.answer_stride) + 1
        self._residuals = torch.empty(len(self._layers), probes, steering.hooked.hidden_size, dtype=loaded.dtype)
        self._statistics = torch.empty(most, 4)
        self._total = torch.empty(most)
        k = min(options.top_k, loaded.vocabulary_size)
        self._ids = torch.empty(most, k, dtype=torch.int32)
        self._logprobs = torch.empty(most, k, dtype=torch.float16)
        shape = (most, loaded.vocabulary_size) if options.all_logits else (0, 0)
        self._logits = torch.empty(shape, dtype=loaded.dtype)

    @torch.inference_mode()
    def read(self, item: Item, answer: Sequence[int], schedule: _Schedule) -> bytes:
        """The blob of one text."""
        ids = torch.tensor([*item.prompt_ids, *answer])  # [N]
        prompt, total = len(item.prompt_ids), ids.shape[0]
        places = self._places(prompt, total)
        self._passes(ids, prompt, places)
        seen = {layer: self._residuals[i, : len(places)] for i, layer in enumerate(self._layers)}
        slots, energy = self._plan(seen, int((places < prompt).sum()))
        metadata = BlobMetadata(
            schema=SCHEMA,
            prompt=item.prompt,
            seed=None if item.answer_ids is not None else self._options.seed + item.index,
            toggles={"workspace": self._options.workspace},
            prompt_tokens=prompt,
            kind=item.kind,
            model=self._steering.loaded.name,
            fingerprint=self._steering.loaded.fingerprint,
            delta_first=schedule.delta_first,
        )
        answers = total - prompt
        tensors = {
            "input_ids": ids.int(),
            "attention_mask": torch.ones(total, dtype=torch.uint8),
            "probe_positions": places.int(),
            **{f"residuals.{layer}": residual for layer, residual in seen.items()},
            "statistics": self._statistics[:answers],
            "births": torch.tensor(schedule.births, dtype=torch.int32),
            "updates": torch.tensor(schedule.updates, dtype=torch.int32),
            "slots": slots,
            "plan_energy": energy,
        }
        if self._options.all_logits:
            tensors["logits"] = self._logits[:answers]
        elif self._options.top_k:
            tensors |= {
                "top_ids": self._ids[:answers],
                "top_logprobs": self._logprobs[:answers],
                "logsumexp": self._total[:answers],
            }
        return encode_blob(metadata, tensors)

    def _places(self, prompt: int, total: int) -> Tensor:
        """Where the slots see the text, [P] rising."""
        found = [probe_places(min(PASS, prompt - start)) + start for start in range(0, prompt, PASS)]
        stride = self._options.answer_stride
        return torch.cat([*found, torch.arange(prompt + stride - 1, total, stride)])

    def _passes(self, ids: Tensor, prompt: int, places: Tensor) -> None:
        """Fill the buffers: residuals at ``places``, and the distributions that predict the answer's tokens."""
        loaded = self._steering.loaded
        cache = DynamicCache(config=loaded.model.config)
        total, done = ids.shape[0], 0
        for start in range(0, total, PASS):
            stop = min(start + PASS, total)
            recorder = Recorder(self._layers, whole=True)
            first, last = max(start, prompt - 1), min(stop, total - 1)  # positions that predict an answer token
            out = loaded.model(
                ids[None, start:stop].to(loaded.device),
                position_ids=torch.arange(start, stop, device=loaded.device)[None],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=torch.arange(first - start, last - start, device=loaded.device)
                if first < last
                else torch.zeros(1, dtype=torch.long, device=loaded.device),
                workspace=Context(recorder=recorder),
            )
            here = places[(places >= start) & (places < stop)] - start
            for i, layer in enumerate(self._layers):
                rows = recorder.residuals[layer][0, here.to(loaded.device)]
                self._residuals[i, done : done + len(here)].copy_(rows)
            done += len(here)
            if first < last:
                self._keep(out.logits[0], ids[first + 1 : last + 1], first - prompt + 1)

    def _keep(self, logits: Tensor, following: Tensor, at: int) -> None:
        """Distributions ``logits`` [n, V] and the tokens that did follow [n] into the buffers from row ``at``."""
        rows = slice(at, at + logits.shape[0])
        statistics = token_statistics(logits, following.to(logits.device))
        self._statistics[rows].copy_(torch.stack(statistics, dim=-1))
        if self._options.all_logits:
            self._logits[rows].copy_(logits)
        elif self._options.top_k:
            numbers = logits.float()
            total = numbers.logsumexp(dim=-1)  # [n]
            best, places = numbers.topk(self._ids.shape[1], dim=-1)
            self._ids[rows].copy_(places)
            self._logprobs[rows].copy_(best - total[:, None])
            self._total[rows].copy_(total)

    def _plan(self, seen: dict[int, Tensor], shown: int) -> tuple[Tensor, Tensor]:
        """Slots [S, W] after the prompt, and the mean norms [L, 2] of what they would broadcast."""
        steering = self._steering
        prompt = {layer: rows[None, :shown].to(steering.loaded.device) for layer, rows in seen.items()}
        slots = steering.modules.update(prompt).slots
        layers = steering.broadcast(slots, prompt)
        norms = [
            [float(keys.float().norm(dim=-1).mean()), float(values.float().norm(dim=-1).mean())]
            for keys, values, _ in layers.values()
        ]
        return slots[0].cpu(), torch.tensor(norms)
