"""What a task is: tokenised examples, how they become a batch, and how predictions are judged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, Protocol, overload

import numpy as np
import torch
from torch import Tensor

from leap_dist.errors import UserError, own_words
from leap_dist.ops.words import IGNORED

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

Example = dict[str, Any]
"""A tokenised example: lists of int (input_ids, attention_mask, ...) and single numbers (labels, ...)."""

Batch = dict[str, Tensor]

Problem = Literal["single_label_classification", "regression", "question_answering", "causal_lm", "masked_lm"]
"""What a model is asked for; models/load.py gives it the head for it."""


class Evaluation(Protocol):
    """How a task predicts and judges; what lies between, ranks and order, is train/evaluate.py's."""

    def predict(self, model: Callable[..., Any], batch: Batch) -> dict[str, Tensor]:
        """What is kept of a collated batch: tensors (batch, ...), behind the batch of one shape for a whole split."""

    def score(self, split: str, kept: Mapping[str, Tensor]) -> dict[str, float]:
        """Metrics by name, and the mean "loss"; `kept` holds all examples of the split in their order."""


class ExampleStream(Protocol):
    """Training examples that are read while the job trains."""

    source: str

    @property
    def state(self) -> dict[str, Any]:
        """Where the next example begins; JSON-able."""

    def begin(self, seed: int) -> None:
        """Start anew, in the order that the seed decides."""

    def take(self, count: int, step: str) -> list[Example]:
        """The next examples, for the step that messages name."""

    def resume(self, state: Mapping[str, Any]) -> None:
        """Continue where another stream of the same dataset and seed was."""


@dataclass(frozen=True)
class Task:
    """A dataset with its evaluation, ready for a training loop.

    `validation` maps a split's name to its examples; the first split is the main one. `primary` is the metric
    that tables show. `label_names` are empty where the problem has no classes.
    """

    name: str
    num_labels: int
    train: Sequence[Example]
    validation: Mapping[str, Sequence[Example]]
    collate: Callable[[Sequence[Example]], Batch]
    evaluation: Evaluation
    primary: str
    problem: Problem
    label_names: tuple[str, ...]
    vocab_size: int | None = None
    """Token ids are below this: a model's embedding needs at least as many rows. None: not known."""
    max_length: int | None = None
    """Longest example in tokens: a model needs at least as many positions. None: not known."""
    pad_id: int | None = None
    """The token that pads: models that count positions from it, or answer at the last other one, have to know it."""
    augment: Callable[[Batch, Sequence[torch.Generator]], Batch] | None = None
    """Applied to collated training batches, all chance from a row's generator. None: they are left as they are."""
    stream: ExampleStream | None = None
    """Training examples in place of `train`, which is empty then."""


class TokenTable(Sequence[Example]):
    """Tokenised examples in flat int32 arrays: some bytes a token, where a list of dicts takes some dozens.

    columns: (tokens of all examples,) by name; those of example i lie at starts[i] to starts[i + 1].
    numbers: (examples,) by name, one number for an example.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], **numbers: Sequence[float] | np.ndarray) -> None:
        """`arrays`: the columns and "starts", as `flat` makes them."""
        self.starts = arrays["starts"]
        self.columns = {key: ids for key, ids in arrays.items() if key != "starts"}
        self.numbers = {key: np.asarray(values) for key, values in numbers.items()}

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example."""
        return np.diff(self.starts)

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return int(self.lengths.max(initial=0))

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = range(len(self))[index]
        part = slice(self.starts[row], self.starts[row + 1])
        tokens = {key: ids[part].tolist() for key, ids in self.columns.items()}
        return tokens | {key: values[row].item() for key, values in self.numbers.items()}


def flat(columns: Mapping[str, Sequence[Sequence[int] | np.ndarray] | np.ndarray]) -> dict[str, np.ndarray]:
    """Lists of ids, one a row, as the arrays of a TokenTable."""
    lengths = [len(ids) for ids in next(iter(columns.values()))]
    starts = np.cumsum([0, *lengths])
    arrays = {key: np.fromiter(chain.from_iterable(rows), np.int32, count=starts[-1]) for key, rows in columns.items()}
    return {**arrays, "starts": starts}


def joined(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Arrays of tables with the same columns, one after the other, as those of one table."""
    arrays = {key: np.concatenate([part[key] for part in parts]) for key in parts[0] if key != "starts"}
    lengths = np.concatenate([np.diff(part["starts"]) for part in parts])
    return {**arrays, "starts": np.cumsum([0, *lengths])}


def lengths_of(examples: Sequence[Example]) -> np.ndarray:
    """Tokens of each example, (examples,)."""
    if isinstance(examples, TokenTable):
        return examples.lengths
    return np.array([len(example["input_ids"]) for example in examples], dtype=np.int64)


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding token, or, as decoders have none, the one that ends a text."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise UserError("model.name: its tokenizer has no padding token; set one in its tokenizer_config.json")


def tokenised(
    tokenizer: PreTrainedTokenizerBase, *texts: str | list[str], key: str = "data.tokenizer", **options: Any
) -> BatchEncoding:
    """What a tokenizer makes of texts. UserError for a word that it has no token for, nor one for all unknown.

    key: the setting that the tokenizer is of.
    """
    try:
        return tokenizer(*texts, **options)
    except Exception as error:
        if type(error) is not Exception:  # the one that the tokenizers library raises
            raise
        problem = f'cannot take "{_refused(tokenizer, texts)[:60]}" ({own_words(error)})'
        raise UserError(f"{key}: the tokenizer {problem}; allowed: one with a token for unknown words") from error


def _refused(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str | list[str]]) -> str:
    """The first text that the tokenizer cannot take."""
    for text in chain.from_iterable([part] if isinstance(part, str) else part for part in texts):
        try:
            tokenizer(text)
        except Exception:  # of this class alone, see above
            return text
    raise AssertionError("each text alone is taken")


class Collator:
    """Pads a list of examples to the longest of them, on the right; on the left where `left` is set.

    Lists of ids become int64 (batch, longest): input_ids padded with `pad_id`, labels with IGNORED, attention_mask
    and token_type_ids with 0. The keys of `numbers` become (batch,) of that dtype. Other keys are left out.
    """

    def __init__(self, pad_id: int, numbers: Mapping[str, torch.dtype]) -> None:
        self.pad_id, self.left = pad_id, False
        self.padding = {"input_ids": pad_id, "attention_mask": 0, "token_type_ids": 0, "labels": IGNORED}
        self.numbers = dict(numbers)

    def __call__(self, examples: Sequence[Example]) -> Batch:
        longest = max(len(example["input_ids"]) for example in examples)
        batch: Batch = {}
        for key in examples[0]:
            values = [example[key] for example in examples]
            if key in self.numbers:
                batch[key] = torch.tensor(values, dtype=self.numbers[key])
            elif key in self.padding:
                lacking = [[self.padding[key]] * (longest - len(ids)) for ids in values]
                pairs = zip(lacking, values, strict=True) if self.left else zip(values, lacking, strict=True)
                batch[key] = torch.tensor([[*first, *second] for first, second in pairs])
        return batch
