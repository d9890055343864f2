"""What the target of a model is a share of (leap.measure), counted before anything is trained."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from math import prod
from statistics import median_low
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from leap_dist.config.family import FamilyConfig
from leap_dist.config.leap import LeapConfig
from leap_dist.core.gates import Gate, GatePlan
from leap_dist.core.measure import Measure
from leap_dist.errors import UserError
from leap_dist.models.blocks import find_blocks, tensor_shapes
from leap_dist.models.flops import BATCHED, LENGTH, max_length, plain_implementations
from leap_dist.models.latency import latency_measure
from leap_dist.models.load import cause
from leap_dist.models.outputs import example_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Counted = Mapping[str, Mapping[str, float]]
"""FLOPs by path of a module, and by kind: "attention" for products of activations, "linear" for those with weights."""


Attention = dict[str, tuple[str, float]]
"""Of the tensors of attention: the path of their block, and the FLOPs of its products of activations."""
WITH_ATTENTION = {"head", "layer", "depth"}
"""Gates whose units take attention products with them."""


def measure_of(model: nn.Module, plan: GatePlan, config: LeapConfig, family: FamilyConfig | None) -> Measure:
    """UserError where the FLOPs of a model cannot be counted, or do not follow from what its gates keep."""
    if config.measure == "weights":
        return Measure(target=config.target)
    if config.measure == "parameters":
        everything = sum(map(prod, tensor_shapes(model).values()))
        return Measure("parameters", config.target, everything - sum(map(plan.numel, plan.covers)))
    if config.measure == "latency":
        return latency_measure(model, plan, config, family)
    counted = _count(model)
    each = _of_weight(plan, counted)
    attention = _attention(model, family, counted)
    kinds = sorted({gate.granularity for gate in plan.gates} & WITH_ATTENTION)
    if len(kinds) > 1:
        raise UserError(
            f'leap.measure: got "flops", with gates {" and ".join(kinds)}: each would count the products of attention; '
            'allowed: one of these gates, or "weights" or "parameters"'
        )
    products = tuple(_of_unit(gate, attention) / each for gate in plan.gates)
    inside = Measure("flops", config.target, 0.0, products).removable(plan)
    return Measure("flops", config.target, max(sum(counted[""].values()) / each - inside, 0.0), products)


def _count(model: nn.Module) -> Counted:
    """FLOPs of a forward pass of a model like this one, without its weights; the whole model is ""."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise UserError(
            f'leap.measure: got "flops", and the model is a {type(model).__name__}; allowed: a model of transformers, '
            'or "weights" or "parameters"'
        )
    with torch.device("meta"):
        twin = type(model)(copy.deepcopy(model.config)).eval()
    inputs = example_inputs(twin, 1, min(LENGTH, max_length(twin)))
    try:
        operators = _operators(twin, inputs)
    except Exception:  # masks without values: some architectures look into one that is given, others into their own
        try:
            operators = _operators(twin, {key: value for key, value in inputs.items() if key != "attention_mask"})
        except Exception as error:  # whatever transformers' code comes to without values
            raise UserError(
                f'leap.measure: got "flops", and those of a {model.config.model_type} model cannot be counted: '
                f'{cause(error)}; allowed: "weights" or "parameters"'
            ) from error
    found: dict[str, dict[str, float]] = {}
    for path, counts in operators.items():
        attention = sum(n for operator, n in counts.items() if str(operator).split(".")[1] in BATCHED)
        name = "" if path == "Global" else path.removeprefix(f"{type(twin).__name__}.")
        found[name] = {"attention": attention, "linear": sum(counts.values()) - attention}
    return found


def _operators(twin: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> dict[str, dict[Any, int]]:
    """FLOPs by path of a module and by operator."""
    with plain_implementations(twin), torch.no_grad(), FlopCounterMode(display=False) as counter:
        twin(**inputs)
    return counter.get_flop_counts()


def _of_weight(plan: GatePlan, counted: Counted) -> float:
    """FLOPs for each gated weight. UserError where they are not the same for all: a gate cannot count them then."""
    sizes: dict[str, int] = {}
    for tensor in filter(plan.counted, plan.covers):
        module = tensor.rpartition(".")[0]
        sizes[module] = sizes.get(module, 0) + plan.numel(tensor)
    each = {module: counted.get(module, {}).get("linear", 0.0) / size for module, size in sizes.items()}
    usual = median_low(each.values())
    for module, flops in each.items():
        if not usual or abs(flops / usual - 1) > 1e-6:
            raise UserError(
                f'leap.measure: got "flops", and a weight of {module} takes {flops:,.1f} of them in a forward pass, '
                f'others {usual:,.1f} (an expert, a convolution, a shared layer); allowed: "weights" or "parameters", '
                "or leave it out with leap.exclude"
            )
    return usual


def _attention(model: nn.Module, family: FamilyConfig | None, counted: Counted) -> Attention:
    found: Attention = {}
    for block in find_blocks(model, family):
        if block.structure.kind == "head":
            path = block.path(block.table.module)
            flops = counted.get(path, {}).get("attention", 0.0)
            found |= dict.fromkeys((part.tensor for part in block.structure.parts), (path, flops))
    return found


def _of_unit(gate: Gate, attention: Attention) -> float:
    """FLOPs of attention products that leave with a unit."""
    if gate.granularity not in WITH_ATTENTION:
        return 0.0
    inside = [(part.units.start, *attention[part.tensor]) for part in gate.slices if part.tensor in attention]
    if gate.granularity == "head":
        return inside[0][2] / gate.num_units
    blocks = [dict[str, float]() for _ in range(gate.num_units)]  # of every unit, a layer or a half of one
    for unit, path, flops in inside:
        blocks[unit][path] = flops
    products = {sum(flops.values()) for flops in blocks}
    if len(products) > 1:
        raise UserError(
            f'leap.measure: got "flops", and the layers of {gate.name} differ in the products of their attention; '
            'allowed: "weights" or "parameters"'
        )
    return products.pop()
