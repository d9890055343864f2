"""The layout of checkpoints on the hub, in which experts lie one by one where the model holds them as one tensor.

Engines other than transformers read that layout alone; a run's own folder has the names of the model, by which gates
and masks go.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from leap_dist.models.load import quiet_transformers

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel


def save_as_on_hub(model: PreTrainedModel, folder: Path) -> None:
    """Weights, config and generation settings of a model that its config describes, by the names of the hub."""
    bare = _bare(model)
    if model.can_generate():
        bare.generation_config = model.generation_config
    bare.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    bare.tie_weights()
    with quiet_transformers():
        bare.save_pretrained(folder)


def hub_state(model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's tensors as a file in that layout holds them; on the device "meta" without values."""
    from transformers.core_model_loading import revert_weight_conversion

    found: dict[str, Tensor] = revert_weight_conversion(_bare(model), dict(state))
    return found


def load_from_hub(model: PreTrainedModel, state: Mapping[str, Tensor]) -> PreTrainedModel:
    """A model like this one with the tensors of a file in that layout."""
    with quiet_transformers():
        return type(model).from_pretrained(None, config=model.config, state_dict=dict(state), dtype="auto")


def _bare(model: PreTrainedModel) -> PreTrainedModel:
    """Without weights, and without the memory of the names that were found when it was loaded."""
    with torch.device("meta"):
        return type(model)(copy.deepcopy(model.config))
