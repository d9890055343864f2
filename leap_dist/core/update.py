"""The update: the gradient of the masked weights moves latent weights and element scores; gates get their gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

from leap_dist.core.fragments import Fragment
from leap_dist.core.gating import (
    EXP_AVG,
    EXP_AVG_SQ,
    LATENT,
    MASK,
    SCORE,
    SCORE_EXP_AVG,
    SCORE_EXP_AVG_SQ,
    Gating,
)
from leap_dist.core.parts import Part
from leap_dist.ops import dispatch as ops
from leap_dist.ops.reference import Adam


def update_(gating: Gating, adam: Adam | None) -> None:
    """AdamW on the latent weights with dL/dW = G * M; without `adam` they are frozen."""
    for part in gating.parts:
        if part.grad is not None:
            _update_weights_(gating, part.updated, part, part.grad, adam)


def learn_(gating: Gating, adam: Adam | None, score_adam: Adam) -> tuple[Tensor, Tensor]:
    """The same, and Adam on element scores.

    Returns (dL/dsigma on the CPU, dL/dS of structured units), float64, summed over ranks. With G = dL/d(W * M):
    dL/dS_u = sum_{i in u} G_i W_i prod_{g' != g} M_g',i and dL/dsigma = sum_u M_u dL/dS_u.
    """
    plan = gating.plan
    num_gates = len(plan.gates)
    sums = torch.zeros(num_gates + plan.num_structured_units, dtype=torch.float64, device=gating.device)
    for part in gating.parts:
        if part.grad is not None:
            _add_unit_sums(gating, sums[num_gates:], part, part.grad)
            _update_elements_(gating, sums[:num_gates], part, part.grad, adam, score_adam)
            _update_weights_(gating, part.structured, part, part.grad, adam)
    sums = gating.communicator.sum_(sums.float()).double()  # fp32, as the weights' gradients are reduced
    sigma, units = sums[:num_gates], sums[num_gates:]
    sigma += segment_sums(units * gating.unit_mask, gating.structured_units)
    return sigma.cpu(), units


def move_(gating: Gating, fragments: Sequence[Fragment], grad: Tensor, adam: Adam) -> None:
    """Adam on this rank's fragments of gate values, scores or thresholds, whose whole gradient is `grad`."""
    state = gating.values.state
    for fragment in fragments:
        local = grad[fragment.start : fragment.start + fragment.length].to(fragment.flat, non_blocking=True)
        moments = fragment.view(state[EXP_AVG]), fragment.view(state[EXP_AVG_SQ])
        ops.adamw_(fragment.view(fragment.flat), local, *moments, adam)


def write_(gating: Gating) -> None:
    """The hosted partition becomes W * M."""
    with gating.communicator.stopwatch.measure("mask"):
        for part in gating.parts:
            ops.write_masked_(part.updated, *gating.flat_states(part, LATENT, MASK), part.hosted)


def _update_weights_(gating: Gating, table: Tensor, part: Part, grad: Tensor, adam: Adam | None) -> None:
    if len(table) and adam is not None:
        ops.masked_adamw_(table, grad, *gating.flat_states(part, MASK, LATENT, EXP_AVG, EXP_AVG_SQ), adam)


def _add_unit_sums(gating: Gating, sums: Tensor, part: Part, grad: Tensor) -> None:
    """Add a part's share of the gradients of structured units to `sums`."""
    (latent,) = gating.flat_states(part, LATENT)
    if len(part.alone):
        sums += ops.unit_sums(part.alone, grad, latent, None, len(sums))
    for patches, rest in part.joint:
        others = gating.times_units(gating.element_masks(part), rest)
        sums += ops.unit_sums(patches, grad, latent, others, len(sums))


def _update_elements_(
    gating: Gating, sums: Tensor, part: Part, grad: Tensor, adam: Adam | None, score_adam: Adam
) -> None:
    """One step of element scores and the latent weights under them; adds to dL/dsigma in `sums`."""
    if not len(part.elements):
        return
    mask, latent, score = gating.flat_states(part, MASK, LATENT, SCORE)
    others = gating.times_units(torch.ones_like(mask), part.patches) if part.joint else None
    known = part.elements, grad, part.hosted
    own = (SCORE_EXP_AVG, SCORE_EXP_AVG_SQ) if SCORE_EXP_AVG in gating.keys else ()
    scores = score, *gating.flat_states(part, *own)
    if adam is None:
        sigma = ops.score_adamw_(*known, others, latent, *scores, score_adam)
    else:
        states = latent, *gating.flat_states(part, EXP_AVG, EXP_AVG_SQ), *scores
        if own:
            sigma = ops.element_adamw_(*known, mask, others, *states, adam, score_adam)
        else:
            sigma = ops.shared_adamw_(*known, mask, others, *states, adam, score_adam.lr)
    sums += segment_sums(sigma, part.num_rows)


def segment_sums(values: Tensor, lengths: Tensor) -> Tensor:
    """The sums of runs of values, or of rows, that follow each other: one for each of `lengths`; no host sync."""
    return torch.segment_reduce(values, "sum", lengths=lengths, initial=0.0, unsafe=True)
