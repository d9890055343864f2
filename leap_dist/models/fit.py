"""Whether the weights in a folder are those of the model that its config describes: only a head may be new."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch

from leap_dist.errors import UserError, few_of
from leap_dist.models.body import is_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

CONSTANTS = ("attn.bias", "attention.bias", "masked_bias", "causal_mask", "position_ids", "token_type_ids", "inv_freq")
"""Ends of the names of buffers that models compute; older versions of transformers saved them with the weights."""
SHOWN = 3
"""How many names a message lists."""


def check_loaded(
    name: str, model: PreTrainedModel, report: Mapping[str, Any], causal: bool = False, frozen: bool = False
) -> set[str]:
    """The parameters that are new; UserError for others than a head's, and for tensors that have no place in the model.

    report: what `from_pretrained(..., output_loading_info=True)` gives beside the model. A new head, and the head for
    another task that the files hold, are reported in one line each. For causal language models, and where weights are
    frozen, so that the head would stay random, a new one is refused.
    """
    buffers = {key for key, _ in model.named_buffers()}
    missing = {key for key in report["missing_keys"] if not (key in buffers and key.endswith(CONSTANTS))}
    left_over = {key for key in report["unexpected_keys"] if key not in buffers and not key.endswith(CONSTANTS)}
    shapes = {key: (tuple(stored), tuple(wanted)) for key, stored, wanted in report["mismatched_keys"]}
    kind = model.config.model_type
    body = {key for key, _ in model.named_parameters() if not is_head(model, key)}
    if body and body <= missing:
        raise UserError(f'model.name: got "{name}"; none of its weights fit its config.json, a {kind} model')
    other_shape = {key for key, both in shapes.items() if not _is_other_labels(model, key, *both)}
    problems = (
        ("missing in its files", {key for key in missing if not is_head(model, key)}),
        ("in its files, but no tensor of the model", {key for key in left_over if not is_head(model, key)}),
        ("of another shape in its files", other_shape),
    )
    found = [f"{_listed(keys, shapes)} {'is' if len(keys) == 1 else 'are'} {what}" for what, keys in problems if keys]
    if found:
        raise UserError(
            f'model.name: got "{name}"; its weights are not those of its config.json, a {kind} model: '
            f"{'; '.join(found)}; allowed: a complete folder, whose config.json was written with its weights "
            "(only the head may be new)"
        )
    broken = {key for key, value in model.named_parameters() if not torch.isfinite(value).all()}
    if broken:
        numbers = "are NaN or infinite; allowed: a model without them; use an earlier checkpoint"
        raise UserError(f'model.name: got "{name}"; values of {_listed(broken, {})} {numbers}')
    new = (missing | shapes.keys()) & {key for key, _ in model.named_parameters()}
    if new and causal:
        raise UserError(
            f'model.name: got "{name}"; its files have no head that says the next token: {_listed(new, {})} would be '
            "random; allowed: a folder saved with its head (the class that ends in ForCausalLM), or another data.task"
        )
    if new and frozen:
        raise UserError(
            f'model.name: got "{name}"; its files have no head that fits the task, and with frozen weights '
            f'{_listed(new, {})} would stay random; allowed: a model trained on the task, or leap.weights "trained"'
        )
    if new and not is_rank_above_0():
        logger.warning("%s: the head is new, its files have none that fits the task: %s", name, _listed(new, {}))
    if left_over and not is_rank_above_0():
        logger.warning("%s: not used, of a head for another task: %s", name, _listed(left_over, {}))
    return new


def _is_other_labels(model: PreTrainedModel, key: str, stored: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a tensor of the head differs from the file's by the number of labels alone."""
    return is_head(model, key) and stored[1:] == wanted[1:] and wanted[0] == model.config.num_labels


def is_rank_above_0() -> bool:
    """All ranks load the same files: one reports what is in them."""
    return os.environ.get("RANK", "0") != "0"


def _listed(keys: Collection[str], shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> str:
    """The first names, with both shapes where they differ, and how many more there are."""
    names = sorted(keys)
    shown = [f"{key} ({shapes[key][0]}, not {shapes[key][1]})" if key in shapes else key for key in names[:SHOWN]]
    return few_of([*shown, *names[SHOWN:]], SHOWN)
