"""Making a dataset: targets, splits, weights, resuming at any byte, teachers that fail, and that nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from lm.errors import InvalidCall, RequestRefused, Unavailable
from memory.distillation.config import DistillConfig, make_distill_config
from memory.distillation.data_generation import REPORT, DataProgress, DataReport, generate_dataset
from memory.distillation.dataset import read_dataset
from memory.distillation.errors import JournalMismatch, NothingToDistil, TeacherRefused, TeacherUnavailable
from memory.distillation.leftovers import DATASET, JOURNAL
from memory.distillation.rows import Row
from memory.history import Record
from storage import files
from tests.support.experiences import record, tagged
from tests.support.teachers import Messages, RuleTeacher
from workspace.errors import InvalidPrompt

ROOT = Path(__file__).resolve().parents[4]


def config(**sections: Any) -> DistillConfig:
    """Small and impatient."""
    teacher = {"attempts": 2, "backoff_seconds": 0.0, **sections.pop("teacher", {})}
    return make_distill_config({"teacher": teacher, "top_logprobs": 5, "training": {"failure_weight": 3.0}, **sections})


def made(
    folder: Path, records: list[Record], settings: DistillConfig | None = None, **more: Any
) -> tuple[DataReport, list[Row]]:
    more.setdefault("teacher", RuleTeacher())
    report = generate_dataset(records, settings or config(), folder, **more)
    return report, read_dataset(folder / DATASET) if report.complete else []


def test_replay_rows_hold_the_teachers_tokens_and_not_its_memory(tmp_path: Path) -> None:
    teacher = RuleTeacher()
    report, rows = made(tmp_path, tagged(20), config(system_prompt="Label it."), teacher=teacher)
    assert (report.complete, report.rows, report.resumed, report.bad) == (True, 20, 0, [])
    assert [row.metadata["experience_id"] for row in rows] == list(range(1, 21))
    row = rows[2]
    assert row.system_prompt == "Label it."
    assert [(item.role, item.content) for item in row.messages] == [
        ("user", "message number 3"),
        ("assistant", "OPS-RED"),
    ]
    assert row.answer.token_ids == tuple(map(ord, "OPS-RED"))
    assert row.answer.top_logprobs is not None
    assert row.answer.top_logprobs.shape == (7, 5)
    assert (row.target, row.weight, row.type) == ("teacher", 3.0, "replay")
    assert row.metadata["failed"] is True
    assert row.metadata["gold"] == "OPS-RED"
    assert row.metadata["memory"] == 19
    assert row.metadata["teacher_tokens"] > 100
    assert (rows[0].weight, rows[0].metadata["failed"]) == (1.0, False)
    for row, asked in zip(rows, teacher.asked, strict=True):
        assert asked[0] == {"role": "system", "content": "Label it."}
        assert asked[-1]["content"] == row.messages[0].content
        assert sum(item["content"] == row.messages[0].content for item in asked) == 1


def test_what_is_old_counts_less_where_conventions_change(tmp_path: Path) -> None:
    _, rows = made(tmp_path, tagged(40), config(data={"targets": "feedback", "half_life": 10}))
    newest = max(row.metadata["experience_id"] for row in rows)
    for row in rows:
        recency = 0.5 ** ((newest - row.metadata["experience_id"]) / 10)
        assert row.recency == pytest.approx(recency)
        assert row.weight == pytest.approx(recency * (3.0 if row.metadata["failed"] else 1.0))
    (tmp_path / "short").mkdir()
    _, rows = made(tmp_path / "short", tagged(40), config(data={"targets": "feedback", "half_life": 1}))
    assert min(row.weight for row in rows) > 0


def test_the_split_is_by_content_and_counted(tmp_path: Path) -> None:
    report, rows = made(tmp_path, tagged(60), config(data={"eval_share": 0.3}))
    assert report.eval_rows == sum(row.split == "eval" for row in rows)
    assert 8 < report.eval_rows < 30
    assert report.train_rows + report.eval_rows == 60


def test_held_out_experiences_can_be_kept_out_of_every_memory(tmp_path: Path) -> None:
    teacher = RuleTeacher()
    settings = config(data={"eval_share": 0.3, "strict_hold_out": True})
    _, rows = made(tmp_path, tagged(30), settings, teacher=teacher)
    held_out = {row.messages[0].content for row in rows if row.split == "eval"}
    assert held_out
    for asked in teacher.asked:
        assert not held_out & {item["content"] for item in asked[:-1]}


def test_where_nothing_is_held_out_a_share_is_asked_again(tmp_path: Path) -> None:
    settings = config(data={"eval_share": 0.3, "hold_out": "reasks"}, strategy={"exclude_current": False})
    report, rows = made(tmp_path, tagged(30), settings)
    train = {row.metadata["content_key"] for row in rows if row.split == "train"}
    again = [row for row in rows if row.split == "eval"]
    assert (report.train_rows, report.eval_rows) == (30, len(again))
    assert len(again) > 3
    assert {row.metadata["content_key"] for row in again} <= train


def test_feedback_targets_need_no_teacher_and_carry_text_only(tmp_path: Path) -> None:
    records = [*tagged(6), record(7, "nobody judged")]
    report, rows = made(tmp_path, records, config(data={"targets": "feedback", "eval_share": 0}), teacher=None)
    assert (report.targets, report.teacher_prompt_tokens) == ({"feedback": 6}, 0)
    assert [row.answer.content for row in rows] == ["OPS-RED", "OPS-BLUE"] * 3
    assert all(row.answer.token_ids is None and row.answer.top_logprobs is None for row in rows)


def test_mixed_targets_ask_the_teacher_only_where_nobody_judged(tmp_path: Path) -> None:
    teacher = RuleTeacher()
    records = [*tagged(6), record(7, "nobody judged 7")]
    report, rows = made(tmp_path, records, config(data={"targets": "mixed", "eval_share": 0}), teacher=teacher)
    assert report.targets == {"feedback": 6, "teacher": 1}
    assert len(teacher.asked) == 1
    assert rows[6].answer.token_ids is not None


def test_answers_that_contradict_feedback_can_be_dropped(tmp_path: Path) -> None:
    teacher = RuleTeacher(lambda messages: "OPS-RED")
    report, rows = made(tmp_path, tagged(6), config(data={"filter_incorrect": True, "eval_share": 0}), teacher=teacher)
    assert report.skipped == {"the teacher's answer contradicts the feedback": 3}
    assert [row.metadata["experience_id"] for row in rows] == [1, 3, 5]


def test_self_study_asks_and_answers(tmp_path: Path) -> None:
    def rule(messages: Messages) -> str:
        if "You write one message" in messages[0]["content"]:
            return 'Here is one:\n"What about number 42"'
        return "OPS-BLUE"

    teacher = RuleTeacher(rule)
    settings = config(system_prompt="Label it.", data={"replay": False, "self_study": {"rows": 5, "memory_records": 4}})
    report, rows = made(tmp_path, tagged(20), settings, teacher=teacher)
    kinds = ["structuring", "summarization", "question", "use_case", "creative"]
    assert report.kinds == dict.fromkeys(kinds, 1)
    assert [row.type for row in rows] == kinds
    assert {row.messages[0].content for row in rows} == {"What about number 42"}
    assert all(row.split == "train" and "experience_id" not in row.metadata for row in rows)
    asking, answering = teacher.asked[0], teacher.asked[1]
    assert asking[1]["content"].count("OBSERVATION:") == 4
    assert [item["role"] for item in answering].count("assistant") == 4
    assert answering[-1]["content"] == "What about number 42"


def test_self_study_does_not_train_on_what_is_held_out(tmp_path: Path) -> None:
    _, rows = made(tmp_path / "replay", tagged(30), config(data={"eval_share": 0.3}))
    held_out = next(row.messages[0].content for row in rows if row.split == "eval")
    settings = config(data={"eval_share": 0.3, "self_study": {"rows": 2, "types": ["question"]}})
    report, rows = made(tmp_path / "study", tagged(30), settings, teacher=RuleTeacher(lambda messages: held_out))
    assert report.skipped == {"the question is a held-out observation": 2}
    report, _ = made(tmp_path / "silent", tagged(30), settings, teacher=RuleTeacher(lambda messages: ' " '))
    assert report.skipped == {"the teacher wrote no question": 2}


def test_texts_are_redacted_before_anybody_sees_them(tmp_path: Path) -> None:
    teacher = RuleTeacher()
    records = [record(1, "I am a@b.io, number 1", "x", "Correct!"), *tagged(6)[1:]]
    report, _ = made(tmp_path, records, config(data={"eval_share": 0}), teacher=teacher)
    assert report.redactions == {"email": 1}
    seen = json.dumps(teacher.asked) + "".join(path.read_text(errors="replace") for path in tmp_path.iterdir())
    assert "b.io" not in seen
    assert "[EMAIL_1]" in seen


def test_progress_and_report(tmp_path: Path) -> None:
    seen: list[DataProgress] = []
    settings = config(data={"targets": "mixed"}, teacher={"max_prompt_tokens": 100})
    records = [*tagged(9), record(10, "nobody judged 10")]
    report, _ = made(tmp_path, records, settings, progress=seen.append)
    assert [item.done for item in seen] == [0, 9, 10]
    assert seen[-1] == DataProgress(10, 10, 10, 0)
    written = json.loads((tmp_path / REPORT).read_text())
    assert written == json.loads(json.dumps(report.to_json()))
    assert written["experiences_dropped"] > 0
    assert "message number" not in (tmp_path / REPORT).read_text()


def test_asking_in_parallel_makes_the_same_dataset(tmp_path: Path) -> None:
    _, one = made(tmp_path / "1", tagged(20))
    _, four = made(tmp_path / "4", tagged(20), config(teacher={"parallel": 4}))
    assert one == four


def test_nothing_to_distil_is_said(tmp_path: Path) -> None:
    with pytest.raises(NothingToDistil, match="give feedback"):
        made(tmp_path, [record(1, "nobody judged")], config(data={"targets": "feedback"}))
    with pytest.raises(NothingToDistil, match="of 0 experiences"):
        made(tmp_path, [])
    settings = config(data={"filter_incorrect": True})
    with pytest.raises(NothingToDistil, match="contradicts"):
        made(tmp_path, [tagged(1)[0]], settings, teacher=RuleTeacher(lambda messages: "no"))
    with pytest.raises(TeacherRefused, match="none was given"):
        made(tmp_path / "other", tagged(3), teacher=None)


# -- interruptions ------------------------------------------------------------------------------------------------


def test_a_run_goes_on_after_being_cut_off_at_any_byte(tmp_path: Path) -> None:
    settings = config(data={"targets": "mixed", "eval_share": 0.2})
    records = [*tagged(3), record(4, "nobody judged 4"), record(5, "nobody judged 5")]
    _, whole = made(tmp_path / "whole", records, settings)
    journal = (tmp_path / "whole" / JOURNAL).read_bytes()
    ends = [index + 1 for index, byte in enumerate(journal) if byte == ord("\n")]
    for cut in sorted({*range(0, len(journal), 97), *ends, *(end - 1 for end in ends), ends[0] - 10}):
        folder = tmp_path / f"cut{cut}"
        folder.mkdir()
        (folder / JOURNAL).write_bytes(journal[:cut])
        teacher = RuleTeacher()
        report, rows = made(folder, records, settings, teacher=teacher)
        assert rows == whole
        assert report.resumed == max(0, sum(end <= cut for end in ends) - 1)
        assert len(teacher.asked) <= 2


def test_a_run_that_is_killed_goes_on(tmp_path: Path) -> None:
    """A real process and a real SIGKILL, in the middle of the sixth answer."""
    program = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from tests.unit.memory.distillation import test_data_generation as test
from tests.support.teachers import echo
calls = []
def rule(messages):
    calls.append(1)
    if len(calls) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return echo(messages)
test.made(Path({str(tmp_path)!r}), test.tagged(12), teacher=test.RuleTeacher(rule))
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert not (tmp_path / DATASET).exists()
    teacher = RuleTeacher()
    report, rows = made(tmp_path, tagged(12), teacher=teacher)
    assert (report.resumed, report.rows, len(teacher.asked)) == (5, 12, 7)
    _, uninterrupted = made(tmp_path / "again", tagged(12))
    assert rows == uninterrupted


def test_a_stop_ends_it_between_two_samples_and_loses_nothing(tmp_path: Path) -> None:
    stop = threading.Event()

    def halt(progress: DataProgress) -> None:
        if progress.done == 4:
            stop.set()

    report, _ = made(tmp_path, tagged(10), stop=stop, progress=halt)
    assert (report.complete, report.rows) == (False, 4)
    assert not (tmp_path / DATASET).exists()
    report, rows = made(tmp_path, tagged(10))
    assert (report.complete, report.resumed, len(rows)) == (True, 4, 10)


def test_a_stop_ends_the_wait_for_a_teacher(tmp_path: Path) -> None:
    stop = threading.Event()
    teacher = RuleTeacher(failures=[OSError("down")] * 9)
    timer = threading.Timer(0.05, stop.set)
    timer.start()
    settings = config(teacher={"attempts": 9, "backoff_seconds": 60})
    report, _ = made(tmp_path, tagged(3), settings, teacher=teacher, stop=stop)
    timer.join()
    assert not report.complete
    assert len(teacher.asked) == 1


def test_a_damaged_line_is_made_again(tmp_path: Path) -> None:
    _, whole = made(tmp_path, tagged(6))
    lines = (tmp_path / JOURNAL).read_text().splitlines()
    lines[3] = lines[3][: len(lines[3]) // 2]
    (tmp_path / JOURNAL).write_text("\n".join(lines) + "\n")
    report, rows = made(tmp_path, tagged(6))
    assert (report.resumed, rows) == (5, whole)


@pytest.mark.parametrize("change", ["settings", "history", "teacher"])
def test_a_journal_of_something_else_is_refused_until_it_is_asked_to_start_over(tmp_path: Path, change: str) -> None:
    made(tmp_path, tagged(4))
    records = tagged(5) if change == "history" else tagged(4)
    settings = config(seed=1) if change == "settings" else config()
    teacher = RuleTeacher(name="other" if change == "teacher" else "rule")
    with pytest.raises(JournalMismatch, match=f"another {change}; give this run its own directory"):
        made(tmp_path, records, settings, teacher=teacher)
    report, _ = made(tmp_path, records, settings, teacher=teacher, restart=True)
    assert report.resumed == 0
    report, _ = made(tmp_path, records, settings.model_copy(update={"hf_repo_id": "me/x"}), teacher=teacher)
    assert report.resumed == len(records)


# -- teachers that fail -------------------------------------------------------------------------------------------


def test_what_passes_is_tried_again(tmp_path: Path) -> None:
    teacher = RuleTeacher(failures=[Unavailable("u", 1, "x"), None, OSError("reset"), None])
    report, _ = made(tmp_path, tagged(4), teacher=teacher)
    assert (report.rows, len(teacher.asked)) == (4, 6)


def test_a_teacher_that_stays_away_is_a_clear_state_and_keeps_what_it_said(tmp_path: Path) -> None:
    down = RuleTeacher(failures=[None, None, None] + [Unavailable("u", 1, "refused")] * 9)
    with pytest.raises(TeacherUnavailable, match="'rule' failed 2 times in a row"):
        made(tmp_path, tagged(8), teacher=down)
    report, _ = made(tmp_path, tagged(8))
    assert (report.resumed, report.rows) == (3, 8)


def test_a_request_that_is_refused_is_a_bad_row_that_is_reported(tmp_path: Path) -> None:
    teacher = RuleTeacher(failures=[InvalidCall("too long"), None, RequestRefused("u", 400, "no")])
    report, rows = made(tmp_path, tagged(5), teacher=teacher)
    assert [name for name, _ in report.bad] == ["replay:1", "replay:3"]
    assert "HTTP 400" in report.bad[1][1]
    assert [row.metadata["experience_id"] for row in rows] == [2, 4, 5]
    assert json.loads((tmp_path / REPORT).read_text())["bad"][0][0] == "replay:1"


def test_a_teacher_that_refuses_everything_ends_the_run_and_settles_nothing(tmp_path: Path) -> None:
    teacher = RuleTeacher(failures=[InvalidCall("gives no log-probabilities")] * 9)
    with pytest.raises(TeacherRefused, match="first 3 requests: InvalidCall: gives no"):
        made(tmp_path, tagged(8), teacher=teacher)
    with pytest.raises(TeacherRefused, match="first 2 requests"):
        made(tmp_path / "few", tagged(2), teacher=RuleTeacher(failures=[InvalidCall("no")] * 2))
    report, _ = made(tmp_path, tagged(8))
    assert (report.resumed, report.rows, report.bad) == (0, 8, [])


def test_a_template_that_takes_no_such_turns_is_said_with_what_to_do(tmp_path: Path) -> None:
    def count(messages: Any) -> int:
        raise InvalidPrompt("Conversation roles must alternate")

    with pytest.raises(TeacherRefused, match=r"must alternate; .* set data\.merge_turns: true"):
        made(tmp_path, tagged(8), count=count)


def test_an_empty_answer_and_a_long_observation_are_bad_rows(tmp_path: Path) -> None:
    records = [*tagged(4), record(5, "word " * 500)]
    teacher = RuleTeacher(lambda messages: "" if messages[-1]["content"].endswith("2") else "OPS-RED")
    report, rows = made(tmp_path, records, config(teacher={"max_prompt_tokens": 300}), teacher=teacher)
    assert [name for name, _ in report.bad] == ["replay:2", "replay:5"]
    assert "it is empty" in report.bad[0][1]
    assert "max_prompt_tokens" in report.bad[1][1]
    assert len(rows) == 3


def test_a_full_disk_is_an_error_and_the_run_goes_on_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = files.append_line
    written: list[str] = []

    def full(path: Path, line: str) -> None:
        if len(written) == 3:
            with open(path, "ab") as handle:
                handle.write(line.encode()[:20])  # what fitted
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(line)
        whole(path, line)

    monkeypatch.setattr(files, "append_line", full)
    with pytest.raises(OSError, match="No space left"):
        made(tmp_path, tagged(6))
    monkeypatch.undo()
    report, rows = made(tmp_path, tagged(6))
    assert (report.resumed, len(rows)) == (2, 6)
