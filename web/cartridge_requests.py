"""Cartridges in a request for an answer: the field, and the tag for clients that cannot add fields.

The field is Tokasaurus': ``cartridges: [{"id", "source", "force_redownload"}]``, except that ``source`` is ``local``
where it is not given, since nothing else serves here. The tag stands in a system message,
``<cartridge>{"id": "memory_v0007"}</cartridge>``, and is taken out of it before the model sees it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from olympus.chat_types import CartridgeWish
from web.errors import ApiError, FieldError

_TAG = re.compile(r"<cartridge>(.*?)</cartridge>\s?", re.DOTALL)
_MOST = 16


class CartridgeBody(BaseModel):
    """One cartridge. ``id`` is a cartridge's id, or a domain: then the one that serves it now."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    source: Literal["local", "wandb", "huggingface"] = "local"
    force_redownload: bool = False  #: read and prove the files again

    def to_wish(self) -> CartridgeWish:
        """What the chat service takes."""
        return CartridgeWish(self.id, self.source, self.force_redownload)


CartridgeList = Annotated[tuple[CartridgeBody, ...], Field(max_length=_MOST)]


def take_tags(
    messages: Sequence[Mapping[str, Any]],
) -> tuple[tuple[Mapping[str, Any], ...], tuple[CartridgeWish, ...]]:
    """``messages`` without the tags of their system messages, and what these ask for.

    A system message that held nothing else goes. Raises ``ApiError`` for a tag that cannot be read.
    """
    kept: list[Mapping[str, Any]] = []
    wishes: list[CartridgeWish] = []
    for place, message in enumerate(messages):
        text = str(message["content"])
        if message["role"] not in ("system", "developer") or "<cartridge>" not in text:
            kept.append(message)
            continue
        wishes += [_read(found.group(1), place) for found in _TAG.finditer(text)]
        rest = _TAG.sub("", text).strip()
        if "<cartridge>" in rest:
            raise _unreadable(place, "a <cartridge> is not closed")
        if rest:
            kept.append({**message, "content": rest})
    if len(wishes) > _MOST:
        raise _unreadable(0, f"at most {_MOST} cartridges are possible")
    return tuple(kept), tuple(wishes)


def _read(text: str, place: int) -> CartridgeWish:
    try:
        return CartridgeBody.model_validate_json(text, strict=True).to_wish()
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise _unreadable(place, f"{where}: {first['msg']}" if where else first["msg"]) from None


def _unreadable(place: int, problem: str) -> ApiError:
    field = f"messages[{place}].content"
    detail = f'{problem}; a cartridge is named like <cartridge>{{"id": "memory_v0007"}}</cartridge>'
    return ApiError(422, "invalid_request", f"{field}: {detail}", errors=[FieldError(field, detail)])
