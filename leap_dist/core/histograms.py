"""How the scores of every gate lie around its cut at the end of a run: counted on every rank, summed over all."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from leap_dist.core.gating import Gating
from leap_dist.core.masks import score_runs

BINS, REACH = 40, 4.0  # the bins together reach this many standard deviations to either side of the cut
CHUNK = 2**22  # scores that are held in fp64 at a time
MOST_LISTED = 256  # units of a gate whose kept ones are listed

Moments = tuple[int, float, float, float, float]
"""Of the scores of a gate on a rank: their number, sum, sum of squares, lowest kept, highest removed."""


@torch.no_grad()
def score_histograms(gating: Gating, kept_units: Sequence[int]) -> list[dict[str, Any]]:
    """One dict for each gate that ranks its units (not n:m): its name, granularity, units and kept_units, then

    cut     halfway between the lowest score that is kept and the highest that is not; where all are kept the lowest
    spread  the standard deviation of its scores
    kept, removed   BINS counts each, of units by (score - cut) / spread from -REACH to REACH; the outermost bins hold
                    all that is further off
    which   the kept units, in a structured gate of at most MOST_LISTED

    kept_units: of every gate of the plan. Collective; the same on every rank.
    """
    gates, runs = gating.plan.gates, list(score_runs(gating))
    scales = _scales(gating, runs)
    counts = torch.zeros(len(gates), 2 * BINS, dtype=torch.int64)
    for gate, scores, mask in runs:
        for part, kept in zip(scores.split(CHUNK), mask.split(CHUNK), strict=True):
            counts[gate] += _count(part, kept, *scales[gate]).cpu()
    gating.communicator.sum_(counts)
    return [
        {
            "name": gates[gate].name,
            "granularity": gates[gate].granularity,
            "units": gates[gate].num_units,
            "kept_units": kept_units[gate],
            "cut": cut,
            "spread": spread,
            "kept": counts[gate, BINS:].tolist(),
            "removed": counts[gate, :BINS].tolist(),
            **_which(gating, gate),
        }
        for gate, (cut, spread) in sorted(scales.items())
    ]


def _scales(gating: Gating, runs: Sequence[tuple[int, Tensor, Tensor]]) -> dict[int, tuple[float, float]]:
    """(cut, spread) by gate."""
    local: dict[int, Moments] = {}
    for gate, scores, mask in runs:
        local[gate] = _add(local.get(gate), _moments(scores, mask))
    total: dict[int, Moments] = {}
    for rank in gating.communicator.gather(local):
        for gate, moments in rank.items():
            total[gate] = _add(total.get(gate), moments)
    scales = {}
    for gate, (num, first, second, lowest, highest) in total.items():
        ends = [end for end in (lowest, highest) if math.isfinite(end)]
        variance = max(second / num - (first / num) ** 2, 0.0)
        scales[gate] = sum(ends) / len(ends), math.sqrt(variance)
    return scales


def _moments(scores: Tensor, mask: Tensor) -> Moments:
    first, second = 0.0, 0.0
    for part in scores.split(CHUNK):
        exact = part.double()
        first, second = first + exact.sum().item(), second + exact.square().sum().item()
    kept, removed = scores[mask], scores[~mask]
    lowest = kept.min().item() if len(kept) else math.inf
    highest = removed.max().item() if len(removed) else -math.inf
    return len(scores), first, second, lowest, highest


def _add(one: Moments | None, other: Moments) -> Moments:
    if one is None:
        return other
    return one[0] + other[0], one[1] + other[1], one[2] + other[2], min(one[3], other[3]), max(one[4], other[4])


def _count(scores: Tensor, mask: Tensor, cut: float, spread: float) -> Tensor:
    """Counts by bin, first of the removed, then of the kept; int64 of shape (2 * BINS,)."""
    distance = (scores.double() - cut) / (spread or 1.0)
    place = ((distance + REACH) * (BINS / (2 * REACH))).floor_().clamp_(0, BINS - 1).long()
    return torch.bincount(place + BINS * mask, minlength=2 * BINS)


def _which(gating: Gating, gate: int) -> dict[str, list[int]]:
    if gating.plan.gates[gate].elementwise or gating.plan.gates[gate].num_units > MOST_LISTED:
        return {}
    mask = gating.unit_mask[gating.plan.units(gate)]
    return {"which": mask.nonzero().flatten().tolist()}
