"""Files as users have them: lists, patterns, packed, JSON and Parquet; all give what plain files give."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from leap_dist.config.sections import DataConfig
from leap_dist.errors import UserError
from leap_dist.tasks import files, load_task
from leap_dist.tasks.files import files_of, read_text, zstd
from leap_dist.tracking.datasets import describe

Rows = list[dict[str, Any]]


def as_lines(rows: Rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_csv(rows: Rows) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows: Rows) -> bytes:
    import pyarrow
    from pyarrow import parquet

    content = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), content)
    return content.getvalue()


def in_frames(content: bytes) -> bytes:
    """As `zstd` and `pzstd` append: a reader that stops behind the first frame loses the rest in silence."""
    middle = len(content) // 2
    return zstd.compress(content[:middle]) + zstd.compress(content[middle:])


KINDS: dict[str, Callable[[Rows], bytes]] = {
    ".jsonl": as_lines,
    ".jsonl.gz": lambda rows: gzip.compress(as_lines(rows)),
    ".jsonl.zst": lambda rows: in_frames(as_lines(rows)),
    ".JSONL.GZ": lambda rows: gzip.compress(as_lines(rows[:2])) + gzip.compress(as_lines(rows[2:])),
    ".json": lambda rows: json.dumps(rows).encode(),
    ".json.xz": lambda rows: lzma.compress(json.dumps(rows).encode()),
    ".ndjson": as_lines,
    ".jsonl.xz": lambda rows: lzma.compress(as_lines(rows[:2])) + bytes(8) + lzma.compress(as_lines(rows[2:])),
    ".csv": as_csv,
    ".csv.bz2": lambda rows: bz2.compress(as_csv(rows)),
    ".parquet": as_parquet,
    ".parquet.xz": lambda rows: lzma.compress(as_parquet(rows)),
}


@pytest.fixture(scope="module")
def paragraphs(data_dir: Path) -> Rows:
    articles = json.loads(next((data_dir / "squad").glob("dev*.json")).read_text("utf-8"))["data"]
    return [{"text": paragraph["context"]} for article in articles for paragraph in article["paragraphs"]][:24]


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_file(paragraphs: Rows, tokenizer: Any, tmp_path: Path, kind: str) -> None:
    (tmp_path / "plain.jsonl").write_bytes(as_lines(paragraphs))
    (tmp_path / f"part-0{kind}").write_bytes(KINDS[kind](paragraphs[:9]))
    (tmp_path / f"part-1{kind}").write_bytes(KINDS[kind](paragraphs[9:]))
    names = {"train": str(tmp_path / "part-*"), "validation": str(tmp_path / "plain.jsonl")}
    task = load_task(DataConfig(task="lm", max_length=64, **names), tokenizer)
    whole = load_task(DataConfig(task="lm", max_length=64, **{**names, "train": names["validation"]}), tokenizer)
    assert len(task.train) > 20 and task.train[:] == whole.train[:]


@pytest.mark.parametrize(("suffix", "compress"), [(".bz2", bz2.compress), (".xz", lzma.compress)])
@pytest.mark.parametrize("damage", ["in the second stream", "behind the last stream"])
def test_streams_that_are_damaged(tokenizer: Any, tmp_path: Path, suffix: str, compress: Any, damage: str) -> None:
    """As `pbzip2` and `cat` make them: Python's readers take one that is none for the end of the file."""
    first, second = (compress(as_lines([{"text": f"{word} film"}] * 9)) for word in ("good", "bad"))
    file = tmp_path / f"a.jsonl{suffix}"
    file.write_bytes(first + (b"\1" + second[1:] if damage == "in the second stream" else second + b"more"))
    data = DataConfig(task="lm", max_length=8, train=str(file), validation=str(file))
    with pytest.raises(
        UserError, match=rf"^data\.train: .*a\.jsonl{suffix}: damaged, or cut off: .*; download or pack"
    ):
        load_task(data, tokenizer)
    file.write_bytes(first + second)
    assert sum(example["input_ids"].count(9) for example in load_task(data, tokenizer).validation["validation"]) == 9


@pytest.mark.parametrize(("suffix", "compress"), [(".bz2", bz2.compress), (".xz", lzma.compress)])
@pytest.mark.parametrize("piece", [1, 7, 2**16])
def test_a_packed_file_that_ends_anywhere(
    tmp_path: Path, monkeypatch: Any, suffix: str, compress: Any, piece: int
) -> None:
    """Only the end of a stream is the end of a file."""
    monkeypatch.setattr(files, "PIECE", piece)
    parts = [b"a good film", b"", b"a bad plot"]
    content, file = b"".join(map(compress, parts)), tmp_path / f"a.txt{suffix}"
    whole = {len(b"".join(map(compress, parts[:number]))): b"".join(parts[:number]) for number in (1, 2, 3)}
    for length in range(len(content) + 1):
        file.write_bytes(content[:length])
        if length in whole:
            assert read_text("data.train", file).encode() == whole[length]
        else:
            with pytest.raises(UserError, match=r"^data\.train: .*damaged, or cut off: Compressed file ended before"):
                read_text("data.train", file)


def test_classes_in_several_files(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"s": f"a {'good' if i % 2 else 'bad'} film", "label": i % 2} for i in range(6)]
    for number, kind in enumerate((".jsonl.zst", ".csv.bz2", ".json.xz")):
        (tmp_path / f"{number}{kind}").write_bytes(KINDS[kind](rows[number * 2 : number * 2 + 2]))
    given = {"task": "text/classification", "text": "s", "validation": str(tmp_path / "0.jsonl.zst")}
    data = DataConfig(**given, train=[str(tmp_path / "[0-1].*"), str(tmp_path / "2.json.xz")])
    assert load_task(data, tokenizer).train.numbers["labels"].tolist() == [0, 1] * 3
    (tmp_path / "1.csv.bz2").write_bytes(bz2.compress(b"s,label\nx,0\ny,\n"))
    with pytest.raises(UserError, match=r'1\.csv\.bz2: line 3, column "label": got'):
        load_task(data, tokenizer)
    records = describe(data, load_task(DataConfig(**given, train=str(tmp_path / "0.jsonl.zst")), tokenizer))
    assert json.loads(records[0]["values"]["source"]) == {"uri": str(tmp_path)}
    assert json.loads(records[1]["values"]["source"]) == {"uri": str(tmp_path / "0.jsonl.zst")}


def test_patterns(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "deep/er/c.txt", "odd[1].txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")

    def found(*names: str) -> list[str]:
        return [str(file.relative_to(tmp_path)) for file in files_of("data.train", [f"{tmp_path}/{n}" for n in names])]

    assert found("[ab].txt") == ["a.txt", "b.txt"] and found("b.txt", "a.txt") == ["b.txt", "a.txt"]
    assert found("**/c.txt") == ["deep/er/c.txt"] and found("odd[1].txt") == ["odd[1].txt"]
    with pytest.raises(UserError, match=r"data\.train: got .*/c\*\.txt; no file matches it"):
        found("c*.txt")
    with pytest.raises(UserError, match=r"data\.train: got .*/dee\*; no file matches it"):  # a folder
        found("dee*")
    with pytest.raises(UserError, match=r"data\.train: .*/a\.txt is named more than once; allowed: each file once"):
        found("b.txt", "a.txt", "a*.txt")


def test_a_file_to_learn_and_to_judge(tokenizer: Any, tmp_path: Path, caplog: Any, monkeypatch: Any) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text("a good film " * 9)
    (tmp_path / "link.txt").symlink_to("a.txt")
    told = f"data.validation: {tmp_path}/link.txt, {tmp_path}/b.txt: also in data.train, so the metrics say nothing of"
    names = ["link.txt", "b.txt", "c.txt"]
    data = DataConfig(
        task="lm", max_length=8, train=str(tmp_path / "[ab].txt"), validation=[str(tmp_path / name) for name in names]
    )
    load_task(data, tokenizer)
    assert caplog.text.count("also in data.train") == caplog.text.count(told) == 1
    load_task(data, tokenizer, classes=())  # a model is judged that has learned already
    load_task(data.model_copy(update={"validation": (str(tmp_path / "c.txt"),)}), tokenizer)
    monkeypatch.setenv("RANK", "1")
    load_task(data, tokenizer)
    assert caplog.text.count("also in data.train") == 1


def test_names_that_lead_to_no_file(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "loop.csv").symlink_to("loop.csv")
    data = DataConfig(task="text/classification", train=str(tmp_path / "loop.csv"), validation="b.csv", text="s")
    with pytest.raises(
        UserError, match=r"^data\.train: got .*loop\.csv; there is no such file; it is a link that leads to none$"
    ):
        load_task(data, tokenizer)
    for name in ("a\0b.csv", "a\0b/*.csv"):
        with pytest.raises(UserError, match=r"^data\.train: got a\\x00b.*csv; allowed: a name without a zero byte$"):
            files_of("data.train", [name])
    with pytest.raises(UserError, match=r"^data\.train: got x+\*\.csv; no file matches it$"):
        files_of("data.train", ["x" * 300 + "*.csv"])
