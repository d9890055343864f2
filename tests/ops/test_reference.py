"""The inner loops against torch.optim.AdamW bit for bit, and against float64; the registered ops against opcheck."""

from typing import Any

import pytest
import torch

from leap_dist.core.oracle import top_k
from leap_dist.ops import dispatch as ops
from leap_dist.ops import reference
from leap_dist.ops.reference import CPU_BLOCK, Adam, run_table
from leap_dist.ops.soft import Curve, noise_keys, numbered_table
from tests.ops import runs

SIZES = [0, 1, 7, 1000, CPU_BLOCK, CPU_BLOCK + 13]


@pytest.mark.parametrize("size", SIZES)
def test_adamw_gives_the_bits_of_torch(size: int) -> None:
    torch.manual_seed(size)
    start = torch.randn(size)
    parameter = torch.nn.Parameter(start.clone())
    theirs = torch.optim.AdamW([parameter], lr=1e-2, weight_decay=0.1)
    ours, exp_avg, exp_avg_sq = start.clone(), torch.zeros(size), torch.zeros(size)
    masked, *moments = start.clone(), torch.zeros(size), torch.zeros(size)
    table, ones = run_table([(0, size, 0, 1)], CPU_BLOCK), torch.ones(size, dtype=torch.bool)
    for step in range(1, 5):
        grad = torch.randn(size)
        grad[::3] = 0.0  # as of words that no text has: their moments stay 0
        parameter.grad = grad.clone()
        theirs.step()
        adam = Adam(lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, step=step)
        ops.adamw_(ours, grad, exp_avg, exp_avg_sq, adam)
        ops.masked_adamw_(table, grad, ones, masked, *moments, adam)
    assert torch.equal(ours, parameter.detach())
    assert torch.equal(masked, ours)


@pytest.mark.parametrize("size", [1, 2, 64, 1 << 40])
def test_any_cut_gives_the_same_bits(size: int) -> None:
    whole, cut = runs.state(0), runs.state(0)
    scalars = runs.ADAM, runs.SCORE_ADAM
    one = ops.element_adamw_(runs.table(CPU_BLOCK), *whole.values(), *scalars)
    parts = ops.element_adamw_(runs.table(size), *cut.values(), *scalars)
    assert all(torch.equal(whole[key], cut[key]) for key in whole)
    torch.testing.assert_close(parts.sum(), one.sum(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hybrid", [False, True])
def test_element_update_against_float64(moments: torch.dtype, hybrid: bool) -> None:
    arguments = runs.state(1, moments)
    arguments["others"] = arguments["others"] if hybrid else None
    exact, sigma = runs.expected(arguments)
    table = runs.table()
    partial = ops.element_adamw_(table, *arguments.values(), runs.ADAM, runs.SCORE_ADAM)
    for key, value in exact.items():
        tolerance = {"rtol": 1e-2, "atol": 1e-4} if arguments[key].dtype == torch.bfloat16 else {"rtol": 1e-5}
        torch.testing.assert_close(arguments[key].double(), value, **({"atol": 1e-6} | tolerance), msg=key)
    by_gate = torch.zeros_like(sigma).index_add_(0, table[:, reference.GATE], partial)
    torch.testing.assert_close(by_gate, sigma, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hybrid", [False, True])
def test_shared_update_against_float64(moments: torch.dtype, hybrid: bool) -> None:
    arguments = runs.shared(runs.state(1, moments))
    arguments["others"] = arguments["others"] if hybrid else None
    exact, sigma = runs.expected_of_shared(arguments)
    cut = {key: value if value is None else value.clone() for key, value in arguments.items()}
    partial = ops.shared_adamw_(runs.table(), *arguments.values(), runs.ADAM, runs.SCORE_ADAM.lr)
    for key, value in exact.items():
        tolerance = {"rtol": 1e-2, "atol": 1e-4} if arguments[key].dtype == torch.bfloat16 else {"rtol": 1e-5}
        torch.testing.assert_close(arguments[key].double(), value, **({"atol": 1e-6} | tolerance), msg=key)
    by_gate = torch.zeros_like(sigma).index_add_(0, runs.table()[:, reference.GATE], partial)
    torch.testing.assert_close(by_gate, sigma, rtol=1e-5, atol=1e-4)
    ops.shared_adamw_(runs.table(64), *cut.values(), runs.ADAM, runs.SCORE_ADAM.lr)
    assert all(cut[key] is None or torch.equal(arguments[key], cut[key]) for key in arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_write_fills_the_runs_and_nothing_else(dtype: torch.dtype) -> None:
    latent, mask = torch.randn(runs.NUMEL), torch.rand(runs.NUMEL) < 0.5
    hosted = torch.full((runs.NUMEL,), float("nan"), dtype=dtype)
    ops.write_masked_(runs.table(), latent, mask, hosted)
    inside = runs.covered()
    assert torch.equal(hosted[inside], (latent * mask).to(dtype)[inside])
    assert hosted[~inside].isnan().all()


@pytest.mark.parametrize("width", [0.0, 0.01, 10.0, float("inf")])
def test_scores_inside_a_bracket_are_counted_and_taken(width: float) -> None:
    scores = torch.randn(runs.NUMEL)
    scores[[7, 1600, 2000]] = torch.tensor([float("nan"), float("inf"), 0.25])
    low, high = 0.25 - width, 0.25 + width
    bracket = torch.tensor([[low] * runs.NUM_GATES, [high] * runs.NUM_GATES])
    counts = ops.count_inside(runs.table(), scores, bracket)
    inside = runs.covered() & (scores >= low) & (scores <= high)
    assert counts.sum(0).tolist() == [int((runs.covered() & (scores > high)).sum()), int(inside.sum())]
    assert torch.equal(ops.take_inside(runs.table(), scores, bracket, counts[:, 1]), scores[inside])


def test_the_first_of_equal_scores_are_kept() -> None:
    scores = torch.tensor([1.0, 2.0, 1.0, 0.0, 1.0, float("nan"), 1.0])
    table = reference.run_table([(0, 7, 0, 0)], 7)
    for share, kept in ((-1, [1]), (0, [1]), (2, [0, 1, 2]), (4, [0, 1, 2, 4, 6]), (9, [0, 1, 2, 4, 6])):
        mask = torch.ones(7, dtype=torch.bool)
        ops.cut_(table, scores, torch.tensor([1.0]), torch.tensor([share]), mask)
        assert mask.nonzero().flatten().tolist() == kept


@pytest.mark.parametrize("kind", runs.SLICES)
@pytest.mark.parametrize("hybrid", [False, True])
def test_unit_sums_against_float64(kind: str, hybrid: bool) -> None:
    grad, latent, others = torch.randn(2000), torch.randn(2000), torch.rand(2000) < 0.5
    units = runs.unit_of(kind)
    values = grad.double() * latent.double() * (others if hybrid else 1.0)
    expected = torch.zeros(runs.num_units(kind), dtype=torch.float64)
    expected.index_add_(0, units[units >= 0], values[units >= 0])
    sums = ops.unit_sums(runs.patches(kind), grad, latent, others if hybrid else None, len(expected))
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", runs.SLICES)
def test_units_are_spread_over_their_elements(kind: str) -> None:
    units, of_element = torch.rand(runs.num_units(kind)) < 0.5, runs.unit_of(kind)
    for before in (False, True):
        mask = torch.full((2000,), before)
        ops.expand_units_(runs.patches(kind), units, torch.full_like(units, before), mask)
        assert torch.equal(mask, torch.where(of_element >= 0, units[of_element.clamp(min=0)], torch.tensor(before)))


@pytest.mark.parametrize("kind", runs.SLICES)
def test_a_mask_is_multiplied_by_units(kind: str) -> None:
    units, of_element = torch.rand(runs.num_units(kind)) < 0.5, runs.unit_of(kind)
    mask = torch.rand(2000) < 0.5
    expected = mask & torch.where(of_element >= 0, units[of_element.clamp(min=0)], torch.tensor(True))
    ops.expand_units_(runs.patches(kind), units, None, mask)
    assert torch.equal(mask, expected)


def test_the_best_of_groups_are_those_of_every_group_alone() -> None:
    table, scores, kept = runs.groups()
    for before in (False, True):
        mask = torch.full_like(scores, before, dtype=torch.bool)
        expected = mask.clone()
        for offset, length, gate, of in table.tolist():
            for start in range(offset, offset + length, of):
                expected[start : start + of] = top_k(scores[start : start + of], int(kept[gate]))
        assert not ops.best_of_(table, scores, kept, mask).any()
        assert torch.equal(mask, expected)


def test_rows_with_nan_are_told() -> None:
    table, scores, kept = runs.groups()
    scores[[1304, 4]] = float("nan")  # in the row of groups of three; outside all rows
    broken = ops.best_of_(table, scores, kept, torch.ones_like(scores, dtype=torch.bool))
    assert table[broken].tolist() == [[1301, 9, 1, 3]]


def sample(name: str) -> tuple[Any, ...]:
    """Arguments of one op."""
    state = runs.state(2)
    latent = state["latent"], state["exp_avg"], state["exp_avg_sq"]
    zeros = torch.zeros(runs.NUM_GATES, dtype=torch.int64)
    flags, units = torch.zeros(2000, dtype=torch.bool), torch.ones(runs.num_units("row"), dtype=torch.bool)
    bracket = torch.tensor([[-0.1] * runs.NUM_GATES, [0.1] * runs.NUM_GATES])
    before_scores = state["grad"], state["hosted"], state["others"], state["latent"]
    scores = state["score"], state["score_exp_avg"], state["score_exp_avg_sq"]
    curve = Curve(25.0, 4.0, 0.1, 7, 100.0)
    soft = numbered_table(runs.NUMBERED, 700), noise_keys(curve.key, runs.NUM_GATES, torch.device("cpu"))
    samples: dict[str, tuple[Any, ...]] = {
        "adamw_": (latent[0], state["grad"], *latent[1:], runs.ADAM),
        "masked_adamw_": (runs.table(), state["grad"], state["mask"], *latent, runs.ADAM),
        "element_adamw_": (runs.table(), *state.values(), runs.ADAM, runs.SCORE_ADAM),
        "shared_adamw_": (runs.table(), *runs.shared(state).values(), runs.ADAM, 1e-2),
        "write_masked_": (runs.table(), latent[0], state["mask"], state["hosted"]),
        "count_inside": (runs.table(), state["score"], bracket),
        "take_inside": (runs.table(), torch.zeros(runs.NUMEL), bracket, runs.table()[:, reference.LENGTH]),
        "cut_": (runs.table(), state["score"], bracket[0], runs.table()[:, reference.LENGTH] // 2, state["mask"]),
        "histogram": (reference.run_table([(0, 50, 1, 0)], 7), torch.randn(50), zeros, zeros + 3, zeros, 24),
        "unit_sums": (runs.patches("block"), state["grad"], latent[0], state["others"], runs.num_units("block")),
        "expand_units_": (runs.patches("row"), units, ~units, flags),
        "best_of_": (*runs.groups(), state["mask"]),
        "score_adamw_": (runs.table(), *before_scores, *scores, runs.SCORE_ADAM),
        "write_soft_": (*soft, state["latent"], state["score"], state["hosted"], curve.scalars()),
        "learn_soft_": (
            *(*soft, state["grad"], state["latent"], *scores, torch.empty(runs.NUMEL), curve.scalars()),
            *(torch.full((runs.NUM_GATES, 2), 0.5), runs.SCORE_ADAM),
        ),
    }
    return samples[name]


NAMES = ["adamw_", "masked_adamw_", "element_adamw_", "shared_adamw_", "write_masked_", "histogram", "unit_sums"]
SELECTION = ["count_inside", "take_inside", "cut_", "best_of_", "expand_units_"]
SCORES = ["score_adamw_", "write_soft_", "learn_soft_"]


def test_every_op_is_listed() -> None:
    made = {name for name, value in vars(ops).items() if isinstance(value, torch._ops.OpOverload)}
    assert made == {*NAMES, *SELECTION, *SCORES}


@pytest.mark.parametrize("name", [*NAMES, *SELECTION, *SCORES])
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(ops, name), sample(name))
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"leap_dist::{name}", "CUDA")


def test_a_backend_says_all_its_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = ops.reasons(torch.device("cuda", 0))
    assert said == ["triton is not installed: pip install triton", "torch finds no CUDA device"]
    ops.runs_on_triton.cache_clear()
    with pytest.warns(UserWarning, match="without its fused kernels: triton is not installed.*; torch finds no CUDA"):
        assert ops.row_size(torch.device("cuda", 0)) > 1 << 60
    assert ops.row_size(torch.device("cpu")) == CPU_BLOCK
    ops.runs_on_triton.cache_clear()


def test_a_dtype_that_no_kernel_takes_is_a_reason() -> None:
    said = ops.reasons(torch.device("cpu"), {torch.float32, torch.float16, torch.float64})
    assert said[-3:] == [
        "the tensors are on cpu, not on a CUDA device",
        "torch.float16 is not supported",
        "torch.float64 is not supported",
    ]
