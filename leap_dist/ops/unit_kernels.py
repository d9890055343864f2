"""Triton versions of the ops on structured gates (units.py): sums over units, and unit masks spread over elements.

A patch's region is a grid of units; a program finds its patch by a binary search in the number of programs before
each. Sums of a patch's units go to places of their own and are folded over the patches in their order, so that the
result does not depend on the order of programs. No GPU has run these kernels yet: they are checked by Triton's
interpreter on the CPU, against float64, and the tiles are not tuned.
"""

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from leap_dist.ops.kernels import BLOCK, EXACT
from leap_dist.ops.units import BLOCK_ROWS, LENGTH, patches_of

TALL = 8  # units of so many rows are summed in tiles of as many rows
TILES = {True: (TALL, 64), False: (1, 256)}  # rows and columns of a tile, for tall units and for others
FOLD = 256  # units of one program of the last sum


@triton.jit
def _patch(patches, firsts, program, STEPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """(patch that a program works on, number of the program within it)."""
    low, high = tl.zeros((), dtype=tl.int64), tl.full((), 1 << STEPS, dtype=tl.int64)
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        before = tl.load(firsts + middle) <= program
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return patches + 12 * low, program - tl.load(firsts + low), low


@triton.jit
def _geometry(patch):  # type: ignore[no-untyped-def]
    """(cols, first row, rows, first column, columns of the region, rows and columns of a block, first unit)."""
    cols, top, num_rows = tl.load(patch + 4), tl.load(patch + 5), tl.load(patch + 6)
    left, num_cols = tl.load(patch + 7), tl.load(patch + 8)
    return cols, top, num_rows, left, num_cols, tl.load(patch + 9), tl.load(patch + 10), tl.load(patch + 11)


@triton.jit
def _sum_kernel(  # type: ignore[no-untyped-def]
    patches, firsts, bases, grad, latent, others, partial,
    STEPS: tl.constexpr, OTHERS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Sums of G * W * others over neighbouring units in a grid row, as many as fit into COLS columns, float64."""
    patch, piece, number = _patch(patches, firsts, tl.program_id(0).to(tl.int64), STEPS)
    offset, start, length = tl.load(patch), tl.load(patch + 1), tl.load(patch + 2)
    cols, top, num_rows, left, num_cols, height, width, _ = _geometry(patch)
    across = (num_cols + width - 1) // width
    group = tl.maximum(COLS // width, 1)
    pieces = (across + group - 1) // group
    i, j = piece // pieces, (piece % pieces) * group
    first_row = tl.maximum(i * height, start // cols - top)
    last_row = tl.minimum(tl.minimum((i + 1) * height, num_rows), (start + length - 1) // cols - top + 1)
    first_col, last_col = j * width, tl.minimum((j + group) * width, num_cols)
    column = tl.arange(0, COLS)
    total = tl.zeros((COLS,), dtype=tl.float64)
    for row in range(first_row, last_row, ROWS):
        for col in range(first_col, last_col, COLS):
            r, c = (row + tl.arange(0, ROWS))[:, None], (col + column)[None, :]
            element = (top + r) * cols + left + c
            inside = (r < last_row) & (c < last_col) & (element >= start) & (element < start + length)
            at = element + (offset - start)
            values = tl.load(grad + at, mask=inside, other=0) * tl.load(latent + at, mask=inside, other=0)
            if OTHERS:
                values *= tl.load(others + at, mask=inside, other=0).to(tl.float32)
            total += tl.sum(values, 0).to(tl.float64)
    base = partial + tl.load(bases + number) + i * across
    for unit in range(j, tl.minimum(j + group, across)):
        mine = (group == 1) | ((first_col + column) // width == unit)
        tl.store(base + unit + tl.arange(0, 1), tl.sum(tl.where(mine, total, 0.0), 0, keep_dims=True))


@triton.jit
def _fold_kernel(patches, bases, partial, sums, num_patches, num_units, FOLD: tl.constexpr):  # type: ignore[no-untyped-def]
    """sums_u = the partial sums of unit u, patch after patch."""
    unit = tl.program_id(0).to(tl.int64) * FOLD + tl.arange(0, FOLD)
    total = tl.zeros((FOLD,), dtype=tl.float64)
    for number in range(num_patches):
        base, num = tl.load(bases + number), tl.load(bases + number + 1) - tl.load(bases + number)
        place = unit - tl.load(patches + 12 * number + 11)
        total += tl.load(partial + base + place, mask=(place >= 0) & (place < num), other=0.0)
    tl.store(sums + unit, total, mask=unit < num_units)


@triton.jit
def _expand_kernel(  # type: ignore[no-untyped-def]
    patches, firsts, units, before, mask, STEPS: tl.constexpr, PRODUCT: tl.constexpr, BLOCK: tl.constexpr
):
    """mask_i = units_u on BLOCK elements of a patch, where units_u is not before_u; PRODUCT: not 1."""
    patch, piece, _ = _patch(patches, firsts, tl.program_id(0).to(tl.int64), STEPS)
    offset, start, length = tl.load(patch), tl.load(patch + 1), tl.load(patch + 2)
    cols, top, num_rows, left, num_cols, height, width, first = _geometry(patch)
    at = piece * BLOCK + tl.arange(0, BLOCK)
    row, col = (start + at) // cols - top, (start + at) % cols - left
    inside = (at < length) & (row >= 0) & (row < num_rows) & (col >= 0) & (col < num_cols)
    unit = first + (row // height) * ((num_cols + width - 1) // width) + col // width
    new = tl.load(units + unit, mask=inside, other=1)
    old = tl.full((BLOCK,), 1, tl.uint8) if PRODUCT else tl.load(before + unit, mask=inside, other=1)
    tl.store(mask + offset + at, new, mask=new != old)


class _Grid(NamedTuple):
    """A launch over patches: their table and the number of programs before each, on the GPU; the programs in all."""

    patches: Tensor
    firsts: Tensor
    num_programs: int
    steps: int


class _SumGrid(NamedTuple):
    """A launch over the units of patches, in tiles of one shape; bases: the number of units before each patch's."""

    grid: _Grid
    tile: tuple[int, int]
    bases: Tensor
    num_partial: int


Made = TypeVar("Made")


def _once(make: Callable[[Tensor, torch.device], Made]) -> Callable[[Tensor, torch.device], Made]:
    """Remember what was made for a table of patches: tables are made once (core/parts.py) and never change."""
    made = WeakTensorKeyDictionary()

    @functools.wraps(make)
    def known(patches: Tensor, device: torch.device) -> Made:
        if patches not in made:
            made[patches] = make(patches, device)
        found: Made = made[patches]
        return found

    return known


@_once
def _sum_grids(patches: Tensor, device: torch.device) -> list[_SumGrid]:
    """The launches of unit_sums: one for tall units, one for others, where there are any."""
    tall = patches[:, BLOCK_ROWS] >= TALL
    found = []
    for tile, chosen in ((TILES[True], patches[tall]), (TILES[False], patches[~tall])):
        parts = [part for *_, part in patches_of(chosen)]
        if parts:
            groups = [max(tile[1] // part.block_cols, 1) for part in parts]
            pieces = [part.grid[0] * -(-part.grid[1] // group) for part, group in zip(parts, groups, strict=True)]
            bases, num_partial, _ = _programs((down * across for down, across in (p.grid for p in parts)), device)
            found.append(_SumGrid(_Grid(chosen.to(device), *_programs(pieces, device)), tile, bases, num_partial))
    return found


@_once
def _element_grid(patches: Tensor, device: torch.device) -> _Grid:
    """The launch of expand_units_: BLOCK elements a program."""
    pieces = (-(-num // BLOCK) for num in patches[:, LENGTH].tolist())
    return _Grid(patches.to(device), *_programs(pieces, device))


def _programs(counts: Iterable[int], device: torch.device) -> tuple[Tensor, int, int]:
    """(number before each patch, padded with the total to a power of two and one; total; steps of a binary search)."""
    firsts = [0, *itertools.accumulate(counts)]
    steps = max(len(firsts) - 2, 1).bit_length()
    padded = firsts + [firsts[-1]] * ((1 << steps) + 1 - len(firsts))
    return torch.tensor(padded, dtype=torch.int64).to(device), firsts[-1], steps


def unit_sums(patches: Tensor, grad: Tensor, latent: Tensor, others: Tensor | None, num_units: int) -> Tensor:
    """As units.unit_sums."""
    sums = torch.zeros(num_units, dtype=torch.float64, device=grad.device)
    known = latent if others is None else others.view(torch.uint8)
    for (table, firsts, num_programs, steps), (rows, cols), bases, num_partial in _sum_grids(patches, grad.device):
        partial = sums.new_empty(num_partial)
        _sum_kernel[(num_programs,)](
            table, firsts, bases, grad, latent, known, partial,
            STEPS=steps, OTHERS=others is not None, ROWS=rows, COLS=cols, **EXACT,
        )  # fmt: skip
        part_sums = torch.empty_like(sums)
        fold = (triton.cdiv(num_units, FOLD),)
        _fold_kernel[fold](table, bases, partial, part_sums, len(table), num_units, FOLD=FOLD, **EXACT)
        sums += part_sums
    return sums


def expand_units_(patches: Tensor, units: Tensor, before: Tensor | None, mask: Tensor) -> None:
    """As units.expand_units_."""
    table, firsts, num_programs, steps = _element_grid(patches, mask.device)
    if num_programs:
        flags = [flag.view(torch.uint8) for flag in (units, units if before is None else before, mask)]
        _expand_kernel[(num_programs,)](
            table, firsts, *flags, STEPS=steps, PRODUCT=before is None, BLOCK=BLOCK, **EXACT
        )  # fmt: skip
