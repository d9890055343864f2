"""Columns in another order before an n:m mask (leap.permute), by what scores start from; before hosting."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor, nn

from leap_dist.config.family import FamilyConfig
from leap_dist.config.sections import JobConfig
from leap_dist.console import console
from leap_dist.core.closed_form import closed_form
from leap_dist.core.communicator import Communicator
from leap_dist.core.inputs import Inputs
from leap_dist.core.measure import Measure, check_reachable, fewest_units, most_units
from leap_dist.errors import UserError
from leap_dist.files import replacing
from leap_dist.models.inputs import resolve_start
from leap_dist.models.permute import are_orders_of, find_orders, permute_
from leap_dist.models.plan import make_plan
from leap_dist.run_folder import PERMUTATION
from leap_dist.train.batches import Batches, StreamBatches
from leap_dist.zero.listener import Listener
from leap_dist.zero.ranks import Ranks


def reorder(
    config: JobConfig, model: nn.Module, batches: Batches | StreamBatches, ranks: Ranks, begun: Path | None = None
) -> dict[str, Tensor]:
    """Permute a job's model; returns the orders, which the first rank finds. Collective.

    begun: the folder of a run that is resumed, which has them: another micro-batch would find others.
    Raises UserError for a target that the gates cannot reach, as far as arithmetic tells: a search takes minutes.
    """
    orders = ranks.on_first(lambda: _read_orders(begun, model, config.family)) if begun else None
    if orders is None:
        orders = _search(config, model, batches, ranks)
    permute_(model, orders, config.family)
    return orders


def _read_orders(folder: Path, model: nn.Module, family: FamilyConfig | None) -> dict[str, Tensor] | None:
    """Those that a run has been begun with; None where it was cut off before. Raises UserError for a damaged file."""
    file = folder / PERMUTATION
    if not file.is_file():
        return None
    try:
        with np.load(file, allow_pickle=False) as arrays:
            orders = {name: torch.from_numpy(array) for name, array in arrays.items()}
        whole = are_orders_of(model, orders, family)
    except (OSError, ValueError, TypeError, RuntimeError, EOFError, BadZipFile):
        whole = False
    if not whole:
        raise UserError(f"{file}: damaged: these are no orders of this model's columns; restore it, or start a new run")
    return orders


def _search(config: JobConfig, model: nn.Module, batches: Batches | StreamBatches, ranks: Ranks) -> dict[str, Tensor]:
    """The orders by what scores start from."""
    plan = make_plan(model, config.leap, config.family)
    count, measure = closed_form(plan), Measure(target=config.leap.target)
    if count is not None and config.leap.measure == "weights":
        check_reachable(plan, measure, count(fewest_units(plan)), count(most_units(plan)))
    start = resolve_start(model, plan, config.leap)
    norms: Mapping[str, Tensor] = {}
    if start.axes:
        inputs = Inputs(start.axes, Communicator(), Communicator(), torch.device("cpu"), strict=not start.why)
        _show(model, inputs, batches.calibration(config.leap.calibration_batches))
        parts = [sums for sums in ranks.gather_objects(inputs.flat) if sums is not None]
        inputs.flat.copy_(torch.stack(parts).sum(0))
        norms = inputs.norms()

    def worth(tensor: str) -> Tensor:
        sizes = model.get_parameter(tensor).detach().abs().float().cpu()
        return sizes * norms[tensor] if tensor in norms else sizes

    orders = ranks.on_first(lambda: find_orders(model, plan, worth, config.family))
    if ranks.first:
        patterned = sum(1 for covers in plan.covers.values() if any(plan.gates[c.gate].pattern for c in covers))
        stay = "; inputs from the residual stream, and of experts, stay as they are" if len(orders) < patterned else ""
        moved = f"the columns of {len(orders)} of {patterned} n:m tensors are in another order"
        console().print(f"leap.permute: {moved}{stay}", markup=False)
    return orders


def _show(model: nn.Module, inputs: Inputs, batches: Iterable[Mapping[str, Any]]) -> None:
    """Let a model see batches, so that `inputs` has the sums of this rank."""
    listener, training = Listener(model, inputs, on=True), model.training
    inputs.calibrating = True
    model.eval()
    device = next(model.parameters()).device
    with torch.no_grad():
        for batch in batches:
            model(**{key: value.to(device) for key, value in batch.items()})
    inputs.pool()
    model.train(training)
    listener.remove()


def save_orders(folder: Path, orders: Mapping[str, Tensor]) -> None:
    """Write them to a run folder, once: a run that is resumed has the weights of its checkpoint."""
    if orders and not (folder / PERMUTATION).exists():
        arrays: dict[str, Any] = {name: order.numpy() for name, order in orders.items()}
        with replacing(folder / PERMUTATION) as partial, partial.open("wb") as file:
            np.savez(file, **arrays)
