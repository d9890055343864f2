"""Brings the head of a trained classifier into the order of the task's labels, or says that its labels are others."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from leap_dist.models.body import is_head
from leap_dist.models.fit import is_rank_above_0

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def fit_labels(name: str, model: PreTrainedModel, own: Mapping[int, str], wanted: Sequence[str]) -> None:
    """Give a head that was trained the task's labels.

    own: what the model's config.json calls its classes, by number; wanted: what the task calls them. The same names in
    another order, which is that of most MNLI models, put the rows of the head in the task's. Where the task has numbers
    alone the model's names stay, if none is a number. Others are reported: the head is then one for these labels.
    """
    names = [str(own.get(number)) for number in range(len(wanted))]
    if len(own) != len(wanted) or names == [f"LABEL_{number}" for number in range(len(names))]:
        return
    places = {_spelled_alike(label): number for number, label in enumerate(names)}
    rows = [places.get(_spelled_alike(label), -1) for label in wanted]
    numbers = [str(number) for number in range(len(wanted))]
    if sorted(rows) == list(range(len(rows))):
        _reorder_head(model, rows)
    elif list(wanted) == numbers and not any(map(str.isdecimal, names)):
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {label: number for number, label in enumerate(names)}
    elif not is_rank_above_0():
        logger.warning(
            "%s: its head was trained for the labels %s, which are taken for %s, in this order",
            name,
            ", ".join(names),
            ", ".join(wanted),
        )


def _spelled_alike(label: str) -> str:
    """One spelling of "not_entailment", "Not entailment" and "NOT-ENTAILMENT"."""
    return label.casefold().replace("_", " ").replace("-", " ").strip()


@torch.no_grad()
def _reorder_head(model: PreTrainedModel, rows: Sequence[int]) -> None:
    """Row i of what has a row for each label becomes row rows[i]."""
    for key, tensor in model.named_parameters():
        if is_head(model, key) and tensor.shape[:1] == (len(rows),):
            tensor.copy_(tensor[list(rows)])
