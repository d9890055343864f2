"""What the weights of a model are multiplied with, where its modules show that, and how scores start by it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from leap_dist.config.leap import GateConfig, LeapConfig
from leap_dist.core.gates import GatePlan, pattern_of
from leap_dist.core.inputs import Axes
from leap_dist.errors import UserError, few_of
from leap_dist.models.families import is_conv1d, is_fused
from leap_dist.models.views import Owner, Owners, Shape, are_transposed
from leap_dist.ops.slices import Slice

STARTS = {
    "magnitude": "|W| (magnitude)",
    "activation": "|W| times the norm of its input (activation)",
    "gradient": "|W| times the norm of its input and the size of its gradient (gradient)",
}


class Start(NamedTuple):
    """How scores start: the config with "auto" resolved, the axes of gated tensors where inputs count, and in words why
    "auto" came to it; "" where the config says."""

    config: LeapConfig
    axes: Mapping[str, Axes]
    why: str


def resolve_start(model: nn.Module, plan: GatePlan, config: LeapConfig) -> Start:
    """What `leap.score_init` comes to for a model.

    Raises UserError where inputs are asked for and no module shows those of a gated tensor.
    """
    config = beside_heads(config)
    given = config.start is not None or config.prior_mask is not None
    if given or config.rule == "magnitude" or config.score_init in ("magnitude", "zero"):
        return Start(config, {}, "")
    automatic, learns = config.score_init == "auto", config.mode == "train" and not config.frozen
    losing = [gate.granularity for gate in config.gates if not _gains_without_gradients(gate)]
    if automatic and not learns and losing and not is_causal_lm(model):
        return _by_magnitude(config, f"without gradients that is better for {losing[0]} of models that write no text")
    owners = Owners(model)
    counted = [name for name in plan.covers if plan.counted(name)]
    found = {name: axes_of(owners.of(name), name, owners.shape(name)) for name in counted}
    axes = {name: own for name, own in found.items() if own is not None}
    hidden = [name for name in counted if name not in axes and not (axes and _of_stream_alone(plan, name))]
    if hidden:
        few = few_of(hidden)
        if automatic:
            return _by_magnitude(config, f"no module shows the inputs of {few}")
        raise UserError(
            f'leap.score_init: got "{config.score_init}", but no linear layer, convolution or module of experts shows '
            f'the inputs of {few}; leave it out in leap.exclude, or set leap.score_init to "magnitude"'
        )
    why = "weights and masks are trained" if learns else "there are no gradients"
    start = config.score_init if not automatic else "gradient" if learns else "activation"
    return Start(config.model_copy(update={"score_init": start}), axes, why if automatic else "")


def _gains_without_gradients(gate: GateConfig) -> bool:
    """Whether activations were seen to rank a gate's units better than magnitude in an encoder that is cut at once.

    Blocks and rows of a matrix lose by them (docs/benchmarks.md).
    """
    return gate.granularity in ("element", "head", "neuron", "layer") or pattern_of(gate.granularity) is not None


def beside_heads(config: LeapConfig) -> LeapConfig:
    """The config with what other gates than those of heads start from in place of "syntax"."""
    if config.score_init != "syntax":
        return config
    alone = all(gate.granularity == "head" for gate in config.gates)
    return config.model_copy(update={"score_init": "magnitude" if alone else "auto"})


def _of_stream_alone(plan: GatePlan, name: str) -> bool:
    """Whether a tensor has no say in scores by activation: one of the residual stream's gate alone, as an embedding is,
    which is looked up and multiplied with nothing; dimensions are ranked by the others."""
    return all(plan.gates[cover.gate].granularity == "hidden" for cover in plan.covers[name])


def _by_magnitude(config: LeapConfig, why: str) -> Start:
    return Start(config.model_copy(update={"score_init": "magnitude"}), {}, why)


def describe_start(config: LeapConfig, why: str) -> str:
    """What "auto" came to, in a line."""
    return f"scores start from {STARTS[config.score_init]}: {why}"


def is_causal_lm(model: nn.Module) -> bool:
    """Whether a model is, or holds, one that transformers loads for causal language modelling."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    return any(kind.__name__ in names for module in model.modules() for kind in type(module).__mro__)


def shows_inputs(owner: Owner) -> bool:
    """Whether a module is called with what its parameter is multiplied with.

    The projection of torch's attention is no such module: its weight is handed to a function.
    """
    linear = isinstance(owner.module, nn.Linear) and not isinstance(owner.module, NonDynamicallyQuantizableLinear)
    return owner.local == "weight" and (linear or is_conv1d(owner.module) or isinstance(owner.module, _ConvNd))


def shows_products(owner: Owner) -> bool:
    """Whether a parameter holds the matrices of fused experts, and its module multiplies with them in plain torch.

    Then what each of them is multiplied with can be seen while the module computes (zero/products.py). Kernels that
    take tokens, routes and weights at once show nothing, and nor does a product with a copy of the weights.
    """
    config = getattr(owner.module, "config", None)
    plain = getattr(config, "_experts_implementation", None) in (None, "eager", "grouped_mm")
    return plain and is_fused(owner.module, owner.local) and type(owner.module).__module__.startswith("transformers.")


def axes_of(owners: list[Owner], name: str, shape: Shape) -> Axes | None:
    """Where a tensor of that whole shape has inputs and outputs; None where no module shows, or several differ."""
    found = {_axes(owner.module, name, shape) for owner in owners if shows_inputs(owner) or shows_products(owner)}
    return found.pop() if len(found) == 1 else None


def _axes(module: nn.Module, name: str, shape: Shape) -> Axes:
    rows, cols = shape[0], math.prod(shape[1:])

    def cut(block_rows: int, block_cols: int) -> Slice:
        return Slice(name, rows, cols, block_rows, block_cols)

    if isinstance(module, _ConvNd):
        group, kernel = rows // module.groups, math.prod(shape[2:])
        by_row, by_window = cut(1, cols), cut(group, kernel)
        return Axes(by_row, by_window) if module.transposed else Axes(by_window, by_row)
    stacked = len(shape) == 3
    matrices = shape[0] if stacked else 1
    rows, cols = matrices * shape[-2], shape[-1]
    by_row, by_column = cut(1, cols), cut(shape[-2], 1)
    transposed = is_conv1d(module) or (stacked and are_transposed(module))
    return Axes(by_row, by_column, matrices) if transposed else Axes(by_column, by_row, matrices)
