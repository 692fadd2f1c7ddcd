"""Pictures of a real distillation with SmolLM2, minutes of work on a quiet machine: part of `make test-all`."""

from __future__ import annotations

import pytest

from tests.e2e.conftest import Watched

pytestmark = [pytest.mark.browser, pytest.mark.model, pytest.mark.slow]

DESKS = {
    "blue": ["parcel", "package", "letter", "courier", "shipment", "crate"],
    "red": ["card", "refund", "invoice", "charge", "receipt", "bank"],
    "green": ["password", "login", "account", "profile", "username", "code"],
}
FORMS = ["Which desk takes a question about my {}?", "My {} is wrong, where do I go?", "I lost my {}, who helps?"]
#: Enough for what these labels need, and little enough to wait for.
RUN = {
    "data": {"eval_share": 0.35},
    "training": {"slots": 32, "max_steps": 100, "warmup_steps": 8, "rows": 8, "max_tokens": 64, "evaluate_every": 10},
    "gate": {"min_rows": 6, "max_rows": 16, "metric": "ranked"},
}


@pytest.mark.timeout(1800)
def test_pictures_of_a_distillation(watched: Watched) -> None:
    server = watched.server
    for desk, words in DESKS.items():
        for word in words:
            for form in FORMS:
                body = {"domain": "reception", "observation": form.format(word), "action": desk, "score": 1}
                server.post("/olympus/history", {**body, "feedback": "Correct!"})
    body = {"domain": "reception", "preset": "feedback_labels", "config": RUN}
    run = server.post("/olympus/distillation/runs", body)["id"]
    path = f"/olympus/distillation/runs/{run}"
    server.wait_until(lambda: server.get(path)["finished_at"] is not None, 1500, "the end of the run")
    assert server.get(path)["state"] in ("promoted", "rejected")
    for name, scheme in (("cartridges", "light"), ("cartridges-dark", "dark")):
        page = watched.open(f"/cartridges?domain=reception&run={run}", height=1500, scheme=scheme)
        page.locator(".plots .plot").first.wait_for()
        page.locator("#run-chart canvas").wait_for()
        watched.until_live()
        page.locator("#domain-title").evaluate("(e) => window.scrollTo(0, e.getBoundingClientRect().top - 24)")
        page.wait_for_timeout(500)
        watched.save(name)
