"""Slices: the part of a tensor that a gate covers, cut into blocks; sums over its units, and units spread over it."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Slice:
    """The part of one tensor, seen as (rows, cols), that units of a gate cover.

    region: (first row, rows, first column, columns) of the part, None for the whole tensor. `counted` says whether its
    elements are prunable weights: a bias follows its unit and is not counted.
    """

    tensor: str
    rows: int
    cols: int
    block_rows: int
    block_cols: int
    counted: bool = True
    first_unit: int = 0
    region: tuple[int, int, int, int] | None = None

    @property
    def bounds(self) -> tuple[int, int, int, int]:
        """The region, made explicit."""
        return self.region or (0, self.rows, 0, self.cols)

    @property
    def numel(self) -> int:
        """Number of elements of the region."""
        return self.bounds[1] * self.bounds[3]

    @property
    def grid(self) -> tuple[int, int]:
        """Number of blocks down and across."""
        _, num_rows, _, num_cols = self.bounds
        return -(-num_rows // self.block_rows), -(-num_cols // self.block_cols)

    @property
    def units(self) -> slice:
        """Where its units stand among those of the gate."""
        down, across = self.grid
        return slice(self.first_unit, self.first_unit + down * across)

    @property
    def _last(self) -> tuple[int, int]:
        """Rows and columns of the last block."""
        (down, across), (_, num_rows, _, num_cols) = self.grid, self.bounds
        return num_rows - (down - 1) * self.block_rows, num_cols - (across - 1) * self.block_cols

    def unit_sizes(self) -> torch.Tensor:
        """Elements of every unit that it covers, int64 of shape (down * across,)."""
        heights, widths = torch.full(self.grid[:1], self.block_rows), torch.full(self.grid[1:], self.block_cols)
        heights[-1], widths[-1] = self._last
        return torch.outer(heights, widths).flatten()

    def distinct_sizes(self) -> set[int]:
        """The sizes that occur among its units: four at most."""
        (down, across), (height, width) = self.grid, self._last
        heights = {height} | ({self.block_rows} if down > 1 else set())
        widths = {width} | ({self.block_cols} if across > 1 else set())
        return {rows * cols for rows in heights for cols in widths}


def rectangles(start: int, length: int, cols: int) -> list[tuple[int, int, int, int]]:
    """Cut a run of elements of a (rows, cols) matrix into at most three rectangles (row, num_rows, col, num_cols).

    They follow each other in memory: the rest of the first row, full rows, the begun last row.
    """
    if length == 0:
        return []
    row, col = divmod(start, cols)
    parts = []
    if col:
        num = min(cols - col, length)
        parts.append((row, 1, col, num))
        row, length = row + 1, length - num
    if full := length // cols:
        parts.append((row, full, 0, cols))
    if rest := length % cols:
        parts.append((row + full, 1, 0, rest))
    return parts


def _pieces(start: int, length: int, part: Slice) -> Iterator[tuple[slice, tuple[int, int], int, int, slice, slice]]:
    """Where a run of elements of a slice's tensor meets the slice's region.

    For every rectangle of the run: its place in the run, its shape, the first row and column of the meeting inside the
    region, and the rows and columns of the rectangle that meet it.
    """
    top, num_rows, left, num_cols = part.bounds
    position = 0
    for row, height, col, width in rectangles(start, length, part.cols):
        place = slice(position, position + height * width)
        position = place.stop
        first_row, last_row = max(row, top), min(row + height, top + num_rows)
        first_col, last_col = max(col, left), min(col + width, left + num_cols)
        if first_row < last_row and first_col < last_col:
            down, across = slice(first_row - row, last_row - row), slice(first_col - col, last_col - col)
            yield place, (height, width), first_row - top, first_col - left, down, across


def add_unit_sums_(units: Tensor, values: Tensor, start: int, part: Slice) -> None:
    """units_u += sum of the values that unit u covers.

    units: (num_units,) of the gate, any float dtype; values: (length,), the run from element `start` of the slice's
    tensor.
    """
    grid = units[part.units].view(part.grid)
    for place, shape, row, col, rows, cols in _pieces(start, values.numel(), part):
        block = values[place].view(shape)[rows, cols]
        sums = _block_sums(_block_sums(block, 0, row, part.block_rows), 1, col, part.block_cols)
        down, across = row // part.block_rows, col // part.block_cols
        grid[down : down + sums.shape[0], across : across + sums.shape[1]] += sums


def expand_units(units: Tensor, out: Tensor, start: int, part: Slice) -> Tensor:
    """out_i = units_u for the unit u that covers element i; elements outside the slice's region keep their value.

    units: (num_units,) of the gate; out: (length,), the run from element `start` of the slice's tensor; returns out.
    """
    grid = units[part.units].view(part.grid)
    for place, shape, row, col, rows, cols in _pieces(start, out.numel(), part):
        block = out[place].view(shape)[rows, cols]
        down = row // part.block_rows
        band = grid[down : (row + block.shape[0] - 1) // part.block_rows + 1]  # what the run meets; widened next
        wide = _repeat(band, 1, col, block.shape[1], part.block_cols)
        block.copy_(_repeat(wide, 0, row - down * part.block_rows, block.shape[0], part.block_rows))
    return out


def _repeat(grid: Tensor, dim: int, first: int, num: int, block: int) -> Tensor:
    """For the indices first .. first + num - 1 along `dim` their block's entry of grid; one entry if all share it."""
    start, stop = first // block, (first + num - 1) // block + 1
    part = grid.narrow(dim, start, stop - start)
    if stop - start == 1:
        return part
    indices = torch.arange(first, first + num, device=grid.device)
    return part.index_select(dim, indices.div_(block, rounding_mode="floor").sub_(start))


def _block_sums(x: Tensor, dim: int, first: int, block: int) -> Tensor:
    """Sum x along `dim` in blocks that end at multiples of `block`; x's first index there is `first`."""
    size = x.shape[dim]
    if block == 1:
        return x
    if first // block == (first + size - 1) // block:
        return x.sum(dim, keepdim=True)
    head = -first % block
    body = (size - head) // block
    middle = x.narrow(dim, head, body * block).unflatten(dim, (body, block)).sum(dim + 1)
    ends = [x.narrow(dim, 0, head), x.narrow(dim, head + body * block, size - head - body * block)]
    sums = [end.sum(dim, keepdim=True) if end.shape[dim] else end for end in ends]
    return torch.cat([sums[0], middle, sums[1]], dim)
