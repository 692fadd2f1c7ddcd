"""Capture: blobs round-trip, say what the model said, resume where they were, and are refused when they are broken."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from torch.nn import functional

from storage import files
from workspace.capture import CaptureOptions, CaptureSummary, capture
from workspace.capture_blob import BlobMetadata, decode_blob, encode_blob
from workspace.capture_folder import Capture, CaptureFolder, read_capture
from workspace.capture_prompts import read_prompts
from workspace.context import Context, Recorder
from workspace.errors import BlobDamaged, CaptureError, CaptureMismatch, ManifestDamaged, PromptsDamaged
from workspace.models import LoadedModel
from workspace.run import probe_places
from workspace.sampling import SamplingParams
from workspace.steering import Steering
from workspace.workspace_config import ControllerConfig, WorkspaceConfig

CONFIG = WorkspaceConfig(
    slots=4, slot_width=16, write_slots=2, virtual_tokens=4, embedding_width=6, kv_plan_bias=-1, update_every=3
)
SMALL = CaptureOptions(window=48, context=32, max_answer=10, batch=4, answer_stride=3, top_k=8, max_tokens=200)
LINES: list[dict[str, Any]] = [
    {"text": "The quick brown fox jumps over the lazy dog. " * 6, "kind": "fable"},
    {"prompt": "Where is Bern?", "answer": "In Switzerland.", "kind": "given", "split": "held_out"},
    {"prompt": "What is the capital of France?", "kind": "chat"},
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello!"}], "kind": "chat"},
]


class Killed(BaseException):
    """Stands for ``kill -9``: nothing catches it, nothing is cleaned up on its account."""


@pytest.fixture
def steering(tiny: LoadedModel) -> Iterator[Steering]:
    found = Steering(tiny, CONFIG)
    yield found
    found.close()


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


def run(steering: Steering, prompts: Path, output: Path, **changes: Any) -> CaptureSummary:
    return capture(steering, prompts, output, SMALL.model_copy(update=changes))


def contents(folder: Path) -> dict[str, bytes]:
    names = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in names}


# What is captured.


def test_every_line_becomes_texts_in_order(steering: Steering, prompts: Path, tmp_path: Path) -> None:
    summary = run(steering, prompts, tmp_path / "out")
    found = read_capture(summary.manifest)
    kinds = [entry.kind for entry in found.entries]
    assert kinds[-3:] == ["given", "chat", "chat"]
    assert set(kinds[:-3]) == {"fable"}
    assert len(kinds) > 4
    assert [entry.index for entry in found.entries] == list(range(len(kinds)))
    assert [entry.split for entry in found.entries if entry.split != "train"] == ["held_out"]
    assert (summary.captured, summary.kept) == (len(kinds), 0)
    assert summary.tokens == sum(entry.tokens for entry in found.entries)
    assert found.header is not None
    assert found.header.layers == steering.layers
    blobs = [found.read(entry) for entry in found.entries]
    assert blobs[0].prompt_tokens == 32
    assert blobs[0].tokens == 48
    assert all(1 <= blob.tokens - blob.prompt_tokens <= 10 for blob in blobs[-2:])
    tokenizer = steering.loaded.tokenizer
    assert tokenizer.decode(blobs[-3].input_ids[blobs[-3].prompt_tokens :]) == "In Switzerland.<|im_end|>"
    assert blobs[-2].metadata.prompt == "What is the capital of France?"
    assert blobs[-2].metadata.seed == found.entries[-2].index


def test_a_blob_says_what_the_model_said_and_showed(steering: Steering, prompts: Path, tmp_path: Path) -> None:
    """Checked against one pass of the model over the whole text, which the capture does in pieces."""
    found = read_capture(run(steering, prompts, tmp_path / "out").manifest)
    for entry in (found.entries[0], found.entries[-1]):
        blob = found.read(entry)
        recorder = Recorder(steering.layers, whole=True)
        with torch.inference_mode():
            out = steering.loaded.model(blob.input_ids[None], workspace=Context(recorder=recorder))
        logs = out.logits[0].log_softmax(dim=-1)[blob.prompt_tokens - 1 : -1]  # [T, V]
        teacher, answer = blob.teacher, blob.input_ids[blob.prompt_tokens :]
        assert teacher is not None
        assert blob.statistics is not None
        assert teacher.ids.shape == (len(answer), 8)
        torch.testing.assert_close(teacher.logprobs, logs.gather(1, teacher.ids), atol=2e-2, rtol=0)  # float16
        torch.testing.assert_close(teacher.logprobs[:, 0], logs.amax(dim=-1), atol=2e-2, rtol=0)
        surprise = functional.nll_loss(logs, answer, reduction="none")
        torch.testing.assert_close(blob.statistics[:, 3], surprise, atol=1e-4, rtol=1e-4)
        lse = out.logits[0].logsumexp(dim=-1)[blob.prompt_tokens - 1 : -1]
        torch.testing.assert_close(teacher.logsumexp, lse, atol=1e-4, rtol=1e-4)
        for layer, residual in blob.residuals.items():
            expected = recorder.residuals[layer][0, blob.probe_positions]
            torch.testing.assert_close(residual, expected, atol=1e-4, rtol=1e-4)
        prompt_places = blob.probe_positions[blob.probe_positions < blob.prompt_tokens]
        assert torch.equal(prompt_places, probe_places(blob.prompt_tokens))
        later = blob.probe_positions[len(prompt_places) :]
        assert (later[1:] - later[:-1] == 3).all()
        assert blob.births is not None
        assert blob.births.tolist() == [blob.prompt_tokens]
        assert blob.slots is not None
        assert blob.slots.shape == (4, 16)
        assert blob.plan_energy is not None
        assert (blob.plan_energy > 0).all()


def test_long_texts_are_read_in_passes(steering: Steering, tmp_path: Path) -> None:
    """Two passes over the prompt: the probes stand as the server's would, and the numbers are those of one pass."""
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"text": "Paris is the capital of France; Bern is not the capital of Italy. " * 40}))
    summary = capture(
        steering, path, tmp_path / "out", CaptureOptions(window=400, context=300, max_tokens=450, top_k=4)
    )
    found = read_capture(summary.manifest)
    blob = found.read(found.entries[0])
    assert (blob.probe_positions < 256).sum() == 16
    assert (blob.probe_positions < 300).sum() == 32
    with torch.inference_mode():
        logs = steering.loaded.model(blob.input_ids[None]).logits[0].log_softmax(dim=-1)[299:-1]
    assert blob.statistics is not None
    expected = functional.nll_loss(logs, blob.input_ids[300:], reduction="none")
    torch.testing.assert_close(blob.statistics[:, 3], expected, atol=1e-3, rtol=1e-3)


def test_all_logits_on_request(steering: Steering, prompts: Path, tmp_path: Path) -> None:
    few = read_capture(run(steering, prompts, tmp_path / "few").manifest)
    all_of_them = read_capture(run(steering, prompts, tmp_path / "all", all_logits=True).manifest)
    size = steering.loaded.vocabulary_size
    for entry, other in zip(few.entries, all_of_them.entries, strict=True):
        tensors = load((all_of_them.manifest.parent / other.file).read_bytes())
        assert tensors["logits"].shape == (other.tokens - other.prompt_tokens, size)
        one, two = few.read(entry).teacher, all_of_them.read(other).teacher
        assert one is not None
        assert two is not None
        torch.testing.assert_close(one.logprobs, two.logprobs[:, :8], atol=2e-2, rtol=0)
        torch.testing.assert_close(one.logsumexp, two.logsumexp, atol=1e-5, rtol=1e-5)


def test_with_the_workspace_on_its_schedule_is_kept(tiny: LoadedModel, prompts: Path, tmp_path: Path) -> None:
    """A threshold that is always reached: broadcasts as often as the gap allows, updates every third token."""
    thresholds = ControllerConfig(broadcast_entropy=0.01, broadcast_gap=4, release=0.99, halt_on_repetition=False)
    steering = Steering(tiny, CONFIG.model_copy(update={"thresholds": thresholds}))
    try:
        found = read_capture(run(steering, prompts, tmp_path / "out", workspace=True).manifest)
        blob = found.read(found.entries[-1])
    finally:
        steering.close()
    assert blob.metadata.toggles == {"workspace": True}
    assert blob.births is not None
    assert blob.updates is not None
    assert blob.births[0] == blob.updates[0] == blob.prompt_tokens
    gaps = blob.updates[1:] - blob.updates[:-1]
    assert len(gaps) >= 2
    assert (gaps <= 3).all()
    assert blob.metadata.delta_first is None


def test_plain_lines_are_questions(steering: Steering, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("Who are you?\n\n  What is this?  \n")
    lines, digest = read_prompts(path)
    assert [line.prompt for line in lines] == ["Who are you?", "What is this?"]
    assert len(digest) == 64
    assert run(steering, path, tmp_path / "out").captured == 2


# Interruptions.


@pytest.mark.parametrize("phase", ["before the blob", "after the blob", "in the line", "after the line"])
def test_a_killed_capture_goes_on_where_it_was(
    phase: str, steering: Steering, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result is that of a capture that was not killed, to the bit."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(steering, prompts, whole)
    calls = 0

    def tear(path: Path, line: str) -> None:
        with open(path, "a") as handle:
            handle.write(line[: len(line) // 2])

    def dying(original: Any, before: bool, torn: bool = False) -> Any:
        def act(path: Path, data: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == 5 and torn:
                tear(path, data)
            elif calls < 5 or not before:
                original(path, data)
            if calls == 5:
                raise Killed

        return act

    with monkeypatch.context() as patched:
        if phase == "before the blob":
            patched.setattr(files, "write_bytes", dying(files.write_bytes, True))
        elif phase == "after the blob":
            patched.setattr(files, "write_bytes", dying(files.write_bytes, False))
        else:
            patched.setattr(files, "append_line", dying(files.append_line, False, torn=phase == "in the line"))
        with pytest.raises(Killed):
            run(steering, prompts, cut)
    before = len(read_capture(cut / "manifest.jsonl").entries)
    assert 3 <= before < 8
    summary = run(steering, prompts, cut)
    assert summary.kept == before
    assert contents(cut) == contents(whole)
    again = run(steering, prompts, cut)
    assert (again.captured, again.kept) == (0, summary.kept + summary.captured)
    with CaptureFolder(cut, read_capture(again.manifest).header) as folder:  # type: ignore[arg-type]
        folder.check_invariants()


def test_only_one_may_capture_into_a_folder(steering: Steering, prompts: Path, tmp_path: Path) -> None:
    found = read_capture(run(steering, prompts, tmp_path / "out").manifest)
    assert found.header is not None
    with (
        CaptureFolder(tmp_path / "out", found.header),
        pytest.raises(CaptureError, match=r"another capture writes to .*out"),
    ):
        run(steering, prompts, tmp_path / "out")


def test_other_options_or_prompts_are_another_capture(steering: Steering, prompts: Path, tmp_path: Path) -> None:
    run(steering, prompts, tmp_path / "out")
    with pytest.raises(CaptureMismatch, match=r"capture.json.*: top_k is 8, now 9;"):
        run(steering, prompts, tmp_path / "out", top_k=9)
    prompts.write_text(prompts.read_text() + '{"prompt": "More?"}\n')
    with pytest.raises(CaptureMismatch, match="prompts_sha256 is"):
        run(steering, prompts, tmp_path / "out")


def test_a_missing_blob_is_captured_again(steering: Steering, prompts: Path, tmp_path: Path) -> None:
    run(steering, prompts, tmp_path / "whole")
    run(steering, prompts, tmp_path / "out")
    (tmp_path / "out/blobs/000003.safetensors").unlink()
    assert run(steering, prompts, tmp_path / "out").captured == 1
    assert (tmp_path / "out/blobs/000003.safetensors").read_bytes() == (
        tmp_path / "whole/blobs/000003.safetensors"
    ).read_bytes()
    assert len(read_capture(tmp_path / "out/manifest.jsonl").entries) == len(
        read_capture(tmp_path / "whole/manifest.jsonl").entries
    )


# Refusals.


@pytest.fixture
def captured(steering: Steering, prompts: Path, tmp_path: Path) -> Capture:
    return read_capture(run(steering, prompts, tmp_path / "out").manifest)


def test_a_manifest_that_names_what_is_not_there(captured: Capture) -> None:
    folder = captured.manifest.parent
    (folder / "blobs/000001.safetensors").unlink()
    (folder / "blobs/000002.safetensors").write_bytes(b"short")
    message = r"manifest.jsonl names files .*blobs/000001.safetensors is missing, blobs/000002.safetensors has 5 bytes"
    with pytest.raises(ManifestDamaged, match=message):
        read_capture(captured.manifest)
    with pytest.raises(ManifestDamaged, match=r"nowhere.jsonl does not exist"):
        read_capture(folder / "nowhere.jsonl")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", r"manifest.jsonl, line 2: the line: Invalid JSON"),
        ('{"index": 1}', r"line 2: file: Field required"),
        ('{"index": 1, "file": "../../etc/passwd"}', r"line 2: file: Value error, must lie below the manifest"),
    ],
)
def test_a_malformed_line_is_named(line: str, message: str, captured: Capture) -> None:
    lines = captured.manifest.read_text().splitlines()
    captured.manifest.write_text("\n".join([lines[0], line, *lines[2:]]) + "\n")
    with pytest.raises(ManifestDamaged, match=message):
        read_capture(captured.manifest)


def test_an_empty_manifest_is_refused(captured: Capture) -> None:
    captured.manifest.write_text("")
    with pytest.raises(ManifestDamaged, match="lists no texts"):
        read_capture(captured.manifest)


def test_an_altered_blob_is_refused_by_name(captured: Capture) -> None:
    entry = captured.entries[2]
    path = captured.manifest.parent / entry.file
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(BlobDamaged, match=r"blobs/000002.safetensors has SHA-256"):
        captured.read(entry)


def good() -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.arange(6, dtype=torch.int32),
        "attention_mask": torch.ones(6, dtype=torch.uint8),
        "probe_positions": torch.tensor([1, 3]),
        "residuals.0": torch.ones(2, 8),
        "residuals.1": torch.ones(2, 8),
        "top_ids": torch.zeros(2, 3, dtype=torch.int32),
        "top_logprobs": torch.full((2, 3), -2.0),
        "logsumexp": torch.ones(2),
        "statistics": torch.ones(2, 4),
    }


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("residuals.1", torch.tensor([[1.0, float("nan")] * 4] * 2), "residuals.1 holds NaN or infinity"),
        ("statistics", torch.full((2, 4), float("inf")), "statistics holds NaN"),
        ("residuals.1", torch.ones(3, 8), "different shapes"),
        ("residuals.1", torch.ones(2, 8, dtype=torch.int32), "residuals.1 is torch.int32"),
        ("residuals.one", torch.ones(2, 8), "residuals.one is"),
        ("input_ids", torch.ones(6), "input_ids is torch.float32, not integers"),
        ("input_ids", torch.ones(4, dtype=torch.int32), "4 tokens with a prompt of 4 leave no answer"),
        ("input_ids", torch.full((6,), -1, dtype=torch.int32), "negative"),
        ("attention_mask", torch.zeros(6, dtype=torch.uint8), "attention_mask must be ones"),
        ("probe_positions", torch.tensor([3, 1]), "2 rising positions below 6"),
        ("probe_positions", torch.tensor([4, 5]), "no residual was read in the prompt"),
        ("top_ids", torch.zeros(3, 3, dtype=torch.int32), "must have a row for 2 tokens"),
        ("top_logprobs", torch.full((2, 3), -0.1), "sum to more than 1"),
        ("statistics", torch.ones(2, 3), r"statistics is \[2, 3\], not \[2, 4\]"),
        ("logits", torch.ones(3, 9), r"logits is \[3, 9\]"),
        ("input_ids", None, "it lacks input_ids"),
        ("residuals.0", None, None),
    ],
)
def test_a_malformed_blob_is_named(name: str, tensor: torch.Tensor | None, message: str | None) -> None:
    tensors = good()
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    data = encode_blob(BlobMetadata(schema=1, prompt_tokens=4), tensors)
    if message is None:  # a layer less is a blob of fewer layers
        assert list(decode_blob(data, "x").residuals) == [1]
        return
    with pytest.raises(BlobDamaged, match=rf"dir/x.safetensors: .*{message}"):
        decode_blob(data, "dir/x.safetensors")


@pytest.mark.parametrize(
    "data", [b"", b"\0" * 100, b"{}" * 50, encode_blob(BlobMetadata(schema=1, prompt_tokens=4), {})]
)
def test_bytes_that_are_no_blob(data: bytes) -> None:
    with pytest.raises(BlobDamaged, match=r"^x"):
        decode_blob(data, "x")
    with pytest.raises(BlobDamaged, match=r"^x is no captured text"):
        decode_blob(data, "x", pickled=True)


def test_blobs_of_another_schema(captured: Capture) -> None:
    with pytest.raises(BlobDamaged, match="schema 2, this version reads 1"):
        decode_blob(encode_blob(BlobMetadata(schema=2, prompt_tokens=4), good()), "x")


def test_pt_files_of_other_programs_are_read_without_running_them(captured: Capture) -> None:
    """``torch.save`` of a plain dict, as the first design had it; code in the file is not executed."""
    entry = captured.entries[0]
    blob = captured.read(entry)
    value = {
        "input_ids": blob.input_ids,
        "attention_mask": torch.ones_like(blob.input_ids),
        "probe_positions": blob.probe_positions,
        "residuals": blob.residuals,
        "logits": torch.randn(blob.tokens - blob.prompt_tokens, 320),
        "metadata": {"prompt": "p", "seed": 3, "toggles": {}, "prompt_tokens": blob.prompt_tokens},
    }
    buffer = io.BytesIO()
    torch.save(value, buffer)
    found = decode_blob(buffer.getvalue(), "x.pt", pickled=True)
    assert found.residuals.keys() == blob.residuals.keys()
    assert found.teacher is not None
    assert found.teacher.ids.shape[1] == 64
    evil = io.BytesIO()
    torch.save({**value, "metadata": Evil()}, evil)
    with pytest.raises(BlobDamaged, match=r"^evil.pt is no captured text \(UnpicklingError"):
        decode_blob(evil.getvalue(), "evil.pt", pickled=True)


class Evil:
    """Would end the test run if it were unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.exit, ("code of a .pt file was executed",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a", "text": "b"}', "line 1: Value error, give exactly one of prompt, messages and text"),
        ('\n{"promt": "a"}', "line 2: promt: Extra inputs are not permitted"),
        ('{"text": "a", "answer": "b"}', "an answer belongs to a prompt"),
        ("{", "line 1: Invalid JSON"),
        ("", "holds no prompts"),
    ],
)
def test_damaged_prompts_are_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(PromptsDamaged, match=rf"bad.jsonl.*{message}"):
        read_prompts(path)


def test_prompts_that_are_too_long(steering: Steering, tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("word " * 300)
    with pytest.raises(PromptsDamaged, match=r"prompt 1 has .* tokens, at most 190"):
        run(steering, path, tmp_path / "out")


def test_options_that_contradict_each_other() -> None:
    with pytest.raises(ValueError, match=r"context \(40\) must be below window \(40\)"):
        CaptureOptions(window=40, context=40)


def test_greedy_batches_equal_the_engine(tiny: LoadedModel, make_engine: Any) -> None:
    """The batch is only faster: at temperature 0 its rows are what the engine says, whatever stands beside them."""
    from workspace.batched_sampling import sample_batch

    engine = make_engine(tiny)
    prompts = [engine.encode(text) for text in ("Paris is", "The quick brown fox jumps over the lazy", "x")]
    params = SamplingParams(max_tokens=12, temperature=0)
    expected = [list(engine.submit(prompt, params).result().token_ids) for prompt in prompts]
    assert sample_batch(tiny, prompts, [params] * 3) == expected
