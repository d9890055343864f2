"""Rows of columns, from local TSV, CSV and JSONL files or from a hub dataset."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from leap_dist.config.json_file import repeated
from leap_dist.config.section import nearest
from leap_dist.errors import UserError, own_words

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

Row = tuple[int, dict[str, Any]]
"""Line number and cells by column."""
PACKED = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
PACKED |= {b"PAR1": "Parquet", b"ARROW1": "Arrow"}
"""How files begin that are no text."""
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
LFS_POINTER = b"version https://git-lfs"
"""How a file begins that a clone without Git LFS has in place of a large one."""


@dataclass(frozen=True)
class Table:
    """The rows of one split: the texts (one or two a row), the raw labels, and where they came from."""

    source: str
    texts: list[tuple[str, ...]]
    labels: list[Any]
    label: str
    """The column of the labels."""
    numbers: Sequence[int]
    """The line or the row of each, counted from 1."""
    unit: Literal["line", "row"]

    def place(self, row: int) -> str:
        """Where the label of a row stands."""
        return f'{self.source}: {self.unit} {self.numbers[row]}, column "{self.label}"'


def cell_text(value: Any, source: str, place: str, column: str) -> str:
    """A cell as text. UserError for what is none: nothing, a list, true, no finite number, half a character."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = value[error.start].encode("unicode_escape").decode()
            raise UserError(
                f'{source}: {place}, column "{column}": {half} at character {error.start + 1} is half of a surrogate '
                "pair, not text; save the file again as UTF-8"
            ) from error
        return value
    if value is None:
        raise UserError(f'{source}: {place}: nothing in column "{column}"')
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(f'{source}: {place}, column "{column}": got {str(value)[:40]}; allowed: text')
    return str(value)


# ---------------------------------------------------------------------------------------------- hub


def load_hub(key: str, name: str, subset: str | None) -> DatasetDict:
    """All splits of a hub dataset (or of a local folder, or of the hub's cache); `key` is the setting that names it."""
    from datasets import load_dataset

    what = f'"{name}"' + (f' with subset "{subset}"' if subset else "")
    with _hub_errors(key, f"the dataset {what} could not be loaded"):
        splits: DatasetDict = load_dataset(name, subset) if subset else load_dataset(name)
    return splits


@contextmanager
def _hub_errors(key: str, problem: str) -> Iterator[None]:
    """Whatever `datasets` and the libraries below it say of the user's data, as one message."""
    try:
        yield
    except Exception as error:  # network, files, scripts, features, missing decoders: dozens of classes without a base
        raise UserError(
            f"{key}: {problem} ({own_words(error)}); check its name and the network, or give local files in data.train "
            "and data.validation"
        ) from error


def hub_split(splits: DatasetDict, key: str, name: str) -> Dataset:
    """One split, which has rows; `key` is the setting that names it."""
    if name not in splits:
        known = list(splits)
        raise UserError(
            f'{key}: got "{name}", not a split of the dataset; allowed: {", ".join(known)}{nearest(name, known)}'
        )
    if not len(splits[name]):
        raise UserError(f'{key}: the split "{name}" of the dataset has no rows')
    return splits[name]


def hub_column(rows: Dataset, key: str, column: str) -> list[Any]:
    """The values of a column; `key` is the setting that names it."""
    if column not in rows.column_names:
        known = list(rows.column_names)
        problem = f'got "{column}", no column of the dataset'
        raise UserError(f"{key}: {problem}; allowed: {', '.join(known)}{nearest(column, known)}")
    with _hub_errors(key, f'the column "{column}" of the dataset cannot be read'):
        return list(rows[column])


def hub_texts(rows: Dataset, source: str, column: str) -> list[str]:
    """The texts in a column of a split."""
    values = hub_column(rows, "data.text", column)
    return [cell_text(value, source, f"row {row}", column) for row, value in enumerate(values, start=1)]


def hub_table(rows: Dataset, source: str, text: Sequence[str], label: str) -> Table:
    """The texts and labels of a split."""
    columns = [hub_texts(rows, source, column) for column in text]
    labels = hub_column(rows, "data.label", label)
    if None in labels:
        raise UserError(f'{source}: row {labels.index(None) + 1}: nothing in column "{label}"')
    return Table(source, list(zip(*columns, strict=True)), labels, label, range(1, len(labels) + 1), "row")


def class_names(rows: Dataset, label: str) -> tuple[str, ...]:
    """What the dataset calls its classes; empty where it does not."""
    return tuple(getattr(rows.features.get(label), "names", None) or ())


# ---------------------------------------------------------------------------------------------- files


def read_table(key: str, file: Path, text: Sequence[str], label: str) -> Table:
    """The texts and labels of a file; `key` is the setting that holds its path."""
    columns = [*(("data.text", column) for column in text), ("data.label", label)]
    numbers, texts, labels = [], [], []
    for number, cells in read_cells(key, file, columns):
        numbers.append(number)
        pairs = zip(cells, text, strict=False)
        texts.append(tuple(cell_text(cell, str(file), f"line {number}", column) for cell, column in pairs))
        labels.append(cells[-1])
    return Table(str(file), texts, labels, label, numbers, "line")


def read_texts(key: str, file: Path, column: str) -> list[str]:
    """The texts in a column of a file."""
    rows = read_cells(key, file, [("data.text", column)])
    return [cell_text(cell, str(file), f"line {number}", column) for number, (cell,) in rows]


def read_text(key: str, file: Path) -> str:
    """All of a text file."""
    with reading(key, file):
        return file.read_text("utf-8-sig")


def read_cells(key: str, file: Path, columns: Sequence[tuple[str, str]]) -> Iterator[tuple[int, list[Any]]]:
    """Line number and cells of every row, none of them null; columns: (setting, column) of each."""
    for line, row in read_rows(key, file):
        yield line, [_cell(file, line, row, *column) for column in columns]


def read_rows(key: str, file: Path) -> Iterator[Row]:
    """Every row with its line number; `key` is the setting that names the file."""
    with reading(key, file):
        reader = _READERS.get(file.suffix.lower())
        if reader is None:
            raise UserError(f"{key}: got {file}; allowed: a file that ends in {', '.join(_READERS)}")
        empty = True
        for line, row in reader(file):
            empty = False
            yield line, row
        if empty:
            raise UserError(f"{key}: {file}: no examples in it")


@contextmanager
def reading(key: str, file: Path) -> Iterator[None]:
    """A file that is not there, or not what it should be, as the mistake of the setting `key`."""
    try:
        if file.is_dir():
            raise UserError(f"{key}: got {file}; that is a folder; allowed: a file")
        if not file.is_file():
            raise UserError(f"{key}: got {file}; there is no such file")
        with file.open("rb") as stream:
            start = stream.read(1024)
        if packed := next((kind for magic, kind in PACKED.items() if start.startswith(magic)), None):
            raise UserError(f"{key}: {file}: is a {packed} file, not text; unpack or convert it first")
        if start.startswith(LFS_POINTER):
            raise UserError(f"{key}: {file}: is a pointer of Git LFS, not the file itself; run git lfs pull there")
        if b"\0" in start and not start.startswith(UTF_16):
            raise UserError(
                f"{key}: {file}: not text: a zero byte at byte {start.index(0)}, as in UTF-16 and in files of "
                "programs; save it as UTF-8 text"
            )
        yield
    except UnicodeDecodeError as error:
        hint = "; it looks like UTF-16" if start.startswith(UTF_16) else ""
        problem = f"not UTF-8 text: {error.reason} at byte {error.start}{hint}; save it as UTF-8"
        raise UserError(f"{key}: {file}: {problem}") from error
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{key}: {file}: cannot be read: {error.strerror or error}") from error
    except (csv.Error, ValueError, RecursionError) as error:  # of JSON: also too many digits, and too deep nesting
        raise UserError(f"{key}: {file}: cannot be read: {error}") from error


def _cell(file: Path, line: int, row: dict[str, Any], key: str, column: str) -> Any:
    """The value of `column`, which must be there and not null."""
    if column not in row:
        known = list(row)
        problem = f'got "{column}", which is not a column of {file}'
        hint = _other_delimiter(known) or nearest(column, known)
        raise UserError(f"{key}: {problem}; allowed: {', '.join(known)}{hint}")
    if row[column] is None:
        raise UserError(f'{file}: line {line}: nothing in column "{column}"')
    return row[column]


def _other_delimiter(header: Sequence[str]) -> str:
    """A hint, where the one name that a file seems to have is several, parted by something else."""
    found = next((mark for mark in "\t;|," if len(header) == 1 and mark in header[0]), None)
    return f"; they look parted by {found!r}: a .csv file is parted by commas, a .tsv file by tabs" if found else ""


def _read_tsv(file: Path) -> Iterator[Row]:
    yield from _read_delimited(file, delimiter="\t", quoting=csv.QUOTE_NONE)


def _read_csv(file: Path) -> Iterator[Row]:
    yield from _read_delimited(file, delimiter=",", quoting=csv.QUOTE_MINIMAL)


def _read_delimited(file: Path, delimiter: str, quoting: Literal[0, 3]) -> Iterator[Row]:
    """(number of the first line, row) of a file with a header; a short row lacks values (None).

    A longer one has a delimiter too many: its cells are not those of the columns that they stand under.
    """
    limit = csv.field_size_limit(sys.maxsize)  # a document in a cell may be of any length
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, delimiter=delimiter, quoting=quoting, strict=True)
            header, before = next(filter(None, reader), []), reader.line_num
            first = before
            advice = (
                "replace tabs in texts by spaces, or give the column a name"
                if quoting == csv.QUOTE_NONE
                else 'put "" around texts with commas, the first " right after the comma before it, or name the column'
            )
            if twice := [name for name in repeated(header) if name]:
                raise UserError(
                    f'{file}: line {before}: more than one column is called "{twice[0]}"; give each a name of its own'
                )
            for cells in reader:
                if cells:
                    if any(cells[len(header) :]):
                        raise UserError(
                            f"{file}: line {before + 1}: got {len(cells)} cells, and line {first} names "
                            f"{len(header)} columns; {advice}"
                        )
                    padded = [*cells, *[None] * (len(header) - len(cells))]
                    yield before + 1, dict(zip(header, padded, strict=False))
                before = reader.line_num
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from error
    finally:
        csv.field_size_limit(limit)


def _read_jsonl(file: Path) -> Iterator[Row]:
    """(line number, object) of a file with one JSON object a line."""
    with file.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line, object_pairs_hook=_object)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number}: {getattr(error, 'msg', error)}") from error
            if not isinstance(row, dict):
                raise UserError(f"{file}: line {number}: got {line.strip()[:40]}; allowed: a JSON object")
            yield number, row


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, in which each key stands once."""
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f'the key "{repeated(key for key, _ in pairs)[0]}" stands there more than once')
    return row


_READERS = {".tsv": _read_tsv, ".txt": _read_tsv, ".csv": _read_csv, ".jsonl": _read_jsonl}
