"""A grammar that leaves the model no choice but to call a tool: ``tool_choice`` "required", or a named one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from workspace.tool_prompt import CLOSE, OPEN

if TYPE_CHECKING:  # imported with the first grammar
    from workspace.constraints import Grammar, Grammars


def call_grammar(
    grammars: Grammars, tools: Sequence[Mapping[str, Any]], *, named: str | None = None, several: bool = False
) -> Grammar:
    """One call, or ``several``, of the tools, or of the ``named`` one, with arguments that fit its parameters.

    Names hold letters, digits, ``_`` and ``-`` only. Raises ``InvalidGrammar`` naming the parameters at fault.
    """
    from workspace.constraints import JSON_OPTIONS, json_text

    rules: list[str] = []
    for place, tool in enumerate(tools):
        function = tool["function"]
        if named is not None and function["name"] != named:
            continue
        schema = function.get("parameters") or {"type": "object", "properties": {}, "additionalProperties": False}
        grammars.json_schema(schema, f"tools[{place}].function.parameters")
        head = json_text(f'{{"name": "{function["name"]}", "arguments": ')
        rules.append(f'call_{place}: {head} args_{place} "}}"')
        rules.append(f"args_{place}: %json {json_text({**schema, 'x-guidance': JSON_OPTIONS})}")
    calls = " | ".join(rule.partition(":")[0] for rule in rules if rule.startswith("call_"))
    block = f"{json_text(OPEN)} NL call NL {json_text(CLOSE)}"
    start = "start: block (NL block)*" if several else "start: block"
    return grammars.lark("\n".join([start, f"block: {block}", f"call: {calls}", *rules, 'NL: "\\n"']), "tool_choice")
