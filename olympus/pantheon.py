"""Names and profiles of the kernels: gods, muses, titans and heroes of Greek myth, lower case, in a fixed order.

A profile is a name, words of the domain that the myth gives it, and an affinity: the weight of a ballot. The
Olympians' words and affinities are those of the original pantheon; everybody else has affinity 1. A name decides
nothing about what a kernel knows: the words only choose who is called first when a domain's name mentions one, and
the affinity scales a ballot whose direction was measured (``ballots``).
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Collection
from dataclasses import dataclass

from olympus.requests import NAME_PATTERN

DEFAULT_AFFINITY = 1.0
#: name: words, affinity. Zeus, who governs (power, 1.5), is not given to a kernel.
_OLYMPIANS: dict[str, tuple[str, float]] = {
    "athena": ("wisdom strategy reason logic knowledge science math", 1.4),
    "hermes": ("transmission messages mail transfer payment trade translation support", 1.5),
    "apollo": ("prophecy forecast prediction music poetry art health", 1.2),
    "hestia": ("home hearth house family", 1.0),
    "hephaestus": ("craft code programming build tools hardware engineering", 1.4),
    "artemis": ("hunt search tracking nature animals", 1.1),
    "demeter": ("growth food farming garden cooking recipes", 1.0),
    "dionysus": ("chaos wine theatre games fun stories", 1.2),
    "poseidon": ("depth sea water travel shipping", 1.3),
    "hera": ("authority law policy contracts identity", 1.2),
    "ares": ("conflict sports complaints disputes", 1.3),
    "aphrodite": ("attraction love beauty fashion relationships", 1.0),
    "hades": ("underworld archive history security risk", 1.5),
}
_TITANS = (
    "themis metis mnemosyne prometheus rhea tethys theia phoebe oceanus hyperion coeus crius iapetus atlas epimetheus"
)
_MUSES = "calliope clio erato euterpe melpomene polyhymnia terpsichore thalia urania"
_OTHER_GODS = (
    "persephone iris nike tyche nemesis hecate selene helios eos asclepius hygieia pan morpheus hypnos eirene dike"
)
_MORTALS = "daedalus orpheus cassandra tiresias odysseus penelope ariadne theseus perseus atalanta chiron nestor echo"


@dataclass(frozen=True, slots=True)
class Profile:
    """Who a name stands for."""

    name: str
    words: tuple[str, ...]
    affinity: float


PROFILES: tuple[Profile, ...] = (
    *(Profile(name, tuple(words.split()), affinity) for name, (words, affinity) in _OLYMPIANS.items()),
    *(Profile(name, (), DEFAULT_AFFINITY) for name in " ".join((_TITANS, _MUSES, _OTHER_GODS, _MORTALS)).split()),
)
PANTHEON: tuple[str, ...] = tuple(profile.name for profile in PROFILES)
_AFFINITY = {profile.name: profile.affinity for profile in PROFILES}

_NAME = re.compile(NAME_PATTERN.removesuffix(r"\z"))
_GENERATION = re.compile(r"-[0-9]+\Z")


def affinity(god_name: str) -> float:
    """The weight of a ballot of a kernel of that name; ``athena-2`` votes as Athena."""
    return _AFFINITY.get(_GENERATION.sub("", god_name), DEFAULT_AFFINITY)


def choose_name(taken: Collection[str], domain: str = "") -> str:
    """A free name: whose words the domain mentions, else the first; when all are taken, ``athena-2`` and so on."""
    mentioned = set(domain.split("-"))
    called = [profile.name for profile in PROFILES if mentioned & {*profile.words, profile.name}]
    for generation in range(1, len(taken) + 2):
        for god in (*called, *PANTHEON):
            name = god if generation == 1 else f"{god}-{generation}"
            if name not in taken:
                return name
    raise AssertionError("more names than kernels were generated; one must be free")


def kernel_id(god_name: str) -> str:
    """``<god>-<6 hex>``; short enough for a column of 64 characters. ``god_name`` must be a valid name."""
    if _NAME.fullmatch(god_name) is None:
        raise ValueError(f"{god_name!r} is not a kernel name")
    return f"{god_name[:57]}-{secrets.token_hex(3)}"
