"""Trains the recall benchmark's model from nothing: a small gpt-oss which reads off its context who has which value.

    python benchmarks/distillation_parts/recall_model.py --out FOLDER [--seed 1] [--finish 300]

All but YaRN is there (sliding and full attention in turns, sinks, top-2 of 4 experts), in 0.34 M parameters;
only the window is 4 tokens instead of 128. FOLDER gets weights in bfloat16, tokenizer, configuration and training.log,
anew after every stage; benchmarks/models/recall holds what seed 1 made. One thread; the same seed gives the same
losses.

Models like this one sit on a plateau for millions of tokens, where they answer *some* value of the history (loss
ln N), until two layers find each other: one that notes at each value whose it is, one that looks for the note. What is
done against that here: every value is asked again in the same sequence, so each gives N targets; the loss is on values
that are determined, and on nothing else before these are found (later on their end as well); few pairs first, twice as
many whenever recall passes 97 %; a window that holds little beside the name; queries that begin as copies of keys in
the full layers, so that equal things attend to each other (mimetic initialisation, Trockman and Kolter 2023, arXiv
2305.09828); embeddings of length one per channel; Muon for the matrices (Jordan et al. 2024), AdamW for the rest.
docs/cartridge-training.md says what was tried.

Shapes: B sequences, N pairs, T tokens.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from settings import prepare_process_environment  # noqa: E402

prepare_process_environment()  # before torch is imported

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from transformers import GenerationConfig, GptOssConfig, GptOssForCausalLM  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

from benchmarks.distillation_parts.recall_world import (  # noqa: E402
    END,
    PAD,
    START,
    TOKENS_PER_PAIR,
    VOCABULARY,
    make_tokenizer,
    sequences,
)

EVALUATED = (16, 32, 64, 128)  #: pairs in the histories of the log's table


@dataclass(frozen=True)
class Recipe:
    """What the committed weights were made with."""

    seed: int = 1
    tokens: int = 4096  #: of a batch
    stages: tuple[int, ...] = (8, 16, 32, 64, 128)  #: pairs
    bound: float = 0.97  #: recall at which a stage ends
    most: int = 2000  #: steps of a stage
    finish: int = 300  #: steps of 8 to 128 pairs at the end, while the learning rates fall to zero
    muon: float = 0.02  #: learning rate of matrices
    adam: float = 3e-3  #: of embeddings, head, norms, sinks, router and experts
    warmup: int = 50
    clip: float = 1.0


def make_model(seed: int) -> GptOssForCausalLM:
    """The model before training."""
    torch.manual_seed(seed)
    config = GptOssConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=4,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        pad_token_id=PAD,
        bos_token_id=START,
        eos_token_id=END,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    model = GptOssForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _first_values(name, parameter)
        for layer in model.model.layers:
            attention = layer.self_attn
            if attention.sliding_window is None:
                keys = attention.k_proj.weight.view(config.num_key_value_heads, config.head_dim, -1)
                queries = keys.repeat_interleave(attention.num_key_value_groups, dim=0)
                attention.q_proj.weight.copy_(queries.reshape_as(attention.q_proj.weight))
    return model


def train(recipe: Recipe, tell: Callable[[str], None], keep: Callable[[GptOssForCausalLM], None]) -> None:
    """All stages; ``keep`` gets the model after each. Raises ``RuntimeError`` for one that does not end."""
    model = make_model(recipe.seed).train()
    training = _Training(recipe, model, tell)
    for pairs in recipe.stages:
        training.stage(pairs)
        keep(model)
    training.finish()
    keep(model)


@torch.no_grad()
def recall_in_context(model: Any, pairs: int, *, rows: int = 16, seed: int = 0) -> float:
    """Share of right answers where a whole history is asked once more, in another order."""
    made = sequences(rows, pairs, torch.Generator().manual_seed(seed))
    logits = model.lm_head(model.model(made.ids).last_hidden_state[:, made.asked])  # [B, N, vocabulary]
    return float((logits.argmax(-1) == made.ids[:, made.asked + 1]).float().mean())


class _Training:
    """Steps, and a line about each twentieth."""

    def __init__(self, recipe: Recipe, model: GptOssForCausalLM, tell: Callable[[str], None]):
        self._recipe, self._model, self._tell = recipe, model, tell
        self._random = torch.Generator().manual_seed(recipe.seed)
        self._optimizers = list(_optimizers(model, recipe))
        self._step, self._tokens, self._began = 0, 0, time.process_time()

    def stage(self, pairs: int) -> None:
        """Until histories of ``pairs`` are recalled."""
        recall, begun = 0.0, self._step
        while recall < self._recipe.bound:
            if self._step - begun == self._recipe.most:
                raise RuntimeError(f"{pairs} pairs are not recalled after {self._recipe.most} steps: {recall:.3f}")
            recall = 0.9 * recall + 0.1 * self._one(pairs, share=1.0)
        self._tell(f"{pairs} pairs are recalled after {self._step} steps, {self._tokens / 1e6:.2f} M tokens")

    def finish(self) -> None:
        """Histories of all lengths, at falling learning rates."""
        for step in range(self._recipe.finish):
            stage = int(torch.randint(len(self._recipe.stages), (), generator=self._random))
            self._one(self._recipe.stages[stage], share=1 - step / self._recipe.finish)

    def _one(self, pairs: int, share: float) -> float:
        """A step; its recall."""
        recipe, start = self._recipe, bool(self._step % 2)
        rows = max(1, recipe.tokens // (2 * TOKENS_PER_PAIR * pairs))
        made = sequences(rows, pairs, self._random, start=start)
        for optimizer, rate in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * share * min(1.0, (self._step + 1) / recipe.warmup)
            optimizer.zero_grad(set_to_none=True)
        loss, recall = _loss(self._model, made.ids, made.asked, ends=pairs > recipe.stages[0])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), recipe.clip)
        for optimizer, _ in self._optimizers:
            optimizer.step()
        self._step += 1
        self._tokens += made.ids.numel()
        if self._step % 20 == 0:
            self._tell(
                f"step {self._step:5d}  {self._tokens / 1e6:6.2f} M tokens  {time.process_time() - self._began:6.0f} "
                f"CPU s  pairs {pairs:3d}  loss {loss.item():.4f} (ln pairs {math.log(pairs):.2f})  recall {recall:.3f}"
            )
        return recall


def _loss(model: GptOssForCausalLM, ids: Tensor, asked: Tensor, *, ends: bool) -> tuple[Tensor, float]:
    """Mean negative log-likelihood of the values that are determined, and the share of right ones.

    With ``ends`` also that of the token behind each value.
    """
    hidden = model.model(ids).last_hidden_state
    logits = model.lm_head(hidden[:, asked]).flatten(0, 1)
    wanted = ids[:, asked + 1].flatten()
    loss = F.cross_entropy(logits, wanted)
    if ends:
        loss = loss + F.cross_entropy(model.lm_head(hidden[:, asked + 1]).flatten(0, 1), ids[:, asked + 2].flatten())
    return loss, float((logits.argmax(-1) == wanted).float().mean())


def _first_values(name: str, parameter: Tensor) -> None:
    """In place. Matrices keep the length of what they multiply; what writes into the residual begins smaller."""
    if "sinks" in name:
        parameter.fill_(-2.0)
    elif "embed_tokens" in name:
        parameter.normal_(0.0, 1.0)
    elif "_proj" in name and parameter.ndim >= 2 and "bias" not in name:
        fan_in = parameter.shape[1]  # [out, in], and experts are [experts, in, out]
        parameter.normal_(0.0, fan_in**-0.5)
        if "o_proj" in name or "down_proj" in name:
            parameter.mul_(0.3)


def _optimizers(model: GptOssForCausalLM, recipe: Recipe) -> Iterator[tuple[torch.optim.Optimizer, float]]:
    """Each with its learning rate. Muon wants matrices, so experts, which lie in stacks, have AdamW."""
    matrices = {name: p for name, p in model.named_parameters() if "_proj.weight" in name}
    others = [p for name, p in model.named_parameters() if name not in matrices]
    yield torch.optim.Muon(matrices.values(), lr=recipe.muon, weight_decay=0.0, momentum=0.95), recipe.muon
    yield torch.optim.AdamW(others, lr=recipe.adam, betas=(0.9, 0.95), weight_decay=0.0), recipe.adam


def save(model: GptOssForCausalLM, folder: Path) -> None:
    """Weights in bfloat16, tokenizer and configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    model = copy.deepcopy(model).to(torch.bfloat16)
    model.generation_config = GenerationConfig(bos_token_id=START, eos_token_id=END, pad_token_id=PAD)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--finish", type=int, default=Recipe.finish, help="steps at falling learning rates")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    lines: list[str] = []

    def tell(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    recipe = Recipe(seed=arguments.seed, finish=arguments.finish)
    tell(f"torch {torch.__version__}; {asdict(recipe)}")
    train(recipe, tell, lambda model: save(model, arguments.out))
    kept = GptOssForCausalLM.from_pretrained(arguments.out, dtype=torch.float32, attn_implementation="eager").eval()
    for pairs in EVALUATED:
        tell(f"{pairs} pairs: {recall_in_context(kept, pairs, seed=arguments.seed):.4f} recalled")
    (arguments.out / "training.log").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
