"""What people use instead of a cartridge, each as conversations for the same questions.

truncated    as many of the first or last experiences as fit into as many tokens as the cartridge has slots
summary      the model's own summary of the history, of at most as many tokens
knn          the eight experiences whose words are nearest to the question, out of all of them (BM25); as they were
             lived, and with the right answers in place of mistakes
lora         a LoRA of equal bytes on queries and values, trained on the same rows for as many steps
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from benchmarks.distillation_parts.house import House, Message, observation
from lm.types import LanguageModel
from memory.distillation.config import TrainingConfig
from memory.distillation.encoding import Encoder, Example
from memory.distillation.prompt_builder import as_corrected
from memory.distillation.rows import Row
from memory.distillation.training_batches import rows_of_step
from memory.history import Record
from memory.recall import WordIndex
from workspace.models import LoadedModel, adopt_model

NEIGHBOURS = 8
_LORA_RATE = 1e-3
_SUMMARISE = "Write down, as briefly as possible, how messages are to be labelled. Give every label and what it is for."


def truncated(house: House, loaded: LoadedModel, tokens: int, *, first: bool) -> list[list[Message]]:
    """The first or the last experiences that fit into ``tokens``."""
    encoder = Encoder(loaded)
    bare = len(encoder.prompt(house.after([], "x"), after_prefix=False))
    chosen: list[Record] = []
    for record in house.shown if first else reversed(house.shown):
        more = [*chosen, record] if first else [record, *chosen]
        if len(encoder.prompt(house.after(more, "x"), after_prefix=False)) - bare > tokens:
            break
        chosen = more
    return [house.after(chosen, observation(question)) for question in house.questions]


def summary(house: House, teacher: LanguageModel, tokens: int) -> tuple[str, list[list[Message]]]:
    """The model's summary, and the questions with it in the system message."""
    told = teacher.call(house.after(house.shown, _SUMMARISE), max_tokens=tokens)
    prompts = []
    for question in house.questions:
        system, *rest = house.student(observation(question))
        prompts.append([{**system, "content": f"{system['content']}\n\n{told.text}"}, *rest])
    return told.text, prompts


def nearest(house: House, *, corrected: bool = False) -> list[list[Message]]:
    """The nearest experiences of each question, the nearest last; ``corrected`` without mistakes and feedback."""
    index = WordIndex([record.observation for record in house.episodes])
    prompts = []
    for question in house.questions:
        found = [house.episodes[place] for place, _ in index.best(observation(question), NEIGHBOURS)]
        shown = [as_corrected(record) for record in found] if corrected else found
        prompts.append(house.after(shown[::-1], observation(question)))
    return prompts


def lora(
    make_model: Callable[[], LoadedModel],
    rows: Sequence[Row],
    config: TrainingConfig,
    numbers: int,
    tell: Callable[[int, float], None],
) -> tuple[LoadedModel, int, float]:
    """A model of its own with a LoRA of about ``numbers`` trained numbers; the model, their count, seconds of training.

    AdamW at 1e-3 after a warm-up (not swept), the same rows in the same order. Its weights are merged, so that it
    answers like any other model.
    """
    from peft import LoraConfig, get_peft_model

    loaded = make_model()
    for parameter in loaded.model.parameters():
        parameter.requires_grad_(False)
    per_rank = _numbers_per_rank(loaded)
    rank = max(1, round(numbers / per_rank))
    torch.manual_seed(config.seed)  # of the adapter's first values
    wrapped = get_peft_model(
        loaded.model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    )
    parameters = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    encoder = Encoder(loaded)
    options = {"top_k": config.top_k, "max_tokens": config.max_tokens}
    examples = [
        encoder.example(row, name=str(number), after_prefix=False, **options)  # type: ignore[arg-type]
        for number, row in enumerate(rows)
    ]
    optimizer = torch.optim.AdamW(parameters, lr=_LORA_RATE)
    begun = time.perf_counter()
    for step in range(config.max_steps):
        share = min(1.0, (step + 1) / max(1, config.warmup_steps))
        for group in optimizer.param_groups:
            group["lr"] = _LORA_RATE * share
        chosen = [examples[place] for place in rows_of_step(step, len(examples), config.rows, config.seed)]
        optimizer.zero_grad(set_to_none=True)
        loss = _gold_loss(wrapped, chosen)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        tell(step + 1, float(loss))
    seconds = time.perf_counter() - begun
    merged = wrapped.merge_and_unload()
    merged.eval().requires_grad_(False)
    return adopt_model(f"{loaded.name}+lora", merged, loaded.tokenizer), sum(p.numel() for p in parameters), seconds


def _numbers_per_rank(loaded: LoadedModel) -> int:
    config = loaded.model.config
    head = config.hidden_size // config.num_attention_heads
    return int(
        config.num_hidden_layers * (2 * config.hidden_size + config.hidden_size + config.num_key_value_heads * head)
    )


def _gold_loss(model: torch.nn.Module, examples: Sequence[Example]) -> torch.Tensor:
    """Mean negative log-likelihood of the answers' tokens, padded rows."""
    longest = max(len(example.token_ids) for example in examples)
    ids = torch.zeros((len(examples), longest), dtype=torch.long)
    mask = torch.zeros_like(ids)
    wanted = torch.full_like(ids, -100)
    for row, example in enumerate(examples):
        tokens = torch.tensor(example.token_ids)
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        wanted[row, example.start : len(tokens)] = tokens[example.start :]
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    flat = wanted[:, 1:].reshape(-1)
    here = flat >= 0
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1])[here].float(), flat[here])
