"""Gates and slices: which units cover which elements of which tensors.

Every granularity is one arithmetic. A slice views its tensor as (rows, cols) and cuts that view into blocks of
(block_rows, block_cols), the blocks at the edges being smaller; block (i, j) belongs to unit i * grid_cols + j.
An element gate has blocks of 1 x 1, a row gate 1 x cols, a column gate rows x 1.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from leap_dist.errors import UserError


@dataclass(frozen=True)
class Slice:
    """The part of one tensor that the units of a gate cover, here the whole tensor seen as (rows, cols).

    `counted` says whether its elements are prunable weights: a bias follows its unit and is not counted.
    """

    tensor: str
    rows: int
    cols: int
    block_rows: int
    block_cols: int
    counted: bool = True

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.rows * self.cols

    @property
    def grid(self) -> tuple[int, int]:
        """Number of blocks down and across."""
        return -(-self.rows // self.block_rows), -(-self.cols // self.block_cols)

    def unit_sizes(self) -> torch.Tensor:
        """Elements of every unit, int64 of shape (num_units,)."""
        down, across = self.grid
        heights = torch.full((down,), self.block_rows)
        widths = torch.full((across,), self.block_cols)
        heights[-1] = self.rows - (down - 1) * self.block_rows
        widths[-1] = self.cols - (across - 1) * self.block_cols
        return torch.outer(heights, widths).flatten()


@dataclass(frozen=True)
class Gate:
    """A set of units that share one score vector and one learned threshold."""

    name: str
    granularity: str
    slices: tuple[Slice, ...]

    @property
    def num_units(self) -> int:
        """Length n of the score vector."""
        down, across = self.slices[0].grid
        return down * across

    @property
    def elementwise(self) -> bool:
        """True if a unit is one weight: such scores live beside the weights, sharded like them."""
        return self.granularity == "element"

    @property
    def unit_size(self) -> int:
        """Prunable weights in the largest unit."""
        return sum(min(s.block_rows, s.rows) * min(s.block_cols, s.cols) for s in self.slices if s.counted)

    @property
    def uniform(self) -> bool:
        """True if all units hold the same number of prunable weights."""
        return all(s.rows % s.block_rows == 0 and s.cols % s.block_cols == 0 for s in self.slices if s.counted)


def block_shape(granularity: str, rows: int, cols: int) -> tuple[int, int]:
    """(block_rows, block_cols) of `granularity` on a matrix of (rows, cols)."""
    simple = {"element": (1, 1), "row": (1, cols), "column": (rows, 1)}
    if granularity in simple:
        return simple[granularity]
    match = re.fullmatch(r"block:(\d+)x(\d+)", granularity)
    if match is None or 0 in (block := (int(match[1]), int(match[2]))):
        allowed = '"element", "row", "column" or "block:RxC" with R, C >= 1'
        raise UserError(f"leap.gates: {granularity!r} is not a granularity; allowed: {allowed}")
    return block


def matrix_gate(tensor: str, shape: Sequence[int], granularity: str, bias: str | None = None) -> Gate:
    """The gate of one granularity on one matrix; a row gate takes the bias of its rows along.

    Raises UserError if the matrix has not two dimensions, or is smaller than one block.
    """
    if len(shape) != 2:
        raise UserError(f"leap.gates: {granularity!r} needs matrices, but {tensor} has shape {tuple(shape)}")
    rows, cols = shape
    block_rows, block_cols = block_shape(granularity, rows, cols)
    if block_rows > rows or block_cols > cols:
        raise UserError(
            f"leap.gates: {granularity!r} is larger than {tensor} of {rows}x{cols}; "
            f"choose a smaller block, or name the tensor in leap.exclude"
        )
    slices = [Slice(tensor, rows, cols, block_rows, block_cols)]
    if granularity == "row" and bias is not None:
        slices.append(Slice(bias, rows, 1, 1, 1, counted=False))
    return Gate(f"{tensor}:{granularity}", granularity, tuple(slices))


@dataclass(frozen=True)
class Cover:
    """One tensor under one gate: the gate's index in the plan and the slice of this tensor."""

    gate: int
    slice: Slice


class GatePlan:
    """All gates of a model, and for every gated tensor the gates that cover it."""

    def __init__(self, gates: Iterable[Gate]) -> None:
        self.gates = tuple(gates)
        self.covers: dict[str, list[Cover]] = {}
        for index, gate in enumerate(self.gates):
            for part in gate.slices:
                self.covers.setdefault(part.tensor, []).append(Cover(index, part))
        self.structured = [index for index, gate in enumerate(self.gates) if not gate.elementwise]
        starts = torch.tensor([0] + [self.gates[i].num_units for i in self.structured]).cumsum(0).tolist()
        self._unit_start = dict(zip(self.structured, starts, strict=False))
        self.num_structured_units: int = starts[-1]

    def units(self, gate: int) -> slice:
        """Where the units of a structured gate stand in the joint score vector of all structured gates."""
        start = self._unit_start[gate]
        return slice(start, start + self.gates[gate].num_units)

    def numel(self, tensor: str) -> int:
        """Elements of a gated tensor."""
        return self.covers[tensor][0].slice.numel

    def counted(self, tensor: str) -> bool:
        """True if the elements of this tensor are prunable weights (a bias is not)."""
        return self.covers[tensor][0].slice.counted

    @property
    def prunable(self) -> int:
        """N, the number of prunable weights."""
        return sum(self.numel(t) for t in self.covers if self.counted(t))

    def hybrid(self, tensor: str) -> bool:
        """True if several gates cover the tensor."""
        return len(self.covers[tensor]) > 1

    def unit_sizes(self, gate: int) -> torch.Tensor:
        """Prunable weights of every unit of a gate, int64 of shape (num_units,)."""
        sizes = [part.unit_sizes() for part in self.gates[gate].slices if part.counted]
        return torch.stack(sizes).sum(0)

    @property
    def unit(self) -> int:
        """Prunable weights in the largest unit of any gate: the grain to which a density can be exact."""
        return max((gate.unit_size for gate in self.gates), default=1)

    @property
    def closed_form(self) -> bool:
        """True if the kept weights follow from the kept counts alone: no hybrid, no smaller units at edges."""
        alone = not any(self.hybrid(tensor) for tensor in self.covers)
        return alone and all(gate.uniform for gate in self.gates)
