"""Names and their profiles."""

from __future__ import annotations

from olympus import pantheon
from olympus.pantheon import PANTHEON, PROFILES


def test_names_are_unique_valid_and_called_by_their_words() -> None:
    assert len(set(PANTHEON)) == len(PANTHEON) > 60
    assert all(pantheon.kernel_id(name).startswith(f"{name}-") for name in PANTHEON)
    assert pantheon.choose_name([]) == "athena"
    assert pantheon.choose_name([], "code-review") == "hephaestus"
    assert pantheon.choose_name(["hephaestus"], "code-review") == "athena"
    assert pantheon.choose_name([], "nobodys-word") == "athena"
    assert pantheon.choose_name(PANTHEON) == "athena-2"
    assert pantheon.choose_name([*PANTHEON, "hephaestus-2"], "code") == "athena-2"


def test_affinities_weigh_and_do_not_rule() -> None:
    assert all(1.0 <= profile.affinity <= 1.5 for profile in PROFILES)
    assert pantheon.affinity("hermes") == pantheon.affinity("hermes-12") == 1.5
    assert pantheon.affinity("somebody-else") == 1.0
    words = [word for profile in PROFILES for word in profile.words]
    assert len(set(words)) == len(words), "a word calls one god"
