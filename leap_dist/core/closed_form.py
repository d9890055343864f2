"""Kept weights from kept counts alone, where that is exact, so that no masks are made only to be counted.

Where one gate covers a tensor and its units are alike, it keeps so many weights for every kept unit. Where two gates
cover it, one by rows and one by columns (a neuron or a head, and a dimension of the residual stream), the kept weights
are a rectangle: kept rows times kept columns, whichever they are. Every other overlap depends on which units stay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from leap_dist.core.gates import Cover, Gate, GatePlan
from leap_dist.ops.slices import Slice

ROWS, COLUMNS = 0, 1
Key = tuple[int, ...]


@dataclass(frozen=True)
class ClosedForm:
    """Kept weights as a polynomial of the kept counts of all gates.

    terms: by the gates whose counts are multiplied, the weights that each product of units has.
    """

    terms: dict[Key, int]

    def __call__(self, keep: Sequence[int]) -> int:
        """Kept weights of `keep`, the kept units of every gate."""
        return sum(each * math.prod(keep[gate] for gate in gates) for gates, each in self.terms.items())


def closed_form(plan: GatePlan, followers: bool = False) -> ClosedForm | None:
    """How many weights kept counts keep; None where it depends on which units these are.

    followers: with the biases that follow their units, which are no prunable weights.
    """
    terms: dict[Key, int] = {}
    alone: dict[int, list[Slice]] = {}
    for tensor, covers in plan.covers.items():
        if not (followers or plan.counted(tensor)):
            continue
        if len(covers) == 1:
            alone.setdefault(covers[0].gate, []).extend(covers[0].slices)
            continue
        found = _rectangle(plan, covers)
        if found is None:
            return None
        gates, each = found
        terms[gates] = terms.get(gates, 0) + each
    for gate, slices in alone.items():
        each_unit = _of_each(plan.gates[gate], slices)
        if each_unit is None:
            return None
        terms[gate,] = each_unit
    return ClosedForm(terms)


def _rectangle(plan: GatePlan, covers: Sequence[Cover]) -> tuple[Key, int] | None:
    """The two gates that cover a tensor by its rows and by its columns, and the weights where two units meet."""
    axes = [(axis, cover.gate, cover) for cover in covers if (axis := _axis(cover)) is not None]
    axes.sort(key=lambda found: found[0])
    shapes = {(part.rows, part.cols) for cover in covers for part in cover.slices}
    if len(covers) != 2 or [axis for axis, *_ in axes] != [ROWS, COLUMNS] or len(shapes) > 1:
        return None
    sides = [_of_each(plan.gates[gate], [_side(part, axis) for part in cover.slices]) for axis, gate, cover in axes]
    if sides[0] is None or sides[1] is None:
        return None
    first, second = sorted(gate for _, gate, _ in axes)
    return (first, second), sides[0] * sides[1]


def _axis(cover: Cover) -> int | None:
    """Whether the units of a cover are whole rows, or whole columns."""
    if all(part.block_cols == part.cols == part.bounds[3] for part in cover.slices):
        return ROWS
    return COLUMNS if all(part.block_rows == part.rows == part.bounds[1] for part in cover.slices) else None


def _side(part: Slice, axis: int) -> Slice:
    """The rows of a slice of whole rows, or the columns of one of whole columns, as a slice of one column."""
    start, length = part.bounds[2 * axis : 2 * axis + 2]
    size, block = (part.rows, part.block_rows) if axis == ROWS else (part.cols, part.block_cols)
    return replace(part, rows=size, cols=1, block_rows=block, block_cols=1, region=(start, length, 0, 1))


def _of_each(gate: Gate, slices: Sequence[Slice]) -> int | None:
    """Elements that every unit of a gate has in these slices; None where units differ."""
    of_them = replace(gate, slices=tuple(replace(part, counted=True) for part in slices))
    if of_them.num_units != gate.num_units or not of_them.uniform:
        return None
    return of_them.unit_size
