"""Kernels as files: the round trip is exact, and nothing that was tampered with gets in."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from olympus.archive_reader import ArchiveInvalid, KernelArchive, read_archive
from olympus.errors import CheckpointNotFound, DuplicateKernel
from olympus.kernel_archive import MANIFEST, WEIGHTS, stream
from olympus.kernel_state import KernelState
from olympus.requests import ImportRequest, QueryRequest
from olympus.snapshot import weights_checksum
from qig_core.learning import collate, supervised_loss
from qig_core.vocabulary import encode_pair
from tests.unit.olympus.kernel_world import (
    World,
    archive_bytes,
    archive_files,
    facts,
    tiny_plan,
    trained_state,
    write_facts,
)

LIMIT = 64 << 20
MakeWorld = Callable[..., World]


def zipped(files: Mapping[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return target.getvalue()


def signed(files: Mapping[str, bytes], **changes: Any) -> bytes:
    """An archive whose manifest agrees with its files, whatever they are: only the content is wrong."""
    manifest = {**json.loads(files[MANIFEST]), **changes}
    manifest["files"] = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in files.items()
        if name != MANIFEST
    }
    return zipped({**files, MANIFEST: json.dumps(manifest).encode()})


def refuse(data: bytes, message: str, limit: int = LIMIT) -> None:
    with pytest.raises(ArchiveInvalid, match=message):
        read_archive(data, limit)


def equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# -- the round trip ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_weights_come_back_bit_for_bit(method: int) -> None:
    state = trained_state()
    archive = read_archive(zipped(archive_files(state), method), LIMIT)
    assert archive.training is None
    assert equal(archive.weights, state.ema.shadow.state_dict())
    assert archive.plan == tiny_plan()
    assert archive.manifest.checkpoint.holdout_loss == 1.5


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_the_training_state_comes_back_bit_for_bit(steps: int) -> None:
    state = trained_state(steps)
    found = read_archive(archive_bytes(state, training=True), LIMIT).training
    assert found is not None
    for part, tensors in state.tensors().items():
        assert equal(found.tensors()[part], tensors), part
    found.check_invariants()
    mine, theirs = state.optimizer.state_dict(), found.optimizer.state_dict()
    assert mine["param_groups"] == theirs["param_groups"]
    assert found.ema.steps == state.ema.steps
    assert (found.progress.step, found.progress.best_step) == (steps, state.progress.best_step)
    advance(state), advance(found)
    assert weights_checksum(state.kernel) == weights_checksum(found.kernel), "the next step is the same"
    assert weights_checksum(state.ema.shadow) == weights_checksum(found.ema.shadow)


def advance(state: KernelState) -> None:
    batch = collate([encode_pair(item.observation, item.action, 64) for item in facts(5, start=50)])
    state.optimizer.zero_grad(set_to_none=True)
    supervised_loss(state.kernel, batch.ids, batch.loss_mask).total.backward()
    state.optimizer.step()
    state.ema.update(state.kernel)


def test_equal_content_is_equal_bytes_and_no_pickle() -> None:
    files = archive_files(training=True)
    assert b"".join(stream(files)) == b"".join(stream(files))
    with zipfile.ZipFile(io.BytesIO(b"".join(stream(files)))) as archive:
        assert archive.testzip() is None
        assert {name.rsplit(".", 1)[1] for name in archive.namelist()} == {"json", "safetensors"}


# -- what must not get in ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["../../evil.safetensors", "/etc/passwd", "weights.safetensors/..", "C:\\evil", "model.pkl", "sub/ema.safetensors"],
)
def test_names_are_a_fixed_set(name: str) -> None:
    refuse(signed({**archive_files(), name: b"x"}), "does not belong into a kernel's archive")


def test_bombs_are_refused_before_they_are_unpacked() -> None:
    zeros = b"\x00" * (5 << 20)
    bomb = zipped({**archive_files(), "model.safetensors": zeros}, zipfile.ZIP_DEFLATED)
    assert len(bomb) < 1 << 20
    refuse(bomb, "kernels.import_max_bytes allows 4,194,304", 4 << 20)
    lying = bytearray(zipped({WEIGHTS: zeros}, zipfile.ZIP_DEFLATED))
    at = lying.rindex(b"PK\x01\x02") + 24  # the size that the directory announces
    lying[at : at + 4] = (100).to_bytes(4, "little")
    refuse(bytes(lying), "not a whole zip|another size")


def test_a_file_twice_and_a_file_that_nobody_listed() -> None:
    files = archive_files()
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr(WEIGHTS, b"again")
    refuse(target.getvalue(), "twice")
    refuse(zipped({**files, "best.safetensors": b"x"}), "best.safetensors.* do not agree")
    refuse(zipped({MANIFEST: files[MANIFEST]}), "weights.safetensors.* do not agree")
    refuse(zipped({WEIGHTS: files[WEIGHTS]}), "manifest.json is missing")
    refuse(zipped({}), "manifest.json is missing")


def test_other_compressions_and_encrypted_entries() -> None:
    refuse(zipped(archive_files(), zipfile.ZIP_BZIP2), "compressed in a way that is not supported")
    data = bytearray(archive_bytes())
    for mark, flag in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(mark) + flag] |= 1
    refuse(bytes(data), "not a whole zip archive")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "manifest.json: format"),
        ({"version": 2}, "manifest.json: version"),
        ({"surprise": 1}, "manifest.json: surprise"),
        ({"training": "yes"}, "manifest.json: training"),
        ({"vocabulary": {"symbols": 50257}}, "another vocabulary"),
        ({"training": True}, "training.json is missing"),
        ({"kernel": {"god_name": "../x", "domain": "d", "seed": 1}}, "manifest.json: kernel.god_name"),
        ({"kernel": {"god_name": "x", "domain": "d", "seed": -1}}, "manifest.json: kernel.seed"),
        ({"plan": {}}, "its plan is not possible here"),
    ],
)
def test_the_manifest_is_strict(changes: dict[str, Any], message: str) -> None:
    refuse(signed(archive_files(), **changes), message)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("network", {"width": 10_000}, "width=10000 must be at most"),
        ("network", {"context": 10**9}, "context=1000000000 must be at most"),
        ("network", {"width": "48"}, "must be of type int"),
        ("network", {"layers": 3}, "unknown kernel option 'layers'"),
        ("network", {"preset_name": "huge"}, "unknown preset 'huge'"),
        ("network", {"width": 32}, "its plan needs .* as F32"),
        ("training", {"lr": 1e9}, "lr must be"),
        ("training", {"betas": [0.5, 0.5]}, "betas"),
        ("training", {"batch_size": 10**6}, "batch_size must be"),
    ],
)
def test_the_plan_has_the_bounds_of_a_spawn(part: str, changes: dict[str, Any], message: str) -> None:
    files = archive_files()
    plan = json.loads(files[MANIFEST])["plan"]
    plan[part] |= changes
    refuse(signed(files, plan=plan), message)


def test_nothing_is_allocated_for_shapes_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    files = archive_files()
    files[WEIGHTS] = safetensors.torch.save({"memory": torch.zeros(3)})
    monkeypatch.setattr(safetensors.torch, "load", lambda data: pytest.fail("loaded before its shapes were checked"))
    refuse(signed(files), "its plan needs")


def change_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> bytes:
    files = archive_files()
    tensors = safetensors.torch.load(files[WEIGHTS])
    change(tensors)
    files[WEIGHTS] = safetensors.torch.save(tensors)
    return signed(files)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(extra=torch.zeros(1)), "its plan has no tensor 'extra'"),
        (lambda t: t.pop("memory"), "its plan needs memory"),
        (lambda t: t.update(memory=t["memory"].double()), "needs memory as F32"),
        (lambda t: t.update(memory=t["memory"].T.contiguous()), "needs memory as F32"),
        (lambda t: t["memory"].fill_(float("nan")), "memory holds a value that is not a finite number"),
        (lambda t: t["memory"].fill_(float("inf")), "memory holds a value that is not a finite number"),
    ],
)
def test_the_tensors_are_those_of_the_plan(change: Callable[[dict[str, torch.Tensor]], Any], message: str) -> None:
    refuse(change_weights(change), message)


@pytest.mark.parametrize(
    "data", [b"", b"1234567", b"\xff" * 64, (2**40).to_bytes(8, "little") + b"{}", b"\x02" + bytes(7) + b"[]", b"PK"]
)
def test_what_is_no_safetensors_file_is_said_to_be_none(data: bytes) -> None:
    refuse(signed({**archive_files(), WEIGHTS: data}), "weights.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": 4}, "it is at step 4, the manifest at 3"),
        ({"step": "3"}, "training.json: step"),
        ({"lr_scale": 0}, "training.json: lr_scale"),
        ({"ema_steps": -1}, "training.json: ema_steps"),
        ({"loss_ema": "low"}, "training.json: loss_ema"),
        ({"best_loss": None}, "belong together"),
        ({"parameter_steps": {"999": 1}}, "parameters that the plan does not have"),
        ({"parameter_steps": {}}, "its plan has no tensor"),
        ({"group_steps": [1]}, "has 1 groups, not 2"),
        ({"code": "import os"}, "training.json: code"),
    ],
)
def test_the_counters_are_strict(changes: dict[str, Any], message: str) -> None:
    files = archive_files(training=True)
    files["training.json"] = json.dumps({**json.loads(files["training.json"]), **changes}).encode()
    refuse(signed(files), message)


def test_a_negative_fisher_is_refused() -> None:
    files = archive_files(training=True)
    moments = safetensors.torch.load(files["optim.safetensors"])
    next(value for key, value in moments.items() if key.endswith(".fisher")).fill_(-1.0)
    refuse(signed({**files, "optim.safetensors": safetensors.torch.save(moments)}), "a Fisher information is negative")


# -- fuzz -------------------------------------------------------------------------------------------------------

WHOLE = archive_bytes(training=True)


def survives(data: bytes) -> KernelArchive | None:
    """Either it is refused with a clear error, or it is a sound kernel. Anything else fails the test."""
    try:
        return read_archive(data, LIMIT)
    except ArchiveInvalid as error:
        message = str(error)
    assert 10 < len(message) < 600
    return None


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.integers(0, len(WHOLE) - 1))
def test_truncated_archives_are_refused(length: int) -> None:
    assert survives(WHOLE[:length]) is None


@settings(max_examples=250, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes_are_refused_or_harmless(changes: list[tuple[int, int]]) -> None:
    data = bytearray(WHOLE)
    for place, value in changes:
        data[place] = value
    found = survives(bytes(data))
    if found is not None:  # a date or an attribute in the zip's own records
        original = read_archive(WHOLE, LIMIT)
        assert found.manifest == original.manifest
        assert equal(found.weights, original.weights)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.binary(max_size=400))
def test_noise_is_refused(data: bytes) -> None:
    assert survives(data) is None
    assert survives(zipped({MANIFEST: data})) is None


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.sampled_from(["plan", "kernel", "checkpoint", "files", "vocabulary", "training"]),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=8,
    ),
)
def test_any_json_in_the_manifest_is_refused_clearly(field: str, value: Any) -> None:
    files = archive_files_once()
    manifest = {**json.loads(files[MANIFEST]), field: value}
    survives(zipped({**files, MANIFEST: json.dumps(manifest).encode()}))


_FILES: dict[str, bytes] = {}


def archive_files_once() -> dict[str, bytes]:
    if not _FILES:
        _FILES.update(archive_files())
    return _FILES


# -- through Zeus -----------------------------------------------------------------------------------------------


def test_a_kernel_moves_and_trains_on_as_if_it_had_stayed(make_world: MakeWorld) -> None:
    world = make_world(patience_evaluations=10_000)
    first = world.tiny(experiences=tuple(facts(60)))
    world.wait_for(first, "training", step=25)
    step = world.zeus.pause(first)["step"]
    file = world.zeus.export(first, training=True)
    assert file.name == f"{first}-step-{step:08d}.kernel.zip"
    data = b"".join(file.content)
    came = world.zeus.import_kernel(data, ImportRequest(train=False))
    second = came["kernel_id"]
    assert second != first
    assert (came["state"], came["step"], came["domain"]) == ("paused", step, "d")
    assert came["god_name"] != "athena", "the name is taken"
    one, other = (world.zeus.checkpoint_store.newest(kernel).loaded for kernel in (first, second))
    assert one is not None
    assert other is not None
    for part in ("model", "ema", "optim", "best"):
        assert equal(one.tensors[part], other.tensors[part]), part
    question = QueryRequest(input="red light 5", candidates=("stop", "go", "wait"), return_basin=True)
    answers = [world.zeus.query(kernel, question) for kernel in (first, second)]
    assert answers[0]["candidates"] == answers[1]["candidates"]
    assert answers[0]["basin"] == answers[1]["basin"]
    world.zeus.resume(second)
    world.wait_for(second, "training", step=step + 5)
    status = world.zeus.status(second)
    assert status["restored_from"] == f"athena step-{step:08d}, imported"
    world.zeus.pause(second)
    world.zeus.checkpoint_store.check_invariants()


def test_weights_alone_answer_at_once_and_learn_from_the_beginning(make_world: MakeWorld) -> None:
    world = make_world(patience_evaluations=10_000)
    state = trained_state()
    data = archive_bytes(state)
    came = world.zeus.import_kernel(data, ImportRequest(name="metis", domain="elsewhere"))
    kernel = came["kernel_id"]
    assert (came["god_name"], came["domain"]) == ("metis", "elsewhere")
    told = world.zeus.query(kernel, QueryRequest(input="red", candidates=("stop", "go")))
    assert told["checkpoint_used"] == "best@0"
    shelf = world.zeus.snapshots.get(kernel, "best")
    assert shelf is not None
    assert equal(shelf.kernel.state_dict(), state.ema.shadow.state_dict())
    world.wait_for(kernel, "waiting")
    write_facts(world.history, 60, domain="elsewhere")
    world.wait_for(kernel, "training", step=12)
    best = world.zeus.status(kernel)["loss"]
    assert best["best"] != 1.5, "what another server measured does not count here"


def test_an_import_that_is_refused_leaves_nothing_behind(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world()
    data = archive_bytes()
    with pytest.raises(ArchiveInvalid):
        world.zeus.import_kernel(data[:-30], ImportRequest())
    assert world.zeus.kernels() == []
    world.tiny(name="metis", train=False)
    with pytest.raises(DuplicateKernel):
        world.zeus.import_kernel(data, ImportRequest(name="metis"))

    def full(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(world.zeus.checkpoint_store, "publish", full)
    with pytest.raises(OSError, match="disk full"):
        world.zeus.import_kernel(data, ImportRequest())
    assert [line["god_name"] for line in world.zeus.kernels()] == ["metis"]


def test_exporting_needs_a_checkpoint(make_world: MakeWorld) -> None:
    world = make_world()
    kernel = world.tiny(train=False)
    with pytest.raises(CheckpointNotFound, match="no checkpoint yet"):
        world.zeus.export(kernel)
    with pytest.raises(CheckpointNotFound):
        world.zeus.export(kernel, "step-00000100")


def test_best_latest_and_a_named_checkpoint(make_world: MakeWorld) -> None:
    world = make_world()
    kernel = world.zeus.import_kernel(archive_bytes(trained_state(), training=True), ImportRequest(train=False))
    state = trained_state()
    assert state.best is not None
    expected = {
        "best": state.best,
        "latest": state.ema.shadow.state_dict(),
        "step-00000003": state.ema.shadow.state_dict(),
    }
    for choice, weights in expected.items():
        archive = read_archive(b"".join(world.zeus.export(kernel["kernel_id"], choice).content), LIMIT)
        assert equal(archive.weights, weights), choice
        assert archive.manifest.checkpoint.weights == ("best" if choice == "best" else "ema")
