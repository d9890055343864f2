"""Rows of columns, from local TSV, CSV and JSONL files or from a hub dataset."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from leap_dist.config.section import nearest
from leap_dist.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

Row = tuple[int, dict[str, Any]]
"""Line number and cells by column."""


@dataclass(frozen=True)
class Table:
    """The rows of one split: the texts (one or two a row), the raw labels, and where they came from."""

    source: str
    texts: list[tuple[str, ...]]
    labels: list[Any]


# ---------------------------------------------------------------------------------------------- hub


def load_hub(key: str, name: str, subset: str | None) -> DatasetDict:
    """All splits of a hub dataset (or of a local folder, or of the hub's cache); `key` is the setting that names it."""
    from datasets import load_dataset

    what = f'"{name}"' + (f' with subset "{subset}"' if subset else "")
    try:
        splits: DatasetDict = load_dataset(name, subset) if subset else load_dataset(name)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{key}: the dataset {what} could not be loaded ({error}); check its name and the network, or give local "
            "files in data.train and data.validation"
        ) from error
    return splits


def hub_split(splits: DatasetDict, key: str, name: str) -> Dataset:
    """One split; `key` is the setting that names it."""
    if name not in splits:
        known = list(splits)
        raise UserError(
            f'{key}: got "{name}", no split of the dataset; allowed: {", ".join(known)}{nearest(name, known)}'
        )
    return splits[name]


def hub_column(rows: Dataset, key: str, column: str) -> list[Any]:
    """The values of a column; `key` is the setting that names it."""
    if column not in rows.column_names:
        known = list(rows.column_names)
        problem = f'got "{column}", no column of the dataset'
        raise UserError(f"{key}: {problem}; allowed: {', '.join(known)}{nearest(column, known)}")
    return list(rows[column])


def hub_table(rows: Dataset, source: str, text: Sequence[str], label: str) -> Table:
    """The texts and labels of a split."""
    columns = [hub_column(rows, "data.text", column) for column in text]
    labels = hub_column(rows, "data.label", label)
    for name, values in zip((*text, label), (*columns, labels), strict=True):
        if None in values:
            raise UserError(f'{source}: row {values.index(None) + 1}: nothing in column "{name}"')
    return Table(source, [tuple(map(str, texts)) for texts in zip(*columns, strict=True)], labels)


# ---------------------------------------------------------------------------------------------- files


def read_table(key: str, file: Path, text: Sequence[str], label: str) -> Table:
    """The texts and labels of a file; `key` is the setting that holds its path."""
    columns = [*(("data.text", column) for column in text), ("data.label", label)]
    rows = list(read_cells(key, file, columns))
    return Table(str(file), [tuple(map(str, values[:-1])) for values in rows], [values[-1] for values in rows])


def read_cells(key: str, file: Path, columns: Sequence[tuple[str, str]]) -> Iterator[list[Any]]:
    """The cells of every row, none of them null; columns: (setting, column) of each."""
    reader = _READERS.get(file.suffix.lower())
    if reader is None and file.is_file():
        raise UserError(f"{key}: got {file}; allowed: a file that ends in {', '.join(_READERS)}")
    empty = True
    with reading(key, file):
        for line, row in reader(file) if reader else ():
            empty = False
            yield [_cell(file, line, row, *column) for column in columns]
    if empty:
        raise UserError(f"{key}: {file}: no examples in it")


@contextmanager
def reading(key: str, file: Path) -> Iterator[None]:
    """A file that is not there, or not what it should be, as the mistake of the setting `key`."""
    if not file.is_file():
        raise UserError(f"{key}: got {file}; there is no such file")
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{key}: {file}: not UTF-8 text: {error.reason} at byte {error.start}") from error
    except UserError:
        raise
    except (csv.Error, ValueError, RecursionError) as error:  # of JSON: also too many digits, and too deep nesting
        raise UserError(f"{key}: {file}: cannot be read: {error}") from error


def _cell(file: Path, line: int, row: dict[str, Any], key: str, column: str) -> Any:
    """The value of `column`, which must be there and not null."""
    if column not in row:
        raise UserError(f'{key}: got "{column}", which is not a column of {file}; allowed: {", ".join(row)}')
    if row[column] is None:
        raise UserError(f'{file}: line {line}: nothing in column "{column}"')
    return row[column]


def _read_tsv(file: Path) -> Iterator[Row]:
    yield from _read_delimited(file, delimiter="\t", quoting=csv.QUOTE_NONE)


def _read_csv(file: Path) -> Iterator[Row]:
    yield from _read_delimited(file, delimiter=",", quoting=csv.QUOTE_MINIMAL)


def _read_delimited(file: Path, delimiter: str, quoting: Literal[0, 3]) -> Iterator[Row]:
    """(line number, row) of a file with a header; a short row lacks values (None), a long one is cut."""
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, delimiter=delimiter, quoting=quoting)
        header = next(reader, [])
        for cells in reader:
            if cells:
                padded = [*cells, *[None] * (len(header) - len(cells))]
                yield reader.line_num, dict(zip(header, padded, strict=False))


def _read_jsonl(file: Path) -> Iterator[Row]:
    """(line number, object) of a file with one JSON object a line."""
    with file.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            row = json.loads(line)
            if not isinstance(row, dict):
                raise UserError(f"{file}: line {number}: got {line.strip()[:40]}; allowed: a JSON object")
            yield number, row


_READERS = {".tsv": _read_tsv, ".txt": _read_tsv, ".csv": _read_csv, ".jsonl": _read_jsonl}
