"""A model for fewer tokens: embeddings, heads and their biases with the rows of some tokens alone, ids renumbered."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from leap_dist.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKEN_KEY = re.compile(r"(^|_)token_(id|ids|index|indices)$")
"""Keys of a config that hold the id of a token that the model needs, or a list of them."""
NOT_SAID = ("suppress_tokens", "begin_suppress_tokens")
"""Lists of tokens that are never generated: those that leave cannot be."""
NOT_RENUMBERED = ("bad_words_ids", "force_words_ids", "forced_decoder_ids", "sequence_bias")


def named_ids(model: PreTrainedModel) -> set[int]:
    """The ids that the model's configs name: beginning, end and padding of texts, images and so on."""
    found: list[int] = []
    for settings in _configs(model):
        _renumbered({key: value for key, value in settings.items() if key not in NOT_SAID}, found.append)
    return set(found)


def with_rows(model: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """A copy of `model` that knows the tokens `kept` (old ids, ascending) alone, numbered from 0 in their order.

    Rows that no token has, which fill a vocabulary up to a multiple, are gone. UserError for an architecture whose
    rows are not found by its config's vocab_size, and for settings of generation that hold ids in other shapes.
    """
    from transformers import GenerationConfig
    from transformers.initialization import no_init_weights

    new = {number: place for place, number in enumerate(kept)}
    settings, *generation = (_renumbered(settings, new.get) for settings in _configs(model))
    config = type(model.config).from_dict(settings)
    rows = config.get_text_config().vocab_size
    config.get_text_config().vocab_size = len(kept)
    with torch.device("meta"):
        whole, cut = type(model)(copy.deepcopy(model.config)), type(model)(copy.deepcopy(config))
    state, index, found = model.state_dict(), torch.tensor(kept), len(kept) == rows
    shapes = {name: value.shape for name, value in cut.state_dict().items()}
    for name, value in whole.state_dict().items():
        for axis, (before, after) in enumerate(zip(value.shape, shapes.get(name, value.shape), strict=True)):
            if before != after:
                if (before, after) != (rows, len(kept)):
                    raise UserError(f"{type(model).__name__}: {name} has no row for each token; --vocabulary needs one")
                state[name], found = state[name].index_select(axis, index), True
    if not found:
        raise UserError(f"{type(model).__name__}: its config's vocab_size sizes no tensor; --vocabulary needs one")
    with no_init_weights():
        result = type(model)(config)
    result.load_state_dict(state, assign=True)
    result.tie_weights()
    if generation:
        result.generation_config = GenerationConfig.from_dict(generation[0])
    return result.eval()


def _configs(model: PreTrainedModel) -> list[dict[str, Any]]:
    """The settings of the model, and those of generation if it can."""
    holders = [model.config, model.generation_config if model.can_generate() else None]
    found: list[dict[str, Any]] = [holder.to_dict() for holder in holders if holder is not None]
    for settings in found:
        for key in NOT_RENUMBERED:
            if settings.get(key):
                raise UserError(f"{type(model).__name__}: {key} holds token ids, which --vocabulary does not renumber")
    return found


def _renumbered(settings: Mapping[Any, Any], number: Callable[[int], Any]) -> dict[Any, Any]:
    """Settings whose token ids are what `number` makes of them; None, and out of a list, where that is None."""
    changed: dict[Any, Any] = {}
    for key, value in settings.items():
        names_token = bool(TOKEN_KEY.search(str(key)))
        if isinstance(value, Mapping):
            changed[key] = _renumbered(value, number)
        elif names_token and type(value) is int:
            changed[key] = value if value < 0 else number(value)
        elif (names_token or key in NOT_SAID) and isinstance(value, list | tuple):
            changed[key] = [new for old in value if (new := number(old)) is not None]
        else:
            changed[key] = value
    return changed
