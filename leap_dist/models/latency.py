"""leap.measure "latency": what units take of a forward pass, from a table that was measured once on this machine.

Latency is taken as a sum: what is always there, and so much for every head or neuron that is kept. The table holds what
was measured at several counts of units, the fit of that sum, and by how much the fit is off.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from leap_dist.config.family import FamilyConfig
from leap_dist.config.json_file import read_json
from leap_dist.config.leap import LeapConfig
from leap_dist.core.gates import GatePlan
from leap_dist.core.measure import Measure
from leap_dist.errors import UserError
from leap_dist.files import write_text
from leap_dist.machine import machine
from leap_dist.models.blocks import find_blocks, tensor_shapes

if TYPE_CHECKING:
    from torch import nn

    from leap_dist.models.structures import Structure

COUNTED = ("head", "neuron")
MAKE = "make it with python launch/bench.py latency --config JOB"
Positive = Annotated[float, Field(gt=0)]


class Row(BaseModel):
    """Milliseconds with so many units left in all, by kind."""

    units: dict[str, int]
    ms: Positive


class Table(BaseModel):
    """units: by kind, those of the dense model that can go, so none that is its block's only one. fixed: what none of
    them takes. each: what a unit takes. ms in all of them.

    residual: the largest difference between the fit and what was measured, relative.
    """

    model_config = ConfigDict(extra="forbid")

    machine: dict[str, Any]
    model: str
    batch: int
    length: int
    threads: int
    units: dict[str, int]
    rows: list[Row]
    fixed: Annotated[float, Field(ge=0)]
    each: dict[str, Positive]
    residual: float


def kind_of(granularity: str, num_units: int) -> str:
    """Blocks that are alike: "neuron of 1536"."""
    return f"{granularity} of {num_units}"


def structures_of(model: nn.Module, family: FamilyConfig | None) -> list[Structure]:
    """The blocks whose units a table counts."""
    return [block.structure for block in find_blocks(model, family) if block.structure.kind in COUNTED]


def units_of(structures: Iterable[Structure]) -> dict[str, int]:
    """How many units each kind has in all, where a block has more than one: its last one stays."""
    found: dict[str, int] = {}
    for each in structures:
        if each.num_units > 1:
            kind = kind_of(each.kind, each.num_units)
            found[kind] = found.get(kind, 0) + each.num_units
    return found


def digest_of(model: nn.Module, family: FamilyConfig | None) -> str:
    """By which a model of the same shapes is known, whatever its weights and its head."""
    shapes = tensor_shapes(model)
    parts = [
        [structure.name, structure.kind, structure.num_units, [list(shapes[part.tensor]) for part in structure.parts]]
        for structure in structures_of(model, family)
    ]
    return hashlib.sha256(json.dumps([type(model).__name__, parts]).encode()).hexdigest()


def here() -> dict[str, Any]:
    """What a table holds for: the processor, its cores, and the version of torch."""
    found = machine()
    return {"processor": found["processor"], "cores": found["cores"], "torch": found["versions"]["torch"]}


def fit(rows: Sequence[Row], kinds: Sequence[str]) -> tuple[float, dict[str, float], float]:
    """(fixed, each, residual) of the sum that fits best, differences relative to what was measured.

    The first row is the dense model's, of which the target is a share: there the sum is exact. UserError where a kind's
    units take no time.
    """
    counts, ms = (
        np.array([[row.units[kind] for kind in kinds] for row in rows], float),
        np.array([row.ms for row in rows]),
    )
    gone = counts[0] - counts[1:]
    slopes = np.linalg.lstsq(gone / ms[1:, None], (ms[0] - ms[1:]) / ms[1:], rcond=None)[0]
    each = dict(zip(kinds, slopes.tolist(), strict=True))
    for kind, value in each.items():
        if value <= 0:
            raise UserError(
                f"leap.latency_table: with fewer units ({kind}) the model is not faster on this machine; allowed: a "
                "larger latency_batch or latency_length, a quieter machine, or another measure"
            )
    share = min(1.0, ms[0] / float(counts[0] @ slopes))  # all units together take no more than the model
    slopes, each = share * slopes, {kind: share * value for kind, value in each.items()}
    fitted = ms[0] - (counts[0] - counts) @ slopes
    return max(float(ms[0] - counts[0] @ slopes), 0.0), each, float(np.abs(fitted / ms - 1).max())


def write_table(table: Table, path: Path) -> None:
    """JSON; an older one is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, table.model_dump_json(indent=1) + "\n")


def read_table(model: nn.Module, config: LeapConfig, family: FamilyConfig | None) -> Table:
    """The table that a job names. UserError if it is not there, is damaged, or is of something else."""
    assert config.latency_table is not None
    path = Path(config.latency_table)
    if not path.is_file():
        raise UserError(f"leap.latency_table: got {path}; there is no such file; {MAKE}")
    try:
        table = Table.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"{path}: damaged: {place}: {first['msg']}; {MAKE}") from error
    wanted = {
        "the machine": (table.machine, here()),
        "the model": (table.model[:12], digest_of(model, family)[:12]),
        "latency_batch": (table.batch, config.latency_batch),
        "latency_length": (table.length, config.latency_length),
    }
    for what, (measured, asked) in wanted.items():
        if measured != asked:
            raise UserError(
                f"leap.latency_table: {path} was measured with another value of {what}: it has {_said(measured)}, here "
                f"it is {_said(asked)}; {MAKE}"
            )
    return table


def _said(value: Any) -> str:
    return ", ".join(map(str, value.values())) if isinstance(value, dict) else str(value)


def latency_measure(model: nn.Module, plan: GatePlan, config: LeapConfig, family: FamilyConfig | None) -> Measure:
    """The sum of the table, in units of a weight: of all gates together it is as large as their weights.

    UserError for gates whose units no table counts.
    """
    for gate in plan.gates:
        if gate.granularity not in COUNTED or not gate.uniform:
            raise UserError(
                f'leap.measure: got "latency", with gate {gate.granularity}; allowed: {" and ".join(COUNTED)}, or '
                'another measure: "weights", "parameters" or "flops"'
            )
    table, each = read_table(model, config, family), list[float]()
    for gate in plan.gates:
        kind = kind_of(gate.granularity, gate.num_units)
        if gate.num_units > 1 and kind not in table.each:
            raise UserError(f"leap.latency_table: {config.latency_table} has no {gate.name}; {MAKE}")
        each.append(table.each.get(kind, 0.0))  # the only unit of a block is a part of what is fixed
    gated = sum(ms * gate.num_units for ms, gate in zip(each, plan.gates, strict=True))
    if not gated:
        raise UserError(
            'leap.gates: no gate has more than one unit, and the last one stays; allowed with measure "latency": gates '
            "of blocks with several heads or neurons"
        )
    scale = plan.prunable / gated  # weights for a millisecond
    products = tuple(scale * ms - gate.unit_size for ms, gate in zip(each, plan.gates, strict=True))
    ungated = table.fixed + sum(table.each[kind] * number for kind, number in table.units.items()) - gated
    return Measure("latency", config.target, max(scale * ungated, 0.0), products)
