"""The nine GLUE tasks from the hub, and any text classification from local TSV, CSV or JSONL files."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from leap_dist.config import DataConfig
from leap_dist.errors import UserError
from leap_dist.tasks.base import Collator, Problem, Task, TokenTable, make_metrics

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HUB_DATASET = "nyu-mll/glue"
SUFFIXES = (".tsv", ".txt", ".csv", ".jsonl")
TOKENIZE_ROWS = 1000
"""Rows that the tokenizer sees at once: bounds the memory of its answer."""


Row = tuple[int, dict[str, Any]]
"""Line number and cells by column."""


@dataclass(frozen=True)
class GlueTask:
    """A task as the hub stores it. No label names: regression on a score from 0 to 5."""

    text: tuple[str, ...]
    label_names: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    validation: tuple[str, ...] = ("validation",)


_ENTAILMENT = ("entailment", "not_entailment")
_PAIR = ("sentence1", "sentence2")

GLUE = {
    "glue/cola": GlueTask(("sentence",), ("unacceptable", "acceptable"), ("matthews", "accuracy")),
    "glue/sst2": GlueTask(("sentence",), ("negative", "positive")),
    "glue/mrpc": GlueTask(_PAIR, ("not_equivalent", "equivalent"), ("accuracy", "f1")),
    "glue/qqp": GlueTask(("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
    "glue/stsb": GlueTask(_PAIR, (), ("spearman", "pearson")),
    "glue/mnli": GlueTask(
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        validation=("validation_matched", "validation_mismatched"),
    ),
    "glue/qnli": GlueTask(("question", "sentence"), _ENTAILMENT),
    "glue/rte": GlueTask(_PAIR, _ENTAILMENT),
    "glue/wnli": GlueTask(_PAIR, ("not_entailment", "entailment")),
}
LOCAL = "text/classification"
NAMES = (*GLUE, LOCAL)
MAX_SCORE = 5.0


@dataclass(frozen=True)
class Table:
    """The rows of one split: the texts (one or two a row), the raw labels, and where they came from."""

    source: str
    texts: list[tuple[str, ...]]
    labels: list[Any]


def load(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Task:
    """The task from the hub, or from local files where `data` names them."""
    known = GLUE.get(data.task)
    train, validation = _local_tables(data, known) if data.train else _hub_tables(data.task)
    if known is not None and not known.label_names:
        return _build(data, tokenizer, train, validation, (), _score)
    names, number = _class_labels(train, known.label_names if known else None)
    return _build(data, tokenizer, train, validation, names, number)


def _build(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    train: Table,
    validation: dict[str, Table],
    label_names: tuple[str, ...],
    number: Callable[[Any], float],
) -> Task:
    """Tokenise the tables; no `label_names` means regression."""
    if tokenizer.pad_token_id is None:
        raise UserError("model.name: its tokenizer has no padding token; set one in its tokenizer_config.json")
    metric_names = GLUE[data.task].metrics if data.task in GLUE else ("accuracy",)
    problem: Problem = "single_label_classification" if label_names else "regression"
    tables = {"": train, **validation}
    splits = {name: _tokenize(table, tokenizer, data.max_length, number) for name, table in tables.items()}
    longest = max(table.longest for table in splits.values())
    return Task(
        name=data.task,
        num_labels=len(label_names) or 1,
        train=splits.pop(""),
        validation=splits,
        collate=Collator(tokenizer.pad_token_id, torch.int64 if label_names else torch.float32),
        metrics=lambda: make_metrics(metric_names, len(label_names)),
        primary=metric_names[0],
        problem=problem,
        label_names=label_names or ("score",),
        vocab_size=len(tokenizer),
        max_length=longest,
    )


def _tokenize(
    table: Table, tokenizer: PreTrainedTokenizerBase, max_length: int, number: Callable[[Any], float]
) -> TokenTable:
    """Special tokens included, cut to `max_length` (the longer text of a pair first), not padded."""
    labels = [_labelled(number, table, row) for row in range(len(table.labels))]
    columns: dict[str, list[list[int]]] = {}
    for start in range(0, len(labels), TOKENIZE_ROWS):
        texts = list(zip(*table.texts[start : start + TOKENIZE_ROWS], strict=True))
        encoded = tokenizer(*map(list, texts), truncation=True, max_length=max_length)
        for key, rows in encoded.items():
            columns.setdefault(key, []).extend(rows)
    return TokenTable(columns, labels)


# ---------------------------------------------------------------------------------------------- labels


def _labelled(number: Callable[[Any], float], table: Table, row: int) -> float:
    try:
        return number(table.labels[row])
    except ValueError as error:
        raise UserError(f"{table.source}: row {row + 1}: label: {error}") from error


def _score(label: Any) -> float:
    """A similarity score; `ValueError` says what is allowed."""
    try:
        score = float(label)
    except (TypeError, ValueError):
        score = math.nan
    if not 0 <= score <= MAX_SCORE:
        raise ValueError(f"got {label!r}; allowed: a number from 0 to {MAX_SCORE:g}")
    return score


def _class_labels(train: Table, expected: tuple[str, ...] | None) -> tuple[tuple[str, ...], Callable[[Any], float]]:
    """Label names, and the function from a raw label to its class id.

    Integers 0..K-1 are kept. A GLUE task's own label names get the task's ids. Everything else is numbered in
    sorted order over train. `expected` are a GLUE task's label names: there must be as many classes.
    """
    seen = sorted({_normal(label) for label in train.labels}, key=_order)
    integers = [int(label) for label in seen if re.fullmatch(r"\d+", label)]
    if expected is not None and (set(seen) <= set(expected) or len(integers) == len(seen)):
        names, ids = expected, {name: i for i, name in enumerate(expected)}
        if integers:
            ids = {str(i): i for i in range(len(expected))}
    else:
        names, ids = tuple(seen), {name: i for i, name in enumerate(seen)}
    if len(names) < 2 or (expected is not None and len(names) != len(expected)):
        wanted = len(expected) if expected is not None else "2 or more"
        received = f"{len(names)} different labels ({_listing(names)})"
        raise UserError(f"{train.source}: got {received}; allowed: {wanted}")

    def number(label: Any) -> float:
        if _normal(label) not in ids:
            raise ValueError(f"got {label!r}; allowed: {_listing(ids)}")
        return ids[_normal(label)]

    return names, number


def _normal(label: Any) -> str:
    """One spelling for a label, whichever file format it comes from: 1, 1.0 and "1" are the same."""
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    return str(label).strip()


def _order(label: str) -> tuple[int, float, str]:
    """Integers by value, then strings by the alphabet."""
    return (0, int(label), "") if re.fullmatch(r"-?\d+", label) else (1, 0, label)


def _listing(values: Iterable[str]) -> str:
    names = list(values)
    return ", ".join(names[:10]) + (f", ... ({len(names)} in all)" if len(names) > 10 else "")


# ---------------------------------------------------------------------------------------------- hub


def _hub_tables(name: str) -> tuple[Table, dict[str, Table]]:
    """Train and validation splits of a GLUE task from the hub (or from its local cache)."""
    if name not in GLUE:
        raise UserError(f"data.train: missing; {name} reads local files: give train and validation")
    from datasets import load_dataset

    try:
        splits = load_dataset(HUB_DATASET, name.removeprefix("glue/"))
    except (OSError, ValueError) as error:
        raise UserError(
            f'data.task: "{name}" could not be loaded from the hub dataset {HUB_DATASET} ({error}); '
            "check the network, or give local files in data.train and data.validation"
        ) from error
    columns = GLUE[name].text
    tables = {
        split: Table(
            f"{HUB_DATASET} {split}",
            list(zip(*(splits[split][column] for column in columns), strict=True)),
            list(splits[split]["label"]),
        )
        for split in ("train", *GLUE[name].validation)
    }
    return tables.pop("train"), tables


# ---------------------------------------------------------------------------------------------- files


def _local_tables(data: DataConfig, known: GlueTask | None) -> tuple[Table, dict[str, Table]]:
    """The two local files that `data` names; columns default to those of the hub's dataset."""
    text = data.text or (known.text if known else None)
    if text is None:
        raise UserError(f"data.text: missing; {data.task} needs the name of one or two text columns")
    label = data.label or "label"
    assert data.train is not None and data.validation is not None
    train = _read_table("data.train", Path(data.train), text, label)
    return train, {"validation": _read_table("data.validation", Path(data.validation), text, label)}


def _read_table(key: str, file: Path, text: tuple[str, ...], label: str) -> Table:
    """One file; `key` is the dotted name of the setting that holds its path."""
    if not file.is_file():
        raise UserError(f"{key}: got {file}; there is no such file")
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        raise UserError(f"{key}: got {file}; allowed: a file that ends in {', '.join(SUFFIXES)}")
    table = Table(str(file), [], [])
    try:
        for line, row in reader(file):
            values = [_cell(file, line, row, *column) for column in _columns(text, label)]
            table.texts.append(tuple(map(str, values[:-1])))
            table.labels.append(values[-1])
    except UnicodeDecodeError as error:
        raise UserError(f"{key}: {file}: not UTF-8 text: {error.reason} at byte {error.start}") from error
    except (csv.Error, json.JSONDecodeError) as error:
        raise UserError(f"{key}: {file}: cannot be read: {error}") from error
    if not table.labels:
        raise UserError(f"{key}: {file}: no examples in it")
    return table


def _columns(text: tuple[str, ...], label: str) -> list[tuple[str, str]]:
    """(setting, column) of each cell of a row, the label last."""
    return [*(("data.text", column) for column in text), ("data.label", label)]


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
