"""Scores from weights and norms of inputs, for every way that a matrix may lie in memory."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from leap_dist.config.job_file import parse_leap
from leap_dist.core.communicator import Communicator
from leap_dist.core.fragments import Fragment
from leap_dist.core.gates import Gate, GatePlan, matrix_gate
from leap_dist.core.gating import EXP_AVG_SQ, SCORE
from leap_dist.core.importance import Norms, write_importance_
from leap_dist.core.inputs import Axes, Inputs
from leap_dist.core.optimizer import GATED, LeapAdamW
from leap_dist.models.inputs import resolve_start
from leap_dist.models.plan import make_plan
from leap_dist.ops.slices import Slice

LAYERS = {
    "linear": (lambda: nn.Linear(5, 7), lambda w: w),
    "conv1d of GPT-2": (lambda: Conv1D(7, 5), lambda w: w.T),
    "convolution": (lambda: nn.Conv2d(6, 4, 3, groups=2), lambda w: w.view(2, 2, 3, 9).permute(0, 1, 3, 2)),
    "transposed convolution": (
        lambda: nn.ConvTranspose2d(6, 4, 3, groups=2),
        lambda w: w.view(2, 3, 2, 9).permute(0, 2, 3, 1),
    ),
}
"""A layer, and its weight as (outputs, inputs), or (groups, outputs, window, inputs)."""


@pytest.mark.parametrize("kind", LAYERS)
def test_a_score_is_the_weight_times_the_norm_of_its_input_over_the_mean_of_its_row(kind: str) -> None:
    torch.manual_seed(0)
    make, seen = LAYERS[kind]
    model = nn.ModuleDict({"layer": make()})
    weight = model["layer"].weight
    config = parse_leap({"target": 0.5, "total_steps": 10, "score_init": "activation", "include": ["layer.weight"]})
    plan = make_plan(model, config)
    start = resolve_start(model, plan, config)
    size = start.axes["layer.weight"].num_inputs
    norms = torch.rand(size)
    parts = [Fragment("layer.weight", first, length, weight, first) for first, length in _cuts(weight.numel())]
    optimizer = LeapAdamW([{"params": [weight], GATED: True}], plan, start.config, axes=start.axes)
    optimizer.bind(parts, Communicator())
    write_importance_(optimizer.gating, Norms({"layer.weight": norms}, start.axes), scaled=True)
    factors = norms if seen(weight).dim() == 2 else norms.view(2, 1, 1, 3)
    expected = seen(weight.detach()).abs() * factors
    rows = (1,) if expected.dim() == 2 else (2, 3)
    expected = expected / expected.mean(rows, keepdim=True)
    torch.testing.assert_close(seen(optimizer.state[weight][SCORE]), expected)


def seven_by_five(start: str) -> tuple[LeapAdamW, Tensor]:
    """An optimizer that is not bound yet, and its one matrix "0.weight"."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 2))
    weight: Tensor = model[0].weight  # type: ignore[assignment]
    config = parse_leap({"target": 0.5, "total_steps": 10, "score_init": start})
    plan = make_plan(model, config)
    found = resolve_start(model, plan, config)
    return LeapAdamW([{"params": [weight], GATED: True}], plan, found.config, axes=found.axes), weight


@pytest.mark.parametrize("length", [35, 17])
def test_a_gradient_has_a_quarter_of_the_exponent(length: int) -> None:
    optimizer, weight = seven_by_five("gradient")
    parts = [(0, length), (length, 35 - length)]
    optimizer.bind([Fragment("0.weight", a, n, weight, a) for a, n in parts if n], Communicator())
    moments = optimizer.state[weight][EXP_AVG_SQ].copy_(torch.rand(7, 5) * 1e-9)
    norms = Norms({"0.weight": torch.rand(5)}, optimizer.axes, gradients=True)
    write_importance_(optimizer.gating, norms, scaled=True)
    inputs, gradients = norms.values["0.weight"].double(), moments.double().sqrt()
    expected = weight.detach().abs().double() * inputs**0.75 * gradients**0.25
    expected = (expected / expected.mean(1, keepdim=True)).float()
    torch.testing.assert_close(optimizer.state[weight][SCORE], expected)


@pytest.mark.parametrize("excluded", [[], ["2.weight"]])
def test_neurons_are_ranked_by_their_outputs_or_by_all_where_these_do_not_count(excluded: list[str]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 2))
    up, down = model[0].weight, model[2].weight
    cuts = [Slice("0.weight", 7, 5, 1, 5), Slice("2.weight", 2, 7, 2, 1, counted=not excluded)]
    plan = GatePlan([Gate("0", "neuron", tuple(cuts))])
    axes = {"0.weight": Axes(Slice("0.weight", 7, 5, 7, 1), Slice("0.weight", 7, 5, 1, 5))}
    if not excluded:
        axes["2.weight"] = Axes(Slice("2.weight", 2, 7, 2, 1), Slice("2.weight", 2, 7, 1, 7))
    config = parse_leap({"target": 0.5, "total_steps": 10, "score_init": "activation", "gates": ["neuron"]})
    optimizer = LeapAdamW([{"params": [up, down], GATED: True}], plan, config, axes=axes)
    parts = [Fragment("0.weight", 0, 35, up, 0), Fragment("2.weight", 0, 14, down, 0)]
    optimizer.bind(parts, Communicator())
    norms = {name: torch.rand(own.num_inputs) for name, own in axes.items()}
    write_importance_(optimizer.gating, Norms(norms, axes), scaled=False)
    by_output = (down.detach().abs() * norms["2.weight"]).sum(0) / 7 if not excluded else None
    expected = by_output if by_output is not None else (up.detach().abs() * norms["0.weight"]).mean(1)
    (scores,) = [f.view(f.flat) for f in optimizer.gating.own_scores]
    torch.testing.assert_close(scores, expected)

    for weight in (up, down):
        optimizer.state[weight][EXP_AVG_SQ].copy_(torch.rand(weight.shape) * 1e-9)
    write_importance_(optimizer.gating, Norms(norms, axes, gradients=True), scaled=True)
    sizes = [
        weight.detach().abs() * norms[name] ** 0.75 * optimizer.state[weight][EXP_AVG_SQ] ** 0.125
        for name, weight in (("0.weight", up), ("2.weight", down))
        if name in norms
    ]
    expected = sizes[0].sum(1) + (sizes[1].sum(0) if not excluded else 0.0)
    if not excluded:  # a root of both sides: what they are made of, and what they give
        expected = (expected / expected.mean() * norms["2.weight"] / norms["2.weight"].mean()).sqrt()
    else:
        expected = expected / expected.mean()
    torch.testing.assert_close(scores, expected)


def _cuts(numel: int) -> list[tuple[int, int]]:
    """Fragments that begin and end within rows."""
    edges = [0, 4, 11, numel - 3, numel]
    return [(first, last - first) for first, last in pairwise(edges)]


def test_scores_that_have_moved_keep_their_movement() -> None:
    optimizer, weight = seven_by_five("activation")
    optimizer.bind([Fragment("0.weight", 0, 35, weight, 0)], Communicator())
    moved = optimizer.state[weight][SCORE].copy_(torch.randn(7, 5)).clone()
    norms = Norms({"0.weight": torch.rand(5)}, optimizer.axes)
    write_importance_(optimizer.gating, norms, scaled=True, added=True)
    sizes = weight.detach().abs() * norms.values["0.weight"]
    torch.testing.assert_close(optimizer.state[weight][SCORE], moved + sizes / sizes.mean(1, keepdim=True))


@pytest.mark.parametrize("start", ["activation", "gradient"])
@pytest.mark.parametrize("gate", ["element", "row"])
def test_an_expert_that_no_token_reached(start: str, gate: str) -> None:
    """Of three matrices of (4, 5) the second had none: its single weights count as others do, its rows for nothing."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(3, 4, 5))
    plan = GatePlan([matrix_gate("experts", (3, 4, 5), gate)])
    config = parse_leap({"target": 0.5, "total_steps": 10, "score_init": start, "gates": [gate]})
    axes = {"experts": Axes(Slice("experts", 12, 5, 4, 1), Slice("experts", 12, 5, 1, 5), matrices=3)}
    optimizer = LeapAdamW([{"params": [weight], GATED: True}], plan, config, axes=axes)
    optimizer.bind([Fragment("experts", a, n, weight, a) for a, n in _cuts(60)], Communicator())
    inputs = Inputs(axes, Communicator(), Communicator(), torch.device("cpu"))
    inputs.see("experts", torch.rand(6, 5), first=0)
    inputs.see("experts", torch.rand(6, 5), first=10)
    inputs.pool()
    norms = inputs.norms()
    optimizer.state[weight][EXP_AVG_SQ].copy_(torch.rand(3, 4, 5))[1] = 0.0
    write_importance_(optimizer.gating, Norms(norms, axes, start == "gradient"), scaled=True)
    assert inputs.idle["experts"].tolist() == [False] * 5 + [True] * 5 + [False] * 5
    if gate == "row":
        (scores,) = [f.view(f.flat) for f in optimizer.gating.own_scores]
        assert scores.view(3, 4)[1].max() < 1e-4 * scores.view(3, 4)[[0, 2]].min()
    else:
        scores = optimizer.state[weight][SCORE]
        mean = norms["experts"].view(3, 5)[[0, 2]].square().mean(0).sqrt()
        sizes = weight.detach()[1].abs() * (mean if start == "activation" else mean**0.75)
        torch.testing.assert_close(scores[1], sizes / sizes.mean(1, keepdim=True))
