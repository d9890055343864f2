"""Masks on frozen weights: scores learn as the oracle's do, no weight changes, and none has moments."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from leap_dist.config.job_file import parse_leap
from leap_dist.core.gating import EXP_AVG, LATENT, MASK, SCORE
from leap_dist.core.oracle import Oracle
from leap_dist.errors import UserError
from tests.core.test_optimizer import biases, build, step_both, train
from tests.peers.nets import LR, WEIGHT_DECAY, batches, leap, net, relative_error


@pytest.mark.parametrize(
    ("kind", "steps", "changes"),
    [
        ("element", 100, {"control": "paper"}),
        ("element", 40, {}),
        ("hybrid", 40, {"rule": "movement"}),
        ("head+2:4", 40, {"score_init": "zero"}),
    ],
)
def test_scores_on_frozen_weights_equal_the_oracle(kind: str, steps: int, changes: dict[str, Any]) -> None:
    config = leap(kind, steps, weights="frozen", **changes)
    model, reference, before = net(kind), net(kind), dict(net(kind).named_parameters())
    optimizer = build(model, config, kind)
    oracle = Oracle(reference, optimizer.plan, config, LR, WEIGHT_DECAY, no_decay=biases(optimizer.plan))
    for x, y in batches(steps):
        step_both(oracle, model, optimizer, x, y)
    expected = oracle.masked_weights()
    assert optimizer.settled and optimizer.schedule.settle_start == steps - 1
    assert abs(optimizer.kept_weights - config.target * optimizer.plan.prunable) <= optimizer.plan.unit
    for index, gate in enumerate(optimizer.plan.gates):
        if gate.elementwise:
            found = optimizer.state[model.get_parameter(gate.slices[0].tensor)][SCORE].flatten()
        else:
            found = optimizer.gating.values.flat[len(optimizer.plan.gates) :][optimizer.plan.units(index)]
        assert relative_error(found, oracle.scores[index].detach()) <= 1e-5, gate.name
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name]), name
        state = optimizer.state[parameter]
        assert EXP_AVG not in state
        assert torch.equal(state.get(LATENT, parameter), before[name])
        assert torch.equal(parameter, before[name] * state.get(MASK, 1)), name


def test_frozen_weights_save_their_moments() -> None:
    changes = {"trained": {"score_moments": "own"}, "frozen": {"weights": "frozen"}}
    trained, frozen = (build(net(), leap("element", 40, **own)) for own in changes.values())
    train(net(), frozen, 1)

    def held(optimizer: Any) -> int:
        return sum(t.nbytes for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t))

    numel = sum(p.numel() for p in net().parameters())
    assert held(trained) - held(frozen) == 8 * numel
    assert trained.gating.extra_bytes == frozen.gating.extra_bytes == 17 * frozen.plan.prunable


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rule": "magnitude"},
            r'leap\.weights: got "frozen", but rule "magnitude" takes its masks from the weights, so that nothing .*',
        ),
        (
            {"start": "zeros"},
            r'leap\.weights: got "frozen", but the masks of leap\.start are fixed, so that nothing .*',
        ),
        (
            {"settle_fraction": 0.4},
            r"leap\.settle_fraction: got 0\.4, which has no effect here: frozen weights .*",
        ),
        (
            {"mode": "one_shot"},
            r'leap\.weights: got "frozen", which has no effect here: mode "one_shot" takes no step.*',
        ),
    ],
)
def test_nothing_to_learn_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_leap({"target": 0.5, "weights": "frozen", **changes})
