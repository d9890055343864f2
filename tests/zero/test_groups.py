"""Parameter groups and optimizers that are handed in: each option of torch's AdamW is honoured or refused by name."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import leap_dist
from leap_dist.config.job_file import parse_leap
from leap_dist.core.communicator import Communicator
from leap_dist.core.fragments import whole
from leap_dist.core.gating import SCORE
from leap_dist.core.hosted import GATED
from leap_dist.core.optimizer import LeapAdamW
from leap_dist.errors import UserError
from leap_dist.models.plan import make_plan
from leap_dist.zero.groups import NO_EFFECT, OPTIONS, OTHERS, parameter_groups
from leap_dist.zero.refusals import check_engine_config

LEAP: dict[str, Any] = {"target": 0.5, "total_steps": 10, "include": ["0.weight", "2.weight"]}
CONFIG: dict[str, Any] = {"leap": LEAP}
ROWS: dict[str, Any] = {"leap": {**LEAP, "gates": ["row"]}}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def adamw(params: Any, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(params, **options)


def bound(model: nn.Module, optimizer: torch.optim.AdamW, section: dict[str, Any]) -> LeapAdamW:
    """LEAP's optimizer with the groups of another one, over whole tensors."""
    config = parse_leap(section)
    plan = make_plan(model, config)
    made = LeapAdamW(parameter_groups(model, plan, optimizer, None, {}), plan, config)
    made.bind(whole(model.named_parameters()), Communicator())
    return made


def refused(model: nn.Module, optimizer: Any, config: dict[str, Any] = CONFIG) -> str:
    """What host says, which leaves the model as it was."""
    with pytest.raises(UserError) as caught:
        leap_dist.host(model, optimizer, config)
    assert not any(name.startswith("leap") for name, _ in model.named_parameters())
    return str(caught.value)


def test_every_option_of_adamw_is_known() -> None:
    group = adamw(net().parameters()).param_groups[0]
    assert set(group) - {"params"} == {*OPTIONS, *OTHERS, *NO_EFFECT} - {"params", "param_names"}
    assert all(group[option] == off for option, (off, _) in OTHERS.items())


@pytest.mark.parametrize("option", OTHERS)
@pytest.mark.parametrize("number", [0, 1])
def test_an_option_that_changes_the_step_is_refused_in_any_group(option: str, number: int) -> None:
    model, off = net(), OTHERS[option][0]
    groups: list[dict[str, Any]] = [{"params": list(layer.parameters())} for layer in (model[0], model[2])]
    optimizer = adamw(groups)
    optimizer.param_groups[number][option] = not off
    message = refused(model, optimizer)
    assert message.startswith(f"optimizer: {option} is not supported: got {not off} in group {number}; ")


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("lr", -1, "a number >= 0"),
        ("lr", float("nan"), "a number >= 0"),
        ("lr", float("inf"), "a number >= 0"),
        ("lr", "auto", "a number >= 0"),
        ("lr", True, "a number >= 0"),
        ("betas", (2, 0.9), "two numbers, 0 <= beta < 1"),
        ("betas", (0.9, 1.0), "two numbers, 0 <= beta < 1"),
        ("betas", 0.9, "two numbers, 0 <= beta < 1"),
        ("eps", -1e-8, "a number > 0"),
        ("eps", 0.0, "a number > 0: weights that are pruned have no gradient"),
        ("weight_decay", -0.1, "a number >= 0"),
    ],
)
def test_a_value_that_no_step_can_have_is_refused(option: str, value: Any, allowed: str) -> None:
    model = net()
    optimizer = adamw([{"params": model[0].parameters()}, {"params": model[2].parameters()}])
    optimizer.param_groups[1][option] = value
    assert refused(model, optimizer).startswith(
        f"optimizer.param_groups[1].{option}: got {value!r}; allowed: {allowed}"
    )
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), option: value}]
    message = re.escape(f"model_parameters[1].{option}: got {value!r}; allowed: {allowed}")
    with pytest.raises(UserError, match=message):
        leap_dist.initialize(model=model, model_parameters=groups, config=CONFIG)


def test_the_settings_of_every_group_are_taken_over() -> None:
    model = net()
    gated = {"params": [model[0].weight, model[2].weight], "lr": torch.tensor(0.5), "betas": (0.5, 0.75)}
    rest = {"params": [model[0].bias, model[2].bias], "lr": 0.25, "eps": 1e-3, "weight_decay": 0.125, "lr_scale": 3.0}
    optimizer = leap_dist.host(model, adamw([rest, gated], fused=False, foreach=True), CONFIG)
    first, second = optimizer.param_groups  # in the user's order, which lists of a scheduler have
    assert second[GATED] and not first[GATED]
    assert (second["lr"], second["betas"], second["eps"], second["weight_decay"]) == (0.5, (0.5, 0.75), 1e-8, 0.01)
    assert (first["lr"], first["eps"], first["weight_decay"], first["lr_scale"]) == (0.25, 1e-3, 0.125, 3.0)


def test_gated_tensors_stand_in_the_place_of_the_first_group_that_has_any() -> None:
    """So that a scheduler with a rate for each group gives each its own; what is left of that group follows."""
    from torch.optim.lr_scheduler import OneCycleLR

    config = {**CONFIG, "leap": {**CONFIG["leap"], "include": ["0.weight"]}}
    for bias in (True, False):
        model = nn.Sequential(nn.Linear(6, 8, bias), nn.Linear(8, 4), nn.Linear(4, 2))
        groups = [{"params": model[number].parameters()} for number in (2, 0, 1)]
        optimizer = leap_dist.host(model, adamw(groups), config)
        found = [(group[GATED], len(group["params"])) for group in optimizer.param_groups]
        assert found == [(False, 2), (True, 1), *[(False, 1)] * bias, (False, 2)]
    OneCycleLR(optimizer, max_lr=[1e-2, 1e-5, 1e-4], total_steps=10)
    assert [group["max_lr"] for group in optimizer.param_groups] == [1e-2, 1e-5, 1e-4]


def stepped(model: nn.Sequential, optimizer: torch.optim.Optimizer, steps: int) -> list[Tensor]:
    """The parameters after steps on one batch."""
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return [p.detach().clone() for p in (model[0].weight, model[0].bias, model[2].weight, model[2].bias)]


@pytest.mark.parametrize("bias_decay", [0.0, 0.1])
def test_biases_under_gates_have_the_weight_decay_of_their_group(bias_decay: float) -> None:
    """Where nothing is pruned yet a step is torch's, bit for bit."""

    def groups(model: nn.Sequential) -> list[dict[str, Any]]:
        biases = {"params": [model[0].bias, model[2].bias], "weight_decay": bias_decay}
        return [{"params": [model[0].weight, model[2].weight], "weight_decay": 0.1}, biases]

    plain, ours = net(), net()
    expected = stepped(plain, adamw(groups(plain), lr=0.1), 4)
    optimizer = bound(ours, adamw(groups(ours), lr=0.1), {**ROWS["leap"], "dense_fraction": 0.5})
    found = stepped(ours, optimizer, 4)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("difference", [{"lr": 0.5}, {"betas": (0.5, 0.9)}, {"weight_decay": 0.5}, {"lr_scale": 2.0}])
def test_a_gate_whose_tensors_have_two_settings_is_refused(difference: dict[str, Any]) -> None:
    model = net()
    weights = {"params": [model[0].weight, model[2].weight], "lr_scale": 1.0}
    biases = {"lr_scale": 1.0, "params": [model[0].bias, model[2].bias], **difference}
    assert refused(model, adamw([weights, biases]), ROWS).startswith("optimizer: gated weights, and biases that follow")


def test_an_optimizer_with_a_past_or_company_is_refused() -> None:
    model = net()
    used = adamw(model.parameters())
    stepped(model, used, 1)
    assert refused(model, used).startswith("optimizer: it has taken steps")
    tied = adamw(model.parameters())
    torch.optim.lr_scheduler.LinearLR(tied)
    assert refused(model, tied).startswith("optimizer: a scheduler is tied to it, which would not reach LEAP's")
    hooked = adamw(model.parameters())
    hooked.register_step_post_hook(lambda *_: None)
    assert refused(model, hooked).startswith("optimizer: it has step hooks")


def test_parameters_that_do_not_fit_the_model_are_refused() -> None:
    model = net()
    assert refused(model, adamw(net().parameters())) == (
        "optimizer: a parameter of shape (8, 6) is not one of the model's; allowed: parameters of the model that is "
        "passed in"
    )
    assert refused(model, adamw([model[0].weight, model[2].weight]), ROWS) == (
        "optimizer: 0.bias is under a gate but not among them; add it, or call requires_grad_(False) on it"
    )
    allowed = "allowed: model.parameters(), or a list of groups, such as {'params': [...], 'lr': 1e-4}"
    for given, message in (
        (model.named_parameters(), f"model_parameters: got (name, parameter) pairs in group 0; {allowed}"),
        (model.state_dict(), f"model_parameters: got a OrderedDict; {allowed}"),
        (model[0].weight, f"model_parameters: got a Parameter; {allowed}"),
        (["0.weight"], f"model_parameters: got a str among the parameters in group 0; {allowed}"),
        (3, f"model_parameters: got a int; {allowed}"),
        ([*model.parameters(), model[0].bias], "model_parameters: 0.bias is in it twice; keep one"),
        ([], "model_parameters: 0.weight is under a gate but not among them; add it, or call requires_grad_(False) on"),
        (net().parameters(), "model_parameters: a parameter of shape (8, 6) is not one of the model's; allowed: "),
    ):
        with pytest.raises(UserError) as caught:
            leap_dist.initialize(model=model, model_parameters=given, config=CONFIG)
        assert str(caught.value).startswith(message)
        assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_named_parameters_in_torchs_own_optimizer_are_taken() -> None:
    model = net()
    assert len(leap_dist.host(model, adamw(model.named_parameters()), CONFIG).param_groups) == 2


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.LazyLinear(4), "model: weight has no shape yet (a lazy module); call the model once first"),
        (nn.Linear(2, 3, device="meta"), "model: weight is on the meta device, without values"),
        (nn.Linear(2, 3).requires_grad_(False), "model: it has no parameter that is trained"),
        (nn.Tanh(), "model: it has no parameter that is trained"),
    ],
)
def test_a_model_that_is_not_ready_is_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        check_engine_config(CONFIG, model, None, None, None, None)


def scores_moved(rate: float, schedule: Any) -> tuple[float, LeapAdamW]:
    """How far the scores move in the first step."""
    model = net()
    optimizer = bound(model, adamw(model.parameters(), lr=rate), LEAP)
    schedule(optimizer)
    before = optimizer.state[model[0].weight][SCORE].clone()
    stepped(model, optimizer, 1)
    return (optimizer.state[model[0].weight][SCORE] - before).abs().max().item(), optimizer


def test_a_rate_of_zero_divides_nothing_and_a_known_peak_is_the_measure() -> None:
    from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

    full = 1e-3 / LEAP["target"]
    assert scores_moved(0.0, lambda o: LambdaLR(o, lambda step: 1.0))[0] == pytest.approx(full, rel=1e-3)
    assert scores_moved(0.1, lambda o: LambdaLR(o, lambda step: 0.25))[0] == pytest.approx(full / 4, rel=1e-3)
    moved, optimizer = scores_moved(1e-5, lambda o: OneCycleLR(o, max_lr=1e-2, total_steps=10))
    assert moved == pytest.approx(full * optimizer.param_groups[0]["initial_lr"] / 1e-2, rel=1e-3)
