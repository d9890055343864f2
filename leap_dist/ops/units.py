"""Structured gates over flat partitions: sums over units, and masks of units spread over their elements.

A patch is the part of a fragment that one slice of a gate covers (ops/slices.py): a run of elements of a tensor, seen
as a matrix, and the region of that matrix that is cut into blocks, each of which belongs to one unit.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from leap_dist.ops.reference import cache_blocks
from leap_dist.ops.slices import Slice, add_unit_sums_, expand_units

# Columns of a table of patches, int64: where the run starts in the flat partition and in its tensor, its length; the
# matrix; the region; the blocks; the place of the first unit in the vector of all structured units.
OFFSET, START, LENGTH, ROWS, COLS, TOP, NUM_ROWS, LEFT, NUM_COLS, BLOCK_ROWS, BLOCK_COLS, FIRST_UNIT = range(12)


def patches_of(patches: Tensor) -> Iterator[tuple[int, int, int, Slice]]:
    """(offset, start, length, slice) of every row; the slice counts its units in the joint vector."""
    for offset, start, length, rows, cols, top, num_rows, left, num_cols, height, width, first in patches.tolist():
        part = Slice("", rows, cols, height, width, first_unit=first, region=(top, num_rows, left, num_cols))
        yield offset, start, length, part


def unit_sums(patches: Tensor, grad: Tensor, latent: Tensor, others: Tensor | None, num_units: int) -> Tensor:
    """dL/dS_u = sum_{i in u} G_i W_i prod_{g' != g} M_g',i of all structured units, float64 of shape (num_units,).

    others: the product of the other gates' masks, bool (None: all ones); grad, latent, others are flat.
    """
    sums = torch.zeros(num_units, dtype=torch.float64, device=grad.device)
    for offset, start, length, part in patches_of(patches):
        for b in cache_blocks(length, grad.device):
            run = slice(offset + b.start, offset + b.stop)
            values = grad[run] * latent[run]
            if others is not None:
                values *= others[run]
            add_unit_sums_(sums, values, start + b.start, part)
    return sums


def expand_units_(patches: Tensor, units: Tensor, before: Tensor | None, mask: Tensor) -> None:
    """mask_i = units_u for the unit u that covers element i; with before = None mask_i *= units_u.

    before: the units that the mask holds now, so that only what changes is written. Patches may overlap where they
    multiply. units, before: bool, (num_units,), of all structured gates; mask: bool, flat.
    """
    for offset, start, length, part in patches_of(patches):
        mine = units[part.units]
        if mine.all() if before is None else mine.equal(before[part.units]):
            continue
        for b in cache_blocks(length, mask.device):
            run, first = mask[offset + b.start : offset + b.stop], start + b.start
            if before is None:
                run &= expand_units(units, torch.ones_like(run), first, part)
            else:
                expand_units(units, run, first, part)
