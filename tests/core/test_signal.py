"""Thresholds of weights whose scale a norm takes away: held, so that rounding decides nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from leap_dist.checkpoint.engine_state import _with_tuples
from leap_dist.checkpoint.manifest import LeapState
from leap_dist.config.job_file import parse_leap
from leap_dist.config.leap import LeapConfig
from leap_dist.core import signal
from leap_dist.core.communicator import Communicator
from leap_dist.core.fragments import whole
from leap_dist.core.gating import MASK
from leap_dist.core.hosted import GATED
from leap_dist.core.optimizer import LeapAdamW
from leap_dist.core.oracle import Oracle
from leap_dist.models.plan import make_plan
from tests.peers.nets import relative_error

STEPS = 40


class Normed(nn.Module):
    """Two layers; the scale of the first goes in a norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.norm, self.outer = nn.Linear(13, 24, bias=False), nn.RMSNorm(24, 1e-12), nn.Linear(24, 5)
        self.second = nn.Linear(24, 24, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.second(self.norm(self.inner(x)))))


def settings(**changes: object) -> LeapConfig:
    names = {"include": ["inner.weight", "second.weight", "outer.weight"]}
    return parse_leap({"target": 0.3, "total_steps": STEPS, "score_init": "magnitude", **names, **changes})


def loss_of(out: Tensor, y: Tensor) -> Tensor:
    return (out - y).square().mean()


def batches(order: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(inputs, targets) of every step, their rows in this order."""
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(len(order), 13, generator=generator) for _ in range(STEPS)]
    return [(x[order], torch.tanh(x[order, :5] * 2.0)) for x in inputs]


def optimizer_of(model: nn.Module, config: LeapConfig) -> LeapAdamW:
    plan = make_plan(model, config)
    named = dict(model.named_parameters())
    gated = [p for name, p in named.items() if name in plan.covers]
    rest = [p for name, p in named.items() if name not in plan.covers]
    groups = [{"params": gated, GATED: True, "no_decay": frozenset()}, {"params": rest}]
    optimizer = LeapAdamW(groups, plan, config, lr=1e-2, weight_decay=0.0)
    optimizer.bind(whole(named.items()), Communicator())
    return optimizer


def trained(order: Tensor, **changes: object) -> LeapAdamW:
    model, config = Normed(), settings(**changes)
    optimizer = optimizer_of(model, config)
    for x, y in batches(order):
        model.zero_grad()
        loss_of(model(x), y).backward()
        optimizer.step()
    return optimizer


def masks_of(optimizer: LeapAdamW) -> dict[str, Tensor]:
    return {f.tensor: optimizer.gating.state(f, MASK).clone() for f in optimizer.gating.weights}


@pytest.mark.parametrize("gates", [["element"], ["row"]])
@pytest.mark.parametrize("control", ["projected", "paper"])
def test_thresholds_of_what_a_norm_follows_are_held(gates: list[str], control: str) -> None:
    optimizer = trained(torch.arange(32), gates=gates, control=control)
    names = [next(iter(t for t, c in optimizer.plan.covers.items() if c[0].gate == i)) for i in range(3)]
    assert dict(zip(names, optimizer.level.signal.held.tolist(), strict=True)) == {
        "inner.weight": True,
        "second.weight": False,
        "outer.weight": False,
    }
    assert optimizer.measures()["thresholds_held"] == 1.0
    assert optimizer.settled and abs(optimizer.density - 0.3) < 0.1


def test_the_level_falls_also_where_all_thresholds_are_held() -> None:
    """The regulariser's weight follows the task's gradient, of which there is none."""
    model, config = Normed(), settings(include=["inner.weight"], control="paper")
    optimizer, densities = optimizer_of(model, config), []
    for x, y in batches(torch.arange(32)):
        model.zero_grad()
        loss_of(model(x), y).backward()
        optimizer.step()
        densities.append(optimizer.density)
    before = [density for step, density in enumerate(densities) if optimizer.schedule.phase(step + 1) == "prune"]
    assert optimizer.level.signal.held.all() and before[0] > 0.9 and before[-1] < 0.8


def test_masks_do_not_depend_on_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rows in another order are the same loss; a threshold of rounding alone would move by it."""
    orders = [torch.arange(32), torch.arange(31, -1, -1)]

    def differing() -> int:
        one, two = (masks_of(trained(order)) for order in orders)
        return sum(int((one[name] != two[name]).sum()) for name in one)

    assert differing() == 0
    monkeypatch.setattr(signal, "FLOOR", 0.0)
    assert differing() > 0


def test_it_equals_the_oracle() -> None:
    model, reference, config = Normed(), Normed(), settings()
    optimizer = optimizer_of(model, config)
    oracle = Oracle(reference, optimizer.plan, config, 1e-2, 0.0)
    for x, y in batches(torch.arange(32)):
        oracle.step(lambda forward, x=x, y=y: loss_of(forward(x), y))
        model.zero_grad()
        loss_of(model(x), y).backward()
        optimizer.step()
    expected = oracle.masked_weights()
    for name, parameter in model.named_parameters():
        assert relative_error(parameter, expected[name]) <= 1e-5, name
    assert oracle.signal.held.tolist() == optimizer.level.signal.held.tolist()


def test_huge_gradients_hold_nothing() -> None:
    """Their squares overflow fp32, by which every threshold was held to the end."""
    model, huge = Normed(), Normed()
    ours, theirs = optimizer_of(model, settings()), optimizer_of(huge, settings())
    for x, y in batches(torch.arange(32))[:2]:
        for one, optimizer, scale in ((model, ours, 1.0), (huge, theirs, 2.0**70)):
            one.zero_grad()
            (loss_of(one(x), y) * scale).backward()
            optimizer.step()
    assert theirs.level.signal.held.tolist() == ours.level.signal.held.tolist()
    assert not ours.level.signal.held.all()


def test_a_checkpoint_has_what_was_seen() -> None:
    """Within the steps in which it is found out, too."""
    model = Normed()
    optimizer = optimizer_of(model, settings())
    for x, y in batches(torch.arange(32))[:5]:
        model.zero_grad()
        loss_of(model(x), y).backward()
        optimizer.step()
    state = LeapState(**_with_tuples(optimizer.plain_state())).model_dump()
    other = optimizer_of(Normed(), settings())
    other.level.take_plain_state(state)
    assert other.level.signal.num_steps == 5
    assert other.level.signal.plain_state() == optimizer.level.signal.plain_state()


def test_a_run_continues_with_what_was_seen() -> None:
    optimizer = trained(torch.arange(32))
    known, fresh = optimizer.level.signal, signal.Signal(optimizer.plan)
    fresh.load_plain_state(known.plain_state())
    assert fresh.is_known and fresh.held.tolist() == known.held.tolist() and fresh.held.any()
    fresh.load_plain_state({})  # of an older version
    assert fresh.is_known and not fresh.held.any()
