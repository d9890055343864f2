"""The level in words where units cannot meet the target; and no masks from scores or thresholds that are no numbers."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

from leap_dist.core.gating import SCORE, SCORES, THRESHOLDS
from leap_dist.core.optimizer import LeapAdamW
from tests.core.test_optimizer import STEPS, build, train
from tests.peers.nets import leap, net


def pruned(kind: str, **changes: Any) -> LeapAdamW:
    model = net(kind)
    optimizer = build(model, leap(kind, STEPS, **changes), kind)
    train(model, optimizer)
    return optimizer


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        (
            "head+neuron",
            {"target": 0.15},
            r"no density below 0\.\d{4} is possible, because one unit in every gate",
        ),
        ("head+neuron", {"target": 0.5}, r"a unit of head has \d+ of the \d+ weights, one of neuron \d+ and is kept"),
        ("uniform", {"target": 0.22}, r"no density below 0\.\d+ is possible, because min_keep 2, multiple_of 3 stays"),
        (
            "uniform",
            {"target": 0.4},
            r"a unit of neuron has 36 of .*, 3 at a time \(multiple_of\), in 2 gates",
        ),
    ],
)
def test_a_density_beside_the_target_is_said_in_words_with_its_cause(
    kind: str, changes: dict[str, Any], words: str
) -> None:
    note = pruned(kind, **changes).level.note()
    assert note is not None and re.search(words, note), note


@pytest.mark.parametrize("kind", ["element"])
def test_a_target_that_is_met_needs_no_words(kind: str) -> None:
    assert pruned(kind).level.note() is None


def test_a_settled_run_has_no_regulariser() -> None:
    model = net("element")
    optimizer = build(model, leap("element", STEPS, control="paper"), "element")
    train(model, optimizer, STEPS // 2)
    assert set(optimizer.level.regulariser) == {"lambda", "loss_reg"}
    train(model, optimizer, STEPS - STEPS // 2)
    assert optimizer.settled and optimizer.level.regulariser == {}


def broken(optimizer: LeapAdamW, place: str, value: float) -> None:
    """Put a value into the scores of the gate where all others are worse."""
    for fragment in optimizer.gating.weights + optimizer.gating.own_scores + optimizer.gating.own_thresholds:
        if place in (THRESHOLDS, SCORES) and fragment.tensor == place:
            fragment.view(fragment.flat)[0] = value
            return
        if place not in (THRESHOLDS, SCORES) and fragment.tensor == "1.weight":
            optimizer.gating.state(fragment, place)[3] = value
            return
    raise AssertionError(place)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("kind", "changes", "place", "names"),
    [
        ("element", {}, SCORE, r"scores of 1\.weight:element hold"),
        ("element", {"rule": "magnitude"}, "latent", r"scores of 1\.weight:element hold"),
        ("element", {}, THRESHOLDS, r"thresholds of 1\.weight:element are"),
        ("row", {}, SCORES, r"scores of 1\.weight:row hold"),
    ],
)
def test_no_masks_from_what_is_no_number(
    kind: str, changes: dict[str, Any], place: str, names: str, value: float
) -> None:
    model = net(kind)
    optimizer = build(model, leap(kind, STEPS, **changes), kind)
    train(model, optimizer, STEPS // 2)  # brackets hold by now
    broken(optimizer, place, value)
    with pytest.raises(FloatingPointError, match=names):
        optimizer.level.hold(optimizer.num_steps)


def test_nan_weights_are_no_start_for_scores() -> None:
    model = net("element")
    with torch.no_grad():
        model.get_parameter("1.weight")[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match=r"scores of 1\.weight:element hold NaN or infinity"):
        build(model, leap("element", STEPS))


def test_heads_that_are_worth_nothing_by_what_is_given_score_zero() -> None:
    optimizer = build(net("head+neuron"), leap("head+neuron", STEPS, score_init="magnitude"), "head+neuron")
    heads = optimizer.plan.units(0)
    optimizer.level.start_units({0: torch.zeros(heads.stop - heads.start)})
    scores = optimizer.gating.own_scores[0]
    assert optimizer.level.kept_units[0] == heads.stop - heads.start
    assert scores.view(scores.flat)[heads].tolist() == [0.0] * (heads.stop - heads.start)
