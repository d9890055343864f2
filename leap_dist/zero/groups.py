"""Parameter groups: the user's, checked, become LEAP's: theirs without gated tensors, and one with all of those.

Of torch's AdamW each option is honoured or refused by name, in every group. `foreach` and `fused` choose how torch
computes a step, not what comes out of it: LEAP's step has kernels of its own.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from leap_dist.core.gates import GatePlan
from leap_dist.core.hosted import GATED
from leap_dist.errors import UserError

OPTIONS = ("lr", "betas", "eps", "weight_decay")
"""The options of torch's AdamW that LEAP's step has."""
OTHERS: dict[str, tuple[Any, str]] = {
    "amsgrad": (False, "pass a torch.optim.AdamW without it"),
    "maximize": (False, "LEAP minimises: return the negated loss"),
    "capturable": (False, "LEAP's step cannot be captured in a CUDA graph: leave it out"),
    "differentiable": (False, "no gradient flows through LEAP's step: leave it out"),
    "decoupled_weight_decay": (True, "LEAP steps as AdamW: leave it out"),
}
"""Its other options that change a step: the value that means off, and what to do about another."""
NO_EFFECT = ("foreach", "fused", "param_names", "params")


def optimizer_problems(optimizer: torch.optim.AdamW) -> Iterator[str]:
    """What LEAP cannot take over from an optimizer."""
    yield from _option_problems(optimizer.param_groups, "optimizer", "optimizer.param_groups")
    if optimizer.state:
        yield (
            "optimizer: it has taken steps, and LEAP's would start without its moments; pass one that has taken none"
        )
    if getattr(optimizer.step, "_wrapped_by_lr_sched", False):
        yield (
            "optimizer: a scheduler is tied to it, which would not reach LEAP's; make the scheduler for the optimizer "
            "that leap_dist.host returns, or pass lr_scheduler=lambda optimizer: LinearLR(optimizer, ...)"
        )
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        yield "optimizer: it has step hooks, which LEAP's step would not call; remove them"


def _option_problems(groups: list[dict[str, Any]], key: str, place: str) -> Iterator[str]:
    for option, (off, what) in OTHERS.items():
        number = next((number for number, group in enumerate(groups) if group.get(option, off) != off), None)
        if number is not None:
            yield f"{key}: {option} is not supported: got {groups[number][option]!r} in group {number}; {what}"
    for number, group in enumerate(groups):
        for option in OPTIONS:
            if option in group and not _is_allowed(option, group[option]):
                allowed = "two numbers, 0 <= beta < 1" if option == "betas" else _least(option)
                yield f"{place}[{number}].{option}: got {group[option]!r}; allowed: {allowed}"


def _least(option: str) -> str:
    if option == "eps":
        return "a number > 0: weights that are pruned have no gradient"
    return "a number >= 0"


def _is_allowed(option: str, value: Any) -> bool:
    if option == "betas":
        return isinstance(value, list | tuple) and len(value) == 2 and all(0 <= _number(beta) < 1 for beta in value)
    return _number(value) > 0 if option == "eps" else 0 <= _number(value) < math.inf


def _number(value: Any) -> float:
    """A number, also from a tensor of one element; NaN, which no bound allows, for what is none."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return float(value)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


# ---------------------------------------------------------------------------------------------- LEAP's groups


def parameter_groups(
    model: nn.Module, plan: GatePlan, optimizer: Any, model_parameters: Any, defaults: Mapping[str, float]
) -> list[dict[str, Any]]:
    """The groups of LeapAdamW: the user's without gated tensors, and one of those, at the place of the first that has
    any, before what is left of that one.

    defaults: lr and weight_decay of groups that do not give them. Raises UserError for groups that do not fit.
    """
    key = "optimizer" if optimizer is not None else "model_parameters"
    names = {id(p): name for name, p in model.named_parameters()}
    groups = _user_groups(model, optimizer, model_parameters, defaults)
    _check_members(groups, names, [name for name in names.values() if name in plan.covers], key)
    plain: list[dict[str, Any]] = []
    gated: list[tuple[nn.Parameter, bool]] = []  # with whether its group has weight decay
    place = 0
    settings: list[dict[str, Any]] = []  # of the groups that hold gated tensors
    for group in groups:
        members = [p for p in group["params"] if p.requires_grad]
        inside = [p for p in members if names[id(p)] in plan.covers]
        rest = [p for p in members if names[id(p)] not in plan.covers]
        own = {option: value for option, value in group.items() if option not in (*NO_EFFECT, *OTHERS)}
        own |= {option: _number(own[option]) for option in ("lr", "eps", "weight_decay") if option in own}
        own |= {"betas": tuple(map(_number, own["betas"]))} if "betas" in own else {}
        if inside and not gated:
            place = len(plain)
        if rest:
            plain.append({**own, "params": [(names[id(p)], p) for p in rest], GATED: False})
        if inside:
            gated += [(p, own["weight_decay"] > 0) for p in inside]
            settings.append(own)
    shared = _shared(settings, key)
    gated.sort(key=lambda item: not plan.counted(names[id(item[0])]))
    no_decay = frozenset(names[id(p)] for p, decays in gated if not decays)
    pairs = [(names[id(p)], p) for p, _ in gated]
    plain.insert(place, {**shared, "params": pairs, GATED: True, "no_decay": no_decay})
    return plain


def _shared(settings: list[dict[str, Any]], key: str) -> dict[str, Any]:
    """The settings that all gated tensors have; of weight decay a group has the others', or none."""
    decays = {own["weight_decay"] for own in settings} - {0.0}
    compared = [
        {option: value for option, value in own.items() if option != "weight_decay" and not isinstance(value, str)}
        for own in settings
    ]
    if len(decays) > 1 or any(own != compared[0] for own in compared):
        raise UserError(
            f"{key}: gated weights, and biases that follow them, are in groups with different hyperparameters; a "
            "gate needs its weights in one group: give them the same lr, betas, eps and weight_decay (or 0 of that)"
        )
    return {**settings[0], "weight_decay": max(decays, default=0.0)}


def _user_groups(
    model: nn.Module, optimizer: Any, model_parameters: Any, defaults: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Parameter groups as the user gave them; by default vectors (biases, norms) get no weight decay."""
    if optimizer is not None:
        return list(optimizer.param_groups)
    if model_parameters is not None:
        groups = [{**defaults, **group} for group in _given_groups(model_parameters)]
        problems = list(_option_problems(groups, "model_parameters", "model_parameters"))
        if problems:
            raise UserError("\n".join(problems))
        return groups
    trained = [p for p in model.parameters() if p.requires_grad]
    vectors = [len(getattr(p, "ds_shape", p.shape)) < 2 for p in trained]
    return [
        {**defaults, "params": [p for p, v in zip(trained, vectors, strict=True) if not v]},
        {**defaults, "weight_decay": 0.0, "params": [p for p, v in zip(trained, vectors, strict=True) if v]},
    ]


def _given_groups(model_parameters: Any) -> list[dict[str, Any]]:
    """model_parameters as groups: parameters, or objects with "params"."""
    allowed = "allowed: model.parameters(), or a list of groups, such as {'params': [...], 'lr': 1e-4}"
    if isinstance(model_parameters, torch.Tensor | Mapping | str) or not hasattr(model_parameters, "__iter__"):
        raise UserError(f"model_parameters: got a {type(model_parameters).__name__}; {allowed}")
    given = list(model_parameters)
    groups = given if given and all(isinstance(item, Mapping) for item in given) else [{"params": given}]
    found = []
    for number, group in enumerate(groups):
        params = group.get("params", ())
        members = [params] if isinstance(params, torch.Tensor) else list(params)
        strange = next((item for item in members if not isinstance(item, torch.Tensor)), None)
        if strange is not None:
            pairs = isinstance(strange, tuple) and len(strange) == 2 and isinstance(strange[0], str)
            what = "(name, parameter) pairs" if pairs else f"a {type(strange).__name__} among the parameters"
            raise UserError(f"model_parameters: got {what} in group {number}; {allowed}")
        found.append({**group, "params": members})
    return found


def _check_members(groups: list[dict[str, Any]], names: Mapping[int, str], covered: Iterable[str], key: str) -> None:
    """Every parameter stands in one group at most, what gates cover in one, and nothing else does.

    What is left out is not trained, as in torch.
    """
    members = [p for group in groups for p in group["params"]]
    foreign = next((p for p in members if id(p) not in names), None)
    if foreign is not None:
        raise UserError(
            f"{key}: a parameter of shape {tuple(foreign.shape)} is not one of the model's; allowed: parameters of the "
            "model that is passed in"
        )
    seen: set[str] = set()
    for name in (names[id(p)] for p in members):
        if name in seen:
            raise UserError(f"{key}: {name} is in it twice; keep one")
        seen.add(name)
    missing = next((name for name in covered if name not in seen), None)
    if missing is not None:
        raise UserError(
            f"{key}: {missing} is under a gate but not among them; add it, or call requires_grad_(False) on it"
        )
