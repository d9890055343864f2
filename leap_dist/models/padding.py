"""One padding token for batches, model and export: the task's, which is the tokenizer's.

Classifiers of decoders answer at the last token that does not pad, which they know by config.pad_token_id alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from leap_dist.errors import UserError
from leap_dist.tasks.base import Collator, Example, TokenTable

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from leap_dist.tasks.base import Task

POSITIONS_FROM_PADDING = ("camembert", "data2vec-text", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta")
"""Architectures whose first token has the position after that of padding: they take that many tokens less."""
CLASSES = ("single_label_classification", "regression")


def agree_on_padding(model: PreTrainedModel, task: Task) -> None:
    """Give the model's configs the token that pads the task's batches, and the batches the side that the model needs.

    Raises UserError for a model that counts positions from another padding token, and for one that answers at the
    token that ends a text where examples do not have one each.
    """
    pad, config = _padding_of(task), model.config
    if pad is None:
        return
    if config.model_type in POSITIONS_FROM_PADDING and config.pad_token_id != pad:
        if task.pad_id is None:
            return  # nothing but positions asks for it
        raise UserError(
            f"model: a {config.model_type} model counts positions from config.pad_token_id, which is "
            f"{config.pad_token_id}, but its tokenizer pads with {pad}; allowed: one token for both: set pad_token in "
            "tokenizer_config.json, or take the tokenizer that came with the model"
        )
    for holder in (config, config.get_text_config(), getattr(model, "generation_config", None)):
        if holder is not None:
            holder.pad_token_id = pad
    if task.problem in CLASSES:
        _check_ends(model, task)
        if getattr(config, "summary_type", None) == "last" and isinstance(task.collate, Collator):
            task.collate.left = True  # XLNet: relative positions, and the answer at the last place


def _padding_of(task: Task) -> int | None:
    if task.pad_id is not None:
        return task.pad_id
    return task.collate.pad_id if isinstance(task.collate, Collator) else None


def highest_id(task: Task) -> int | None:
    """One more than the highest token id that the model can meet in the task; None if that is not known.

    A tokenizer may have more entries than its model has rows, as long as no text uses them.
    """
    tables = [table for table in (task.train, *task.validation.values()) if len(table)]
    known = all(isinstance(table, TokenTable) and "input_ids" in table.columns for table in tables)
    if not tables or not known or task.augment is not None:  # masking puts in words at random
        return task.vocab_size
    used = [int(table.columns["input_ids"].max(initial=0)) for table in tables if isinstance(table, TokenTable)]
    return max([*used, _padding_of(task) or 0]) + 1


def num_positions(config: PreTrainedConfig) -> int | None:
    """How many tokens a model takes at most; None where it takes any number (XLNet says -1)."""
    text = config.get_text_config()
    places: int | None = getattr(text, "max_position_embeddings", None)
    if places is None or places < 0:
        return None
    if config.model_type in POSITIONS_FROM_PADDING:
        places -= (text.pad_token_id or 0) + 1
    return places


# ---------------------------------------------------------------------------------------------- the end of a text


def _check_ends(model: PreTrainedModel, task: Task) -> None:
    """A model that answers at the token that ends a text (BART, T5) needs as many of them in every example."""
    if "eos_mask" not in inspect.unwrap(type(model).forward).__code__.co_varnames:
        return
    end = model.config.eos_token_id
    expected: int | None = None
    for split, table in (("train", task.train), *task.validation.items()):
        for row, ids in enumerate(_ids(table)):
            count = int((np.asarray(ids) == end).sum())
            expected = count if expected is None else expected
            if count != expected or count == 0:
                raise UserError(
                    f"model: a {model.config.model_type} classifier answers at the token that ends a text (id {end}), "
                    f"and needs as many in every example, at least one: example {row + 1} of {split} has {count}"
                    + (f", the first has {expected}" if count != expected else "")
                    + "; take a tokenizer that ends texts with it, or another model"
                )


def _ids(table: Sequence[Example] | Any) -> Iterator[Any]:
    if isinstance(table, TokenTable):
        return iter(np.split(table.columns["input_ids"], table.starts[1:-1])) if len(table) else iter(())
    return (example["input_ids"] for example in table)
