"""Importance: scores from the weights as they are, where learned scores start, and those of the magnitude rule."""

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from leap_dist.core.fragments import Fragment
from leap_dist.core.gates import Cover, GatePlan
from leap_dist.core.gating import EXP_AVG_SQ, LATENT, SCORE, Gating
from leap_dist.core.inputs import Axes
from leap_dist.ops.slices import Slice, add_unit_sums_, expand_units

GRADIENT = 0.25
"""What the gradient's part is of the exponent that it shares with the input's norm; measured in docs/benchmarks.md."""


class Norms(NamedTuple):
    """||x_j|| of the inputs of gated matrices, fp32 of shape (features,), and where the matrices have them.

    gradients: whether the size of a weight's gradient counts too.
    """

    values: Mapping[str, Tensor]
    axes: Mapping[str, Axes]
    gradients: bool = False


def write_importance_(
    gating: Gating,
    norms: Norms | None = None,
    *,
    scaled: bool,
    added: bool = False,
    given: Mapping[int, Tensor] = MappingProxyType({}),
) -> None:
    """S_u = mean |W_ij|, or with norms mean |W_ij| ||x_j||, over the unit's prunable weights. Collective.

    Of heads and neurons only the weights of their outputs count then: what they add to the stream. With gradients it
    is mean |W_ij| ||x_j||^3/4 g_ij^1/4 over all weights, g the root of Adam's second moment of dL/dW: what the dense
    phase shows of both sides of a weight. A constant in g does not matter, as scores are scaled then. Of heads and
    neurons it is the root of the product of that and of what they give, ||x_j|| summed over their outputs' weights,
    both over their means.

    scaled: divided by the mean over the gate. added: to the scores that are there, which have moved before they start.
    With norms, those of single weights are divided by the mean over their output row instead, as inputs say what a
    weight is worth to its output, nothing on what the output is worth (docs/benchmarks.md); a pattern compares within
    a row anyway. Biases follow their unit without a say, and with norms tensors that have none. given: of structured
    gates, by number, what their units are worth in place of that, (units,); divided by its mean.
    """
    plan = gating.plan
    num_gates = len(plan.gates)
    outputs, silent = outputs_of(plan, norms)
    flowing = {gate for _, gate in outputs} if norms and norms.gradients else set()
    num_units = plan.num_structured_units
    num_sums = num_gates + num_units * (2 if flowing else 1)
    sums = torch.zeros(num_sums, dtype=torch.float64, device=gating.device)
    units, flows = sums[num_gates : num_gates + num_units], sums[num_gates + num_units :]
    for fragment, sizes in _sizes(gating, norms, gating.weights):
        for cover in plan.covers[fragment.tensor]:
            if (fragment.tensor, cover.gate) in silent:
                continue
            if not plan.gates[cover.gate].elementwise:
                _add_sums_(units[plan.units(cover.gate)], sizes, fragment, cover)
            if scaled:
                sums[cover.gate] += sizes.sum(dtype=torch.float64)
            if norms and cover.gate in flowing and (fragment.tensor, cover.gate) in outputs:
                _add_sums_(flows[plan.units(cover.gate)], _inputs_of(norms, fragment, sizes), fragment, cover)
    gating.communicator.sum_(sums)
    totals = sums[:num_gates].tolist()
    means = [max(t / g.num_weights, 1e-30) if scaled else 1.0 for t, g in zip(totals, plan.gates, strict=True)]
    _write_elements_(gating, norms, means, added)
    for index in plan.structured:
        numbers = plan.gates[index].unit_sizes.to(units.device, non_blocking=True)
        units[plan.units(index)] /= numbers.double() * means[index]
        if index in flowing and (flow := flows[plan.units(index)]).any():
            units[plan.units(index)] = (units[plan.units(index)] * flow / flow.mean()).sqrt()
        if index in given:
            worth = given[index].to(units)
            units[plan.units(index)] = worth / worth.mean().clamp(min=torch.finfo(worth.dtype).tiny)  # all may be 0
    for fragment in gating.own_scores:
        _put_(fragment.view(fragment.flat), units[fragment.start : fragment.start + fragment.length], added)


def outputs_of(plan: GatePlan, norms: Norms | None) -> tuple[set[tuple[str, int]], set[tuple[str, int]]]:
    """(tensor, gate) of the tensors that take a gate's heads or neurons as inputs, and of those that do not rank them.

    By activation units are ranked by the first alone, as what goes into a unit says little of what it adds; by all
    tensors where none of these counts, and with gradients.
    """
    outputs: set[tuple[str, int]] = set()
    others: set[tuple[str, int]] = set()
    for tensor, own in norms.axes.items() if norms else ():
        for cover in plan.covers[tensor] if plan.counted(tensor) else ():
            if plan.gates[cover.gate].granularity in ("head", "neuron"):
                (outputs if _is_output(cover, own.inputs) else others).add((tensor, cover.gate))
    ranked = set() if norms and norms.gradients else {gate for _, gate in outputs}
    return outputs, {(tensor, gate) for tensor, gate in others if gate in ranked}


def _is_output(cover: Cover, inputs: Slice) -> bool:
    """Whether a tensor takes the units as inputs. inputs: the slice with a unit for each input feature."""
    columns = inputs.block_rows == inputs.rows
    return all(
        part.block_rows >= part.bounds[1] if columns else part.block_cols >= part.bounds[3] for part in cover.slices
    )


def _write_elements_(gating: Gating, norms: Norms | None, means: list[float], added: bool) -> None:
    """The scores of single weights."""
    under = {f.tensor: gate for f in gating.weights if (gate := _element_gate(gating, f.tensor)) is not None}
    rows = _row_means(gating, norms) if norms else {}
    for fragment, sizes in _sizes(gating, norms, [f for f in gating.weights if f.tensor in under]):
        mean: float | Tensor = means[under[fragment.tensor]]
        if norms and fragment.tensor in rows:
            outputs = norms.axes[fragment.tensor].outputs
            mean = expand_units(rows[fragment.tensor], torch.empty_like(sizes), fragment.start, outputs)
        _put_(gating.state(fragment, SCORE), sizes.div_(mean), added)


def _element_gate(gating: Gating, tensor: str) -> int | None:
    """The gate that scores a tensor's single weights."""
    return next((c.gate for c in gating.plan.covers[tensor] if gating.plan.gates[c.gate].elementwise), None)


def _put_(scores: Tensor, start: Tensor, added: bool) -> None:
    if added:
        scores.add_(start)
    else:
        scores.copy_(start)


def _sizes(gating: Gating, norms: Norms | None, fragments: Sequence[Fragment]) -> Iterator[tuple[Fragment, Tensor]]:
    """|W|, |W| ||x||, or that with gradients, of the prunable weights of fragments: new tensors of shape (length,)."""
    for fragment in fragments:
        unseen = norms is not None and fragment.tensor not in norms.values
        if unseen or not gating.plan.counted(fragment.tensor):
            continue
        sizes = gating.state(fragment, LATENT).abs()
        if norms is not None:
            inputs = _inputs_of(norms, fragment, sizes)
            if norms.gradients:
                inputs = inputs ** (1.0 - GRADIENT)
                sizes *= _moments(gating, fragment) ** (GRADIENT / 2)
            sizes *= inputs
        yield fragment, sizes


def _inputs_of(norms: Norms, fragment: Fragment, like: Tensor) -> Tensor:
    """||x_j|| of every weight of a fragment, as `like` is."""
    return _spread(norms.values[fragment.tensor], norms, fragment, like)


def _moments(gating: Gating, fragment: Fragment) -> Tensor:
    """Adam's second moment of every weight of a fragment; next to nothing in place of 0, so that weights which have no
    gradient, as what no token reached, are ranked by the rest."""
    return gating.state(fragment, EXP_AVG_SQ).clamp(min=torch.finfo(torch.float32).tiny)


def _spread(values: Tensor, norms: Norms, fragment: Fragment, like: Tensor) -> Tensor:
    """Values of inputs, (features,), for every weight of a fragment, as `like` is."""
    values, inputs = values.to(like), norms.axes[fragment.tensor].inputs
    return expand_units(values, torch.empty_like(like), fragment.start, inputs)


def _row_means(gating: Gating, norms: Norms) -> dict[str, Tensor]:
    """The mean over every output row of the tensors under element gates, fp32 of shape (outputs,). Collective."""
    gates = {tensor: _element_gate(gating, tensor) for tensor in sorted(gating.plan.covers)}
    under = [name for name, gate in gates.items() if gate is not None and not gating.plan.gates[gate].pattern]
    outputs = {name: norms.axes[name].outputs for name in under}
    counts = [part.units.stop for part in outputs.values()]
    sums = torch.zeros(sum(counts), dtype=torch.float64, device=gating.device)
    by_tensor = dict(zip(outputs, sums.split(counts), strict=True))
    for fragment, sizes in _sizes(gating, norms, gating.weights):
        if fragment.tensor in by_tensor:
            add_unit_sums_(by_tensor[fragment.tensor], sizes, fragment.start, outputs[fragment.tensor])
    gating.communicator.sum_(sums)
    return {
        name: (found / outputs[name].unit_sizes().to(found.device)).clamp(min=1e-30).float()
        for name, found in by_tensor.items()
    }


def _add_sums_(units: Tensor, values: Tensor, fragment: Fragment, cover: Cover) -> None:
    local = torch.zeros_like(units)
    for part in cover.slices:
        add_unit_sums_(local, values, fragment.start, part)
    units += local
