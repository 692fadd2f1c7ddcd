"""Names for kernels: gods, muses, titans and heroes of Greek myth, lower case, in a fixed order.

A name is only a name: nothing here decides what a kernel knows. The order is Olympians first, so that a small
installation reads like the family one expects.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Collection

from olympus.requests import NAME_PATTERN

_OLYMPIANS = (
    "athena hermes apollo hestia hephaestus artemis demeter dionysus poseidon hera ares aphrodite hades persephone"
)
_TITANS = (
    "themis metis mnemosyne prometheus rhea tethys theia phoebe oceanus hyperion coeus crius iapetus atlas epimetheus"
)
_MUSES = "calliope clio erato euterpe melpomene polyhymnia terpsichore thalia urania"
_OTHER_GODS = "iris nike tyche nemesis hecate selene helios eos asclepius hygieia pan morpheus hypnos eirene dike"
_MORTALS = "daedalus orpheus cassandra tiresias odysseus penelope ariadne theseus perseus atalanta chiron nestor echo"
PANTHEON: tuple[str, ...] = tuple(" ".join((_OLYMPIANS, _TITANS, _MUSES, _OTHER_GODS, _MORTALS)).split())

_NAME = re.compile(NAME_PATTERN.removesuffix(r"\z"))


def choose_name(taken: Collection[str]) -> str:
    """The first free name; when all are taken, ``athena-2`` and so on."""
    for generation in range(1, len(taken) + 2):
        for god in PANTHEON:
            name = god if generation == 1 else f"{god}-{generation}"
            if name not in taken:
                return name
    raise AssertionError("more names than kernels were generated; one must be free")


def kernel_id(god_name: str) -> str:
    """``<god>-<6 hex>``; short enough for a column of 64 characters. ``god_name`` must be a valid name."""
    if _NAME.fullmatch(god_name) is None:
        raise ValueError(f"{god_name!r} is not a kernel name")
    return f"{god_name[:57]}-{secrets.token_hex(3)}"
