"""Routing: the geometry of domains, honest unknowns, and a router that follows the history."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch

from memory.history import NewExperience
from olympus import routing
from olympus.requests import RouteRequest
from olympus.route_reference import ALPHA, LEAST_TEXTS, Atlas, DomainReference, texts_per_domain
from olympus.text_basin import DIMENSIONS, text_basins
from tests.unit.olympus.kernel_world import World

MakeWorld = Callable[..., World]
_VOCABULARY = {
    "bank": "card payment transfer account balance refund fee statement deposit withdrawal charge loan",
    "garden": "tomato soil seeds watering compost prune roses mulch harvest greenhouse weeds bulbs",
    "ships": "harbour mast sails anchor crew voyage storm captain deck cargo lighthouse tide",
}
WORDS = {domain: words.split() for domain, words in _VOCABULARY.items()}
FRAMES = ("what about the {} and the {}", "my {} needs a {}", "tell me how {} works with {}", "why is {} near {} today")


def sentences(domain: str, count: int, seed: int = 0) -> list[str]:
    """Different sentences of one domain; the frames are common to all."""
    draw, made = random.Random(f"{domain}{seed}"), dict[str, None]()
    while len(made) < count:
        made[draw.choice(FRAMES).format(*draw.sample(WORDS[domain], 2))] = None
    return list(made)


def gibberish(count: int) -> list[str]:
    draw = random.Random(9)
    return ["".join(draw.choice("zqxjkvwy0189#@") for _ in range(30)) for _ in range(count)]


@pytest.fixture(scope="module")
def atlas() -> Atlas:
    torch.set_num_threads(1)
    return Atlas([DomainReference.fit(domain, sentences(domain, 64)) for domain in WORDS])


# -- geometry ---------------------------------------------------------------------------------------------------


def test_a_text_basin_is_a_distribution_and_ignores_case_and_space() -> None:
    basins = text_basins(["Where is my card?", "where  is\nmy card?", "", "où est ma carte ☂ \ud800"])
    assert basins.shape == (4, DIMENSIONS)
    assert torch.allclose(basins.sum(1), torch.ones(4))
    assert basins[0].equal(basins[1])
    assert torch.allclose(basins[2], torch.full((DIMENSIONS,), 1 / DIMENSIONS))
    assert text_basins(["x" * 100_000]).isfinite().all()


def test_domains_are_told_apart(atlas: Atlas) -> None:
    for domain in WORDS:
        places = atlas.locate(sentences(domain, 40, seed=1))
        assert sum(found[0].domain == domain for found in places) >= 39
        for found in places:
            assert [place.share for place in found] == sorted((place.share for place in found), reverse=True)
            assert sum(place.share for place in found) == pytest.approx(1.0)
            assert all(0 <= place.distance <= math.pi and 0 < place.p_value <= 1 for place in found)
            assert 0 <= sum(place.confidence for place in found) <= 1 + 1e-6


def test_what_belongs_nowhere_is_unknown_and_what_belongs_is_rarely_refused(atlas: Atlas) -> None:
    refused = [found[0].p_value < ALPHA for found in atlas.locate(gibberish(50))]
    assert all(refused)
    own = [atlas.locate(sentences(domain, 60, seed=2)) for domain in WORDS]
    wrong = [found[0].p_value < ALPHA for places in own for found in places]
    assert sum(wrong) / len(wrong) <= 0.12


def test_the_p_value_is_a_rank_among_left_out_texts() -> None:
    reference = DomainReference.fit("bank", sentences("bank", LEAST_TEXTS))
    assert reference.p_value(0.0) == 1.0
    assert reference.p_value(math.pi) == 1 / (LEAST_TEXTS + 1) < ALPHA
    median = float(reference.own.median())
    assert reference.p_value(median) == pytest.approx(0.5, abs=0.1)
    again = DomainReference.fit("bank", sentences("bank", LEAST_TEXTS))
    assert again.own.equal(reference.own)


def test_references_stay_bounded() -> None:
    assert texts_per_domain(1) == 128
    assert all(count * texts_per_domain(count) <= 4096 for count in (1, 5, 64, 128))


# -- the router -------------------------------------------------------------------------------------------------


def fill(world: World, domain: str, count: int = 40) -> None:
    world.history.append([NewExperience(text, "x", domain, "api") for text in sentences(domain, count)])


def test_routed_uncovered_unknown(make_world: MakeWorld) -> None:
    world = make_world(auto_spawn=False)
    assert world.zeus.route("anything")["decision"] == "unknown"
    for domain in WORDS:
        fill(world, domain)
    bank, garden = world.tiny("hermes", "bank", train=False), world.tiny("demeter", "garden", train=False)
    everything = world.tiny("athena", "*", train=False)
    world.zeus.governor.router.forget()
    told = world.zeus.route(sentences("bank", 1, seed=7)[0])
    assert (told["decision"], told["kernel_id"], told["domain"]) == ("routed", bank, "bank")
    assert told["confidence"] > 0.5
    assert told["kernels"][0]["kernel_id"] == bank
    assert {line["kernel_id"] for line in told["kernels"]} == {bank, garden, everything}
    (generalist,) = [line for line in told["kernels"] if line["kernel_id"] == everything]
    assert (generalist["distance"], generalist["reason"]) == (None, "learns from all domains")
    told = world.zeus.route(sentences("ships", 1, seed=7)[0])
    assert (told["decision"], told["kernel_id"], told["domain"]) == ("uncovered", None, "ships")
    told = world.zeus.route(gibberish(1)[0])
    assert (told["decision"], told["kernel_id"], told["domain"], told["confidence"]) == ("unknown", None, None, 0.0)
    assert told["unknown_confidence"] > 0.2
    assert told["distance"] is not None


def test_of_several_kernels_of_a_domain_the_best_is_chosen(make_world: MakeWorld) -> None:
    world = make_world(auto_spawn=False)
    fill(world, "bank")
    first, second = world.tiny("hermes", "bank", train=False), world.tiny("hera", "bank", train=False)
    world.zeus.rows.progress(first, 5, {"progress": {"holdout_loss": 1.5}})
    world.zeus.rows.progress(second, 5, {"progress": {"holdout_loss": 0.5}})
    assert world.zeus.route(sentences("bank", 1, seed=3)[0])["kernel_id"] == second


def test_the_router_follows_the_history_and_forgets_what_was_deleted(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world(auto_spawn=False)
    router = world.zeus.governor.router
    fill(world, "bank")
    fill(world, "ships", LEAST_TEXTS - 1)
    first = router.atlas()
    assert [reference.domain for reference in first.references] == ["bank"], "ships has too few texts yet"
    fill(world, "garden")
    assert router.atlas() is first, "not looked at again so soon"
    monkeypatch.setattr(routing, "REFRESH_SECONDS", 0.0)
    second = router.atlas()
    assert [reference.domain for reference in second.references] == ["bank", "garden"]
    assert second.references[0] is first.references[0], "what did not change is not fitted again"
    assert router.atlas() is second
    world.history.delete(domain="bank")
    assert [reference.domain for reference in router.atlas().references] == ["garden"]
    assert router.reference_seconds > 0


def test_requests_name_one_text_or_several() -> None:
    refused: list[dict[str, object]] = [{}, {"text": "a", "texts": ["b"]}, {"texts": []}, {"text": ""}]
    for bad in refused:
        with pytest.raises(ValueError, match=r"text"):
            RouteRequest.model_validate(bad)
