"""Download and upload of kernels over HTTP, and the removal of checkpoints."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable

import pytest
from flask import Flask
from flask.testing import FlaskClient

from olympus.archive_reader import read_archive
from tests.unit.olympus.kernel_world import archive_bytes, trained_state
from tests.unit.web.conftest import MakeRuntime
from web.app import create_app

IMPORT = "/olympus/kernels/import"


def upload(client: FlaskClient, data: bytes, query: str = "", **more: object):  # type: ignore[no-untyped-def]
    return client.post(f"{IMPORT}?{query}", data=data, content_type="application/zip", **more)


def imported(client: FlaskClient, query: str = "train=false", *, training: bool = True) -> str:
    response = upload(client, archive_bytes(training=training), query)
    assert response.status_code == 201, response.text
    return str(response.json["kernel_id"])


def test_up_and_down_and_up_again(client: FlaskClient) -> None:
    state = trained_state()
    first = imported(client, "name=atropos&domain=files&train=false")
    status = client.get(f"/olympus/kernels/{first}/status").json
    assert (status["god_name"], status["domain"], status["state"], status["step"]) == ("atropos", "files", "paused", 3)
    response = client.get(f"/olympus/kernels/{first}/export?checkpoint=latest&include=training")
    assert response.mimetype == "application/zip"
    assert response.headers["Content-Disposition"] == f'attachment; filename="{first}-step-00000003.kernel.zip"'
    archive = read_archive(response.data, 1 << 24)
    assert archive.training is not None
    assert all(bool((archive.weights[name] == tensor).all()) for name, tensor in state.ema.shadow.state_dict().items())
    again = upload(client, response.data, "train=false")
    assert again.status_code == 201
    told = client.post(f"/olympus/kernels/{again.json['kernel_id']}/query", json={"input": "red", "max_tokens": 4})
    assert told.status_code == 200
    small = client.get(f"/olympus/kernels/{first}/export").data
    with zipfile.ZipFile(io.BytesIO(small)) as found:
        assert found.namelist() == ["manifest.json", "weights.safetensors"]


def test_it_trains_by_itself_unless_told_otherwise(client: FlaskClient) -> None:
    kernel = upload(client, archive_bytes(), "domain=untouched").json["kernel_id"]
    state = client.get(f"/olympus/kernels/{kernel}/status").json["state"]
    assert state in ("queued", "waiting", "training")


@pytest.mark.parametrize(
    ("query", "status", "code"),
    [
        ("name=Not%20A%20Name", 422, "invalid_request"),
        ("domain=..%2Fx", 422, "invalid_request"),
        ("train=perhaps", 422, "invalid_request"),
        ("surprise=1", 422, "invalid_request"),
    ],
)
def test_the_query_is_checked(client: FlaskClient, query: str, status: int, code: str) -> None:
    response = upload(client, archive_bytes(), query)
    assert (response.status_code, response.json["code"]) == (status, code)


@pytest.mark.parametrize("data", [b"", b"PK", b"{}", archive_bytes()[:-1], archive_bytes()[100:]])
def test_what_is_no_kernel_is_refused_with_a_reason(client: FlaskClient, data: bytes) -> None:
    response = upload(client, data)
    assert (response.status_code, response.json["code"]) == (422, "invalid_archive")
    assert len(response.json["detail"]) > 20


def test_the_body_must_be_the_file(client: FlaskClient) -> None:
    response = client.post(IMPORT, json={"name": "x"})
    assert response.status_code == 415
    assert "application/zip" in response.json["detail"]
    assert client.get(IMPORT).status_code in (404, 405)


def test_its_size_has_a_limit_of_its_own(make_runtime: MakeRuntime) -> None:
    runtime = make_runtime(kernels={"import_max_bytes": 1 << 20}, server={"max_body_bytes": 1 << 12})
    client = create_app(runtime=runtime).test_client()
    assert len(archive_bytes()) > 1 << 12
    assert upload(client, archive_bytes(), "train=false").status_code == 201
    too_much = b"x" * ((1 << 20) + 1)
    chunked = {"input_stream": io.BytesIO(too_much), "headers": {"Transfer-Encoding": "chunked"}}
    chunked["environ_overrides"] = {"wsgi.input_terminated": True}
    for sent in ({"data": too_much}, chunked):
        refused = client.post(IMPORT, content_type="application/zip", **sent)
        assert refused.status_code == 413
        assert "kernels.import_max_bytes" in refused.json["detail"]
    usual = client.post("/olympus/kernels/spawn", data=b"x" * 5000, content_type="application/json")
    assert "server.max_body_bytes" in usual.json["detail"]


def test_exporting_what_is_not_there(client: FlaskClient) -> None:
    assert client.get("/olympus/kernels/nobody-000000/export").status_code == 404
    kernel = client.post("/olympus/kernels/spawn", json={"domain": "d", "train": False}).json["kernel"]["kernel_id"]
    path = f"/olympus/kernels/{kernel}/export"
    assert client.get(path).json["code"] == "checkpoint_not_found"
    assert client.get(f"{path}?checkpoint=step-00000001").json["code"] == "checkpoint_not_found"
    assert client.get(f"{path}?checkpoint=../../etc").status_code == 422
    assert client.get(f"{path}?include=everything").status_code == 422


def test_a_damaged_checkpoint_is_never_sent(make_runtime: MakeRuntime) -> None:
    runtime = make_runtime()
    client = create_app(runtime=runtime).test_client()
    kernel = imported(client)
    model = runtime.zeus.checkpoint_store.path(kernel, "step-00000003") / "ema.safetensors"
    model.write_bytes(model.read_bytes()[:-1] + b"\x00\x01"[-1:])
    assert client.get(f"/olympus/kernels/{kernel}/export?checkpoint=step-00000003").json["code"] == "checkpoint_invalid"
    assert client.get(f"/olympus/kernels/{kernel}/export").status_code == 404, "it was the only one"


def test_a_checkpoint_is_removed_unless_something_needs_it(make_runtime: MakeRuntime) -> None:
    client = create_app(runtime=make_runtime()).test_client()
    kernel = imported(client)
    path = f"/olympus/kernels/{kernel}/checkpoints"
    refused = client.delete(f"{path}/step-00000003")
    assert (refused.status_code, refused.json["code"]) == (409, "invalid_action")
    assert "latest" in refused.json["detail"]
    assert client.post(f"{path}/step-00000003/pin").status_code == 200
    assert client.post(f"{path}/step-00000003/restore").status_code == 200  # published again as step 4
    assert "pinned" in client.delete(f"{path}/step-00000003").json["detail"]
    client.post(f"{path}/step-00000003/unpin")
    left = client.delete(f"{path}/step-00000003")
    assert left.status_code == 200
    assert [row["id"] for row in left.json["checkpoints"]] == ["step-00000004"]
    assert client.delete(f"{path}/step-00000003").status_code == 404
    assert client.delete(f"{path}/latest").status_code == 404


def test_the_rights_that_are_needed(guarded: Flask, key: Callable[..., dict[str, str]]) -> None:
    client = guarded.test_client()
    reader = key("kernels:read")
    assert upload(client, archive_bytes(), headers=reader).status_code == 403
    assert client.delete("/olympus/kernels/x-000000/checkpoints/step-00000001", headers=reader).status_code == 403
    assert client.get("/olympus/kernels/x-000000/export", headers=key("chat")).status_code == 403
    assert client.get("/olympus/kernels/x-000000/export", headers=reader).status_code == 404
