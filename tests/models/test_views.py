"""Rows are output channels with their bias, columns input channels, whatever module owns a tensor; or it is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from leap_dist.config.job_file import parse_leap
from leap_dist.core.communicator import Communicator
from leap_dist.core.fragments import whole
from leap_dist.core.gates import GatePlan
from leap_dist.core.hosted import GATED
from leap_dist.core.optimizer import LeapAdamW
from leap_dist.core.oracle import unit_index
from leap_dist.errors import UserError
from leap_dist.models.plan import make_plan

MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {  # with the shape of its input, channels first
    "linear": (lambda: nn.Linear(4, 6), (4,)),
    "transposed linear": (lambda: Conv1D(6, 4), (4,)),
    "conv1d": (lambda: nn.Conv1d(4, 8, 3), (4, 7)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (2, 3)), (4, 5, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 3, 4, 5)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 5, 6)),
    "depthwise": (lambda: nn.Conv1d(4, 8, 3, groups=4), (4, 7)),
    "transposed conv1d": (lambda: nn.ConvTranspose1d(4, 6, 3), (4, 7)),
    "transposed grouped": (lambda: nn.ConvTranspose2d(4, 6, (2, 3), groups=2), (4, 5, 6)),
    "one by one": (lambda: nn.Conv2d(4, 8, 1), (4, 3, 3)),
}


class Holder(nn.Module):
    """A model that owns one module, and maps its input through it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.c = inner
        for parameter in self.parameters():
            nn.init.normal_(parameter)  # biases of Conv1D start at 0

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.c(x)
        return found


def plan(model: nn.Module, granularity: str, include: str = "c.weight") -> GatePlan:
    return make_plan(
        model, parse_leap({"target": 0.5, "total_steps": 20, "include": [include], "gates": [granularity]})
    )


def without(model: nn.Module, found: GatePlan, unit: int, x: Tensor) -> Tensor:
    """What the model gives when one unit is removed."""
    changed = {}
    for name, (cover,) in found.covers.items():
        parameter = model.get_parameter(name)
        removed = (unit_index(cover.slices) == unit).view(parameter.shape)
        changed[name] = parameter.detach().masked_fill(removed, 0.0)
    return torch.func.functional_call(model, changed, x)


@pytest.mark.parametrize("kind", MODULES)
def test_a_row_is_an_output_channel_with_its_bias(kind: str) -> None:
    make, shape = MODULES[kind]
    torch.manual_seed(0)
    model, x = Holder(make()), torch.randn(3, *shape)
    found, y = plan(model, "row"), model(x)
    assert found.gates[0].num_units == y.shape[1] and set(found.covers) == {"c.weight", "c.bias"}
    assert found.gates[0].distinct_sizes == {model.get_parameter("c.weight").numel() // y.shape[1]}
    for unit in range(y.shape[1]):
        got = without(model, found, unit, x)
        expected = y.clone()
        expected[:, unit] = 0.0
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind", MODULES)
def test_a_column_is_an_input_channel(kind: str) -> None:
    make, shape = MODULES[kind]
    torch.manual_seed(0)
    model, x = Holder(make()), torch.randn(3, *shape)
    found = plan(model, "column")
    assert found.gates[0].num_units == shape[0] and set(found.covers) == {"c.weight"}
    for unit in range(shape[0]):
        silent = x.clone()
        silent[:, unit] = 0.0
        torch.testing.assert_close(without(model, found, unit, x), model(silent))


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("granularity", ["element", "block:1x1", "block:2x1"])
def test_blocks_are_of_channels_and_single_weights_of_nothing_else(kind: str, granularity: str) -> None:
    make, _ = MODULES[kind]
    model = Holder(make())
    weight = model.get_parameter("c.weight")
    kernel = weight[0, 0].numel()
    found = plan(model, granularity).gates[0]
    index = unit_index(found.slices).flatten()
    expected = {"element": 1, "block:1x1": kernel, "block:2x1": 2 * kernel}[granularity]
    assert torch.bincount(index).max() == expected and len(index) == weight.numel() == found.num_weights


def test_a_dead_channel_takes_its_own_bias_and_no_other_through_a_run() -> None:
    torch.manual_seed(0)
    model = Holder(nn.Conv1d(4, 8, 3))
    config = parse_leap({"target": 0.5, "total_steps": 20, "include": ["c.weight"], "gates": ["row"]})
    found = make_plan(model, config)
    optimizer = LeapAdamW([{"params": model.parameters(), GATED: True}], found, config)
    optimizer.bind(whole(model.named_parameters()), Communicator())
    for _ in range(20):
        model.zero_grad()
        model(torch.randn(5, 4, 7)).square().mean().backward()
        optimizer.step()
    dead = (model.get_parameter("c.weight") == 0).flatten(1).all(1)
    assert optimizer.settled and int(dead.sum()) == 4
    assert torch.equal(model.get_parameter("c.bias") == 0, dead)


@pytest.mark.parametrize("kind", ["conv1d", "conv2d", "transposed conv1d", "transposed linear"])
def test_a_pattern_over_what_are_not_neighbouring_inputs_is_refused(kind: str) -> None:
    with pytest.raises(UserError, match=r"'2:4' does not fit c\.weight, which (has the|is stored)"):
        plan(Holder(MODULES[kind][0]()), "2:4")
    assert plan(Holder(nn.Conv2d(4, 8, 1)), "2:4").gates[0].lowest == 16


class Own(nn.Module):
    """A module that torch does not know, with one parameter."""

    def __init__(self, *shape: int, **attributes: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))
        for name, value in attributes.items():
            setattr(self, name, value)


@pytest.mark.parametrize(
    ("inner", "granularity", "reason"),
    [
        (nn.LayerNorm((4, 4)), "row", r"belongs to a LayerNorm"),
        (nn.LayerNorm(4), "element", "belongs to a LayerNorm"),
        (nn.PReLU(3), "row", r"has shape \(3,\)"),
        (Own(), "element", r"has shape \(\)"),
        (Own(2, 3, 4, 5), "row", r"has shape \(2, 3, 4, 5\)"),
        (Own(2, 3, 4, kernel_size=4), "row", r"belongs to a Own, which is not a convolution of torch\.nn"),
        (Own(0, 3), "element", "has no elements"),
        (Own(3, 0), "row", "has no elements"),
        (nn.Embedding(5, 3, sparse=True), "element", "is an embedding with sparse gradients"),
        (nn.Embedding(5, 3, max_norm=1.0), "row", "is an embedding with max_norm"),
    ],
)
def test_what_is_no_matrix_is_refused_by_name(inner: nn.Module, granularity: str, reason: str) -> None:
    with pytest.raises(
        UserError, match=rf"'{granularity}' needs matrices, but c\.weight {reason}.*; name it in leap\.exclude"
    ):
        plan(Holder(inner), granularity)


def test_a_stack_of_matrices_stays_one() -> None:
    assert plan(Holder(Own(2, 3, 4)), "row").gates[0].num_units == 6
    assert plan(Holder(nn.Embedding(5, 3)), "row").gates[0].num_units == 5
    assert plan(Holder(nn.Bilinear(3, 4, 5)), "row").gates[0].num_units == 5


def shared(first: nn.Module, second: nn.Module) -> nn.Module:
    model = nn.Module()
    model.c, model.d = first, second
    second.weight = first.weight
    return model


def test_a_shared_tensor_has_the_rows_of_all_its_owners() -> None:
    model = shared(nn.Linear(4, 6), nn.Linear(4, 6))
    for name in ("c.weight", "d.weight"):  # by any of its names
        assert set(plan(model, "row", name).covers) == {"c.weight", "c.bias", "d.bias"}
    tied = shared(nn.Embedding(6, 4), nn.Linear(4, 6))
    assert set(plan(tied, "row").covers) == {"c.weight", "d.bias"}
    other = shared(nn.Linear(4, 6), Conv1D(4, 6))
    with pytest.raises(UserError, match=r"'row' does not fit c\.weight, which is shared by c \(Linear\), d \(Conv1D\)"):
        plan(other, "row")
    assert plan(other, "element").prunable == 24


def test_a_bias_that_two_matrices_share_is_refused_for_rows() -> None:
    model = nn.Module()
    model.c, model.d = nn.Linear(4, 6), nn.Linear(4, 6)
    model.d.bias = model.c.bias
    with pytest.raises(UserError, match=r"two gates for row on c\.bias"):
        plan(model, "row", "re:.*weight")


def test_a_tensor_is_excluded_by_any_of_its_names() -> None:
    model = shared(nn.Linear(4, 6), nn.Linear(4, 6))
    model.e = nn.Linear(6, 6)
    section = {"target": 0.5, "include": ["re:.*weight"], "exclude": ["d.weight"], "gates": ["row"]}
    assert set(make_plan(model, parse_leap(section)).covers) == {"e.weight", "e.bias"}
