"""LeapAdamW on one rank without an engine: equal to the oracle, and reducing to what it must reduce to."""

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leap_dist.checkpoint.engine_state import _with_tuples
from leap_dist.checkpoint.manifest import LeapState
from leap_dist.config.leap import LeapConfig
from leap_dist.core.communicator import Communicator
from leap_dist.core.fixed import Fixed
from leap_dist.core.fragments import whole
from leap_dist.core.gates import GatePlan
from leap_dist.core.gating import LATENT, MASK, SCORE
from leap_dist.core.hosted import GATED
from leap_dist.core.optimizer import LeapAdamW
from leap_dist.core.oracle import Oracle, best_units, top_k, unit_index
from leap_dist.core.stopwatch import TIMINGS, Stopwatch
from leap_dist.errors import UserError
from leap_dist.models.inputs import resolve_start
from leap_dist.zero.listener import Listener
from tests.peers.nets import GATES, LR, WEIGHT_DECAY, batches, leap, loss_of, net, plan_of, relative_error

STEPS = 40


def build(model: nn.Module, config: LeapConfig, kind: str = "element", prior: Fixed | None = None) -> LeapAdamW:
    """The optimizer over whole tensors."""
    plan = plan_of(kind, model, config)
    start = resolve_start(model, plan, config)
    named = dict(model.named_parameters())
    gated = [p for name, p in named.items() if name in plan.covers]
    rest = [p for name, p in named.items() if name not in plan.covers]
    no_decay = frozenset(biases(plan))
    groups = [{"params": gated, GATED: True, "no_decay": no_decay}, {"params": rest}]
    own: dict[str, Any] = {"lr": LR, "weight_decay": WEIGHT_DECAY, "axes": start.axes, "prior": prior}
    optimizer = LeapAdamW(groups, plan, start.config, **own)
    optimizer.bind(whole(named.items()), Communicator())
    if optimizer.inputs is not None:
        Listener(model, optimizer.inputs, on=True)
    return optimizer


def biases(plan: GatePlan) -> list[str]:
    return [name for name in plan.covers if not plan.counted(name)]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = STEPS) -> None:
    for x, y in batches(steps):
        model.zero_grad()
        loss_of(model(x), y).backward()
        optimizer.step()


def step_both(oracle: Oracle, model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    """The same step of the oracle, and of a model with its optimizer."""
    oracle.step(lambda forward: loss_of(forward(x), y))
    model.zero_grad()
    loss_of(model(x), y).backward()
    optimizer.step()


CHANGES: dict[str, dict[str, Any]] = {
    "paper": {"control": "paper"},
    "published-lambda": {"control": "paper", "lambda_max": 160.0},
    "movement": {"rule": "movement"},
    "magnitude": {"rule": "magnitude"},
    "zero-scores": {"score_init": "zero"},
    "activation": {"score_init": "activation", "dense_fraction": 0.1, "tokens_per_step": 1},
    "gradient": {"score_init": "gradient", "dense_fraction": 0.1, "tokens_per_step": 1},
}
OWN = {"score_moments": "own"}
GRID = [pytest.param(kind, {}, id=f"projected-{kind}") for kind in GATES]
GRID += [
    pytest.param(kind, changes, id=f"{name}-{kind}", marks=pytest.mark.slow)
    for turn, (name, changes) in enumerate(CHANGES.items())
    for number, kind in enumerate(GATES)
    if (turn + number) % 2 or name == "gradient"
]
"""Every kind by magnitude and by gradient, and with every other of the changes, in turn."""
GRID += [
    pytest.param(kind, changes, id=f"own-{name}-{kind}", marks=pytest.mark.slow)
    for name, changes in {"leap": OWN, "movement": OWN | {"rule": "movement"}}.items()
    for kind in ("element", "2:4", "hybrid", "head+2:4", "layer+element")
]


@pytest.mark.parametrize(("kind", "changes"), GRID)
def test_equals_the_oracle(kind: str, changes: dict[str, Any]) -> None:
    config = leap(kind, STEPS, **changes)
    model, reference = net(kind), net(kind)
    optimizer = build(model, config, kind)
    oracle = Oracle(reference, optimizer.plan, config, LR, WEIGHT_DECAY, no_decay=biases(optimizer.plan))
    for x, y in batches(STEPS):
        step_both(oracle, model, optimizer, x, y)
    expected = oracle.masked_weights()
    for name, parameter in model.named_parameters():
        assert relative_error(parameter, expected[name]) <= 1e-5, name
    assert optimizer.settled
    assert abs(optimizer.kept_weights - config.target * optimizer.plan.prunable) <= optimizer.plan.unit
    learned = optimizer.gating.gather_thresholds()
    torch.testing.assert_close(learned, oracle.sigma.detach(), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("element", {}),
        ("element", OWN),
        ("row", {"control": "paper"}),
        ("hybrid", {"rule": "movement", "dense_fraction": 0.2}),
        ("element", {"rule": "gumbel"}),
    ],
)
def test_steps_that_are_left_out_are_no_updates(kind: str, changes: dict[str, Any]) -> None:
    """Adam counted them: after one at the start of the prune phase thresholds moved 0.53 times as far. A copy that was
    saved and restored goes the same way.
    """
    config = leap(kind, STEPS, **changes)
    model, reference = net(kind), net(kind)
    optimizer = build(model, config, kind)
    optimizer.check_gradient = True
    oracle = Oracle(reference, optimizer.plan, config, LR, WEIGHT_DECAY, no_decay=biases(optimizer.plan))
    start = optimizer.schedule.dense_end
    for step, (x, y) in enumerate(batches(STEPS)):
        if step in (0, 1, start, start + 1, start + 5):
            oracle.skip()
            model.zero_grad()
            (loss_of(model(x), y) * float("inf")).backward()
            optimizer.step()
        else:
            step_both(oracle, model, optimizer, x, y)
        if step == start + 3:
            state = LeapState(**_with_tuples(optimizer.plain_state())).model_dump()
            optimizer.take_counts({})
            optimizer.load_plain_state(state)
    expected = oracle.masked_weights()
    for name, parameter in model.named_parameters():
        assert relative_error(parameter, expected[name]) <= 1e-5, name
    learned = optimizer.gating.gather_thresholds()
    torch.testing.assert_close(learned, oracle.sigma.detach(), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(("kind", "changes"), [("element", {}), ("row", {}), ("hybrid", {}), ("hybrid", OWN)])
def test_target_one_is_plain_adamw_bit_for_bit(kind: str, changes: dict[str, Any]) -> None:
    model, plain = net(), net()
    optimizer = build(model, leap(kind, STEPS, target=1.0, **changes))
    no_decay = set(biases(optimizer.plan))
    named = dict(plain.named_parameters())
    groups = [
        {"params": [p for name, p in named.items() if name not in no_decay]},
        {"params": [p for name, p in named.items() if name in no_decay], "weight_decay": 0.0},
    ]
    train(model, optimizer)
    train(plain, torch.optim.AdamW(groups, lr=LR, weight_decay=WEIGHT_DECAY))
    assert optimizer.settled and optimizer.density == 1.0
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, named[name]), name


def test_the_dense_phase_is_plain_adamw_bit_for_bit() -> None:
    model, plain = net(), net()
    optimizer = build(model, leap("element", STEPS, dense_fraction=0.5))
    train(model, optimizer, STEPS // 2 - 1)
    train(plain, torch.optim.AdamW(plain.parameters(), lr=LR, weight_decay=WEIGHT_DECAY), STEPS // 2 - 1)
    assert optimizer.phase == "dense"
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_fixed_thresholds_keep_the_top_scores() -> None:
    model = net()
    config = leap("element", STEPS, rule="movement")
    optimizer = build(model, config)
    train(model, optimizer, STEPS // 2)
    plan, state = optimizer.plan, optimizer.state
    for index, gate in enumerate(plan.gates):
        flat = dict(model.named_parameters())[gate.slices[0].tensor]
        expected = top_k(state[flat]["score"].flatten(), optimizer.kept_units[index])
        assert torch.equal(state[flat][MASK].flatten(), expected)
        ratio = optimizer.kept_units[index] / gate.num_units
        assert abs(ratio - optimizer.schedule.level(optimizer.num_steps)) <= 1 / gate.num_units + 1e-2


def test_a_hybrid_is_held_to_the_level_though_its_thresholds_ask_for_more() -> None:
    model = net("hybrid")
    optimizer = build(model, leap("hybrid", STEPS), "hybrid")
    seen = 0
    for x, y in batches(STEPS):
        model.zero_grad()
        loss_of(model(x), y).backward()
        optimizer.step()
        if optimizer.phase == "prune" and optimizer.num_steps > 2:
            level = optimizer.schedule.level(optimizer.num_steps)
            assert abs(optimizer.density - level) <= 0.1 * level
            seen += 1
    assert seen > STEPS // 2


@pytest.mark.parametrize("kind", ["hybrid", "layer+element", "head+2:4"])
def test_a_mask_is_the_product_of_its_gates_masks(kind: str) -> None:
    model = net(kind)
    optimizer = build(model, leap(kind, STEPS), kind)
    train(model, optimizer, STEPS // 2)
    plan, gating, kept = optimizer.plan, optimizer.gating, 0
    for name, parameter in model.named_parameters():
        product = torch.ones(parameter.numel(), dtype=torch.bool)
        for cover in plan.covers.get(name, ()):
            gate = plan.gates[cover.gate]
            if gate.elementwise:
                units = best_units(gate, optimizer.state[parameter][SCORE].flatten(), optimizer.kept_units[cover.gate])
            else:
                units = gating.unit_mask[plan.units(cover.gate)]
            product &= units[unit_index(cover.slices).flatten()]
        if name in plan.covers:
            assert torch.equal(optimizer.state[parameter][MASK].flatten(), product), name
            kept += int(product.sum()) if plan.counted(name) else 0
    assert 0 < optimizer.masks.count_kept() == kept == optimizer.kept_weights < plan.prunable


def test_pruned_latent_weights_get_no_gradient_and_masks_freeze_when_settled() -> None:
    model = net()
    optimizer = build(model, leap("element", STEPS, settle_fraction=0.3))
    train(model, optimizer, STEPS - 10)
    assert optimizer.phase == "settle"
    before = [optimizer.state[p][MASK].clone() for p in model.parameters() if MASK in optimizer.state[p]]
    train(model, optimizer, 10)
    after = [optimizer.state[p][MASK] for p in model.parameters() if MASK in optimizer.state[p]]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    for parameter in model.parameters():
        if MASK in optimizer.state[parameter]:
            state = optimizer.state[parameter]
            assert torch.equal(parameter.detach(), (state[LATENT] * state[MASK]).detach())


@pytest.mark.parametrize("kind", ["element", "hybrid"])
def test_a_step_reports_what_it_costs(kind: str) -> None:
    model = net(kind)
    optimizer = build(model, leap(kind, STEPS), kind)
    train(model, optimizer, STEPS // 2)
    report = optimizer.measures()
    assert all(isinstance(value, float) for value in report.values())
    spent = [report[key] for key in TIMINGS]
    assert report["leap_ms_communication"] == 0.0 and all(0.0 < value < 1e4 for value in spent[:-1])
    assert report["leap_collectives"] == report["leap_bytes_communicated"] == 0.0  # one rank
    gated = [p for name, p in model.named_parameters() if name in optimizer.plan.covers]
    masks = 2 if kind == "hybrid" else 1
    assert report["leap_extra_bytes"] == sum(p.numel() for p in gated) * (2 * 4 + masks)


def test_a_stopwatch_takes_an_inner_part_off_the_outer() -> None:
    stopwatch = Stopwatch()
    for _ in range(2):
        stopwatch.restart()
        with stopwatch.measure("update"):
            time.sleep(0.02)
            with stopwatch.measure("communication"):
                time.sleep(0.06)
        time.sleep(0.01)
    spent = stopwatch.milliseconds()
    assert spent.keys() == set(TIMINGS) and spent["leap_ms_select"] == spent["leap_ms_mask"] == 0.0
    assert spent["leap_ms_update"] >= 20.0 and spent["leap_ms_communication"] >= 60.0


def test_settle_can_be_called_early_and_twice() -> None:
    model = net()
    optimizer = build(model, leap("hybrid", STEPS))
    train(model, optimizer, 30)
    optimizer.settle()
    kept = optimizer.kept_weights
    optimizer.settle()
    assert kept == optimizer.kept_weights
    assert abs(kept - 0.2 * optimizer.plan.prunable) <= optimizer.plan.unit


def test_a_target_below_one_unit_a_gate_is_refused_with_the_lowest_possible() -> None:
    with pytest.raises(UserError, match=r"leap.target: 0.01 cannot be reached: .* density is 0\.\d+"):
        build(net(), leap("block", STEPS, gates=["block:13x13"], target=0.01))


def test_total_steps_are_needed() -> None:
    config = leap("element", 100).model_copy(update={"total_steps": None})
    with pytest.raises(UserError, match=r"leap\.total_steps: missing"):
        LeapAdamW([{"params": []}], GatePlan([]), config)


def test_scores_from_gradients_need_a_step() -> None:
    """Without one all of them were 0, and the first weights of every matrix stayed."""
    model = net()
    optimizer = build(model, leap("element", STEPS, score_init="gradient"))
    model(next(iter(batches(1)))[0])
    with pytest.raises(UserError, match=r"^leap\.score_init: scores start from gradients, and there was no step; "):
        optimizer.settle()
