"""Random masks of a plan's gates, in the weights of a model."""

from __future__ import annotations

import torch
from torch import nn

from leap_dist.core.gates import GatePlan
from leap_dist.core.oracle import unit_index


def mask_(model: nn.Module, plan: GatePlan, share: float) -> int:
    """Zero what random masks of all gates drop; about `share` of the units stays, as many as a gate allows. Weights
    dropped."""
    generator, dropped = torch.Generator().manual_seed(0), 0
    masks = []
    for gate in plan.gates:
        order = torch.randperm(gate.num_units, generator=generator)
        count = max(1, int((torch.rand(gate.num_units, generator=generator) < share).sum()))
        keep = torch.zeros(gate.num_units, dtype=torch.bool)
        keep[order[: -(-count // gate.multiple_of) * gate.multiple_of]] = True
        masks.append(keep)
    for tensor, covers in plan.covers.items():
        parameter = model.get_parameter(tensor)
        mask = torch.ones(parameter.shape, dtype=torch.bool)
        for cover in covers:
            mask &= masks[cover.gate][unit_index(cover.slices)].view(parameter.shape)
        dropped += int((~mask).sum()) if plan.counted(tensor) else 0
        parameter.data *= mask
    return dropped
