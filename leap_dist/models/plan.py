"""From a model and `leap.gates` to a plan: the list of gates."""

import re
from collections.abc import Iterable, Sequence

from torch import nn

from leap_dist.config import LeapConfig
from leap_dist.core.gates import Gate, GatePlan, matrix_gate
from leap_dist.errors import UserError
from leap_dist.models.families import prunable_matrices


def match_names(names: Iterable[str], patterns: Sequence[str], key: str) -> list[str]:
    """The names that a pattern gives exactly, or by `re:<regular expression>` from its start, in order.

    Raises UserError for a pattern that is no regular expression or matches nothing.
    """
    names, found = list(names), set()
    for pattern in patterns:
        try:
            matched = (
                {n for n in names if re.match(pattern[3:], n)} if pattern.startswith("re:") else {pattern} & set(names)
            )
        except re.error as error:
            raise UserError(f"{key}: {pattern!r} is not a regular expression ({error})") from None
        if not matched:
            examples = ", ".join(names[:3])
            raise UserError(f"{key}: {pattern!r} matches no tensor of the model; names look like {examples}")
        found |= matched
    return [n for n in names if n in found]


def make_plan(model: nn.Module, config: LeapConfig) -> GatePlan:
    """One gate for every granularity and every chosen matrix of the model.

    Raises UserError where nothing is chosen, or a choice does not fit a tensor.
    """
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters() if p.requires_grad}
    chosen = match_names(shapes, config.include, "leap.include") if config.include else prunable_matrices(model)
    if config.exclude:
        dropped = set(match_names(shapes, config.exclude, "leap.exclude"))
        chosen = [name for name in chosen if name not in dropped]
    chosen = [name for name in chosen if name in shapes]  # frozen and tied weights are not trained here
    if not chosen:
        raise UserError(
            f"leap.gates: {', '.join(config.gates)} match no tensor of the model: it has no trainable linear weight "
            "that is not excluded; name tensors in leap.include"
        )
    gates: list[Gate] = []
    for granularity in config.gates:
        for name in chosen:
            bias = name.removesuffix("weight") + "bias"
            gates.append(matrix_gate(name, shapes[name], granularity, bias if bias in shapes else None))
    return GatePlan(gates)
