"""A model that is really smaller: units whose weights are zero leave it for good.

`shrink_` works on the model in memory; pruned_folder.py keeps it in a folder.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from leap_dist.config.family import FamilyConfig
from leap_dist.models.blocks import is_anchored
from leap_dist.models.families import family_of
from leap_dist.models.removal import remove_
from leap_dist.models.stacks import Parts, adds, find_parts, is_inside
from leap_dist.models.stream import NAME as STREAM
from leap_dist.models.stream import living_dimensions
from leap_dist.models.structures import Block, Span, Stack


def shrink_(model: nn.Module, family: FamilyConfig | None = None) -> dict[str, list[int]]:
    """Remove every dimension, layer, head, neuron and expert that is dead in the weights; returns those left.

    By structure; the residual stream and lists of layers are not among them where they are whole.

    `model.config` still describes the model as it was, and `save_shrunk` counts units by it: shrink a model once.
    """
    parts = find_parts(model, family)
    modules, tensors = dict(model.named_modules()), dict(model.named_parameters())
    kept = {block.structure.name: _living_units(block, tensors) for block in parts.blocks}
    for block in parts.blocks:
        if not kept[block.structure.name] and is_anchored(block, modules):
            kept[block.structure.name] = [0]  # a dead head adds nothing
    table = family or family_of(model)
    for stack in parts.stacks:
        assert table is not None
        dead = [
            unit
            for unit in stack.units
            if all(_is_zero(tensors[name]) for name in stack.tensors[unit])
            or (adds(modules[stack.layers[unit]], table) and _gives_nothing(stack, unit, parts, kept, tensors))
        ]
        if dead:
            kept[stack.name] = [index for index in range(len(stack.layers)) if index not in dead]
    if parts.stream is not None:
        left = living_dimensions(parts.stream, tensors)
        if 0 < len(left) < parts.stream.width:
            kept[STREAM] = left
    remove_(model, parts, kept)
    return kept


def _is_zero(tensor: torch.Tensor) -> bool:
    return not tensor.detach().any()


def _gives_nothing(
    stack: Stack, unit: int, parts: Parts, kept: Mapping[str, list[int]], tensors: Mapping[str, torch.Tensor]
) -> bool:
    """Whether the blocks of a layer hold all its weights, and are dead with the biases of their outputs."""
    layer = stack.layers[unit]
    own = [block for block in parts.blocks if is_inside(block.layer, {layer})]
    held = {part.tensor for block in own for part in block.structure.parts}
    return (
        {name for name, counted in stack.tensors[unit].items() if counted} <= held
        and not any(kept[block.structure.name] for block in own)
        and all(_is_zero(tensors[bias]) for block in own for bias in block.biases)
    )


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
