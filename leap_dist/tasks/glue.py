"""Classes and scores of texts: the nine GLUE tasks, and any text classification, from the hub or local files."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from leap_dist.config.json_file import shortened
from leap_dist.config.sections import DataConfig
from leap_dist.errors import UserError
from leap_dist.tasks.base import Collator, Task, TokenTable, flat, joined, pad_id, tokenised
from leap_dist.tasks.cache import Arrays, cached
from leap_dist.tasks.files import files_of
from leap_dist.tasks.metrics import LabelEvaluation
from leap_dist.tasks.tables import Table, class_names, hub_split, hub_table, load_hub, read_table, split_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Label = TypeVar("Label", str, float)

HUB_DATASET = "nyu-mll/glue"
TOKENIZE_ROWS = 1000
"""Rows that the tokenizer sees at once: bounds the memory of its answer."""


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
NOT_NAMES = ("nan", "-nan", "<na>", "#n/a", "null", "inf", "-inf")
"""What table programs write where there is no value."""
HALF = re.compile(r"[\ud800-\udfff]")
NO_CLASS = "that is not a class; allowed: a name or a number >= 0; fill it in, or remove the row"


def load(data: DataConfig, tokenizer: PreTrainedTokenizerBase, classes: tuple[str, ...] | None = None) -> Task:
    """The task from the hub, or from what `data` names: local files, or another dataset.

    classes: those of a model that was trained on it, by their ids; None: what train has.
    """
    known = GLUE.get(data.task)
    train, validation, names = _tables(data, known)
    if known is not None and not known.label_names:
        return _build(data, tokenizer, train, validation, (), _score)
    if classes is None or classes == names:
        classes, ids = _class_labels(train, names, data.task)
    else:
        ids = _trained_ids(train, classes)
    return _build(data, tokenizer, train, validation, classes, partial(_class_id, ids))


def _build(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    train: Table,
    validation: dict[str, Table],
    label_names: tuple[str, ...],
    number: Callable[[Any], float],
) -> Task:
    """Tokenise the tables; no `label_names` means regression."""
    pad = pad_id(tokenizer)
    metric_names = GLUE[data.task].metrics if data.task in GLUE else ("accuracy",)
    tables = {"": train, **validation}
    splits = {name: _tokenize(table, tokenizer, data.max_length, number) for name, table in tables.items()}
    longest = max(table.longest for table in splits.values())
    return Task(
        name=data.task,
        num_labels=len(label_names) or 1,
        train=splits.pop(""),
        validation=splits,
        collate=Collator(pad, {"labels": torch.int64 if label_names else torch.float32}),
        evaluation=LabelEvaluation(metric_names, len(label_names), regression=not label_names),
        primary=metric_names[0],
        problem="single_label_classification" if label_names else "regression",
        label_names=label_names or ("score",),
        vocab_size=len(tokenizer),
        max_length=longest,
        pad_id=pad,
    )


def _tokenize(
    table: Table, tokenizer: PreTrainedTokenizerBase, max_length: int, number: Callable[[Any], float]
) -> TokenTable:
    """Special tokens included, cut to `max_length` (the longer text of a pair first), not padded."""
    labels = [_labelled(number, table, row) for row in range(len(table.labels))]

    def make() -> Arrays:
        parts = []
        for start in range(0, len(labels), TOKENIZE_ROWS):
            texts = list(zip(*table.texts[start : start + TOKENIZE_ROWS], strict=True))
            encoded = tokenised(tokenizer, *map(list, texts), truncation=True, max_length=max_length)
            parts.append(flat(dict(encoded)))
        return joined(parts)

    tokens = TokenTable(cached(tokenizer, (max_length, *table.texts), make), labels=labels)
    if empty := np.flatnonzero(tokens.lengths == 0).tolist():
        problem = f"got {table.texts[empty[0]]}; allowed: a text of which the tokenizer makes tokens"
        raise UserError(f"{table.places[empty[0]]}: {problem}")
    return tokens


def _tables(data: DataConfig, known: GlueTask | None) -> tuple[Table, dict[str, Table], tuple[str, ...] | None]:
    """(train, validation splits, label names if they are known); columns default to those of the hub's dataset."""
    names = known.label_names if known else None
    if known is not None and not data.train and not data.dataset:
        splits = load_hub("data.task", HUB_DATASET, data.task.removeprefix("glue/"))
        tables = {
            name: hub_table(hub_split(splits, "data.task", name), f"{HUB_DATASET} {name}", known.text, "label")
            for name in ("train", *known.validation)
        }
        return tables.pop("train"), tables, names
    text = data.text or (known.text if known else None)
    label = data.label or "label"
    if not data.train and not data.dataset:
        raise UserError(f"data.train: missing; {data.task} needs local files in train and validation, or data.dataset")
    if text is None:
        raise UserError(f"data.text: missing; {data.task} needs the name of one or two text columns")
    if data.dataset:
        return _dataset_tables(data, text, label, names)
    given = (("data.train", data.train or ()), ("data.validation", data.validation or ()))
    train, validation = (read_table(key, files_of(key, files), text, label) for key, files in given)
    return train, {"validation": validation}, names


def _dataset_tables(
    data: DataConfig, text: tuple[str, ...], label: str, names: tuple[str, ...] | None
) -> tuple[Table, dict[str, Table], tuple[str, ...] | None]:
    """As `_tables`, of `data.dataset`; where it names its classes those are the label names."""
    assert data.dataset is not None
    splits = load_hub("data.dataset", data.dataset, data.subset)
    chosen = split_names(data)
    rows = [hub_split(splits, key, split) for key, split in chosen]
    tables = [
        hub_table(part, f"{data.dataset} {split}", text, label) for part, (_, split) in zip(rows, chosen, strict=True)
    ]
    own, others = (class_names(part, label) for part in rows)
    if own != others:
        problem = f"train has the classes {_listing(own)}, validation {_listing(others)}"
        raise UserError(f"data.dataset: {data.dataset}: {problem}; allowed: the same classes in both")
    if own and names:
        _check_own(data, own, names)
    return tables[0], {"validation": tables[1]}, own or names


def _check_own(data: DataConfig, own: Sequence[str], names: Sequence[str]) -> None:
    """A dataset's own classes: as many as the task's `names`, and where F1 is judged, these or their numbers."""
    if len(own) != len(names):
        problem = f"got {len(own)} classes ({_listing(own)})"
        raise UserError(f"data.dataset: {data.dataset}: {problem}; allowed: {len(names)}, as {data.task} has")
    numbers = [str(i) for i in range(len(names))]
    if _has_f1(data.task) and [name.casefold() for name in own] not in ([*names], numbers):
        raise UserError(
            f"data.dataset: {data.dataset}: got the classes {_listing(own)}; allowed: {_listing(names)}, in this "
            f'order, as F1 is that of the second; rename them, or judge by accuracy: "task": "{LOCAL}"'
        )


# ---------------------------------------------------------------------------------------------- labels


def _labelled(read: Callable[[Any], Label], table: Table, row: int) -> Label:
    """The label of a row as `read` has it; what it refuses is refused with its place."""
    try:
        return read(table.labels[row])
    except ValueError as error:
        raise UserError(f"{table.place(row)}: got {_shown(table.labels[row])}; {error}") from error


def _score(label: Any) -> float:
    """A similarity score; `ValueError` says what is allowed."""
    try:
        score = math.nan if isinstance(label, bool) else float(label)
    except (TypeError, ValueError, OverflowError):  # the last of an integer of 400 digits
        score = math.nan
    if not 0 <= score <= MAX_SCORE:
        raise ValueError(f"allowed: a number from 0 to {MAX_SCORE:g}")
    return score


def _class_id(ids: Mapping[str, int], label: Any) -> float:
    """The id of a raw label; `ValueError` for another label than those of `ids`."""
    name = _class_name(label)
    if name not in ids:
        raise ValueError(f"allowed: {_listing(ids)}")
    return ids[name]


def _trained_ids(table: Table, classes: Sequence[str]) -> dict[str, int]:
    """The ids of the classes of a trained model by what stands for them in the data: their names, or their numbers.

    Numbers alone are those of a head that kept its names (models/labels.py), of which then none is a number.
    """
    numbers = {str(i): i for i in range(len(classes))}
    if any(re.fullmatch(r"\d+", name) for name in classes) or not _seen(table) <= numbers.keys():
        return {name: i for i, name in enumerate(classes)}
    return numbers


def _seen(table: Table) -> set[str]:
    """The labels in a table."""
    return {_labelled(_class_name, table, row) for row in range(len(table.labels))}


def _class_labels(train: Table, expected: tuple[str, ...] | None, task: str) -> tuple[tuple[str, ...], dict[str, int]]:
    """Label names, and the class ids by what stands for them in the data.

    Integers 0..K-1 are kept. Known names (a GLUE task's, or a dataset's) have their ids. Everything else is numbered in
    sorted order over train. `expected` are the known names: there must be as many classes.
    """
    seen = sorted(_seen(train), key=_order)
    integers = [label for label in seen if re.fullmatch(r"\d+", label)]
    truths = [row for row, label in enumerate(train.labels) if isinstance(label, bool)]
    if truths and integers:
        shown = _shown(train.labels[truths[0]])
        raise UserError(
            f"{train.place(truths[0])}: got {shown}, and other rows have numbers; allowed: only numbers, or only names"
        )
    known = {name.casefold(): i for i, name in enumerate(expected or ())}
    spelled = {name: known[name.casefold()] for name in seen if name.casefold() in known}
    if expected is not None and (len(spelled) == len(seen) or len(integers) == len(seen)):
        names, ids = expected, {name: i for i, name in enumerate(expected)} | spelled
        if integers:
            ids = {str(i): i for i in range(len(expected))}
    else:
        _check_unknown(train, expected or (), task)
        names, ids = tuple(seen), {name: i for i, name in enumerate(seen)}
    if len(names) < 2 or (expected is not None and len(names) != len(expected)):
        wanted = len(expected) if expected is not None else "2 or more"
        received = f"{len(names)} different labels ({_listing(names)})"
        raise UserError(f"{train.source}: got {received}; allowed: {wanted}")
    return names, ids


def _has_f1(task: str) -> bool:
    """Whether the task is judged by F1, which is that of class 1 alone."""
    return task in GLUE and "f1" in GLUE[task].metrics


def _check_unknown(train: Table, expected: Sequence[str], task: str) -> None:
    """Labels that are not all of `expected`, nor all their numbers: the alphabet numbers them only if none is known.

    Raises UserError also where F1 depends on which of them is which.
    """
    names = [_class_name(label).casefold() for label in train.labels]
    known = {*map(str, range(len(expected))), *(name.casefold() for name in expected)}
    if not known or not (known.intersection(names) or _has_f1(task)):
        return
    row = next((i for i, name in enumerate(names) if name not in known), names.index(min(names)))
    numbers = f"in all rows their numbers, from 0 to {len(expected) - 1}"
    problem = f"got {_shown(train.labels[row])}; allowed: {_listing(expected)}, the classes of {task}, or {numbers}"
    raise UserError(f"{train.place(row)}: {problem}; rename the labels")


def _class_name(label: Any) -> str:
    """One spelling for a label, whichever file format it comes from: 1, 1.0, "1" and " 1.0 " are the same.

    `ValueError` for what stands for no label: nothing, NaN, a number below 0 (-1 marks it on the hub), a list.
    """
    if not isinstance(label, (str, int, float)):
        raise ValueError(NO_CLASS)
    name = str(int(label) if isinstance(label, float) and label.is_integer() else label).strip()
    if not name or name.lower() in NOT_NAMES or re.fullmatch(r"-\d+(\.\d+)?", name):
        raise ValueError(NO_CLASS)
    if HALF.search(name):
        raise ValueError("half of a surrogate pair is not text; save the file again as UTF-8")
    if name[0] in "[{(" and _is_list(name):
        raise ValueError("a list of labels, and an example has one class here; allowed: one name or number a row")
    return re.sub(r"^(\d+)\.0+$", r"\1", name)


def _is_list(name: str) -> bool:
    """Whether a text is a list, as Python or JSON writes it: a table has no other way to hold several labels."""
    try:
        return isinstance(ast.literal_eval(name), list | tuple | dict | set)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return False


def _order(label: str) -> tuple[int, int, str, str]:
    """Integers by value, then strings by the alphabet."""
    digits = label.lstrip("0")  # int() refuses some thousands of them
    return (0, len(digits), digits, label) if re.fullmatch(r"\d+", label) else (1, 0, label, label)


def _shown(label: Any) -> str:
    text = repr(label)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _listing(values: Iterable[str]) -> str:
    names = list(values)
    return ", ".join(map(shortened, names[:10])) + (f", ... ({len(names)} in all)" if len(names) > 10 else "")
