"""Tools for models that call them as Hermes does: the prompt's side, the parser, the grammar that forces a call."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from workspace.engine import Engine
from workspace.errors import InvalidGrammar
from workspace.hermes_output import HermesOutput
from workspace.models import LoadedModel
from workspace.plain_chat import PLAIN_TEMPLATE
from workspace.sampling import SamplingParams
from workspace.tool_grammar import call_grammar
from workspace.tool_prompt import OPEN, with_tools

FIND: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "find",
        "description": "Find a thing.",
        "parameters": {
            "type": "object",
            "properties": {"q": {"type": "string", "maxLength": 5}, "most": {"$ref": "#/$defs/count"}},
            "required": ["q", "most"],
            "additionalProperties": False,
            "$defs": {"count": {"type": "integer", "minimum": 1, "maximum": 9}},
        },
    },
}
NOW: dict[str, Any] = {"type": "function", "function": {"name": "now"}}
CALL = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": '{"q": "fox"}'}}
TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": "Where is the fox?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "in the den", "tool_call_id": "c1"},
    {"role": "tool", "content": "or out", "tool_call_id": "c2"},
]


def test_a_template_that_knows_no_tools_is_told_in_words() -> None:
    told, tools = with_tools(TURNS, [FIND], "no such thing")
    assert tools is None
    assert [turn["role"] for turn in told] == ["system", "user", "assistant", "user"]
    assert json.dumps(FIND) in told[0]["content"]
    assert told[2]["content"] == '<tool_call>\n{"name": "find", "arguments": {"q": "fox"}}\n</tool_call>'
    assert told[3]["content"] == (
        "<tool_response>\nin the den\n</tool_response>\n<tool_response>\nor out\n</tool_response>"
    )
    assert all(set(turn) == {"role", "content"} for turn in told)
    kept, _ = with_tools([{"role": "system", "content": "Be brief."}, *TURNS], [FIND], PLAIN_TEMPLATE)
    assert kept[0]["content"].startswith("Be brief.\n\n# Tools")


def test_a_template_that_knows_them_gets_arguments_as_objects() -> None:
    told, tools = with_tools(TURNS, [FIND], "{{ tools }} <tool_call>")
    assert tools == [FIND]
    assert told[1]["tool_calls"][0]["function"]["arguments"] == {"q": "fox"}
    assert told[2] == TURNS[2]
    odd = {**CALL, "function": {"name": "find", "arguments": "no json"}}
    told, _ = with_tools([{"role": "assistant", "content": "", "tool_calls": [odd]}], None, "{{ tools }} <tool_call>")
    assert told[0]["tool_calls"][0]["function"]["arguments"] == "no json"


Parsed = tuple[str, list[tuple[str, str]]]


def parsed(loaded: LoadedModel, pieces: list[str], **options: Any) -> Parsed:
    """What a client would have at the end: the text, and calls as name and arguments."""
    output = HermesOutput(loaded.tokenizer, [], **options)
    text, calls = "", []
    for place, piece in enumerate([*pieces, None]):
        ids = [] if piece is None else loaded.tokenizer.encode(piece, add_special_tokens=False)
        outs = [output.push(token) for token in ids] if piece is not None else [output.flush(None)]
        for out in outs:
            text += out.content
            for delta in out.tool_calls:
                if delta.name is not None:
                    assert delta.index == len(calls), place
                    calls.append([delta.name, ""])
                calls[delta.index][1] += delta.arguments
    return text, [(name, arguments) for name, arguments in calls]


def block(body: str) -> str:
    return f"<tool_call>\n{body}\n</tool_call>"


FIRST = '{"name": "find", "arguments": {"q": "a } \\" </tool_call> ü", "n": [1, {"x": 2}]}}'
ARGUMENTS = '{"q": "a } \\" </tool_call> ü", "n": [1, {"x": 2}]}'
CASES: list[tuple[str, Parsed]] = [
    ("just text", ("just text", [])),
    ("a < b <tool and <tool_cal", ("a < b <tool and <tool_cal", [])),
    ("trailing blanks  \n", ("trailing blanks  \n", [])),
    (block(FIRST), ("", [("find", ARGUMENTS)])),
    ("I look. \n" + block(FIRST), ("I look.", [("find", ARGUMENTS)])),
    (block(FIRST) + "\n" + block('{"name": "now", "arguments": {}}'), ("", [("find", ARGUMENTS), ("now", "{}")])),
    (block(FIRST) + "\nDone.", ("Done.", [("find", ARGUMENTS)])),
    ('<tool_call>{"name":"now","parameters":{}}</tool_call>', ("", [("now", "{}")])),
    (block('{"arguments": {"a": 1}, "name": "find"}'), ("", [("find", '{"a": 1}')])),
    (block('{"name": "now"}'), ("", [("now", "{}")])),
    (block('{"name": "now", "arguments": "{}"}'), ("", [("now", "{}")])),
    ('<tool_call>{"name": "find", "arguments": {"q": "cut', ("", [("find", '{"q": "cut')])),
    ('<tool_call>{"name": "fi', ('<tool_call>{"name": "fi', [])),
    ("<tool_call>no json</tool_call>", ("<tool_call>no json</tool_call>", [])),
    (block('{"other": 1}'), ('<tool_call>{"other": 1}\n</tool_call>', [])),
]


@pytest.mark.parametrize(("text", "expected"), CASES)
def test_what_stands_between_the_marks_is_a_call(tiny: LoadedModel, text: str, expected: Parsed) -> None:
    assert parsed(tiny, [text]) == expected
    assert parsed(tiny, list(text)) == expected


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    parts=st.lists(
        st.sampled_from([text for text, _ in CASES] + ["<tool_call>", "</tool_call>", "{", "}", '"', "\\", " \n", "é"]),
        max_size=4,
    ),
    data=st.data(),
)
def test_the_result_does_not_depend_on_the_pieces(tiny: LoadedModel, parts: list[str], data: st.DataObject) -> None:
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parsed(tiny, pieces) == parsed(tiny, [text]) == parsed(tiny, list(text))


def test_one_call_ends_the_answer(tiny: LoadedModel) -> None:
    output = HermesOutput(tiny.tokenizer, [], one_call=True)
    ids = tiny.tokenizer.encode(block(FIRST), add_special_tokens=False)
    ended = [output.push(token) and output.ended for token in ids]
    assert 0 < sum(ended) < 20
    assert ended == sorted(ended)


@pytest.mark.parametrize("named", [None, "find", "now"])
def test_a_forced_call_fits_its_parameters(
    tiny: LoadedModel, make_engine: Callable[..., Engine], named: str | None
) -> None:
    engine = make_engine(tiny, max_waiting=40)
    grammar = call_grammar(engine.grammars, [FIND, NOW], named=named)
    generations = [
        engine.submit(
            [5, 6, 7],
            SamplingParams(max_tokens=200, temperature=1.0, seed=seed),
            tools=[FIND, NOW],
            grammar=grammar,
            one_call=True,
        )
        for seed in range(20)
    ]
    seen = set()
    for generation in generations:
        finished = generation.result(60)
        assert (finished.reason, finished.text) == ("stop", "")
        (call,) = finished.tool_calls
        seen.add(call.name)
        arguments = json.loads(call.arguments)
        if call.name == "find":
            jsonschema.validate(arguments, FIND["function"]["parameters"])
        else:
            assert arguments == {}
    assert seen == {named} if named else seen <= {"find", "now"}


def test_several_calls_may_be_forced(tiny: LoadedModel, make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(tiny)
    grammar = call_grammar(engine.grammars, [NOW], several=True)
    finished = engine.submit(
        [5, 6], SamplingParams(max_tokens=300, temperature=1.0, seed=1), tools=[NOW], grammar=grammar
    ).result(60)
    assert OPEN.startswith(finished.text), "no more than a mark that was cut off"
    assert len(finished.tool_calls) > 1
    assert all(call.name == "now" and json.loads(call.arguments) == {} for call in finished.tool_calls[:-1])


def test_parameters_that_cannot_be_kept_are_named(tiny: LoadedModel, make_engine: Callable[..., Engine]) -> None:
    odd = {"type": "function", "function": {"name": "odd", "parameters": {"type": "object", "not": {}}}}
    with pytest.raises(InvalidGrammar, match='"not"') as refused:
        call_grammar(make_engine(tiny).grammars, [NOW, odd])
    assert refused.value.param == "tools[1].function.parameters"
