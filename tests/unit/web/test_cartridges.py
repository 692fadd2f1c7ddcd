"""Cartridges over HTTP: chats that name them, Tokasaurus' routes and fingerprint, who serves, and files in and out."""

from __future__ import annotations

import io
import itertools
import json
import threading
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from flask import Flask
from flask.testing import FlaskClient

from lm.fingerprint import unpack
from memory.cartridges.archive import pack
from memory.cartridges.cartridge import make_cartridge
from memory.cartridges.files import save_cartridge
from memory.cartridges.rows import CartridgeRow
from memory.cartridges.torch_format import write_torch_file
from olympus.runtime import Runtime
from tests.unit.web.conftest import MakeRuntime, ask, events
from web.app import create_app
from workspace.prefix import KVPrefix, prefix_of_tokens
from workspace.sampling import SamplingParams

CHAT = "/v1/chat/completions"
ROUTES = ("/v1/cartridge/chat/completions", "/custom/cartridge/chat/completions")
ALL = "/olympus/cartridges"
_numbers = itertools.count(1)

Make = Callable[..., CartridgeRow]


def tokens(seed: int, count: int = 16) -> list[int]:
    return torch.randint(2, 300, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture
def domain() -> str:
    """One of its own for each test: the server is shared."""
    return f"cartridges-{next(_numbers)}"


@pytest.fixture
def make(runtime: Runtime, domain: str) -> Make:
    def made(seed: int = 1, slots: int = 16, domain: str = domain, **more: Any) -> CartridgeRow:
        loaded = runtime.engine.loaded
        prefix = prefix_of_tokens(loaded, tokens(seed, slots))
        return runtime.cartridges.register(make_cartridge(loaded, prefix, domain=domain, **more))

    return made


def named(*ids: str, **more: Any) -> dict[str, Any]:
    return {"cartridges": [{"id": cartridge_id, "source": "local", "force_redownload": False} for cartridge_id in ids]}


def said(client: FlaskClient, path: str = CHAT, **fields: Any) -> dict[str, Any]:
    response = client.post(path, json=ask("what do you know?", **fields))
    assert response.status_code == 200, response.text
    return dict(response.json)


# Chats.


def test_a_chat_with_a_cartridge_says_what_its_tokens_would_have_made_it_say(
    client: FlaskClient, runtime: Runtime, make: Make
) -> None:
    row = make(seed=3)
    engine, messages = runtime.engine, ask("what do you know?")["messages"]
    prompt = engine.render(messages, after_prefix=True)
    expected = engine.submit(tokens(3) + prompt, SamplingParams(max_tokens=8, temperature=0)).result(30)
    without = said(client)
    answer = said(client, **named(row.id))
    assert answer["choices"][0]["message"]["content"] == expected.text
    assert answer["choices"] != without["choices"]
    assert answer["usage"]["cartridge_slots"] == 16
    assert answer["usage"]["prompt_tokens"] == len(prompt), "slots are no prompt tokens"
    assert answer["olympus"]["cartridges"] == [row.id]
    assert "cartridge_slots" not in without["usage"]
    assert "cartridges" not in without["olympus"]
    record = runtime.history.get(answer["olympus"]["experience_id"])
    assert record is not None
    assert (record.meta["cartridges"], record.meta["cartridge_slots"]) == ([row.id], 16)


def test_every_way_to_name_a_cartridge_is_the_same(client: FlaskClient, make: Make) -> None:
    row = make(seed=4)
    expected = said(client, **named(row.id))
    ways = [said(client, path, **named(row.id)) for path in ROUTES]
    ways.append(said(client, olympus=named(row.id)))
    ways.append(said(client, cartridges=[{"id": row.id}]))
    ways.append(said(client, cartridges=[{"id": row.id, "force_redownload": True}]))
    tag = f"<cartridge>{json.dumps({'id': row.id, 'source': 'local'})}</cartridge>"
    ways.append(said(client, messages=[{"role": "system", "content": tag}, *ask("what do you know?")["messages"]]))
    for answer in ways:
        assert answer["choices"] == expected["choices"]
        assert answer["usage"] == expected["usage"]
        assert answer["olympus"]["cartridges"] == [row.id]


def test_a_tag_is_taken_out_of_the_system_message_only(client: FlaskClient, make: Make) -> None:
    row = make(seed=5)
    tag = f'<cartridge>{{"id": "{row.id}"}}</cartridge>'
    user = ask("what do you know?")["messages"]
    with_tag = said(client, messages=[{"role": "system", "content": f"Be brief.\n{tag}"}, *user])
    field = said(client, messages=[{"role": "system", "content": "Be brief."}, *user], **named(row.id))
    assert with_tag["choices"] == field["choices"]
    assert with_tag["usage"] == field["usage"]
    text = said(client, messages=[{"role": "user", "content": tag}])
    assert "cartridge_slots" not in text["usage"], "a user's text is text"


@pytest.mark.parametrize(
    "tag", ["{", "{}", '{"id": 1}', '{"id": "a_v0001", "x": 1}', '{"id": "a_v0001", "source": "s3"}']
)
def test_a_tag_that_cannot_be_read_is_an_error(client: FlaskClient, tag: str) -> None:
    body = ask() | {"messages": [{"role": "system", "content": f"<cartridge>{tag}</cartridge>"}]}
    response = client.post(CHAT, json=body)
    assert (response.status_code, response.json["error"]["param"]) == (400, "messages[0].content")
    body["messages"][0]["content"] = '<cartridge>{"id": "a_v0001"}'
    assert "not closed" in client.post(CHAT, json=body).json["error"]["message"]


def test_a_stream_tells_of_its_cartridges(client: FlaskClient, make: Make) -> None:
    row = make()
    body = ask("what do you know?", stream=True, stream_options={"include_usage": True}, **named(row.id))
    *_, last, usage, _done = [entry["data"] for entry in events(client.post(ROUTES[1], json=body).text)]
    assert last["olympus"]["cartridges"] == [row.id]
    assert usage["usage"]["cartridge_slots"] == 16


def test_two_cartridges_are_joined_whatever_their_order(client: FlaskClient, make: Make) -> None:
    one, other = make(seed=1), make(seed=2, slots=32)
    answers = [said(client, **named(*ids)) for ids in ((one.id, other.id), (other.id, one.id))]
    assert answers[0]["choices"] == answers[1]["choices"]
    assert answers[0]["usage"]["cartridge_slots"] == 48
    assert answers[0]["olympus"]["cartridges"] == [one.id, other.id]


def test_a_domain_stands_for_what_serves_it(client: FlaskClient, make: Make, domain: str) -> None:
    row = make(seed=6)
    response = client.post(CHAT, json=ask(**named(domain)))
    assert (response.status_code, response.json["error"]["code"]) == (400, "invalid_cartridge")
    assert client.post(f"{ALL}/{row.id}/promote").json["state"] == "serving"
    assert said(client, **named(domain))["olympus"]["cartridges"] == [row.id]


def test_a_cartridge_and_the_workspace_serve_together(client: FlaskClient, make: Make) -> None:
    row = make(seed=7)
    nothing = {"enabled": True, "virtual_kv": False, "residual_delta": False, "controller": False, "memory": False}
    plain, off, on = (
        said(client, **named(row.id), **more) for more in ({}, {"workspace": nothing}, {"workspace": True})
    )
    assert off["choices"] == plain["choices"]
    assert on["usage"]["cartridge_slots"] == 16
    assert on["usage"]["workspace"]["virtual_tokens"] > 0
    both = said(client, **named(row.id), workspace={"compare": True, "memory": False})
    assert set(both["olympus"]["compare"]) == {"with", "without"}


@pytest.mark.parametrize(
    ("cartridges", "message"),
    [
        ([{"id": "nobody_v0001"}], "there is no cartridge 'nobody_v0001'"),
        ([{"id": "../../etc/passwd"}], "is not the id of a cartridge"),
        ([{"id": "a\u0000b"}], "is not the id of a cartridge"),
        ([{"id": "runs/cache-step512.pt"}], "ids look like"),
        ([{"id": "hazy/x", "source": "wandb"}], "import it with POST /olympus/cartridges/import"),
        ([{"id": "hazy/x", "source": "huggingface"}], "from 'huggingface'"),
        ([{"id": f"a_v000{n}"} for n in range(1, 4)], "at most 2 serve one request"),
        ([{"id": ""}], "cartridges[0].id"),
        ([{"id": "a_v0001", "source": "s3"}], "cartridges[0].source"),
        ([{"id": "a_v0001", "sauce": "local"}], "did you mean source"),
        ("a_v0001", "cartridges"),
    ],
)
def test_a_cartridge_that_cannot_serve_is_refused_as_openai_does(
    client: FlaskClient, cartridges: Any, message: str
) -> None:
    for path in (CHAT, *ROUTES):
        response = client.post(path, json=ask(cartridges=cartridges))
        assert response.status_code == 400, response.text
        assert message in response.json["error"]["message"]
        assert response.json["error"]["type"] == "invalid_request_error"


def test_one_twice_a_rejected_one_and_another_models_are_refused(
    client: FlaskClient, runtime: Runtime, make: Make
) -> None:
    row, bad = make(), make()
    assert "twice" in client.post(CHAT, json=ask(**named(row.id, row.id))).json["error"]["message"]
    client.post(f"{ALL}/{bad.id}/reject", json={"reason": "worse"})
    assert "rejected (worse)" in client.post(CHAT, json=ask(**named(bad.id))).json["error"]["message"]
    loaded = runtime.engine.loaded
    prefix = prefix_of_tokens(loaded, tokens(1))
    foreign = make_cartridge(loaded, prefix, domain="foreign")
    manifest = foreign.manifest.model_copy(update={"model_fingerprint": "a" * 32, "model": "another-model"})
    other = runtime.cartridges.register(type(foreign)(prefix, 1, manifest))
    response = client.post(CHAT, json=ask(**named(other.id)))
    assert response.status_code == 400
    assert "made for the model another-model" in response.json["error"]["message"]


def test_damage_on_disk_is_ours_and_tells_no_path(client: FlaskClient, runtime: Runtime, make: Make) -> None:
    row = make()
    path = runtime.cartridges.path(row.id) / "prefix.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    response = client.post(CHAT, json=ask(**named(row.id)))
    assert (response.status_code, response.json["error"]["code"]) == (500, "cartridge_damaged")
    assert str(runtime.cartridges.folder) not in response.text
    client.delete(f"{ALL}/{row.id}")


def test_a_retry_is_the_same_request_only_with_the_same_cartridges(client: FlaskClient, make: Make) -> None:
    one, other = make(seed=1), make(seed=2)
    headers = {"Idempotency-Key": f"key-{one.id}"}
    first = client.post(CHAT, json=ask(**named(one.id)), headers=headers).json
    again = client.post(CHAT, json=ask(**named(one.id)), headers=headers)
    assert again.headers["Idempotent-Replayed"] == "true"
    assert again.json["choices"] == first["choices"]
    assert again.json["usage"]["cartridge_slots"] == 16
    assert again.json["olympus"]["cartridges"] == [one.id]
    for body in (ask(**named(other.id)), ask()):
        refused = client.post(CHAT, json=body, headers=headers)
        assert refused.json["error"]["code"] == "idempotency_key_reused"


def test_slots_count_against_the_context(make_runtime: MakeRuntime) -> None:
    runtime = make_runtime(model=True)
    loaded = runtime.engine.loaded
    slots = tuple(torch.zeros(1, 2, 4080, 8) for _ in range(2))
    row = runtime.cartridges.register(make_cartridge(loaded, KVPrefix(slots, slots), domain="long"))
    client = create_app(runtime=runtime).test_client()
    response = client.post(CHAT, json=ask("hi", **named(row.id)))
    assert (response.status_code, response.json["error"]["code"]) == (400, "context_length_exceeded")
    assert "after 4080 slots of cartridges" in response.json["error"]["message"]


# Tokasaurus.


def test_ping_answers_anybody(guarded: Flask) -> None:
    client = guarded.test_client()
    assert client.get("/ping").json == {"message": "pong"}
    assert client.get("/ping", headers={"Host": "balancer"}).status_code == 200
    for path in ROUTES:
        response = client.post(path, json=ask())
        assert (response.status_code, response.json["error"]["type"]) == (401, "authentication_error")


def test_the_fingerprint_holds_exact_ids_and_numbers(client: FlaskClient, runtime: Runtime, make: Make) -> None:
    row = make(seed=8)
    wanted = {"logprobs": True, "top_logprobs": 5, "logprobs_in_fingerprint": True, "max_tokens": 12}
    answer = said(client, ROUTES[0], **wanted, **named(row.id))
    assert answer["choices"][0]["logprobs"] is None
    trace = unpack(answer["system_fingerprint"], 5)
    engine = runtime.engine
    prompt = tokens(8) + engine.render(ask("what do you know?")["messages"], after_prefix=True)
    expected = engine.submit(prompt, SamplingParams(max_tokens=12, temperature=0)).result(30)
    assert trace.token_ids == expected.token_ids
    with torch.inference_mode():
        logits = engine.loaded.model(torch.tensor([prompt + list(expected.token_ids)])).logits[0, len(prompt) - 1 : -1]
    values, ids = torch.log_softmax(logits.float(), -1).topk(5)
    assert torch.equal(ids, torch.tensor(trace.topk_token_ids))
    torch.testing.assert_close(torch.tensor(trace.topk_logprobs), values, atol=2e-3, rtol=1e-3)
    plain = said(client, logprobs=True, top_logprobs=5, max_tokens=12, **named(row.id))
    assert plain["system_fingerprint"].startswith("fp_")
    assert len(plain["choices"][0]["logprobs"]["content"]) == 12


def test_the_token_that_ends_an_answer_is_in_the_fingerprint(client: FlaskClient, runtime: Runtime) -> None:
    wanted = {"logprobs": True, "top_logprobs": 2, "logprobs_in_fingerprint": True, "max_tokens": 6}
    whole = unpack(said(client, **wanted)["system_fingerprint"], 2)
    object.__setattr__(runtime.engine.loaded, "eos_ids", frozenset({whole.token_ids[3]}))
    try:
        answer = said(client, **wanted)
        ignored = said(client, ignore_eos=True, **wanted)
    finally:
        object.__setattr__(runtime.engine.loaded, "eos_ids", frozenset({1}))
    first = whole.token_ids.index(whole.token_ids[3])
    trace = unpack(answer["system_fingerprint"], 2)
    assert trace.token_ids == whole.token_ids[: first + 1]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == first + 1
    assert unpack(ignored["system_fingerprint"], 2).token_ids == whole.token_ids


def test_what_was_not_asked_for_is_null_in_the_fingerprint(client: FlaskClient) -> None:
    bare = json.loads(said(client, logprobs_in_fingerprint=True)["system_fingerprint"])
    assert len(bare["completion_ids"][0]) == 8
    assert [bare[f"packed_{name}"] for name in ("chosen_logprobs", "topk_indices", "topk_logprobs")] == [None] * 3
    chosen = json.loads(said(client, logprobs=True, logprobs_in_fingerprint=True)["system_fingerprint"])
    assert chosen["packed_chosen_logprobs"] is not None
    assert chosen["packed_topk_indices"] is None
    refused = client.post(CHAT, json=ask(stream=True, logprobs_in_fingerprint=True))
    assert (refused.status_code, "without stream" in refused.json["error"]["message"]) == (400, True)


def test_fields_of_tokasaurus_are_known_and_others_are_not(client: FlaskClient) -> None:
    for field, status in (("apply_chat_template_overrides", 400), ("logprobs_ignore_temperature", 400)):
        assert client.post(ROUTES[0], json=ask(**{field: {"a": 1}})).status_code == status
    assert client.post(ROUTES[0], json=ask(apply_chat_template_overrides=None)).status_code == 200


# Who serves.


def test_promote_reject_roll_back_retire_delete(client: FlaskClient, make: Make, domain: str) -> None:
    ids = [make(seed=n).id for n in range(3)]
    for cartridge_id in ids[:2]:
        told = client.post(f"{ALL}/{cartridge_id}/promote", json={"reason": "tested"}).json
        assert (told["id"], told["state"], told["state_reason"]) == (cartridge_id, "serving", "tested")
    lineage = client.get(f"{ALL}/lineage?domain={domain}").json
    assert lineage["serving"] == ids[1]
    assert [row["state"] for row in lineage["cartridges"]] == ["retired", "serving", "candidate"]
    assert client.post(f"{ALL}/rollback", json={"domain": domain}).json["id"] == ids[0]
    assert client.post(f"{ALL}/{ids[2]}/reject", json={"reason": "worse"}).json["state"] == "rejected"
    refused = client.post(f"{ALL}/{ids[2]}/promote")
    assert (refused.status_code, refused.json["code"]) == (409, "invalid_action")
    assert refused.mimetype == "application/problem+json"
    assert client.post(f"{ALL}/{ids[2]}/promote", json={"force": True}).json["state"] == "serving"
    assert client.delete(f"{ALL}/{ids[2]}").status_code == 409
    assert client.post(f"{ALL}/{ids[2]}/retire").json["state"] == "retired"
    assert client.delete(f"{ALL}/{ids[2]}").json["state"] == "deleted"
    assert client.get(f"{ALL}/{ids[2]}").status_code == 404
    listed = client.get(f"{ALL}?domain={domain}").json["cartridges"]
    assert [row["id"] for row in listed] == [ids[1], ids[0]]
    assert len(client.get(f"{ALL}?domain={domain}&deleted=true").json["cartridges"]) == 3
    one = client.get(f"{ALL}/{ids[0]}").json
    assert (one["slots"], one["manifest"]["kv_heads"], one["domain"]) == (16, 2, domain)


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/nobody_v0001", None, 404),
        ("GET", "/..%2F..%2Fetc_v0001", None, 404),
        ("GET", "/Nobody_v0001", None, 404),
        ("GET", "/a__b_v0001", None, 404),
        ("GET", f"/{'a' * 120}_v0001", None, 404),
        ("POST", "/nobody_v0001/promote", None, 404),
        ("POST", "/nobody_v0001/promote", {"forse": True}, 422),
        ("POST", "/nobody_v0001/reject", None, 415),
        ("POST", "/nobody_v0001/reject", {"reason": ""}, 422),
        ("POST", "/rollback", {"domain": "nothing-here"}, 409),
        ("POST", "/rollback", {}, 422),
        ("GET", "/lineage", None, 422),
        ("GET", "/nobody_v0001/export?format=gguf", None, 422),
        ("DELETE", "/nobody_v0001", None, 404),
    ],
)
def test_what_is_not_there_or_does_not_fit(client: FlaskClient, method: str, path: str, body: Any, status: int) -> None:
    response = client.open(ALL + path, method=method, json=body)
    assert response.status_code == status, response.text
    assert response.mimetype == "application/problem+json"


def test_scopes(guarded: Flask, key: Callable[..., dict[str, str]]) -> None:
    client = guarded.test_client()
    read, write, chat = key("cartridges:read"), key("cartridges:write"), key("chat")
    assert client.get(ALL, headers=read).status_code == 200
    assert client.get(ALL, headers=chat).status_code == 403
    assert client.post(f"{ALL}/a_v0001/promote", headers=read).status_code == 403
    assert client.post(f"{ALL}/a_v0001/promote", headers=write).status_code == 404
    assert client.post(f"{ALL}/import?domain=d", headers=read, data=b"x").status_code == 403
    assert client.get(f"{ALL}/a_v0001/export", headers=chat).status_code == 403


def test_changes_are_told_as_events(client: FlaskClient, runtime: Runtime, make: Make) -> None:
    row = make()
    heard = runtime.hub.subscribe(["cartridge"])
    client.post(f"{ALL}/{row.id}/promote")
    (event,) = heard.get(1.0)
    assert (event.data["id"], event.data["state"]) == (row.id, "serving")


def test_forgetting_marks_what_was_trained_on_it(client: FlaskClient, runtime: Runtime, make: Make) -> None:
    experience = said(client, domain="forgetful")["olympus"]["experience_id"]
    row = make(experience_ids=[experience])
    assert client.delete(f"/olympus/history/{experience}").status_code == 200
    assert client.get(f"{ALL}/{row.id}").json["stale"] is True
    assert client.post(f"{ALL}/{row.id}/promote").status_code == 409


def test_a_swap_under_eight_clients_never_mixes_versions(
    client: FlaskClient, make: Make, served: Flask, domain: str
) -> None:
    """Every answer is wholly that of the version it names; each version is in use until the swap and no longer."""
    versions = [make(seed=20 + n) for n in range(3)]
    expected = {row.id: said(client, max_tokens=24, **named(row.id))["choices"] for row in versions}
    assert len({json.dumps(choices) for choices in expected.values()}) == 3
    client.post(f"{ALL}/{versions[0].id}/promote")
    stop = threading.Event()
    answers: list[tuple[str, Any]] = []

    def ask_on(_: int) -> None:
        own = served.test_client()
        while not stop.is_set():
            answer = said(own, ROUTES[0], max_tokens=24, **named(domain))
            answers.append((answer["olympus"]["cartridges"][0], answer["choices"]))

    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask_on, number) for number in range(8)]
        for row in [*versions[1:], versions[0], versions[2]]:
            stop.wait(0.3)
            assert client.post(f"{ALL}/{row.id}/promote").status_code == 200
            given, deadline = len(answers), time.monotonic() + 30
            while row.id not in {cartridge_id for cartridge_id, _ in answers[given:]} and time.monotonic() < deadline:
                stop.wait(0.02)
        stop.set()
        for future in asked:
            future.result()
    assert {cartridge_id for cartridge_id, _ in answers} == set(expected)
    for cartridge_id, choices in answers:
        assert choices == expected[cartridge_id], "text of another version than the one that is named"


# Files.


def content_of(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def upload(client: FlaskClient, data: bytes, query: str) -> Any:
    return client.post(f"{ALL}/import?{query}", data=data, content_type="application/zip")


@pytest.mark.parametrize("how", ["native", "tokasaurus", "peft"])
def test_out_and_in_again_it_answers_the_same(client: FlaskClient, make: Make, domain: str, how: str) -> None:
    row = make(seed=9, experience_ids=[1, 2])
    response = client.get(f"{ALL}/{row.id}/export?format={how}")
    assert response.headers["Content-Disposition"] == f'attachment; filename="{row.id}.{how}.zip"'
    names = set(content_of(response.data))
    assert {name.split("/")[0] for name in names} == {row.id}
    assert not any("experiences" in name for name in names), "ids of our rows are nobody else's business"
    told = upload(client, response.data, f"domain={domain}&model=tiny-llama")
    assert told.status_code == 201, told.text
    assert (told.json["state"], told.json["version"], told.json["slots"]) == ("candidate", 2, 16)
    expected = said(client, **named(row.id))["choices"][0]["message"]["content"]
    found = said(client, **named(told.json["id"]))["choices"][0]["message"]["content"]
    assert found == expected
    assert told.json["manifest"]["origin"] == (row.id if how == "native" else how)


def test_a_torch_file_needs_a_declared_model_and_a_fitting_shape(
    client: FlaskClient, runtime: Runtime, domain: str, tmp_path: Path
) -> None:
    prefix = prefix_of_tokens(runtime.engine.loaded, tokens(1))
    write_torch_file(tmp_path / "cache-step3.pt", prefix.keys, prefix.values, 2, "float32")
    data = (tmp_path / "cache-step3.pt").read_bytes()
    refused = upload(client, data, f"domain={domain}")
    assert (refused.status_code, refused.json["code"]) == (409, "cartridge_mismatch")
    assert "model=tiny-llama" in refused.json["detail"]
    assert upload(client, data, f"domain={domain}&model=gpt-5").status_code == 409
    told = upload(client, data, f"domain={domain}&model=tiny-llama")
    assert told.status_code == 201
    assert told.json["manifest"]["frozen"] == 2
    write_torch_file(tmp_path / "x.pt", prefix.keys[:1], prefix.values[:1], 1)
    odd = upload(client, (tmp_path / "x.pt").read_bytes(), f"domain={domain}&model=tiny-llama")
    assert odd.status_code == 400
    assert "1 layers" in odd.json["detail"]


def test_a_native_file_of_another_model_needs_somebody_who_answers_for_it(
    client: FlaskClient, runtime: Runtime, domain: str
) -> None:
    loaded = runtime.engine.loaded
    cartridge = make_cartridge(loaded, prefix_of_tokens(loaded, tokens(1)), domain=domain)
    manifest = cartridge.manifest.model_copy(update={"model_fingerprint": "a" * 32, "model": "tiny-in-bfloat16"})
    data = pack(type(cartridge)(cartridge.prefix, 1, manifest), "native")
    refused = upload(client, data, f"domain={domain}")
    assert (refused.status_code, "tiny-in-bfloat16" in refused.json["detail"]) == (409, True)
    assert upload(client, data, f"domain={domain}&model=tiny-llama").status_code == 201
    assert upload(client, pack(cartridge, "native"), f"domain={domain}").status_code == 201, "its fingerprint proves it"


def zipped(**entries: bytes) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name.replace("__", "."), data)
    return target.getvalue()


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "whole zip"),
        (b"PK\x03\x04 nonsense", "whole zip"),
        (zipped(readme__md=b"hello"), "holds none of"),
        (zipped(manifest__json=b"{}"), "Field required"),
        (zipped(manifest__json=b"{" * 2000), "not JSON"),
        (zipped(adapter_config__json=b"{}"), "peft_type"),
        (zipped(**{"c/cartridge__pt": b"x", "c/config__yaml": b"a: 1"}), "max_tokens is missing"),
        (zipped(**{"a/manifest__json": b"{}", "b/manifest__json": b"{}"}), "twice"),
        (zipped(**{f"file{n}": b"" for n in range(70)}), "70 entries"),
        (zipped(prefix__safetensors=bytes(600 << 20)), "import_max_bytes"),
    ],
)
def test_what_is_no_cartridge_is_refused_with_a_reason(client: FlaskClient, data: bytes, problem: str) -> None:
    response = upload(client, data, "domain=bad&model=tiny-llama")
    assert (response.status_code, response.json["code"]) == (422, "invalid_cartridge_file"), response.text
    assert problem in response.json["detail"]
    assert "/tmp" not in response.json["detail"]
    assert client.get(f"{ALL}?domain=bad").json["cartridges"] == []


def test_the_query_and_the_kind_of_an_upload_are_checked(client: FlaskClient) -> None:
    assert client.post(f"{ALL}/import?domain=d", json={"a": 1}).status_code == 415
    assert upload(client, b"", "").status_code == 422
    assert upload(client, b"", "domain=..%2Fx").status_code == 422
    assert upload(client, b"", "domain=d&force=1").status_code == 422


def test_an_upload_beyond_the_limit_is_cut_off(make_runtime: MakeRuntime) -> None:
    app = create_app(runtime=make_runtime(cartridges={"import_max_bytes": 4096}))
    response = app.test_client().post(f"{ALL}/import?domain=d", data=bytes(5000), content_type="application/zip")
    assert (response.status_code, "cartridges.import_max_bytes" in response.json["detail"]) == (413, True)
    assert (
        app.test_client().post(f"{ALL}/import?domain=d", data=b"x", content_type="application/zip").json["code"]
        == "model_not_ready"
    )


def test_what_cannot_be_a_tokasaurus_folder_is_told(client: FlaskClient, make: Make) -> None:
    row = make(slots=20)
    response = client.get(f"{ALL}/{row.id}/export?format=tokasaurus")
    assert (response.status_code, response.json["code"]) == (409, "not_exportable")
    assert "multiple of 16" in response.json["detail"]


def test_a_restart_adopts_what_a_crash_left(make_runtime: MakeRuntime, tmp_path: Path) -> None:
    first = make_runtime(model=True)
    loaded = first.engine.loaded
    cartridge = make_cartridge(loaded, prefix_of_tokens(loaded, tokens(1)), domain="d")
    manifest = cartridge.manifest.model_copy(update={"id": "d_v0001", "version": 1})
    save_cartridge(first.settings.cartridge_dir / "d_v0001", type(cartridge)(cartridge.prefix, 1, manifest))
    first.shutdown(5)
    again = Runtime(
        first.settings.model_copy(update={"model": first.settings.model.model_copy(update={"load": False})})
    )
    again.start()
    try:
        assert again.cartridges.get("d_v0001").state == "candidate"
    finally:
        again.shutdown(5)
