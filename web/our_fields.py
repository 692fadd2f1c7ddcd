"""Olympus' own fields of a request for an answer: session, domain, workspace, cartridges, memory.

They stand beside OpenAI's fields, or in one field of their own, ``olympus``, which clients that check OpenAI's fields
pass on as it is.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from olympus.chat_types import CartridgeWish, MemoryWish, WorkspaceWish
from olympus.requests import Name
from web.body import ID_LIMIT, Body, Session
from web.cartridge_requests import CartridgeList


class WorkspaceBody(Body):
    """Which parts of the workspace serve a request; what is not said is as the server's settings say."""

    enabled: bool | None = None
    virtual_kv: bool | None = None
    residual_delta: bool | None = None
    controller: bool | None = None
    memory: bool | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=ID_LIMIT)] | None = None
    trace: bool = False
    compare: bool = False

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> WorkspaceBody:
        if self.enabled is False and (self.compare or self.trace):
            raise PydanticCustomError("value_error", "compare and trace need the workspace; leave enabled out")
        return self


def _workspace(value: Any) -> Any:
    """``true`` and ``false`` switch all of it."""
    return {"enabled": value} if isinstance(value, bool) else value


Workspace = Annotated[
    WorkspaceBody | None, BeforeValidator(_workspace, json_schema_input_type=WorkspaceBody | bool | None)
]


class MemoryBody(Body):
    """Whether the domain's cartridge stands in for a long history, and how many turns stay as they are."""

    enabled: bool | None = None
    recent_turns: Annotated[int, Field(ge=0, le=1000)] | None = None


def _memory(value: Any) -> Any:
    """``true`` and ``false``; an object is a wish for it unless it says otherwise."""
    if isinstance(value, bool):
        return {"enabled": value}
    return {"enabled": True, **value} if isinstance(value, dict) else value


Memory = Annotated[MemoryBody | None, BeforeValidator(_memory, json_schema_input_type=MemoryBody | bool | None)]


class OlympusOptions(Body):
    """The same fields in one."""

    session: Session | None = None
    domain: Name | None = None
    workspace: Workspace = None
    cartridges: CartridgeList | None = None
    memory: Memory = None


class OurFields(Body):
    """The fields, each in one of its two places."""

    session: Session | None = None
    domain: Name | None = None
    workspace: Workspace = None
    cartridges: CartridgeList | None = None
    memory: Memory = None
    olympus: OlympusOptions | None = None

    @model_validator(mode="after")
    def _said_once(self) -> OurFields:
        for name in OlympusOptions.model_fields:
            one, other = getattr(self, name), getattr(self.olympus, name, None)
            if one is not None and other is not None and one != other:
                raise PydanticCustomError(
                    "value_error", "{name} and olympus.{name} differ; give one of them", {"name": name}
                )
        return self

    def ours(self, tagged: tuple[CartridgeWish, ...]) -> dict[str, Any]:
        """These fields as those of a ``ChatRequest``; ``tagged``: cartridges that the messages name, too."""
        inner = self.olympus or OlympusOptions()
        wish, memory = self.workspace or inner.workspace, self.memory or inner.memory
        named = tuple(item.to_wish() for item in self.cartridges or inner.cartridges or ())
        return {
            "workspace": None if wish is None else WorkspaceWish(**wish.model_dump()),
            "cartridges": (*named, *tagged),
            "memory": None if memory is None else MemoryWish(**memory.model_dump()),
            "session_id": self.session or inner.session,
            "domain": self.domain or inner.domain,
        }
