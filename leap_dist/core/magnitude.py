"""Scores from the magnitude of the latent weights: where learned scores start, and the magnitude rule."""

import torch
from torch import Tensor

from leap_dist.core.fragments import Fragment
from leap_dist.core.gates import Cover
from leap_dist.core.gating import LATENT, SCORE, Gating
from leap_dist.ops.slices import add_unit_sums_


def magnitude_scores_(gating: Gating, scaled: bool) -> None:
    """S_u = mean |W| over the unit's prunable weights; `scaled` divides by the mean over the gate. Collective.

    Biases follow their unit without a say.
    """
    plan = gating.plan
    num_gates = len(plan.gates)
    sums = torch.zeros(num_gates + plan.num_structured_units, dtype=torch.float64, device=gating.device)
    for fragment in gating.weights:
        if not plan.counted(fragment.tensor):
            continue
        size = gating.state(fragment, LATENT).abs()
        for cover in plan.covers[fragment.tensor]:
            if plan.gates[cover.gate].elementwise:
                gating.state(fragment, SCORE).copy_(size)
            else:
                _add_sums_(sums[num_gates:][plan.units(cover.gate)], size, fragment, cover)
            if scaled:
                sums[cover.gate] += size.sum(dtype=torch.float64)
    gating.communicator.sum_(sums)
    _write(gating, sums[:num_gates], sums[num_gates:], scaled)


def _add_sums_(units: Tensor, values: Tensor, fragment: Fragment, cover: Cover) -> None:
    local = torch.zeros_like(units)
    for part in cover.slices:
        add_unit_sums_(local, values, fragment.start, part)
    units += local


def _write(gating: Gating, totals: Tensor, units: Tensor, scaled: bool) -> None:
    """Turn sums of |W| over gates and units into scores."""
    gates = gating.plan.gates
    means = [(t / g.num_weights).clamp(min=1e-30) for t, g in zip(totals, gates, strict=True)] if scaled else []
    for index in gating.plan.structured:
        sizes = gates[index].unit_sizes.to(units.device, non_blocking=True)
        units[gating.plan.units(index)] /= sizes * (means[index] if scaled else 1.0)
    for fragment in gating.own_scores:
        run = units[fragment.start : fragment.start + fragment.length]
        fragment.view(fragment.flat).copy_(run)
    for fragment in gating.weights if scaled else ():
        for cover in gating.plan.covers[fragment.tensor]:
            if gates[cover.gate].elementwise:
                gating.state(fragment, SCORE).div_(means[cover.gate].item())
