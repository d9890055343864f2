"""One padding token for batches, model and export: the task's, which is the tokenizer's.

Classifiers of decoders answer at the last token that does not pad, which they know by config.pad_token_id alone.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from leap_dist.errors import UserError
from leap_dist.tasks.base import Batch, Collator, Example, TokenTable

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from leap_dist.tasks.base import Task

POSITIONS_FROM_PADDING = ("camembert", "data2vec-text", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta")
"""Architectures whose first token has the position after that of padding: they take that many tokens less."""
NOISE = 1e-4
"""Rounding differs between batches by less than this part of the largest logit."""
CLASSES = ("single_label_classification", "regression")


def agree_on_padding(model: PreTrainedModel, task: Task) -> None:
    """Give the model's configs the token that pads the task's batches, and the batches the side that the model needs.

    Raises UserError for a model that counts positions from another padding token, and for one that answers at the
    token that ends a text where examples do not have one each.
    """
    pad, config = _padding_of(task), model.config
    if pad is None:
        return
    _set_padding(model, task, pad)
    if (change := padding_changes(model, task)) > NOISE and os.environ.get("RANK", "0") == "0":
        logger.warning(
            "padding changes what a %s model answers, by %.2g of the largest logit: it has no mask for it; metrics "
            "depend on the batch size (train.eval_batch_size: 1 is one by one)",
            config.model_type,
            change,
        )


def _set_padding(model: PreTrainedModel, task: Task, pad: int) -> None:
    config = model.config
    if config.model_type in POSITIONS_FROM_PADDING and config.pad_token_id != pad:
        if task.pad_id is None:
            return  # the task does not say
        raise UserError(
            f"model: a {config.model_type} model counts positions from config.pad_token_id, which is "
            f"{config.pad_token_id}, but its tokenizer pads with {pad}; allowed: one token for both: set pad_token in "
            "tokenizer_config.json, or use the tokenizer that came with the model"
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


# ------------------------------------------------------------------------------------ what padding does to answers


def padding_changes(model: PreTrainedModel, task: Task) -> float:
    """By how much an example's logits differ beside a longer one and alone, as a part of the largest; 0 if unknown.

    Architectures mix padding into every token in ways that nobody lists (FNet's Fourier transform, Nystroemformer's
    landmarks, ConvBERT's convolution), so one is asked.
    """
    tables = (task.train, *task.validation.values())
    pair = next(filter(None, map(_two_lengths, tables)), None) if isinstance(task.collate, Collator) else None
    if pair is None:
        return 0.0
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            alone, together = (_logits(model, task.collate(examples)) for examples in (pair[:1], pair))
    except Exception:  # a model that cannot answer at all: the first step says why
        return 0.0
    finally:
        model.train(training)
    difference = (together[:1, : alone.shape[1]] - alone).abs().max()
    return float(difference / alone.abs().max().clamp(min=torch.finfo(alone.dtype).tiny))


def _two_lengths(examples: Sequence[Example]) -> list[Example]:
    """The shortest of the first examples, and the next that is a bit longer; empty where all have one length."""
    few = sorted((examples[row] for row in range(min(len(examples), 64))), key=lambda row: len(row["input_ids"]))
    longer = [row for row in few if len(row["input_ids"]) > len(few[0]["input_ids"])]
    return [few[0], longer[min(4, len(longer) - 1)]] if longer else []


def _logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The first logits for a batch: (batch, labels) or (batch, tokens, ...)."""
    taken = {"input_ids", "attention_mask", "token_type_ids"} & inspect.signature(model.forward).parameters.keys()
    output = model(**{key: ids for key, ids in batch.items() if key in taken}, return_dict=True)
    return next(value for value in output.values() if isinstance(value, Tensor) and value.dim() > 1)


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
                    + "; use a tokenizer that ends texts with it, or another model"
                )


def _ids(table: Sequence[Example] | Any) -> Iterator[Any]:
    if isinstance(table, TokenTable):
        return iter(np.split(table.columns["input_ids"], table.starts[1:-1])) if len(table) else iter(())
    return (example["input_ids"] for example in table)
