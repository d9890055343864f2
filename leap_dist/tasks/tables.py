"""Rows of columns, from local TSV, CSV, JSON and Parquet files or from a hub dataset."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO, StringIO
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from leap_dist.config.json_file import repeated
from leap_dist.config.section import nearest
from leap_dist.config.sections import DataConfig
from leap_dist.errors import UserError, own_words
from leap_dist.tasks.files import PARQUET, kind_of, open_text, opened, reading

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

Row = tuple[int, dict[str, Any]]
"""Line number and cells by column."""


@dataclass(frozen=True)
class Table:
    """The rows of one split: the texts (one or two a row) and the raw labels; `source`: where they came from."""

    source: str
    texts: list[tuple[str, ...]]
    labels: list[Any]
    label: str
    """The column of the labels."""
    places: Sequence[str]
    """Where each row stands."""

    def place(self, row: int) -> str:
        """Where the label of a row stands."""
        return f'{self.places[row]}, column "{self.label}"'


def check_letters(text: str, where: str) -> None:
    """UserError for half a character, which JSON can write and no file of text can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start].encode("unicode_escape").decode()
        raise UserError(
            f"{where}: {half} at character {error.start + 1} is half of a surrogate pair, not text; save the file "
            "again as UTF-8"
        ) from error


def cell_text(value: Any, place: str, column: str) -> str:
    """A cell as text. UserError for what is none: nothing, a list, true, no finite number, half a character."""
    if isinstance(value, str):
        check_letters(value, f'{place}, column "{column}"')
        return value
    if value is None:
        raise UserError(f'{place}: nothing in column "{column}"')
    no_number = isinstance(value, float) and not math.isfinite(value)  # an integer may be too large for isfinite
    if isinstance(value, bool) or not isinstance(value, int | float) or no_number:
        raise UserError(f'{place}, column "{column}": got {str(value)[:40]}; allowed: text')
    return str(value)


# ---------------------------------------------------------------------------------------------- hub


def load_hub(key: str, name: str, subset: str | None) -> DatasetDict:
    """All splits of a hub dataset (or of a local folder, or of the hub's cache); `key` is the setting that names it."""
    from datasets import load_dataset

    what = f'"{name}"' + (f' with subset "{subset}"' if subset else "")
    with _hub_errors(key, f"the dataset {what} could not be loaded"):
        splits: DatasetDict = load_dataset(name, subset) if subset else load_dataset(name)
    return splits


HUB = "check its name and the network, or give local files in data.train and data.validation"
FILES = "a file of this folder is damaged or cut off: restore it, or take it out"


@contextmanager
def _hub_errors(key: str, problem: str, remedy: str = HUB) -> Iterator[None]:
    """Whatever `datasets` and the libraries below it say of the user's data, as one message."""
    try:
        yield
    except StopIteration as error:  # how `datasets` ends at JSON files without a row
        raise UserError(f"{key}: {problem}: no rows in the files of a split; fill them, or take them out") from error
    except Exception as error:  # network, files, scripts, features, missing decoders: dozens of classes without a base
        raise UserError(f"{key}: {problem} ({own_words(error)}); {remedy}") from error


def _check_split(splits: Mapping[str, Any], key: str, name: str) -> None:
    if name not in splits:
        known = list(splits)
        raise UserError(
            f'{key}: got "{name}", not a split of the dataset; allowed: {", ".join(known)}{nearest(name, known)}'
        )


def hub_split(splits: DatasetDict, key: str, name: str) -> Dataset:
    """One split, which has rows; `key` is the setting that names it."""
    _check_split(splits, key, name)
    if not len(splits[name]):
        raise UserError(f'{key}: the split "{name}" of the dataset has no rows')
    return splits[name]


def hub_stream(key: str, data: DataConfig, split: str) -> Any:
    """A split of data.dataset whose rows are read as they are asked for; `key` is the setting that names the split."""
    from datasets import load_dataset

    assert data.dataset is not None
    here = Path(data.dataset).is_dir()
    with _hub_errors("data.dataset", f'the dataset "{data.dataset}" could not be streamed', FILES if here else HUB):
        splits = load_dataset(data.dataset, data.subset, streaming=True)
    _check_split(splits, key, split)
    return splits[split]


def guarded(key: str, rows: Iterable[dict[str, Any]], done: int = 0) -> Iterator[dict[str, Any]]:
    """The rows of a dataset behind `done`; what breaks on the way is the mistake of the setting `key`."""
    try:
        for row in rows:
            yield row
            done += 1
    except Exception as error:
        problem = f"the dataset cannot be read behind row {done} ({own_words(error)})"
        raise UserError(f"{key}: {problem}; check its files, and of the hub the network") from error


def split_names(data: DataConfig) -> tuple[tuple[str, str], tuple[str, str]]:
    """(setting, split) of train and of validation, where `data` names a dataset."""
    train, validation = data.train or ("train",), data.validation or ("validation",)
    return ("data.train", train[0]), ("data.validation", validation[0])


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
    return [cell_text(value, f"{source}: row {row}", column) for row, value in enumerate(values, start=1)]


def hub_table(rows: Dataset, source: str, text: Sequence[str], label: str) -> Table:
    """The texts and labels of a split."""
    columns = [hub_texts(rows, source, column) for column in text]
    labels = hub_column(rows, "data.label", label)
    if None in labels:
        raise UserError(f'{source}: row {labels.index(None) + 1}: nothing in column "{label}"')
    places = [f"{source}: row {row}" for row in range(1, len(labels) + 1)]
    return Table(source, list(zip(*columns, strict=True)), labels, label, places)


def class_names(rows: Dataset, label: str) -> tuple[str, ...]:
    """What the dataset calls its classes; empty where it does not."""
    return tuple(getattr(rows.features.get(label), "names", None) or ())


# ---------------------------------------------------------------------------------------------- files


def read_table(key: str, files: Sequence[Path], text: Sequence[str], label: str) -> Table:
    """The texts and labels of files; `key` is the setting that holds their paths."""
    columns = [*(("data.text", column) for column in text), ("data.label", label)]
    places, texts, labels = [], [], []
    for file in files:
        for place, cells in read_cells(key, file, columns):
            places.append(place)
            pairs = zip(cells, text, strict=False)
            texts.append(tuple(cell_text(cell, place, column) for cell, column in pairs))
            labels.append(cells[-1])
    return Table(", ".join(map(str, files)), texts, labels, label, places)


def read_cells(key: str, file: Path, columns: Sequence[tuple[str, str]]) -> Iterator[tuple[str, list[Any]]]:
    """Place and cells of every row, none of them null; columns: (setting, column) of each."""
    for place, row in read_rows(key, file, [column for _, column in columns]):
        yield place, [cell(str(file), place, row, *column) for column in columns]


def read_rows(key: str, file: Path, columns: Collection[str] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place ("a.jsonl: line 3") and cells by column of every row; at least one.

    columns: those that are used, None: all; of Parquet the others are not read, and None.
    """
    with reading(key, file):
        kind = kind_of(file)
        reader = _READERS.get(kind)
        if reader is None:
            raise UserError(f"{key}: got {file}; allowed: a file that ends in {', '.join(_READERS)}")
        number, unit = 0, "row" if kind in (".json", PARQUET) else "line"
        for number, row in _read_parquet(file, columns) if kind == PARQUET else reader(file):
            yield f"{file}: {unit} {number}", row
        if not number:
            raise UserError(f"{key}: {file}: no examples in it")


def cell(source: str, place: str, row: Mapping[str, Any], key: str, column: str) -> Any:
    """The value of `column`, which must be there and not null."""
    if column not in row:
        known = list(row)
        if not known or (kind_of(Path(source)) in ROWS_OF_THEIR_OWN and not place.endswith(" 1")):
            raise UserError(f'{place}: no "{column}" in it; it has {", ".join(known) or "nothing"}')
        problem = f'got "{column}", which is not a column of {source}'
        hint = _other_delimiter(known) or nearest(column, known)
        raise UserError(f"{key}: {problem}; allowed: {', '.join(known)}{hint}")
    if row[column] is None:
        raise UserError(f'{place}: nothing in column "{column}"')
    return row[column]


ROWS_OF_THEIR_OWN = (".json", ".jsonl", ".ndjson")  # one may have other columns than the next


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
        with open_text(file, newline="") as stream:
            reader = csv.reader(stream, delimiter=delimiter, quoting=quoting, strict=True)
            header: list[str] = []
            first = before = 0
            advice = (
                "replace tabs in texts by spaces, or give the column a name"
                if quoting == csv.QUOTE_NONE
                else 'put "" around texts with commas, the first " right after the comma before it, or name the column'
            )
            for cells in reader:
                if cells and not header:
                    header, first = cells, reader.line_num
                    _check_names(f"{file}: line {first}", filter(None, header))
                elif cells:
                    if any(cells[len(header) :]):
                        raise UserError(
                            f"{file}: line {before + 1}: got {len(cells)} cells, and line {first} names "
                            f"{len(header)} columns; {advice}"
                        )
                    padded = [*cells, *[None] * (len(header) - len(cells))]
                    yield before + 1, dict(zip(header, padded, strict=False))
                before = reader.line_num
    except csv.Error as error:
        if str(error) == "unexpected end of data":
            line, problem = _last_quote(file, before), "the quoted cell that begins there has no end"
        else:
            begin = f", in the row that begins in line {before + 1}" if before + 1 < reader.line_num else ""
            line, problem = reader.line_num, f"{error}{begin}"
        raise ValueError(
            f'line {line}: {problem}; close each quoted cell, and double a " that is part of one'
        ) from error
    finally:
        csv.field_size_limit(limit)


def _check_names(place: str, names: Iterable[str]) -> None:
    """Each column has a name of its own."""
    if twice := repeated(names):
        raise UserError(f'{place}: more than one column is called "{twice[0]}"; give each a name of its own')


def _last_quote(file: Path, before: int) -> int:
    """The line in which the quoted cell begins that has no end, in a row of a .csv file behind `before` lines."""
    with open_text(file, newline="") as stream:
        reader = csv.reader(islice(stream, before, None))
        *_, cells = reader
    lines = sum(1 for _ in StringIO(cells[-1], newline=""))
    return before + reader.line_num - max(lines, 1) + 1


def _read_jsonl(file: Path) -> Iterator[Row]:
    """(line number, object) of a file with one JSON object a line."""
    with open_text(file) as stream:
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


def _read_json(file: Path) -> Iterator[Row]:
    """(row, object) of a file with one list of JSON objects."""
    try:
        with open_text(file) as stream:
            rows = json.load(stream, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        hint = "; one object a line is .jsonl" if error.msg == "Extra data" else ""
        raise ValueError(f"{error}{hint}") from error
    if not isinstance(rows, list):
        raise ValueError("got one JSON value; allowed: a list of objects, or .jsonl with one object a line")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{file}: row {number}: got {json.dumps(row)[:40]}; allowed: a JSON object")
        yield number, row


def _read_parquet(file: Path, columns: Collection[str] | None = None) -> Iterator[Row]:
    """(row, cells) of a Parquet file; columns: those that are read, None: all; the cells of the others are None."""
    from pyarrow.lib import ArrowException
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with opened(file) as stream, ParquetFile(stream if stream.seekable() else BytesIO(stream.read())) as table:
            names = table.schema_arrow.names
            _check_names(str(file), names)
            read = [name for name in names if columns is None or name in columns]
            for batch in table.iter_batches(columns=read):
                unread = [None] * batch.num_rows
                cells = [_parquet_cells(name, batch.column(name)) if name in read else unread for name in names]
                for values in zip(*cells, strict=True):
                    number += 1
                    yield number, dict(zip(names, values, strict=True))
    except (ArrowException, UnicodeDecodeError) as error:  # the second of a name
        raise ValueError(own_words(error)) from error


def _parquet_cells(name: str, column: Any) -> list[Any]:
    """The values of a column; ValueError for one that Python cannot hold."""
    from pyarrow.lib import ArrowException

    try:
        return column.to_pylist()
    except (ArrowException, UnicodeDecodeError, OverflowError) as error:
        why = "" if isinstance(error, ArrowException) else f" ({error})"  # of an unknown zone it says: install zoneinfo
        problem = f'column "{name}": a cell cannot be read as {column.type}{why}'
        raise ValueError(f"{problem}; mend it, or leave the column out") from error


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".tsv": _read_tsv,
    ".txt": _read_tsv,
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    PARQUET: _read_parquet,
}
TABLES = tuple(kind for kind in _READERS if kind != ".txt")
"""Endings of files that are rows whatever the task; .txt is rows for classification and plain text for the rest."""
