"""OpenAI's tools: functions that a request offers, which of them shall be called, and calls in a conversation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, StringConstraints
from pydantic_core import PydanticCustomError

from web.body import Body, without_nul

FunctionName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}\z")]


class FunctionBody(Body):
    """A function: its name, what it is for, and a JSON schema of its arguments."""

    name: FunctionName
    description: Annotated[str, StringConstraints(max_length=100_000)] | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolBody(Body):
    """A tool that the model may call."""

    type: Literal["function"]
    function: FunctionBody

    def to_template(self) -> dict[str, Any]:
        """The tool as chat templates take it: without what was not said."""
        function = self.function.model_dump(exclude_none=True, exclude={"strict"})
        return {"type": "function", "function": function}


class NamedFunction(Body):
    """The name of a function that was offered."""

    name: FunctionName


class NamedTool(Body):
    """The tool that has to be called."""

    type: Literal["function"]
    function: NamedFunction


def _choice(value: Any) -> Any:
    if isinstance(value, str) and value not in ("none", "auto", "required"):
        raise PydanticCustomError(
            "value_error",
            "must be 'none', 'auto', 'required', or like {{'type': 'function', 'function': {{'name': '...'}}}}",
        )
    return value


ToolChoice = Annotated[Literal["none", "auto", "required"] | NamedTool, BeforeValidator(_choice)]


class CalledFunction(Body):
    """Which function an assistant called, with arguments as the text that it wrote."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=256), AfterValidator(without_nul)]
    arguments: Annotated[str, AfterValidator(without_nul)] = "{}"


class ToolCallBody(Body):
    """A call in an assistant's message."""

    id: Annotated[str, StringConstraints(max_length=128)] | None = None
    type: Literal["function"] = "function"
    function: CalledFunction

    def to_template(self) -> dict[str, Any]:
        """The call as chat templates take it."""
        called = {"name": self.function.name, "arguments": self.function.arguments}
        return {"id": self.id or "", "type": "function", "function": called}


def check_tools(names: Sequence[str], choice: str | None, named: str | None, *, shaped: str | None) -> None:
    """Raise for tools and a choice that do not go together; ``shaped``: the field that asks for JSON, if one does."""
    if len(set(names)) < len(names):
        raise PydanticCustomError("value_error", "tools: each function needs a name of its own")
    if choice == "required" and not names:
        raise PydanticCustomError("value_error", "tool_choice 'required' needs tools")
    if named is not None and named not in names:
        raise PydanticCustomError(
            "value_error", "tool_choice names {name}, which is not among the tools", {"name": named}
        )
    if shaped is not None and names and choice != "none":
        raise PydanticCustomError(
            "value_error", "{shaped} and tools exclude each other; send one, or tool_choice 'none'", {"shaped": shaped}
        )


def tool_wish(
    templates: Sequence[dict[str, Any]], choice: str | None, named: str | None, parallel: bool | None
) -> dict[str, Any]:
    """Tools and their choice as the fields of a ``ChatRequest``.

    Several calls unless they are not wanted; of forced ones only where they are.
    """
    offered = () if choice == "none" else tuple(templates)
    single = parallel is False or named is not None or (choice == "required" and not parallel)
    return {
        "tools": offered,
        "must_call": choice == "required" or named is not None,
        "call_named": named,
        "one_call": bool(offered) and single,
    }
