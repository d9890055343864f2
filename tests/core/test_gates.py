"""Units cover every element once, whatever the granularity; fragments see them through any cut."""

import itertools
from dataclasses import replace

import pytest
import torch

from leap_dist.core.gates import Gate, GatePlan, matrix_gate, pattern_of
from leap_dist.core.oracle import unit_index
from leap_dist.errors import UserError
from leap_dist.ops.slices import Slice, add_unit_sums_, expand_units, rectangles

SHAPES = [(1, 1), (1, 7), (7, 1), (5, 8), (13, 11), (32, 16)]
GRANULARITIES = ["element", "row", "column", "block:1x1", "block:4x5", "block:3x2"]


def fits(shape: tuple[int, int], granularity: str) -> bool:
    return not granularity.startswith("block:4x5") or (shape[0] >= 4 and shape[1] >= 5)


CASES = [
    (shape, granularity)
    for shape in SHAPES
    for granularity in GRANULARITIES
    if fits(shape, granularity) and not (granularity == "block:3x2" and (shape[0] < 3 or shape[1] < 2))
]


@pytest.mark.parametrize(("shape", "granularity"), CASES)
def test_every_element_belongs_to_one_unit(shape: tuple[int, int], granularity: str) -> None:
    gate = matrix_gate("w", shape, granularity)
    index = unit_index(gate.slices).flatten()
    assert sorted(set(index.tolist())) == list(range(gate.num_units))
    assert torch.equal(torch.bincount(index), gate.unit_sizes.expand(gate.num_units))
    assert gate.distinct_sizes == set(torch.bincount(index).tolist())
    assert gate.unit_size == torch.bincount(index).max()
    assert gate.uniform == (torch.bincount(index).unique().numel() == 1)


@pytest.mark.parametrize(("shape", "granularity"), CASES)
def test_sums_and_masks_over_fragments_equal_those_over_the_tensor(shape: tuple[int, int], granularity: str) -> None:
    part = matrix_gate("w", shape, granularity).slices[0]
    index = unit_index([part]).flatten()
    values = torch.randn(part.numel, dtype=torch.float64)
    units = torch.randn(int(index.max()) + 1, dtype=torch.float64)
    expected = torch.zeros_like(units).index_add_(0, index, values)
    cuts = torch.randint(0, part.numel + 1, (4,)).tolist()
    edges = [0, *sorted(cuts), part.numel]  # some fragments are empty
    sums = torch.zeros_like(units)
    for start, stop in itertools.pairwise(edges):
        add_unit_sums_(sums, values[start:stop], start, part)
        poisoned = torch.full((stop - start,), float("nan"), dtype=torch.float64)
        assert torch.equal(expand_units(units, poisoned, start, part), units[index[start:stop]])
    torch.testing.assert_close(sums, expected)


@pytest.mark.parametrize(("start", "length"), [(0, 0), (3, 2), (3, 4), (3, 20), (0, 14), (6, 1)])
def test_rectangles_follow_each_other_in_memory(start: int, length: int) -> None:
    cols, elements = 7, []
    for row, num_rows, col, num_cols in rectangles(start, length, cols):
        elements += [r * cols + c for r in range(row, row + num_rows) for c in range(col, col + num_cols)]
    assert elements == list(range(start, start + length))


def test_a_row_takes_its_bias_along_without_counting_it() -> None:
    gate = matrix_gate("w", (6, 4), "row", biases=["b"])
    plan = GatePlan([gate])
    assert [part.tensor for part in gate.slices] == ["w", "b"]
    assert (plan.prunable, plan.unit, plan.counted("b")) == (24, 4, False)
    assert plan.linear


def test_edge_blocks_and_hybrids_are_no_sum_over_gates() -> None:
    assert not GatePlan([matrix_gate("w", (5, 5), "block:2x2")]).linear
    assert not GatePlan([matrix_gate("w", (4, 4), g) for g in ("row", "element")]).linear
    assert GatePlan([matrix_gate("w", (4, 4), "block:2x2")]).linear


@pytest.mark.parametrize(
    ("shape", "granularity", "match"),
    [
        ((4, 4), "block:5x1", "block:5x1' is larger than w of 4x4"),
        ((4, 4), "block:1x5", "larger than w of 4x4"),
        ((4,), "row", "needs matrices, but w has shape"),
        ((4, 4), "diagonal", "'diagonal' is not a granularity; allowed"),
        ((4, 4), "block:0x2", "not a granularity"),
    ],
)
def test_what_does_not_fit_is_refused(shape: tuple[int, ...], granularity: str, match: str) -> None:
    with pytest.raises(UserError, match=match):
        matrix_gate("w", shape, granularity)


def test_a_stack_of_matrices_has_no_block_over_two_of_them() -> None:
    for granularity in ("element", "row", "column", "block:2x3", "block:3x2"):
        stacked = matrix_gate("w", (3, 4, 5), granularity)
        alone = unit_index(matrix_gate("w", (4, 5), granularity).slices)
        num = int(alone.max()) + 1
        expected = torch.cat([alone + num * i for i in range(3)])
        assert torch.equal(unit_index(stacked.slices), expected), granularity
        assert stacked.num_units == 3 * num and stacked.num_weights == 60


def test_a_transposed_matrix_has_output_rows_in_its_columns() -> None:
    row = matrix_gate("w", (4, 6), "row", biases=["b"], transposed=True)
    assert torch.equal(unit_index(row.slices[:1]), torch.arange(6).expand(4, 6))
    assert row.slices[1].rows == 6
    block = matrix_gate("w", (4, 6), "block:3x2", transposed=True)  # 3 outputs x 2 inputs
    assert (block.slices[0].block_rows, block.slices[0].block_cols) == (2, 3)


@pytest.mark.parametrize(
    "slices",
    [
        (Slice("a", 5, 7, 2, 3), Slice("b", 9, 1, 1, 1)),  # edge blocks in one of two
        (Slice("a", 5, 7, 2, 3), Slice("b", 5, 7, 2, 3)),  # in both
        (Slice("a", 4, 6, 2, 6), Slice("b", 3, 5, 1, 5, first_unit=1)),  # units that overlap
        (Slice("a", 4, 6, 2, 6), Slice("b", 2, 1, 1, 1, counted=False, first_unit=2)),  # units without weights
        (Slice("a", 5, 7, 2, 3, first_unit=9), Slice("b", 9, 1, 1, 1)),  # the later units first
    ],
)
def test_sizes_that_occur_follow_from_shapes(slices: tuple[Slice, ...]) -> None:
    gate = Gate("g", "head", slices)
    sizes = torch.zeros(gate.num_units, dtype=torch.int64)
    for part in slices:
        if part.counted:
            sizes.index_add_(0, unit_index([part]).flatten(), torch.ones(part.numel, dtype=torch.int64))
    assert torch.equal(gate.unit_sizes, sizes)
    assert gate.distinct_sizes == set(sizes.tolist())
    assert (gate.unit_size, gate.uniform) == (sizes.max(), len(sizes.unique()) == 1)


def test_hundreds_of_millions_of_units_take_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Slice, "unit_sizes", None)
    gate = matrix_gate("w", (300_001, 200_003), "block:16x16")
    assert gate.num_units == 18751 * 12501 and gate.distinct_sizes == {256, 16, 48, 3}


def test_units_that_cover_runs_of_several_tensors() -> None:
    """Three units: rows 0-1, 2-3, 4-5 of both halves of a fused matrix, and columns of another."""
    halves = tuple(Slice("fused", 12, 5, 2, 5, region=(start, 6, 0, 5)) for start in (0, 6))
    gate = Gate("g", "head", (*halves, Slice("out", 5, 6, 5, 2)))
    assert (gate.num_units, gate.unit_size, gate.num_weights, gate.uniform) == (3, 30, 90, True)
    index = unit_index(halves).flatten()
    assert index.view(12, 5)[:, 0].tolist() == [0, 0, 1, 1, 2, 2] * 2
    values, units = torch.randn(60, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    sums, cuts = torch.zeros(3, dtype=torch.float64), [0, 7, 7, 33, 60]
    for start, stop in itertools.pairwise(cuts):
        out = torch.full((stop - start,), float("nan"), dtype=torch.float64)
        for part in halves:
            add_unit_sums_(sums, values[start:stop], start, part)
            expand_units(units, out, start, part)
        assert torch.equal(out, units[index[start:stop]])
    torch.testing.assert_close(sums, torch.zeros_like(sums).index_add_(0, index, values))


def test_a_pattern_keeps_n_of_m() -> None:
    gate = matrix_gate("w", (3, 8), "2:4")
    assert (gate.pattern, gate.elementwise, gate.lowest) == ((2, 4), True, 12)
    assert [pattern_of(g) for g in ("4:8", "4:4", "8:4", "0:4", "row")] == [(4, 8), None, None, None, None]
    with pytest.raises(
        UserError, match=r"'2:4' does not fit w, which has rows of 6, no multiple of 4; name the tensor"
    ):
        matrix_gate("w", (4, 6), "2:4")
    with pytest.raises(UserError, match=r"'2:4' does not fit w, which is stored as \(inputs, outputs\)"):
        matrix_gate("w", (4, 8), "2:4", transposed=True)


def test_tied_gates_come_and_go_together() -> None:
    gates = [replace(matrix_gate(name, (8, 4), "row"), tie="t", multiple_of=2) for name in "ab"]
    plan = GatePlan([gates[0], matrix_gate("c", (3, 5), "row"), gates[1]])
    assert plan.tied == ((0, 2), (1,))
    assert (plan.grain(plan.tied[0]), plan.unit) == (16, 16)
