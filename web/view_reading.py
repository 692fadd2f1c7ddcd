"""What a view takes and gives, read from its source, for the OpenAPI document.

A view parses its body and its query itself (``parse_body``, ``parse_query``), so what it takes stands in its code; told
a second time beside it, it would sooner or later be told wrong. The views' own source is read, and that of the
functions of this package that they call. Not read: what lies below ``web``.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

View = Callable[..., Any]
_EVENTS = "text/event-stream"


@dataclass
class Reading:
    """What was found. ``optional``: the body may be missing; ``raw``: media types of a body that is a file."""

    body: type[BaseModel] | None = None
    optional: bool = False
    raw: tuple[str, ...] = ()
    query: type[BaseModel] | None = None
    statuses: set[int] = field(default_factory=set)
    media: set[str] = field(default_factory=set)
    objects: list[dict[str, bool] | None] = field(default_factory=list)  #: what is told as JSON, see ``keys``

    @property
    def keys(self) -> dict[str, bool] | None:
        """Of the one object that is told where it stands there: its keys, and whether each holds a list."""
        return self.objects[0] if len(self.objects) == 1 else None


def read_view(view: View) -> Reading:
    """Read ``view``; a view that says nothing of its status answers 200."""
    found = Reading()
    _read(inspect.unwrap(view), found, set())
    found.statuses = found.statuses or {200}
    return found


def _read(function: View, found: Reading, seen: set[View]) -> None:
    seen.add(function)
    names = function.__globals__
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Return):
            found.statuses |= _statuses(node.value)
        if isinstance(node, ast.Call):
            _read_call(node, names, found)
    for called in _called(tree, names):
        if called not in seen:
            _read(called, found, seen)


def _read_call(call: ast.Call, names: dict[str, Any], found: Reading) -> None:
    name = _name(call.func)
    given = names.get(_name(call.args[0])) if call.args else None
    model = given if isinstance(given, type) and issubclass(given, BaseModel) else None
    if name == "parse_query" and model is not None:
        found.query = model
    elif name == "parse_body" and model is not None:
        found.body = model
    elif name == "_optional" and model is not None:
        found.body, found.optional = model, True
    elif name == "read_body":
        found.raw = tuple(sorted(names.get("_ACCEPTED", ("application/octet-stream",))))
    elif name == "sse.response":
        found.media.add(_EVENTS)
    elif name == "jsonify":
        found.media.add("application/json")
        found.objects.append(_keys(call.args[0]) if call.args and isinstance(call.args[0], ast.Dict) else None)
    elif name == "Response":
        found.media |= {_media(keyword.value, names) for keyword in call.keywords if keyword.arg == "mimetype"}
        found.media |= {_media(keyword.value, names) for keyword in call.keywords if keyword.arg == "content_type"}


def _called(tree: ast.AST, names: dict[str, Any]) -> Iterator[View]:
    """Functions of this package that are called by their names; parsers and helpers of every view are not followed."""
    for node in ast.walk(tree):
        target = names.get(_name(node.func)) if isinstance(node, ast.Call) else None
        module = getattr(target, "__module__", "")
        if inspect.isfunction(target) and module.startswith("web.") and module not in ("web.jsonio", "web.context"):
            yield target


def _statuses(value: ast.expr | None) -> set[int]:
    """The numbers that a ``return`` gives as its status."""
    if not isinstance(value, ast.Tuple) or len(value.elts) < 2:
        return {200} if isinstance(value, ast.Call) and _name(value.func) == "jsonify" else set()
    return {
        node.value for node in ast.walk(value.elts[1]) if isinstance(node, ast.Constant) and type(node.value) is int
    }


def _keys(told: ast.Dict) -> dict[str, bool] | None:
    if not all(isinstance(key, ast.Constant) for key in told.keys):
        return None  # with what is spread into it, more than what stands there
    keys = [key.value for key in told.keys if isinstance(key, ast.Constant)]
    return {str(key): isinstance(value, ast.List | ast.ListComp) for key, value in zip(keys, told.values, strict=True)}


def _media(value: ast.expr, names: dict[str, Any]) -> str:
    told = value.value if isinstance(value, ast.Constant) else names.get(_name(value), "")
    return str(told).partition(";")[0]


def _name(node: ast.expr) -> str:
    """``a`` and ``a.b`` as they are written; nothing for anything else."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return f"{node.value.id}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""
