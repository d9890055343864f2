"""Gates and slices: which units cover which elements of which tensors.

Every granularity is one arithmetic. A slice views its tensor as a matrix of (rows, cols) and cuts a region of it into
blocks of (block_rows, block_cols), the blocks at the edges being smaller; block (i, j) of a region belongs to unit
first_unit + i * grid_cols + j. An element gate has blocks of 1 x 1, a row gate 1 x cols; a head covers blocks of
head_dim x cols in Q, K and V and of rows x head_dim in O.
"""

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from leap_dist.errors import UserError
from leap_dist.ops.slices import Slice


@dataclass(frozen=True)
class Gate:
    """A set of units that share one score vector and one learned threshold.

    The kept count is a multiple of `multiple_of` (or all units) and at least `min_keep`. Gates with the same `tie`
    share one threshold and one kept count. A gate with a `pattern` (n, m) has no ratio to learn: of every m neighbours
    in a row the n best are kept.
    """

    name: str
    granularity: str
    slices: tuple[Slice, ...]
    min_keep: int = 1
    multiple_of: int = 1
    tie: str | None = None

    @cached_property
    def num_units(self) -> int:
        """Length n of the score vector."""
        return max(part.units.stop for part in self.slices)

    @property
    def pattern(self) -> tuple[int, int] | None:
        """(n, m) of an n:m gate."""
        return pattern_of(self.granularity)

    @property
    def elementwise(self) -> bool:
        """True if a unit is one weight: such scores live beside the weights, sharded like them."""
        return self.granularity == "element" or self.pattern is not None

    @property
    def unit_sizes(self) -> torch.Tensor:
        """Prunable weights of every unit, int64 of shape (num_units,); of shape (1,) where a unit is one weight.

        Made anew at every call: a large model has hundreds of millions of blocks.
        """
        if self.elementwise:
            return torch.ones(1, dtype=torch.int64)
        sizes = torch.zeros(self.num_units, dtype=torch.int64)
        for part in self.slices:
            if part.counted:
                sizes[part.units] += part.unit_sizes()
        return sizes

    @cached_property
    def distinct_sizes(self) -> frozenset[int]:
        """The numbers of prunable weights that occur among its units; from shapes alone for every gate of a model."""
        if self.elementwise:
            return frozenset({1})
        runs: dict[tuple[int, int], list[set[int]]] = {}  # the slices of every run of units
        for part in self.slices:
            if part.counted:
                runs.setdefault((part.units.start, part.units.stop), []).append(part.distinct_sizes())
        edges = [edge for run in sorted(runs) for edge in run]
        cover_all = edges == sorted(edges) and sum(stop - start for start, stop in runs) == self.num_units
        if not cover_all or any(sum(len(sizes) > 1 for sizes in slices) > 1 for slices in runs.values()):
            return frozenset(self.unit_sizes.unique().tolist())  # runs that overlap, or edges in several tensors
        return frozenset(sum(sizes) for slices in runs.values() for sizes in itertools.product(*slices))

    @cached_property
    def follower_sizes(self) -> frozenset[int]:
        """The numbers of elements that occur among its units of what follows them uncounted, such as biases."""
        if self.elementwise or all(part.counted for part in self.slices):
            return frozenset({0})
        sizes = torch.zeros(self.num_units, dtype=torch.int64)
        for part in self.slices:
            if not part.counted:
                sizes[part.units] += part.unit_sizes()
        return frozenset(sizes.unique().tolist())

    @property
    def unit_size(self) -> int:
        """Prunable weights in the largest unit."""
        return max(self.distinct_sizes)

    @property
    def uniform(self) -> bool:
        """True if all units hold the same number of prunable weights."""
        return len(self.distinct_sizes) == 1

    @property
    def num_weights(self) -> int:
        """Prunable weights of the whole gate."""
        return sum(part.numel for part in self.slices if part.counted)

    @property
    def lowest(self) -> int:
        """The smallest kept count that is allowed."""
        if self.pattern is not None:
            return self.num_units // self.pattern[1] * self.pattern[0]
        return min(-(-max(self.min_keep, 1) // self.multiple_of) * self.multiple_of, self.num_units)


def pattern_of(granularity: str) -> tuple[int, int] | None:
    """(n, m) of "n:m" with 0 < n < m, None for every other granularity."""
    match = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", granularity)
    n_m = (int(match[1]), int(match[2])) if match else None
    return n_m if n_m and n_m[0] < n_m[1] else None


def block_shape(granularity: str, rows: int, cols: int) -> tuple[int, int]:
    """(block_rows, block_cols) of `granularity` on a matrix of (rows, cols)."""
    simple = {"element": (1, 1), "row": (1, cols), "column": (rows, 1)}
    if granularity in simple:
        return simple[granularity]
    if pattern_of(granularity):
        return 1, 1
    match = re.fullmatch(r"block:(\d+)x(\d+)", granularity)
    if match is None or 0 in (block := (int(match[1]), int(match[2]))):
        allowed = '"element", "row", "column", "block:RxC" with R, C >= 1 or "n:m" with 0 < n < m'
        raise UserError(f"leap.gates: {granularity!r} is not a granularity; allowed: {allowed}")
    return block


def matrix_gate(
    tensor: str,
    shape: Sequence[int],
    granularity: str,
    biases: Iterable[str] = (),
    transposed: bool = False,
    kernel: int = 1,
) -> Gate:
    """The gate of one granularity on one matrix of `shape` (outputs, inputs); a row takes along its entry of `biases`.

    Three dimensions are a stack of matrices (fused experts, the groups of a convolution); no block reaches over two of
    them. `transposed` says that a matrix is stored as (inputs, outputs), so that an output row is one of its columns.
    kernel: elements that stand for one entry of a matrix, neighbours in memory: the window of a convolution.

    Raises UserError if the tensor is no matrix or stack, is smaller than one block, or does not divide by a pattern.
    """
    if len(shape) not in (2, 3):
        raise UserError(f"leap.gates: {granularity!r} needs matrices, but {tensor} has shape {tuple(shape)}")
    depth, (rows, cols) = (shape[0] if len(shape) == 3 else 1), shape[-2:]
    outputs, inputs = (cols, rows) if transposed else (rows, cols)
    block = block_shape(granularity, outputs, inputs)
    block_rows, block_cols = (block[1], block[0]) if transposed else block
    leave = "name the tensor in leap.exclude"
    if block_rows > rows or block_cols > cols:
        raise UserError(
            f"leap.gates: {granularity!r} is larger than {tensor} of {rows}x{cols}; choose a smaller block, or {leave}"
        )
    if pattern := pattern_of(granularity):
        _check_pattern(tensor, granularity, cols * kernel % pattern[1], cols, transposed, kernel)
    width = cols * kernel
    if granularity != "element" and not pattern:
        block_cols *= kernel
    whole = Slice(tensor, depth * rows, width, block_rows, block_cols)
    slices = [whole]
    if rows % block_rows:
        num = -(-rows // block_rows) * -(-width // block_cols)
        slices = [replace(whole, first_unit=i * num, region=(i * rows, rows, 0, width)) for i in range(depth)]
    if granularity == "row":
        slices += [Slice(bias, depth * outputs, 1, 1, 1, counted=False) for bias in biases]
    return Gate(f"{tensor}:{granularity}", granularity, tuple(slices))


def _check_pattern(tensor: str, granularity: str, rest: int, cols: int, transposed: bool, kernel: int) -> None:
    """Raise UserError where neighbours in memory are not m inputs of one output."""
    why = None
    if transposed:
        why = "is stored as (inputs, outputs)"
    elif kernel > 1:
        why = f"has the {kernel} weights of one window side by side, not those of neighbouring inputs"
    elif rest:
        why = f"has rows of {cols}, no multiple of {granularity.partition(':')[2]}"
    if why:
        leave = "name the tensor in leap.exclude"
        raise UserError(f"leap.gates: {granularity!r} does not fit {tensor}, which {why}; {leave}")


@dataclass(frozen=True)
class Cover:
    """One tensor under one gate: the gate's index in the plan and slices of this tensor, which cover it whole.

    A gate may cover a tensor twice, by its rows and by its columns.
    """

    gate: int
    slices: tuple[Slice, ...]


class GatePlan:
    """All gates of a model, and for every gated tensor the gates that cover it."""

    def __init__(self, gates: Iterable[Gate]) -> None:
        self.gates = tuple(gates)
        self.covers: dict[str, list[Cover]] = {}
        for index, gate in enumerate(self.gates):
            for tensor in dict.fromkeys(part.tensor for part in gate.slices):
                parts: list[Slice] = []
                for part in (part for part in gate.slices if part.tensor == tensor):
                    parts.append(part)
                    if sum(part.numel for part in parts) == part.rows * part.cols:
                        self.covers.setdefault(tensor, []).append(Cover(index, tuple(parts)))
                        parts = []
                assert not parts, f"{gate.name}: {tensor}"
        self.structured = [index for index, gate in enumerate(self.gates) if not gate.elementwise]
        starts = torch.tensor([0] + [self.gates[i].num_units for i in self.structured]).cumsum(0).tolist()
        self._unit_start = dict(zip(self.structured, starts, strict=False))
        self.num_structured_units: int = starts[-1]
        self.tied = self._tie()

    def _tie(self) -> tuple[tuple[int, ...], ...]:
        """The indices of gates that share a threshold, in the order of their first gate; most stand alone."""
        groups: dict[object, list[int]] = {}
        for index, gate in enumerate(self.gates):
            groups.setdefault(index if gate.tie is None else gate.tie, []).append(index)
        return tuple(map(tuple, groups.values()))

    def units(self, gate: int) -> slice:
        """Where the units of a structured gate stand in the joint score vector of all structured gates."""
        start = self._unit_start[gate]
        return slice(start, start + self.gates[gate].num_units)

    def numel(self, tensor: str) -> int:
        """Elements of a gated tensor."""
        part = self.covers[tensor][0].slices[0]
        return part.rows * part.cols

    def counted(self, tensor: str) -> bool:
        """True if the elements of this tensor are prunable weights (a bias is not)."""
        return self.covers[tensor][0].slices[0].counted

    @cached_property
    def prunable(self) -> int:
        """N, the number of prunable weights."""
        return sum(self.numel(t) for t in self.covers if self.counted(t))

    def hybrid(self, tensor: str) -> bool:
        """True if several gates cover the tensor."""
        return len(self.covers[tensor]) > 1

    def grain(self, group: Sequence[int]) -> int:
        """Prunable weights that come or go at least when the kept count of tied gates changes."""
        return sum(self.gates[i].unit_size * self.gates[i].multiple_of for i in group)

    @cached_property
    def unit(self) -> int:
        """The grain to which a density can be exact: the largest unit, times what has to go together with it."""
        return max((self.grain(group) for group in self.tied), default=1)

    @cached_property
    def linear(self) -> bool:
        """True if the kept weights are a sum over gates: no hybrid, all units of a gate of one size."""
        alone = not any(self.hybrid(tensor) for tensor in self.covers)
        return alone and all(gate.uniform for gate in self.gates)
