"""Configs that describe a model with fewer units, so that transformers loads it without this package."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from leap_dist.config.family import AttentionFamily, ExpertsFamily
from leap_dist.models.stacks import Parts, Renumbered, is_inside, left_out
from leap_dist.models.stream import NAME as STREAM
from leap_dist.models.stream import epsilon_of, with_width
from leap_dist.models.structures import Block

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Kept = Mapping[str, Sequence[int]]
"""By the name of a structure or a list of layers, the units that are left, ascending."""


def stock_model(model: PreTrainedModel, parts: Parts, kept: Kept) -> PreTrainedModel | None:
    """The shrunk model as transformers builds it from a config alone, with the same tensors; None if no config says it.

    Layers are numbered anew.
    """
    from huggingface_hub.errors import StrictDataclassError

    gone, changes = left_out(parts.stacks, kept), dict[str, Any]()
    for block in parts.blocks:
        units = len(kept[block.structure.name])
        if not is_inside(block.layer, gone):
            if not units:
                return None
            changes |= config_values(model.config, block, units, narrow=STREAM in kept)
    if gone:
        if len(parts.stacks) > len(parts.depth) or any(kept.get(stack.name) == [] for stack in parts.stacks):
            return None
        changes |= _fewer_layers(model.config, parts, kept)
    candidate = copy.deepcopy(model.config)
    if parts.stream is not None and STREAM in kept:
        candidate = with_width(candidate, parts.stream.table, len(kept[STREAM]))
        if key := parts.stream.table.epsilon:
            changes[key] = epsilon_of(parts.stream, len(kept[STREAM]), getattr(model.config, key))
    try:
        for key, value in changes.items():
            setattr(candidate, key, value)
        with torch.device("meta"):
            built = type(model)(type(candidate).from_dict(candidate.to_dict()))
    except (ValueError, TypeError, RuntimeError, IndexError, StrictDataclassError):
        return None
    renumbered = Renumbered({stack.name: kept[stack.name] for stack in parts.stacks if stack.name in kept})
    state = {new: value for name, value in model.state_dict(keep_vars=True).items() if (new := renumbered(name))}
    if {name: value.shape for name, value in state.items()} != shapes_of(built):
        return None
    if {new: value for name, value in _constants(model).items() if (new := renumbered(name))} != _constants(built):
        return None  # a number that depends on the layer's place, or on a size
    built.load_state_dict(state, assign=True)
    built.tie_weights()
    if model.can_generate():
        built.generation_config = model.generation_config
    return built


def config_values(config: PreTrainedConfig, block: Block, num_units: int, narrow: bool = False) -> dict[str, int]:
    """The keys of the config for a block with that many units, as far as its table knows any; all where the stream is
    narrow, of whose width others would follow."""
    structure, table = block.structure, block.table
    if num_units == structure.num_units and not narrow:
        return {}
    values = {}
    for key in table.config:
        whole = getattr(config, key, None) or structure.num_units
        values[key] = whole // structure.num_units * num_units
    if isinstance(table, AttentionFamily) and table.config_head_size is not None:
        values[table.config_head_size] = block.silent[0][0].size  # the rows that make the values of one head
    elif isinstance(table, AttentionFamily) and num_units < structure.num_units and narrow:
        values["num_attention_heads"] = num_units  # width / heads can be what it was
    if isinstance(table, ExpertsFamily) and table.config_top_k is not None:
        values[table.config_top_k] = min(getattr(config, table.config_top_k), num_units)
    return values


def _fewer_layers(config: PreTrainedConfig, parts: Parts, kept: Kept) -> dict[str, Any]:
    """The number of layers, and lists with an entry for each layer cut alike."""
    changes: dict[str, Any] = {}
    for key, stack in zip(parts.depth, parts.stacks, strict=False):
        left = kept.get(stack.name, range(len(stack.layers)))
        changes[key] = len(left)
        for name, value in config.to_dict().items():
            if "layer" in name and isinstance(value, list) and len(value) == len(stack.layers):
                changes[name] = [value[index] for index in left]
        if getattr(config, "decoder_sparse_step", None):  # which layers have experts: then those that are not listed
            dense = set(config.mlp_only_layers) | {
                index for index in range(len(stack.layers)) if (index + 1) % config.decoder_sparse_step
            }
            changes["mlp_only_layers"] = [place for place, index in enumerate(left) if index in dense]
            changes["decoder_sparse_step"] = 1
    return changes


def _constants(model: nn.Module) -> dict[str, float]:
    """The numbers that modules compute with, by path: the scale of attention, the epsilon of norms."""
    return {
        f"{path}.{key}": value
        for path, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, float)
    }


def shapes_of(model: nn.Module) -> dict[str, torch.Size]:
    """Of all that a model's file holds."""
    return {name: value.shape for name, value in model.state_dict().items()}


def per_layer_config(config: PreTrainedConfig, parts: Parts, kept: Kept) -> dict[str, dict[str, int]]:
    """What differs from the config in each layer; empty if some difference has no key, or layers are not one stack."""
    found: dict[str, dict[str, int]] = {}
    if STREAM in kept or left_out(parts.stacks, kept):
        return {}
    for block in parts.blocks:
        units = len(kept[block.structure.name])
        values = config_values(config, block, units)
        if units < block.structure.num_units and not values:
            return {}
        found.setdefault(str(block.index), {}).update(values)
    return (
        {} if len(found) != config.num_hidden_layers else {layer: values for layer, values in found.items() if values}
    )
