"""The remaining ratio, the regulariser and the projections, against autograd and by counting."""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from leap_dist.config.job_file import parse_leap
from leap_dist.core import thresholds as th
from leap_dist.core.gates import GatePlan, matrix_gate
from leap_dist.core.phases import Schedule, schedule_of
from leap_dist.errors import UserError

T = 32.0


def plan(*granularities: str, shapes: tuple[tuple[int, int], ...] = ((16, 8), (24, 20))) -> GatePlan:
    return GatePlan([matrix_gate(f"w{i}", s, g) for g in granularities for i, s in enumerate(shapes)])


def closed_count(gates: GatePlan) -> th.CountWeights:
    return lambda keep: sum(n * g.unit_size for n, g in zip(keep, gates.gates, strict=True))


def test_r_weighs_tensors_by_their_size_and_multiplies_over_gates() -> None:
    k = torch.tensor([0.5, 0.25, 0.1, 1.0], dtype=torch.float64)
    r = th.Remaining(plan("row", "element")).ratio(k)
    assert r.item() == pytest.approx((128 * 0.5 * 0.1 + 480 * 0.25 * 1.0) / 608)


@pytest.mark.parametrize("target", [0.1, 0.5, 0.999])
def test_the_regulariser_and_its_gradient(target: float) -> None:
    remaining, sigma = th.Remaining(plan("element")), torch.tensor([3.0, -20.0])
    value, loss, grad = remaining.penalty(sigma, T, target)
    step = 1e-4
    for i in range(2):
        moved = sigma.double().clone()
        moved[i] += step
        changed = max(remaining.ratio(torch.sigmoid(moved / T)).item() - target, 0.0) ** 2
        assert grad[i].item() == pytest.approx((changed - loss) / step, rel=1e-3, abs=1e-9)
    assert loss == pytest.approx(max(value - target, 0.0) ** 2)


def test_lambda_adapts_between_its_bounds() -> None:
    assert th.adaptive_lambda(0.81, 0.1, 160.0, 10.0) == pytest.approx(160.0)
    assert th.adaptive_lambda(0.0, 0.1, 160.0, 10.0) == 10.0


def test_balanced_lambda_gives_the_regulariser_the_larger_part() -> None:
    gap, slopes = 0.1, torch.tensor([1e-3, 3e-3], dtype=torch.float64)  # R falls by 4e-3 for a step of one
    reg = 2 * gap * slopes
    for rate, push in ((0.1, 1.0), (2.5, 0.25), (0.0, 1.0)):  # 250, 10 and any number of steps left; landing is 40
        scale = th.balanced_lambda(gap**2, reg, 5.0, rate, beta1=0.9)
        assert (scale * reg.norm()).item() == pytest.approx(th.RATIO * push * 5.0, rel=1e-5)
    assert th.balanced_lambda(0.0, 0 * reg, 5.0, 1.0, beta1=0.9) == 0.0


def test_the_tasks_size_is_averaged_as_adam_does() -> None:
    size, weight = th.TaskSize(), torch.nn.Parameter(torch.zeros(()))
    adam = torch.optim.Adam([weight], betas=(0.9, 0.99))
    for step, grad in enumerate((3.0, -4.0, 0.5), start=1):
        weight.grad = torch.tensor(grad)
        adam.step()
        got = size.follow(torch.tensor([grad]), 0.99, step)
    assert got == pytest.approx((adam.state[weight]["exp_avg_sq"].item() / (1 - 0.99**3)) ** 0.5, rel=1e-5)


@pytest.mark.parametrize("level", [0.03, 0.2, 0.5, 0.97, 1.0])
def test_the_level_is_met_after_a_shift_common_to_all(level: float) -> None:
    gates, sigma = plan("element"), torch.tensor([160.0, 60.0])
    remaining = th.Remaining(gates)
    shifted, calibration = th.project_level(remaining, sigma, T, level, 1.0, closed_count(gates))
    kept = closed_count(gates)(remaining.keep_counts(th.keep_ratio(shifted, T)))
    assert abs(kept - level * gates.prunable) <= len(gates.gates)
    torch.testing.assert_close((shifted - sigma)[0], (shifted - sigma)[1])
    assert calibration == pytest.approx(1.0, abs=0.2)


@pytest.mark.parametrize("target", [0.03, 0.1, 1 / 3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("granularity", ["element", "row", "block:8x4"])
@pytest.mark.parametrize("sigmas", [(160.0, 160.0), (-500.0, 700.0), (0.0, 1e-3)])
def test_the_settle_projection_is_exact_within_one_unit(
    target: float, granularity: str, sigmas: tuple[float, float]
) -> None:
    gates = plan(granularity)
    count = closed_count(gates)
    floor = count([1] * len(gates.gates))
    sigma, keep = th.project_exact(th.Remaining(gates), torch.tensor(sigmas), T, target, count)
    kept, goal = count(keep), math.ceil(target * gates.prunable - 1e-6)
    assert goal <= kept < goal + gates.unit or kept == floor
    assert all(1 <= n <= gate.num_units for n, gate in zip(keep, gates.gates, strict=True))
    assert torch.isfinite(sigma).all()


def test_equal_thresholds_do_not_settle_in_leaps_of_one_unit_per_gate() -> None:
    gates = plan("element", shapes=((10, 10),) * 7)
    _, keep = th.project_exact(th.Remaining(gates), torch.full((7,), 160.0), T, 0.5 + 3 / 700, closed_count(gates))
    assert sum(keep) == 353 and max(keep) - min(keep) == 1


@pytest.mark.parametrize("steps", [10, 500, 20_000])
@pytest.mark.parametrize("target", [0.03, 0.5, 0.8])
def test_phases_cover_the_run_and_the_level_descends_to_the_target(steps: int, target: float) -> None:
    schedule = Schedule(steps, 0.05, 0.2, target)
    phases = [schedule.phase(t) for t in range(steps)]
    assert phases == sorted(phases, key=["dense", "prune", "settle"].index)
    assert {"prune", "settle"} <= set(phases)
    levels = [schedule.level(t) for t in range(steps)]
    assert all(a >= b for a, b in itertools.pairwise(levels))
    reached = schedule.dense_end + 0.85 * (schedule.settle_start - schedule.dense_end)
    assert levels[math.ceil(reached)] == target and (schedule.dense_end == 0 or levels[0] == 1.0)


def test_the_descent_is_cubic() -> None:
    """Half of the way down, (1/2)^3 of the distance is left (Zhu and Gupta, arXiv 1710.01878)."""
    schedule = Schedule(100, 0.0, 0.2, 0.1)  # at its target after 0.85 x 80 = 68 steps
    assert schedule.level(33) == pytest.approx(0.1 + 0.9 / 8)


@pytest.mark.parametrize("steps", [500, 20_000])
@pytest.mark.parametrize(("target", "share"), [(0.05, 1.0), (0.25, 1.0), (0.5, 0.25), (0.75, 1 / 9)])
def test_the_automatic_rate_covers_the_distance_in_the_prune_phase(steps: int, target: float, share: float) -> None:
    schedule = Schedule(steps, 0.05, 0.2, target)
    distance = (5 - math.log(target / (1 - target))) * T
    steps = schedule.settle_start - schedule.dense_end
    for elementwise in (False, True):
        travel = schedule.threshold_rate(T, projected=True, elementwise=elementwise) * steps
        assert travel == pytest.approx(distance * (share if elementwise else 1.0))
        assert schedule.threshold_rate(T, projected=False, elementwise=elementwise) * steps == pytest.approx(
            2 * distance
        )


@pytest.mark.parametrize("wrong", [{"target": 0}, {"target": 1.5}, {"target": "ten"}, {"gates": []}])
def test_a_wrong_section_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"leap.{next(iter(wrong))}"):
        parse_leap({"target": 0.5, "total_steps": 100, **wrong})


def options_plan(**options: Any) -> GatePlan:
    """Two gates of 60 units of 4 weights and one of 7 units of 50, the first two with options."""
    small = [replace(matrix_gate(name, (60, 4), "row"), **options) for name in "ab"]
    return GatePlan([*small, matrix_gate("c", (7, 50), "row")])


@pytest.mark.parametrize("target", [0.2, 0.5, 0.77])
def test_what_a_large_unit_leaves_is_taken_back_in_small_ones(target: float) -> None:
    gates = options_plan()
    count = closed_count(gates)
    _, keep = th.project_exact(th.Remaining(gates), torch.full((3,), 160.0), T, target, count)
    assert 0 <= count(keep) - target * gates.prunable < 4
    assert abs(keep[0] - keep[1]) <= 1


@pytest.mark.parametrize("target", [0.3, 0.5, 0.77])
def test_what_the_finest_gates_cannot_give_is_taken_back_of_the_next(target: float) -> None:
    """Where the finest gate had nothing left to give up to a whole unit of the coarsest stayed too much."""
    full = replace(matrix_gate("a", (8, 1), "row"), min_keep=8)
    gates = GatePlan([full, matrix_gate("b", (60, 5), "row"), matrix_gate("c", (7, 50), "row")])
    count = closed_count(gates)
    _, keep = th.project_exact(th.Remaining(gates), torch.full((3,), 160.0), T, target, count)
    assert keep[0] == 8 and 0 <= count(keep) - target * gates.prunable < 5


@pytest.mark.parametrize("target", [0.3, 0.6, 1.0])
def test_kept_counts_heed_the_options_of_their_gates(target: float) -> None:
    gates = options_plan(multiple_of=8, min_keep=20, tie="t")
    remaining, count = th.Remaining(gates), closed_count(gates)
    for k in (0.0, 0.3, 0.5, 0.99):
        first, second, third = remaining.keep_counts(torch.full((3,), k, dtype=torch.float64))
        assert first == second and (first % 8 == 0 or first == 60) and first >= 24 and third == max(1, math.ceil(k * 7))
    _, keep = th.project_exact(remaining, torch.tensor([100.0, 100.0, 160.0]), T, target, count)
    assert keep[0] == keep[1] and (keep[0] % 8 == 0 or keep[0] == 60) and keep[0] >= 24
    assert 0 <= count(keep) - target * gates.prunable < gates.unit


def test_tied_gates_share_their_gradient_and_patterns_have_none() -> None:
    gates = GatePlan([*options_plan(tie="t").gates, matrix_gate("d", (4, 8), "2:4")])
    remaining = th.Remaining(gates)
    grad = remaining.share_gradient(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))
    assert grad.tolist() == [3.0, 3.0, 3.0, 0.0]


def test_a_pattern_comes_down_with_the_level() -> None:
    gates = GatePlan([matrix_gate("w", (4, 8), "2:4"), matrix_gate("v", (4, 4), "element")])
    remaining, sigma = th.Remaining(gates), torch.tensor([160.0, 160.0])
    for level, kept in ((1.0, 32), (0.88, 32), (0.8, 24), (0.63, 24), (0.62, 16), (0.51, 16), (0.1, 16)):
        patterned = remaining.with_patterns(sigma, T, level)
        assert remaining.keep_counts(th.keep_ratio(patterned, T))[0] == kept
        assert patterned[1] == sigma[1] and remaining.shifted(patterned, 5.0)[0] == patterned[0]


def test_what_stands_beside_a_pattern_comes_down_with_the_level_and_never_goes_up_again() -> None:
    gates = GatePlan([matrix_gate("w", (40, 80), "2:4"), matrix_gate("v", (40, 60), "element")])
    remaining, sigma, calibration = th.Remaining(gates), torch.tensor([160.0, 160.0]), 1.0
    before = 2400
    for level in (1.0 - 0.01 * step for step in range(51)):
        at = remaining.with_patterns(sigma, T, level)
        shifted, calibration = th.project_level(remaining, at, T, level, calibration, closed_count(gates))
        _, kept = remaining.keep_counts(th.keep_ratio(shifted, T))
        assert kept <= before and abs(kept - level * 2400) <= 5
        before = kept
    _, keep = th.project_exact(remaining, remaining.with_patterns(sigma, T, 0.0), T, 0.6, closed_count(gates))
    assert keep == [1600, 1760]  # 0.6 of 5,600, where 2:4 is half of its own


@pytest.mark.parametrize(
    ("changes", "trust"),
    [
        ({}, 1.0),  # the tokens are not known
        ({"tokens_per_step": 304}, 0.5),  # 304 x 20 tokens for 608,000 scores are half of the 0.02 a score
        ({"tokens_per_step": 10_000}, 1.0),
        ({"tokens_per_step": None}, 1.0),
    ],
)
def test_the_rates_and_the_descent_follow_the_tokens_a_score(changes: dict[str, Any], trust: float) -> None:
    config = parse_leap({"target": 0.1, "total_steps": 20, "score_init": "activation", **changes})
    gates = plan("element", shapes=((800, 760),))
    assert gates.prunable == 608_000
    found, whole = schedule_of(config, gates), Schedule(20, 0.05, 0.2, 0.1)
    assert found.trust == pytest.approx(trust)
    for projected in (True, False):
        assert found.threshold_rate(T, projected, True) == pytest.approx(
            trust * whole.threshold_rate(T, projected, True)
        )
    assert config.score_rate(True, found.trust) == pytest.approx(trust * 1e-2)
    levels = [found.level(step) for step in range(20)]
    assert levels.index(0.1) == math.ceil(1 + 0.85 * 15 * trust) - 1


def test_a_dense_phase_has_a_step_unless_there_is_none() -> None:
    assert [Schedule(20, part, 0.2, 0.5).dense_end for part in (0.0, 0.01, 0.05, 0.1)] == [0, 1, 1, 2]


def test_units_are_counted_by_their_weights_and_need_more_of_them() -> None:
    config = parse_leap({"target": 0.5, "total_steps": 20, "score_init": "activation", "tokens_per_step": 304})
    trusts = {kind: schedule_of(config, plan(kind, shapes=((800, 760),))).trust for kind in ("element", "2:4", "row")}
    assert trusts == {"element": 0.5, "2:4": 0.5, "row": pytest.approx(0.5 * 0.02 / 0.15)}


def test_a_budget_is_for_learned_scores_that_start_by_activation() -> None:
    given = {"target": 0.1, "total_steps": 20}
    config = parse_leap({**given, "score_init": "activation", "tokens_per_step": 1})
    for other in ({"score_init": "magnitude"}, {"rule": "movement"}, {"weights": "frozen"}):
        assert schedule_of(config.model_copy(update=other), plan("element")).trust == 1.0
        with pytest.raises(UserError, match=r"leap\.tokens_per_step: got 7, which has no effect here"):
            parse_leap({**given, **other, "tokens_per_step": 7})
