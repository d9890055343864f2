"""What a task is: tokenised examples, how they become a batch, and how predictions are judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import torch

if TYPE_CHECKING:
    from torchmetrics import MetricCollection

Example = dict[str, Any]
"""A tokenised example: lists of int input_ids, attention_mask, perhaps token_type_ids; labels, a number."""

Problem = Literal["single_label_classification", "regression"]


@dataclass(frozen=True)
class Task:
    """A dataset with its metrics, ready for a training loop.

    `validation` maps a split's name to its examples; the first split is the main one. `metrics()` makes a
    fresh collection whose `update(preds, target)` takes the argmax ids, or the raw values where `problem` is
    "regression"; `primary` is the metric that tables show.
    """

    name: str
    num_labels: int
    train: Sequence[Example]
    validation: Mapping[str, Sequence[Example]]
    collate: Callable[[Sequence[Example]], dict[str, torch.Tensor]]
    metrics: Callable[[], MetricCollection]
    primary: str
    problem: Problem
    label_names: tuple[str, ...]
    vocab_size: int | None = None
    """Token ids are below this: a model's embedding needs at least as many rows. None: not known."""
    max_length: int | None = None
    """Longest example in tokens: a model needs at least as many positions. None: not known."""


class TokenTable(Sequence[Example]):
    """Tokenised examples in flat int32 arrays: some bytes a token, where a list of dicts takes some dozens.

    Every column of `columns` (input_ids, attention_mask, ...) holds one list of ids for each label.
    """

    def __init__(self, columns: Mapping[str, Sequence[Sequence[int]] | np.ndarray], labels: Sequence[float]) -> None:
        lengths = [len(ids) for ids in next(iter(columns.values()))]
        self.starts = np.cumsum([0, *lengths])
        self.columns = {
            key: np.fromiter(chain.from_iterable(rows), np.int32, count=self.starts[-1])
            for key, rows in columns.items()
        }
        self.labels = list(labels)

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return int(np.diff(self.starts).max(initial=0))

    def __len__(self) -> int:
        return len(self.labels)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = range(len(self))[index]
        part = slice(self.starts[row], self.starts[row + 1])
        return {**{key: ids[part].tolist() for key, ids in self.columns.items()}, "labels": self.labels[row]}


class Collator:
    """Pads a list of examples to the longest of them, on the right.

    input_ids are padded with `pad_id`, attention_mask and token_type_ids with 0: int64 (batch, longest).
    labels: (batch,), int64 for class ids, float32 for regression.
    """

    def __init__(self, pad_id: int, label_dtype: torch.dtype = torch.int64) -> None:
        self.padding = {"input_ids": pad_id, "attention_mask": 0, "token_type_ids": 0}
        self.label_dtype = label_dtype

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        longest = max(len(example["input_ids"]) for example in examples)
        batch = {
            key: torch.tensor([_padded(example[key], longest, fill) for example in examples])
            for key, fill in self.padding.items()
            if key in examples[0]
        }
        batch["labels"] = torch.tensor([example["labels"] for example in examples], dtype=self.label_dtype)
        return batch


def _padded(values: Sequence[int], length: int, fill: int) -> list[int]:
    return [*values, *[fill] * (length - len(values))]


def make_metrics(names: Sequence[str], num_labels: int) -> MetricCollection:
    """The named metrics; `update(preds, target)` takes class ids, or raw scores for the correlations."""
    from torchmetrics import MetricCollection, PearsonCorrCoef, SpearmanCorrCoef
    from torchmetrics.classification import BinaryF1Score, MulticlassAccuracy, MulticlassMatthewsCorrCoef

    make: dict[str, Callable[[], Any]] = {
        "accuracy": lambda: MulticlassAccuracy(num_labels, average="micro"),
        "f1": BinaryF1Score,
        "matthews": lambda: MulticlassMatthewsCorrCoef(num_labels),
        "pearson": PearsonCorrCoef,
        "spearman": SpearmanCorrCoef,
    }
    return MetricCollection({name: make[name]() for name in names})
