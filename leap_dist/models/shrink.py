"""A model that is really smaller: units whose weights are zero leave it for good.

`shrink_` works on the model in memory; pruned_folder.py keeps it in a folder.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from leap_dist.config.family import FamilyConfig
from leap_dist.models.blocks import find_blocks, is_anchored
from leap_dist.models.removal import remove_units_
from leap_dist.models.structures import Block, Span


def shrink_(model: nn.Module, family: FamilyConfig | None = None) -> dict[str, list[int]]:
    """Remove every head, neuron and expert that is dead in the weights; returns the units left, by structure.

    `model.config` still describes the model as it was, and `save_shrunk` counts units by it: shrink a model once.
    """
    blocks = find_blocks(model, family)
    modules, tensors = dict(model.named_modules()), dict(model.named_parameters())
    kept = {block.structure.name: _living_units(block, tensors) for block in blocks}
    for block in blocks:
        if not kept[block.structure.name] and is_anchored(block, modules):
            kept[block.structure.name] = [0]  # a dead head adds nothing
    remove_units_(model, blocks, kept)
    return kept


def _living_units(block: Block, tensors: Mapping[str, torch.Tensor]) -> list[int]:
    num_units = block.structure.num_units
    dead = torch.zeros(num_units, dtype=torch.bool)
    for group in block.silent:
        dead |= torch.stack([_zero_units(tensors[span.tensor], span, num_units) for span in group]).all(0)
    return (~dead).nonzero().flatten().tolist()


def _zero_units(tensor: torch.Tensor, span: Span, num_units: int) -> torch.Tensor:
    """Which units hold zeros alone in a span, (num_units,) on the CPU."""
    index = torch.arange(num_units)[:, None] * span.step + span.start + torch.arange(span.size)
    values = tensor.detach().index_select(span.axis, index.flatten().to(tensor.device))
    return (values.movedim(span.axis, 0).reshape(num_units, -1) == 0).all(1).cpu()
