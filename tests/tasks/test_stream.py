"""A dataset that is read while the job trains: every row once a pass, mixed, and resumed at the example."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from leap_dist.config.job_file import parse_job
from leap_dist.config.sections import DataConfig
from leap_dist.errors import UserError
from leap_dist.tasks import load_task
from leap_dist.tasks.base import Task
from leap_dist.tasks.files import zstd
from leap_dist.train.batches import StreamBatches
from leap_dist.zero.ranks import Ranks
from tests.tasks.test_chats import TEMPLATES, TURNS, answers

ALONE = Ranks(0, 1, torch.device("cpu"))
VALIDATION = [{"text": "what is judged, and long enough for it"}]


@pytest.fixture
def stream(tmp_path: Path, speaker: Any) -> Callable[..., Task]:
    """Writes rows into files of a folder that `datasets` streams; the task."""
    folder = tmp_path / "set"
    folder.mkdir()
    speaker.chat_template = TEMPLATES["plain"]

    def make(
        rows: list[Any],
        judged: list[Any] = VALIDATION,
        pack: Any = gzip.compress,
        end: str = "gz",
        own: str | None = None,
        **settings: Any,
    ) -> Task:
        for number in range(3):
            text = "\n".join(map(json.dumps, rows[number::3]))
            (folder / f"train-{number}.jsonl.{end}").write_bytes(pack(text.encode()))
        (folder / "validation.jsonl").write_text("\n".join(map(json.dumps, judged)), "utf-8")
        found = {
            "task": "lm",
            "dataset": str(folder),
            "streaming": True,
            "shuffle_buffer": 7,
            "max_length": 16,
            "validation": own,
        }
        return load_task(DataConfig(**found | settings), speaker)

    return make


def numbered(count: int) -> list[dict[str, str]]:
    return [{"text": f"row {i} " + "x" * (i % 11)} for i in range(count)]


def take(task: Task, steps: int, per_step: int, seed: int = 3) -> list[list[int]]:
    assert task.stream is not None
    task.stream.begin(seed)
    return [row["input_ids"] for step in range(steps) for row in task.stream.take(per_step, f"step {step}")]


def test_every_row_comes_once_and_blocks_are_full(stream: Any, speaker: Any) -> None:
    rows = numbered(40)
    task = stream(rows)
    blocks = take(task, 5, 4)
    assert all(len(block) == 16 for block in blocks) and not len(task.train) and task.max_length == 16
    text = speaker.decode([token for block in blocks for token in block])
    whole = text.split("<|end|>")[:-1]
    assert len(whole) > 20 and len(set(whole)) == len(whole) and set(whole) <= {row["text"] for row in rows}
    assert whole != [row["text"] for row in rows][: len(whole)]  # mixed
    assert take(task, 5, 4) == blocks != take(task, 5, 4, seed=4)


def test_a_buffer_of_one_keeps_the_order(stream: Any, speaker: Any) -> None:
    rows = numbered(30)
    text = speaker.decode([token for block in take(stream(rows, shuffle_buffer=1), 10, 2) for token in block])
    expected = "".join(f"{row['text']}<|end|>" for part in range(3) for row in rows[part::3])
    assert expected.startswith(text) and len(text) > 200


@pytest.mark.parametrize(("buffer", "kind"), [(7, "text"), (1, "text"), (1000, "text"), (5, "chat")])
def test_it_resumes_at_the_example(stream: Any, caplog: pytest.LogCaptureFixture, buffer: int, kind: str) -> None:
    """From what a checkpoint holds, at every step, over the end of a pass too."""
    chats = [{"messages": [TURNS[1] | {"content": f"n {i}"}, TURNS[2]]} for i in range(20)]
    rows, judged = (numbered(25), VALIDATION) if kind == "text" else (chats, chats)
    settings = {"shuffle_buffer": buffer, "max_length": 16 if kind == "text" else 64}
    made = stream(rows, judged, **settings)
    found, states = [], []
    made.stream.begin(3)
    for step in range(14):
        states.append(json.loads(json.dumps(made.stream.state)))
        found.append(made.stream.take(3, str(step)))
    assert states[-1]["epoch"] >= 1 and "its rows are read again" in caplog.text
    again = stream(rows, judged, **settings)
    again.stream.begin(3)
    for state, *expected in zip(states, found, [*found[1:], None], strict=True):
        again.stream.resume(state)
        assert again.stream.take(3, "") == expected[0]
        assert expected[1] in (None, again.stream.take(3, ""))


def test_a_second_pass_has_another_order(stream: Any) -> None:
    task = stream(numbered(12), max_length=8)
    tokens = [token for block in take(task, 40, 2) for token in block]
    first = tokens[: sum(len(row["text"]) + 1 for row in numbered(12))]
    assert tokens[len(first) :][: len(first)] != first
    assert sorted(tokens[len(first) :][: len(first)]) == sorted(first)


def test_conversations(stream: Any, speaker: Any) -> None:
    task = stream([{"messages": TURNS}] * 9, [{"messages": TURNS}], max_length=512)
    (example, *_) = task.stream.take(2, "")
    assert answers(example, speaker) == ["In Italy, à côté.<|end|>", "In Norway.<|end|>"]
    assert example in task.validation["validation"][:]


def test_the_first_conversation_that_is_too_long_is_reported(stream: Any, caplog: pytest.LogCaptureFixture) -> None:
    short = {"messages": [TURNS[1] | {"content": "n"}, TURNS[2] | {"content": "m"}]}
    long = {"messages": [TURNS[1] | {"content": "n " * 90}, TURNS[2]]}
    task = stream([short, short, long, long, short, short], [short], shuffle_buffer=1, max_length=64)
    assert len(task.stream.take(4, "")) == 4
    (told,) = [record.getMessage() for record in caplog.records if "longer than" in record.message]
    assert ": row " in told and "longer than data.max_length (64) and cut there, as others may be" in told


def test_ranks_share_what_one_reads(stream: Any) -> None:
    """Rank r has the r-th part of every micro-batch, whatever their number; the first one's words go to all."""
    rows = numbered(60)
    whole = StreamBatches(stream(rows), 4, 1, 3, ALONE, 9).step(0)[0]["input_ids"].tolist()
    halves = [batch["input_ids"].tolist() for batch in StreamBatches(stream(rows), 2, 2, 3, ALONE, 9).step(0)]
    assert halves == [whole[:2], whole[2:]]


class Two(Ranks):
    """One of two ranks, which reads for itself."""

    def on_first(self, action: Callable[[], Any]) -> Any:
        return action()


def ids(batches: Iterable[dict[str, torch.Tensor]]) -> list[Any]:
    return [batch["input_ids"].tolist() for batch in batches]


def test_two_ranks_have_parts_of_their_own(stream: Any) -> None:
    """Of every micro-batch of a step, and of the calibration; the same over both as on one."""
    rows = numbered(60)
    two = [Two(rank, 2, torch.device("cpu")) for rank in (0, 1)]
    whole = ids(StreamBatches(stream(rows), 4, 1, 3, ALONE, 9).step(0))[0]
    parts = [ids(StreamBatches(stream(rows), 1, 2, 3, rank, 9).step(0)) for rank in two]
    assert parts == [[[whole[0]], [whole[2]]], [[whole[1]], [whole[3]]]]
    first, second, third, fourth = ids(StreamBatches(stream(rows), 2, 1, 3, ALONE, 9).calibration(4))
    parts = [ids(StreamBatches(stream(rows), 2, 1, 3, rank, 9).calibration(3)) for rank in two]
    assert parts == [[first, third], [second, fourth]]  # ZeRO-3 asks all ranks for as many


def test_calibration_is_what_the_first_steps_train_on(stream: Any) -> None:
    batches = StreamBatches(stream(numbered(60)), 2, 1, 3, ALONE, 9)
    shown = [batch["input_ids"].tolist() for batch in batches.calibration(3)]
    assert shown == [batches.step(step)[0]["input_ids"].tolist() for step in range(3)]


def test_files_beside_a_dataset(stream: Any, tmp_path: Path, speaker: Any) -> None:
    (tmp_path / "own.txt").write_text("of my own")
    task = stream(numbered(9), own=str(tmp_path / "own.txt"))
    assert speaker.decode(task.validation["validation"][0]["input_ids"]) == "of my own<|end|>"


# ------------------------------------------------------------------------------ refused


def test_a_stream_that_ends_early_is_refused_or_repeated(stream: Any, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(
        UserError, match=r"ended behind row 6, before step 1 of 9 was full, which takes 90 blocks of 16"
    ):
        stream(numbered(6)).stream.take(90, "step 1 of 9")
    with caplog.at_level(logging.WARNING):
        take(stream(numbered(6)), 4, 2)
    assert "set train: ended behind row 6, in step 1: its rows are read again" in caplog.text


@pytest.mark.parametrize(("end", "pack"), [("gz", gzip.compress), ("zst", zstd.compress)])
def test_a_file_that_is_cut_off(stream: Any, tmp_path: Path, end: str, pack: Any) -> None:
    """`datasets` has .zst files that end early for whole ones, if the zstandard package reads them."""
    task = stream(numbered(3000), pack=lambda content: pack(content), end=end)
    file = (
        next(Path(task.stream._read._dataset._ex_iterable.kwargs["base_files"][0]).parent.glob("*")) if False else None
    )
    assert file is None
    for path in Path(task.stream.source.rpartition(" ")[0]).glob(f"train-*.{end}"):
        path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(
        UserError, match=r"^data\.train: .*(cannot be read|could not be streamed).*Compressed file ended"
    ):
        take(task, 2000, 4)


def test_a_row_of_another_kind(stream: Any) -> None:
    with pytest.raises(UserError, match=r"set train: row \d+: nothing in column"):
        take(stream([*numbered(5), {"text": None}, {"text": None}, {"text": None}]), 9, 3)


def test_a_token_that_the_model_has_no_row_for(stream: Any) -> None:
    batches = StreamBatches(stream(numbered(60)), 2, 1, 3, ALONE, 9)
    first = batches.step(0)[0]["input_ids"].tolist()
    batches.check(262)
    assert batches.step(0)[0]["input_ids"].tolist() == first
    problem = r"data\.train: .*set train: token id 261, and the model has 261 rows for tokens"
    with pytest.raises(UserError, match=problem):
        batches.check(261)
        for step in range(99):
            batches.step(step)


JOB: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "model": {"name": "m"},
    "data": {"task": "lm", "dataset": "x", "streaming": True},
    "train": {"max_steps": 20},
    "leap": {"target": 0.5},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train": {"epochs": 2}},
            r"train\.epochs: got 2; nobody knows how long a streamed dataset is: give train\.max",
        ),
        ({"train": {}}, r"train: got neither of epochs and max_steps"),
        (
            {"data": {"task": "lm", "train": "a", "validation": "b", "streaming": True}},
            r"data\.streaming: got true; a da",
        ),
        (
            {"data": {"task": "squad", "streaming": True}},
            r"data\.streaming: got true; an option of lm and mlm: remove it",
        ),
        (
            {"data": {"task": "lm", "dataset": "x", "shuffle_buffer": 5}},
            r"data\.shuffle_buffer: got 5; an option of stre",
        ),
        (
            {"data": {"task": "lm", "dataset": "x", "train": ["a", "b"]}},
            r'data\.train: got \["a", "b"\]; allowed: the na',
        ),
        (
            {"data": {"task": "lm", "train": [], "validation": "b"}},
            r"data\.train: got \[\]; allowed: a file or a pattern",
        ),
        (
            {"data": {"task": "lm", "train": [""], "validation": "b"}},
            r"data\.train\[0\]: got \"\"; allowed: a file or a",
        ),
    ],
)
def test_jobs_that_are_refused(changes: dict[str, Any], message: str) -> None:
    assert parse_job(JOB).data.shuffle_buffer == 10_000
    with pytest.raises(UserError, match=message):
        parse_job(JOB | changes)
