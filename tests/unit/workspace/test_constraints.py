"""Answers held to a grammar: whatever the schema, an answer that ends by itself validates."""

from __future__ import annotations

import dataclasses
import json
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest
import torch

from workspace.constraints import Grammars
from workspace.engine import Engine
from workspace.errors import InvalidGrammar, InvalidSampling, UnsupportedGrammar
from workspace.models import LoadedModel
from workspace.sampling import Sampler, SamplingParams

MakeEngine = Callable[..., Engine]
PROMPT = [5, 6, 7]


def random_schema(draw: random.Random, depth: int = 0) -> dict[str, Any]:
    """A small schema out of what is supported; deep ones are of simple types."""
    kinds = ["string", "pattern", "integer", "number", "boolean", "null", "enum", "const"]
    kind = draw.choice(kinds if depth > 1 else [*kinds, "object", "object", "object", "array", "array", "anyOf", "ref"])
    if kind == "string":
        least = draw.randint(0, 2)
        return {"type": "string", "minLength": least, "maxLength": least + draw.randint(0, 4)}
    if kind == "pattern":
        return {"type": "string", "pattern": draw.choice([r"^[a-c]{1,3}$", r"^\d{2}-\d{2}$", r"^(ja|nein)$"])}
    if kind in ("integer", "number"):
        least = draw.randint(-20, 20)
        return {"type": kind, "minimum": least, "maximum": least + draw.randint(1, 300)}
    if kind == "enum":
        return {"enum": draw.sample(["a", "b c", 'q"uote', "größer", 1, 2.5, True, None, -7], draw.randint(1, 4))}
    if kind == "const":
        return {"const": draw.choice(["x", 12, None, False, "a\nb"])}
    if kind == "array":
        least = draw.randint(0, 2)
        items = random_schema(draw, depth + 1)
        return {"type": "array", "items": items, "minItems": least, "maxItems": least + draw.randint(0, 2)}
    if kind == "anyOf":
        return {"anyOf": [random_schema(draw, depth + 1) for _ in range(draw.randint(1, 3))]}
    if kind == "ref":
        part = {"type": "object", "properties": {"p": {"$ref": "#/$defs/part"}}, "required": ["p"]}
        return {**part, "additionalProperties": False, "$defs": {"part": random_schema(draw, 2)}} if depth == 0 else {}
    if kind == "object":
        names = draw.sample(["a", "name", "größe", "two words", 'q"', "x1"], draw.randint(0, 3))
        return {
            "type": "object",
            "properties": {name: random_schema(draw, depth + 1) for name in names},
            "required": draw.sample(names, draw.randint(0, len(names))),
            "additionalProperties": False,
        }
    return {"type": kind}


def test_every_finished_answer_to_240_random_schemas_validates(tiny: LoadedModel, make_engine: MakeEngine) -> None:
    engine = make_engine(tiny, max_waiting=300)
    draw = random.Random(20261127)
    schemas = [random_schema(draw) for _ in range(240)]
    generations = [
        engine.submit(
            PROMPT,
            SamplingParams(max_tokens=100, temperature=draw.choice([0.0, 0.7, 1.5]), seed=number),
            grammar=engine.grammars.json_schema(schema),
        )
        for number, schema in enumerate(schemas)
    ]
    reasons: Counter[str] = Counter()
    for schema, generation in zip(schemas, generations, strict=True):
        finished = generation.result(120)
        reasons[finished.reason] += 1
        assert finished.reason in ("stop", "length"), (schema, finished)
        if finished.reason == "stop":
            jsonschema.validate(json.loads(finished.text), schema)
        else:
            assert finished.usage.completion_tokens == 100
    assert reasons["stop"] > 160, reasons
    engine.grammars.check_invariants()


def test_the_end_is_possible_exactly_where_the_grammar_ends(tiny: LoadedModel) -> None:
    grammar = Grammars(tiny).json_schema({"enum": ["ab"]})
    constraint = grammar.start()
    logits = torch.zeros(tiny.vocabulary_size)
    said: list[int] = []
    while (text := tiny.tokenizer.decode(said)) != '"ab"':
        assert '"ab"'.startswith(text)
        allowed = torch.isfinite(constraint.mask(logits))
        assert not any(allowed[token] for token in tiny.eos_ids)
        said.append(int(allowed.nonzero()[0]))
        constraint.advance(said[-1])
    assert set(torch.isfinite(constraint.mask(logits)).nonzero().flatten().tolist()) == set(tiny.eos_ids)
    assert torch.isfinite(logits).all()
    first = torch.isfinite(grammar.start().mask(logits))
    assert not first[next(iter(tiny.eos_ids))], "each generation begins at the beginning"


def test_sampling_inside_the_grammar_is_the_models_own_distribution(tiny: LoadedModel) -> None:
    """Among two words of one token each, the draws follow the softmax over these two."""
    one, two = (tiny.tokenizer.encode(text, add_special_tokens=False)[0] for text in ("7", "8"))
    grammar = Grammars(tiny).json_schema({"enum": [7, 8]})
    logits = torch.full((tiny.vocabulary_size,), 3.0)
    logits[one], logits[two] = 1.0, 0.0
    counts: Counter[int] = Counter()
    for seed in range(2000):
        params = SamplingParams(temperature=1.0, seed=seed, logprobs=True)
        sampled = Sampler(params, PROMPT, grammar.start()).choose(logits)
        counts[sampled.token_id] += 1
        assert sampled.logprob == pytest.approx(float(torch.log_softmax(logits, 0)[sampled.token_id])), "unmodified"
    assert set(counts) == {one, two}
    assert counts[one] / 2000 == pytest.approx(0.731, abs=0.04)


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"not": {"type": "string"}}, "not"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "array", "contains": {"type": "integer"}}, "contains"),
        ({"type": "object", "propertyNames": {"maxLength": 3}}, "propertyNames"),
        ({"type": "object", "properties": {"a": {"if": {"type": "string"}, "then": {}}}}, "if"),
        ({"type": "string", "format": "colour"}, "colour"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"$ref": "#/$defs/nowhere"}, "nowhere"),
        ({"type": "wizard"}, "wizard"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(tiny: LoadedModel, schema: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidGrammar, match="schema cannot be used") as refused:
        Grammars(tiny).json_schema(schema)
    assert named in str(refused.value)
    assert refused.value.param == "response_format"


def test_grammars_are_compiled_once_and_the_oldest_forgotten(tiny: LoadedModel) -> None:
    grammars = Grammars(tiny)
    first = grammars.json_schema({"const": 0})
    assert grammars.json_schema({"const": 0}) is first
    for number in range(1, 70):
        grammars.json_schema({"const": number})
        grammars.check_invariants()
    assert grammars.json_schema({"const": 0}) is not first


def test_what_does_not_go_together(tiny: LoadedModel, make_engine: MakeEngine) -> None:
    engine = make_engine(tiny)
    grammar = engine.grammars.json_schema({"type": "object"})
    with pytest.raises(InvalidSampling, match="ignore_eos"):
        engine.submit(PROMPT, SamplingParams(ignore_eos=True), grammar=grammar)
    speaking = dataclasses.replace(tiny, harmony=object())  # type: ignore[arg-type]
    with pytest.raises(UnsupportedGrammar, match="Harmony"):
        Grammars(speaking).json_schema({"type": "object"})


def test_without_a_grammar_nothing_of_it_is_loaded(tiny: LoadedModel, make_engine: MakeEngine) -> None:
    engine = make_engine(tiny)
    engine.submit(PROMPT, SamplingParams(max_tokens=3)).result(30)
    assert engine._grammars is None
