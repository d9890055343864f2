"""Cells, columns and places of tables: what is refused is refused with its own line, byte, row or column."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from leap_dist.config.sections import DataConfig
from leap_dist.errors import UserError
from leap_dist.tasks import load_task
from leap_dist.tasks.files import zstd
from leap_dist.tasks.glue import LOCAL
from leap_dist.tasks.tables import hub_stream, load_hub, read_cells, read_rows

HUGE = int("1" * 400)
"""An integer that no float holds."""
COLUMNS = (("data.text", "text"), ("data.label", "label"))


def cells(file: Path) -> list[list[Any]]:
    return [found for _, found in read_cells("data.train", file, COLUMNS)]


# ------------------------------------------------------------------------------ integers, and halves of characters


def as_lines(file: Path, *rows: dict[str, Any]) -> str:
    file.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return str(file)


def test_an_integer_of_400_digits_is_text_as_written(tokenizer: Any, tmp_path: Path) -> None:
    path = as_lines(tmp_path / "a.jsonl", {"text": HUGE, "label": 0}, {"text": "a", "label": 1})
    data = DataConfig(task=LOCAL, train=path, validation=path, text="text")
    assert load_task(data, tokenizer).train[0]["input_ids"] == [2, 1, 3]


def test_an_integer_of_400_digits_is_no_score(tokenizer: Any, tmp_path: Path) -> None:
    path = as_lines(tmp_path / "a.jsonl", {"text": "a", "label": HUGE})
    with pytest.raises(
        UserError, match=r'a\.jsonl: line 1, column "label": got 1{57}\.\.\.; allowed: a number from 0 to 5$'
    ):
        load_task(DataConfig(task="glue/stsb", train=path, validation=path, text="text"), tokenizer)


def test_a_class_of_400_digits_is_shown_in_short(tokenizer: Any, tmp_path: Path) -> None:
    path = as_lines(tmp_path / "a.jsonl", {"text": "a", "label": HUGE}, {"text": "b", "label": 0})
    other = as_lines(tmp_path / "b.jsonl", {"text": "a", "label": 1})
    with pytest.raises(UserError, match=r"b\.jsonl: line 1, column \"label\": got 1; allowed: 0, 1{197}\.\.\.$"):
        load_task(DataConfig(task=LOCAL, train=path, validation=other, text="text"), tokenizer)


def test_half_a_character_is_no_class(tokenizer: Any, tmp_path: Path) -> None:
    path = as_lines(tmp_path / "a.jsonl", {"text": "a", "label": "x"}, {"text": "b", "label": "\ud83d"})
    with pytest.raises(
        UserError,
        match=r"a\.jsonl: line 2, column \"label\": got '\\ud83d'; half of a surrogate pair is not text; save",
    ):
        load_task(DataConfig(task=LOCAL, train=path, validation=path, text="text"), tokenizer)


# ------------------------------------------------------------------------------ Parquet


@pytest.fixture
def parquet(tmp_path: Path) -> Callable[..., Path]:
    """Writes columns, (name, array of pyarrow), beside a text and a label."""
    import pyarrow
    from pyarrow.parquet import write_table

    def make(*others: tuple[str, Any]) -> Path:
        columns = [("text", ["a", "b"]), *others, ("label", [1, 0])]
        names = [name for name, _ in columns]
        table = pyarrow.Table.from_arrays([pyarrow.array(values) for _, values in columns], names=names)
        write_table(table, tmp_path / "a.parquet")
        return tmp_path / "a.parquet"

    return make


def test_a_column_of_parquet_that_is_named_twice(parquet: Any) -> None:
    with pytest.raises(
        UserError, match=r'a\.parquet: more than one column is called "text"; give each a name of its own$'
    ):
        cells(parquet(("text", ["x", "y"])))


def broken() -> dict[str, tuple[Any, str]]:
    """Columns whose first cell Python cannot hold, and what is said of each."""
    import pyarrow

    text = pyarrow.array([b"caf\xe9", b"x"])
    return {
        "a year beyond 9999": (
            pyarrow.array([2**60, 1], pyarrow.timestamp("us")),
            r"timestamp\[us\] \(date value out ",
        ),
        "an unknown zone": (
            pyarrow.array([1, 1], pyarrow.timestamp("ns", tz="Mars/Base")),
            r"timestamp\[ns, tz=Mars/Base\]; mend",
        ),
        "Latin-1": (pyarrow.Array.from_buffers(pyarrow.string(), 2, text.buffers()), r"string \('utf-8' codec can't"),
    }


@pytest.mark.parametrize("kind", ["a year beyond 9999", "an unknown zone", "Latin-1"])
def test_a_column_of_parquet_that_nobody_asked_for(parquet: Any, kind: str) -> None:
    values, message = broken()[kind]
    file = parquet(("other", values))
    assert cells(file) == [["a", 1], ["b", 0]]
    with pytest.raises(
        UserError,
        match=rf'^data\.train: .*a\.parquet: cannot be read: column "other": a cell cannot be read as {message}',
    ) as raised:
        list(read_rows("data.train", file))
    assert str(raised.value).endswith("; mend it, or leave the column out")


@pytest.mark.parametrize(("wanted", "missing"), [(("text", "lab"), "lab"), (("tex", "lab"), "tex")])
def test_a_column_that_parquet_does_not_have(parquet: Any, wanted: tuple[str, str], missing: str) -> None:
    columns = list(zip(("data.text", "data.label"), wanted, strict=True))
    with pytest.raises(
        UserError,
        match=rf'got "{missing}", which is not a column of .*a\.parquet; allowed: text, other, label; did you',
    ):
        list(read_cells("data.train", parquet(("other", [1, 2])), columns))


def test_whatever_arrow_says_of_a_damaged_file(tmp_path: Path) -> None:
    """Any byte of its footer changed: the rows, or one message."""
    import pyarrow
    from pyarrow.parquet import write_table

    written = io.BytesIO()
    write_table(pyarrow.table({"text": ["a", "b"], "label": [1, 0]}), written)
    content, file, refused = written.getvalue(), tmp_path / "a.parquet", 0
    for place in range(len(content) - 500, len(content) - 8):
        file.write_bytes(content[:place] + b"\x49" + content[place + 1 :])
        try:
            assert len(cells(file)) == 2
        except UserError:
            refused += 1
    assert refused > 50


# ------------------------------------------------------------------------------ where a mistake stands


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(("suffix", "pack"), [("", bytes), (".gz", gzip.compress), (".zst", zstd.compress)])
def test_the_line_and_the_byte_that_are_no_utf_8(tmp_path: Path, end: str, suffix: str, pack: Any) -> None:
    """Far behind the first piece that a decoder sees, whose count begins anew with each."""
    before = f"\ufefftext,label{end}" + f"h\u00e9llo world,0{end}" * 2000
    file = tmp_path / f"a.csv{suffix}"
    file.write_bytes(pack(before.encode() + b"caf\xe9,1\n"))
    place = rf"in line 2002, at byte {len(before.encode()) + 3}; save it as UTF-8$"
    with pytest.raises(
        UserError, match=rf"^data\.train: .*a\.csv{suffix}: not UTF-8 text: invalid continuation byte {place}"
    ):
        cells(file)


UNCLOSED = {
    "one of many lines": ("ok,0\n" * 10 + '"never ends,1\n' + "ok,1\n" * 3000, 12),
    "behind empty lines": ('\n\n"never ends,1\nb,0\n', 4),
    "behind a cell of two lines": ('a,0\n"b\nc","never ends\nb,0', 4),
    "in the last line": ('a,0\nb,"', 3),
    "in lines of Windows": ('a,0\r\n"never ends,1\r\nb,0\r\n', 3),
    "behind another quoted cell": ('a,0\n"b","never ends\nb,0\n', 3),
}


@pytest.mark.parametrize(("rows", "line"), UNCLOSED.values(), ids=UNCLOSED.keys())
def test_a_quoted_cell_that_never_ends(tmp_path: Path, rows: str, line: int) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(b"text,label\n" + rows.encode())
    problem = rf"line {line}: the quoted cell that begins there has no end; close each quoted cell, and double a "
    with pytest.raises(UserError, match=rf"^data\.train: .*a\.csv: cannot be read: {problem}"):
        cells(file)


def test_a_quoted_cell_that_the_next_one_ends(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text('text,label\na,0\n"never ends,1\nb,0\n"c",1\n')
    with pytest.raises(
        UserError, match=r"line 5: ',' expected after '\"', in the row that begins in line 3; close each quoted cell"
    ):
        cells(file)


# ------------------------------------------------------------------------------ datasets


def test_files_of_a_dataset_that_are_empty(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_bytes(b"")
    data = DataConfig(task="lm", dataset=str(tmp_path / "set"), streaming=True)
    problem = r"^data\.dataset: the dataset .*: no rows in the files of a split; fill them, or take them out$"
    with pytest.raises(UserError, match=problem):
        hub_stream("data.train", data, "train")
    with pytest.raises(UserError, match=problem):
        load_hub("data.dataset", str(tmp_path / "set"), None)
