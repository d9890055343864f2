"""Tables that cannot be read, or would be read as something else: one message each."""

from __future__ import annotations

import bz2
import gzip
import lzma
from pathlib import Path
from typing import Any

import pytest

from leap_dist.config.job_file import parse_job
from leap_dist.errors import UserError
from leap_dist.tasks import load_task
from leap_dist.tasks.files import zstd
from leap_dist.tasks.glue import LOCAL
from tests.tasks.test_glue import GOOD, TEXT

MANY = "sentence\tlabel\n" + "".join(f"a good film {i * i}\t{i % 2}\n" for i in range(5000))


def flipped(content: bytes) -> bytes:
    """With one bit in the middle changed."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    ("content", "suffix", "message"),
    [
        (
            gzip.compress(GOOD.encode(), mtime=0),
            ".tsv",
            r"train\.tsv: is a gzip file, not text; unpack or convert it first",
        ),
        (GOOD.encode(), ".tsv.gz", r"train\.tsv\.gz: damaged, or cut off: Not a gzipped file"),
        (gzip.compress(GOOD.encode(), mtime=0)[:-9], ".tsv.gz", r"damaged, or cut off: Compressed file ended before"),
        (flipped(gzip.compress(MANY.encode(), mtime=0)), ".tsv.gz", r"damaged, or cut off: "),
        (GOOD.encode(), ".tsv.zst", r"train\.tsv\.zst: damaged, or cut off: Unable to decompress Zstandard data"),
        (zstd.compress(GOOD.encode())[:-1], ".tsv.zst", r"damaged, or cut off: Compressed file ended before"),
        (zstd.compress(MANY.encode()) + zstd.compress(GOOD.encode())[:-3], ".tsv.zst", r"Compressed file ended before"),
        (flipped(zstd.compress(MANY.encode())), ".tsv.zst", r"damaged, or cut off: "),
        (lzma.compress(MANY.encode())[:-40], ".tsv.xz", r"damaged, or cut off: Compressed file ended before"),
        (bz2.compress(MANY.encode())[:-40], ".tsv.bz2", r"damaged, or cut off: Compressed file ended before"),
        (gzip.compress(b"PAR1....PAR1", mtime=0), ".tsv.gz", r"is a Parquet file, not text"),
        (b"PAR1....PAR1", ".tsv", r"is a Parquet file"),
        (b"PAR1....PAR1", ".parquet", r"cannot be read: .*Parquet"),
        (GOOD.encode(), ".parquet", r"cannot be read: .*Parquet"),
        (
            b'{"sentence": "a", "label": 1}',
            ".json",
            r"cannot be read: got one JSON value; allowed: a list of objects, or",
        ),
        (
            b'{"sentence": "a"}\n{"sentence": "b"}',
            ".json",
            r"cannot be read: Extra data.*; one object a line is \.jsonl",
        ),
        (GOOD.encode("utf-16"), ".tsv", r"not UTF-8 text: .* at byte 0; it looks like UTF-16; save it as UTF-8"),
        (GOOD.replace("good", "g\u00f6d").encode("latin-1"), ".csv", r"not UTF-8 text: .*; save it as UTF-8"),
        (
            b'sentence,label\n"a,1\nb,0\n',
            ".csv",
            r"train\.csv: cannot be read: line 2: the quoted cell that begins there",
        ),
        (b'{"sentence": "a", "label": 1}\n{"sentence"\n', ".jsonl", r"cannot be read: line 2: Expecting ':'"),
        (b"[" * 100_000, ".jsonl", r"cannot be read: line 1: maximum recursion|line 1: Expecting"),
    ],
)
def test_a_file_that_cannot_be_read(files: Any, tokenizer: Any, content: bytes, suffix: str, message: str) -> None:
    data = files("", suffix=suffix)
    Path(data.train[0]).write_bytes(content)
    with pytest.raises(UserError, match=rf"^data\.train: .*{message}"):
        load_task(data, tokenizer)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"sentence": "a", "label": 1}, 3]', r"train\.json: row 2: got 3; allowed: a JSON object"),
        (b'[{"sentence": "a"}, 3]', r'^data\.label: got "label", which is not a column'),
    ],
)
def test_a_row_that_is_no_object_is_named(files: Any, tokenizer: Any, content: bytes, message: str) -> None:
    data = files("", suffix=".json")
    Path(data.train[0]).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_task(data, tokenizer)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"sentence": "a", "label": 1}\n{"sentence": "b"}',
            r'train\.jsonl: line 2: no "label" in it; it has sentence$',
        ),
        ("{}", r'train\.jsonl: line 1: no "sentence" in it; it has nothing$'),
    ],
)
def test_a_row_that_lacks_a_column_is_named(files: Any, tokenizer: Any, content: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_task(files(content, suffix=".jsonl"), tokenizer)


def test_a_folder_as_a_file(files: Any, tokenizer: Any, tmp_path: Path) -> None:
    data = files(GOOD).model_copy(update={"train": (str(tmp_path),)})
    for task in ("glue/sst2", "lm", "squad"):
        with pytest.raises(UserError, match=r"^data\.train: got .*; that is a folder; allowed: a file$"):
            load_task(data.model_copy(update={"task": task}), tokenizer)


def test_a_name_that_no_file_can_have(files: Any, tokenizer: Any) -> None:
    data = files(GOOD).model_copy(update={"train": ("x" * 300 + ".tsv",)})
    with pytest.raises(UserError, match=r"^data\.train: x+\.tsv: cannot be read: File name too long"):
        load_task(data, tokenizer)


def test_a_cell_of_any_length(files: Any, tokenizer: Any) -> None:
    task = load_task(files(f"sentence\tlabel\n{'a ' * 100_000}\t1\nb\t0\n"), tokenizer)
    assert task.train.longest == 128


def test_a_file_that_is_not_text(files: Any, tokenizer: Any) -> None:
    data = files(GOOD)
    Path(data.train[0]).write_bytes(b"sentence\tlabel\n\xff\t1\n")
    with pytest.raises(UserError, match=r"data\.train: .*not UTF-8 text"):
        load_task(data, tokenizer)


# ------------------------------------------------------------------------------ what would be read as something else

JOB = {
    "train_micro_batch_size_per_gpu": 4,
    "model": {"name": "m"},
    "train": {"epochs": 1},
    "leap": {"target": 0.1},
}
MISREAD = {
    "a comma in a text": ("text,label\na, b,0\nc,1\n", ".csv", r"line 2: got 3 cells, and line 1 names 2 columns; put"),
    "a space before a quote": (
        'label,text\n0,"a"\n1, "b, c"\n',
        ".csv",
        r"line 3: got 3 cells.* right after the comma",
    ),
    "a tab in a text": ("text\tlabel\na\tb\t0\nc\t1\n", ".tsv", r"line 2: got 3 cells.*; replace tabs"),
    "semicolons": ("text;label\na;0\nb;1\n", ".csv", r'data\.text: got "text".*they look parted by \';\''),
    "commas in .tsv": ("text,label\na,0\nb,1\n", ".tsv", r"they look parted by ','"),
    "UTF-16 without its mark": ("t\0e\0x\0t\0,\0", ".csv", r"data\.train: .*not text: a zero byte at byte 1"),
    "a pointer of Git LFS": ("version https://git-lfs.github.com/spec/v1\n", ".csv", r"is a pointer of Git LFS"),
    "several labels": ('text,label\na,"[0, 1]"\nb,[1]\n', ".csv", r"line 2.*: got '\[0, 1\]'; a list of labels"),
    "names in a list": ("text,label\na,['x']\nb,['y']\n", ".csv", r"line 2.*a list of labels"),
    "nothing, as SQL writes it": ("text,label\na,x\nb,NULL\n", ".csv", r"line 3.*got 'NULL'; that is not a class"),
    "a key twice": ('{"text": "a", "label": 0, "label": 1}\n', ".jsonl", r'line 1: the key "label" stands there more'),
}


@pytest.mark.parametrize(("text", "suffix", "message"), MISREAD.values(), ids=MISREAD.keys())
def test_what_would_be_read_as_something_else(files: Any, tokenizer: Any, text: str, suffix: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_task(files(text, suffix=suffix, **TEXT), tokenizer)


def test_a_header_may_stand_below_empty_lines(files: Any, tokenizer: Any) -> None:
    task = load_task(files("\n\r\ntext,label,\na,0,\n\nb,1\n", suffix=".csv", **TEXT), tokenizer)
    assert [example["labels"] for example in task.train] == [0, 1]
    with pytest.raises(UserError, match=r"train\.csv: line 5: got 3 cells, and line 3 names 2 columns"):
        load_task(files("\n\ntext,label\na,0\nb,1,2\n", suffix=".csv", **TEXT), tokenizer)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (("s", "s"), "data.text: .*allowed: one column, or two that differ"),
        (("s", "label"), "data.text: .*label is the column of the label"),
    ],
)
def test_a_column_that_is_read_twice(text: tuple[str, ...], message: str) -> None:
    """A label among the texts is an accuracy of 1 that means nothing."""
    data = {"task": LOCAL, "train": "a.csv", "validation": "b.csv", "text": list(text)}
    with pytest.raises(UserError, match=message):
        parse_job(JOB | {"data": data})
    if text == ("s", "label"):
        parse_job(JOB | {"data": data | {"label": "y"}})
