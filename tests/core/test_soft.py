"""Rule "gumbel": soft masks learned in the optimizer step equal those of autograd, and end exactly at the target."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from leap_dist.core.gating import SCORE
from leap_dist.core.oracle import Oracle
from leap_dist.core.phases import Schedule
from leap_dist.core.soft import curve_at
from leap_dist.errors import UserError
from leap_dist.ops.soft import gumbel, logistic, noise_key, uniform
from tests.core.test_optimizer import biases, build, step_both, train
from tests.peers.nets import LR, WEIGHT_DECAY, batches, leap, net, relative_error

CHOICE = {"granularity": "2:4", "include": r"re:blocks\.\d\.(qkv|out)\.weight"}
REST = {"granularity": "element", "exclude": r"re:blocks\.\d\.(qkv|out)\.weight"}


@pytest.mark.parametrize(
    ("kind", "steps", "changes"),
    [
        ("element", 100, {}),
        ("element", 40, {"control": "paper"}),
        ("element", 40, {"weights": "trained", "score_init": "zero"}),
        ("element", 40, {"score_init": "activation", "dense_fraction": 0.1}),
        ("row", 40, {"weights": "trained"}),
        ("head+neuron", 40, {}),
        ("2:4", 100, {}),
        ("2:4", 40, {"weights": "trained", "score_init": "gradient"}),
        ("2:4", 40, {"weights": "trained", "gates": [CHOICE, REST], "target": 0.3}),
    ],
)
def test_equals_the_oracle(kind: str, steps: int, changes: dict[str, Any]) -> None:
    config = leap(kind, steps, rule="gumbel", **changes)
    model, reference = net(kind), net(kind)
    optimizer = build(model, config, kind)
    oracle = Oracle(reference, optimizer.plan, config, LR, WEIGHT_DECAY, no_decay=biases(optimizer.plan))
    soft = optimizer.level.soft
    assert soft is not None
    means = []
    for x, y in batches(steps):
        step_both(oracle, model, optimizer, x, y)
        if soft.on:
            means.append((soft.mean, optimizer.schedule.level(optimizer.num_steps)))
        if optimizer.num_steps in (steps // 4, steps // 2):
            units = oracle.soft_units(oracle.curve) if oracle.curve else None
            expected = oracle.masked_weights(units)
            for name, parameter in model.named_parameters():
                assert relative_error(parameter, expected[name].detach()) <= 1e-5, (name, optimizer.num_steps)
    expected = oracle.masked_weights()
    for name, parameter in model.named_parameters():
        assert relative_error(parameter, expected[name]) <= 1e-5, name
    assert optimizer.settled and len(means) > steps // 2
    assert abs(optimizer.kept_weights - config.target * optimizer.plan.prunable) <= optimizer.plan.unit
    assert optimizer.masks.count_kept() == optimizer.kept_weights
    if config.control == "projected" and kind == "element":
        assert all(abs(mean - level) <= 0.01 * level + 1e-9 for mean, level in means)
    if config.frozen:
        latent = dict(net(kind).named_parameters())
        assert all(torch.equal(p, latent[name] * (p != 0)) for name, p in model.named_parameters())


def test_noise_depends_on_the_index_alone() -> None:
    key, device = noise_key(17, 3, 2), torch.device("cpu")
    whole = logistic(key, 0, 1000, device)
    cut = torch.cat([logistic(key, first, num, device) for first, num in ((0, 1), (1, 332), (333, 667))])
    assert torch.equal(whole, cut) and not torch.equal(whole, logistic(noise_key(17, 4, 2), 0, 1000, device))
    drawn = uniform(key, 2**40, 10**6, device).double()
    assert drawn.min() > 0 and drawn.max() < 1 and abs(drawn.mean() - 0.5) < 2e-3
    assert abs(drawn.var() - 1 / 12) < 5e-4
    assert abs(torch.corrcoef(torch.stack([drawn[1:], drawn[:-1]]))[0, 1]) < 5e-3
    # the first words of SplitMix64 for the seed 1234567, as its reference code gives them
    words = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    got = uniform(1234567 + 0x9E3779B97F4A7C15, 0, 3, device).double()
    assert torch.equal(got, torch.tensor([((word >> 41) * 2 + 1) / 2.0**24 for word in words], dtype=torch.float64))


def test_noise_has_the_published_distributions() -> None:
    """The logistic of a binary choice and the Gumbel of one among several (Jang et al., arXiv 1611.01144)."""
    key, device = noise_key(17, 3, 2), torch.device("cpu")
    drawn = logistic(key, 0, 10**6, device).double()
    assert abs(drawn.mean()) < 1e-2 and drawn.var() == pytest.approx(math.pi**2 / 3, rel=1e-2)
    drawn = gumbel(key, 0, 10**6, device).double()
    assert abs(drawn.mean() - 0.57722) < 5e-3 and drawn.var() == pytest.approx(math.pi**2 / 6, rel=1e-2)


def test_temperatures_fall_and_scales_grow_as_published() -> None:
    """Mozaffari et al., arXiv 2605.17289, and the last for patterns MaskLLM, arXiv 2409.17481."""
    schedule = Schedule(100, 0.1, 0.2, 0.5)
    first, last = (curve_at(schedule, step, 0.0, 17) for step in (schedule.dense_end, schedule.settle_start))
    assert first[:2] == (25.0, 4.0) and last[:2] == pytest.approx((350.0, 0.05)) and last.choice == pytest.approx(500)


def test_the_best_scores_of_the_whole_model_stay() -> None:
    model = net()
    optimizer = build(model, leap("element", 40, rule="gumbel"))
    train(model, optimizer, 40)
    states = [optimizer.state[p] for p in model.parameters() if SCORE in optimizer.state[p]]
    scores = torch.cat([state[SCORE].flatten() for state in states])
    mask = torch.cat([state["mask"].flatten() for state in states])
    assert (scores[mask].min() > scores[~mask].max()) or (scores[~mask] > scores[mask].min()).sum() <= len(states)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("2:4", {"control": "paper"}, r'leap\.control: got "paper"; .* single weights alone, and 2:4 is in .*'),
        (
            "2:4",
            {"gates": [CHOICE | {"granularity": "8:12"}], "target": 0.6},
            r'leap\.rule: got "gumbel", .* of a group; 8:12 has 495; allowed: at most 100, such as 2:4 or 4:8',
        ),
        ("hybrid", {}, r'leap\.rule: got "gumbel", which takes one gate a tensor, but .* has several \(.*, .*\); .*'),
        ("row", {"control": "paper"}, r'leap\.control: got "paper"; rule "gumbel" .* row is in leap\.gates; .*'),
        ("element", {"lambda_max": 50.0}, r'leap\.lambda_max: got 50\.0, .*: rule "gumbel" learns no thresholds; .*'),
        ("element", {"control": "held"}, r'leap\.control: got "held"; allowed: "projected" or "paper"'),
        ("element", {"settle_fraction": 0.4}, r"leap\.settle_fraction: .* the last step settles; remove it"),
        ("element", {"start": "zeros"}, r"leap\.rule: got .gumbel., which has no effect here: the masks of .*"),
    ],
)
def test_what_it_does_not_know_is_refused(kind: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(net(kind), leap(kind, 40, rule="gumbel", **changes), kind)
