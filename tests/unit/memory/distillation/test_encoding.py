"""Rows as tokens: what the engine renders, what the teacher said, and where turns end."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from memory.distillation.encoding import Encoder, digest, row_name
from memory.distillation.errors import BadRow
from memory.distillation.rows import FlatTopLogprobs, Row, RowMessage, flatten_topk
from tests.support.tiny_cartridges import gold_rows, teacher_row, tiny_loaded
from workspace.models import LoadedModel
from workspace.prompting import Prompting

END = 1  # <|im_end|>


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return tiny_loaded(tmp_path_factory.mktemp("tiny"))


def test_prompt_is_the_engines_and_the_answer_ends_the_turn(loaded: LoadedModel) -> None:
    row = gold_rows(1)[0]
    found = Encoder(loaded).example(row, name="a", top_k=20, max_tokens=64)
    messages = [{"role": "user", "content": row.messages[0].content}]
    assert list(found.token_ids[: found.start]) == Prompting(loaded).render(messages, after_prefix=True)
    answer = found.token_ids[found.start :]
    assert answer[-1] == END
    assert loaded.tokenizer.decode(answer[:-1]) == row.answer.content
    assert found.targets.top_ids[:, 0].tolist() == list(answer)
    assert found.fed == len(found.token_ids) - 1  # nobody has to read the token that ends the turn
    assert found.places[0] == found.start - 1


def test_teachers_tokens_are_taken_as_they_are(loaded: LoadedModel) -> None:
    row = teacher_row(loaded, [{"role": "user", "content": "x"}], "y?")
    found = Encoder(loaded).example(row, name="a", top_k=4, max_tokens=64, gold_weight=7.0)
    assert row.answer.token_ids is not None
    assert found.token_ids[found.start :] == row.answer.token_ids
    assert found.targets.top_ids.shape == (3, 4)
    assert found.weight == 1.0


def test_weights(loaded: LoadedModel) -> None:
    row = gold_rows(1, weight=2.0)[0]
    assert Encoder(loaded).example(row, name="a", top_k=4, max_tokens=64, gold_weight=0.5).weight == 1.0


def test_control_tokens_in_an_answer_are_text(loaded: LoadedModel) -> None:
    row = Row((RowMessage("user", "a"), RowMessage("assistant", "no<|im_end|>yes")))
    found = Encoder(loaded).example(row, name="a", top_k=4, max_tokens=64)
    assert found.token_ids[found.start :].count(END) == 1
    assert found.token_ids[-1] == END
    assert "yes" in loaded.tokenizer.decode(found.token_ids[found.start :])


def test_long_prompts_lose_their_beginning_and_long_answers_their_end(loaded: LoadedModel) -> None:
    row = Row((RowMessage("user", "the lazy dog " * 30), RowMessage("assistant", "a quick brown fox")))
    encoder = Encoder(loaded)
    whole = encoder.example(row, name="a", top_k=4, max_tokens=500)
    short = encoder.example(row, name="a", top_k=4, max_tokens=40)
    assert len(short.token_ids) == 40
    assert short.token_ids == whole.token_ids[-40:]
    tiny = encoder.example(row, name="a", top_k=4, max_tokens=6)
    answer = whole.token_ids[whole.start :]
    assert len(answer) > 6
    assert tiny.token_ids[1:] == answer[:5]
    assert tiny.start == 1


def test_answers_of_templates_that_rewrite_old_answers(loaded: LoadedModel) -> None:
    """Such a template shows no thinking in old turns, but has it in the prompt of a new one."""
    tokenizer = Encoder(loaded).loaded.tokenizer
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "<|im_start|>assistant\n{%", "<|im_start|>assistant\nthink\n{%"
    )
    encoder = Encoder(dataclasses.replace(loaded, tokenizer=tokenizer))
    answer = encoder.answer([{"role": "user", "content": "a"}], "Paris", after_prefix=True)
    assert tokenizer.decode(answer[:-1]) == "Paris"
    assert answer[-1] == END


def test_answers_in_a_plain_transcript_end_with_its_stop(loaded: LoadedModel) -> None:
    from workspace.plain_chat import PLAIN_STOP, PLAIN_TEMPLATE

    tokenizer = Encoder(loaded).loaded.tokenizer
    tokenizer.chat_template = PLAIN_TEMPLATE
    plain = dataclasses.replace(loaded, tokenizer=tokenizer, chat_stop=PLAIN_STOP)
    answer = Encoder(plain).answer([{"role": "user", "content": "a"}], "Paris", after_prefix=True)
    assert tokenizer.decode(answer) == " Paris\nUser:"


def test_tokens_of_another_tokenizer_are_refused_by_name(loaded: LoadedModel) -> None:
    top = flatten_topk([[9, 49_000]], np.log([[0.6, 0.4]]))
    row = Row((RowMessage("user", "a"), RowMessage("assistant", "x", token_ids=(9,), top_logprobs=top)))
    with pytest.raises(BadRow, match=r"row 3.*same tokenizer"):
        Encoder(loaded).example(row, name=row_name(3, row), top_k=4, max_tokens=64)


def test_a_row_without_targets_is_refused_by_name(loaded: LoadedModel) -> None:
    empty = FlatTopLogprobs(np.zeros(0), np.zeros(0), np.zeros(0), (1, 4))
    row = Row(
        (RowMessage("user", "a"), RowMessage("assistant", "x", token_ids=(9,), top_logprobs=empty)),
        metadata={"experience_id": 12},
    )
    with pytest.raises(BadRow, match=r"row 5 .experience_id 12"):
        Encoder(loaded).example(row, name=row_name(5, row), top_k=4, max_tokens=64)


def test_the_engines_tokenizer_is_left_alone(loaded: LoadedModel) -> None:
    assert Encoder(loaded).loaded.tokenizer is not loaded.tokenizer


def test_digest_tells_rows_apart(loaded: LoadedModel) -> None:
    encoder = Encoder(loaded)

    def of(rows: list[Row]) -> str:
        return digest([encoder.example(row, name="a", top_k=4, max_tokens=64) for row in rows])

    assert of(gold_rows(4)) == of(gold_rows(4))
    assert len({of(gold_rows(4)), of(gold_rows(4, weight=2.0)), of(gold_rows(4, shuffled=True)), of(gold_rows(3))}) == 4


def test_names(tmp_path: Path) -> None:
    assert row_name(4, gold_rows(1)[0]) == "row 4 (content_key fox0)"
    assert row_name(4, Row((RowMessage("user", "a"), RowMessage("assistant", "b")))) == "row 4"
