"""The table for leap.measure "latency": a forward pass of the job's model with fewer and fewer heads and neurons."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from leap_dist.bench.forecast import empty_model
from leap_dist.config.sections import JobConfig
from leap_dist.errors import UserError
from leap_dist.export.latency import medians, torch_runner, torch_threads
from leap_dist.export.onnx import model_inputs
from leap_dist.files import nearest, takes_files
from leap_dist.machine import machine
from leap_dist.models.flops import max_length
from leap_dist.models.latency import Row, Table, digest_of, fit, here, kind_of, structures_of, units_of, write_table
from leap_dist.models.removal import remove_
from leap_dist.models.stacks import find_parts

SHARES = (0.75, 0.5, 0.25)
BUDGET = 20.0
"""Seconds for all measurements."""


def bench_latency(config: JobConfig, threads: int) -> dict[str, Any]:
    """Measure and write the table that the job names; returns machine, notes and rows, JSON-able.

    With one thread the processor's time of this process is taken, so that neighbours do not count.
    """
    leap = config.leap
    if leap.measure != "latency" or leap.latency_table is None:
        raise UserError(f'leap.measure: got "{leap.measure}"; allowed: "latency", with latency_table')
    _check_place(Path(leap.latency_table))
    empty: Any = empty_model(config.model, config.data.task)
    if leap.latency_length > max_length(empty):
        raise UserError(f"leap.latency_length: got {leap.latency_length}; allowed: at most {max_length(empty)}")
    with torch.random.fork_rng(devices=[]):
        dense = type(empty)(empty.config).eval()
    units = units_of(structures_of(dense, config.family))
    if not units:
        raise UserError(
            'leap.measure: got "latency"; the model has no blocks of two or more heads or neurons that are known here; '
            'allowed: another measure: "weights", "parameters" or "flops"'
        )
    where = machine()
    models, left = {"dense": dense}, {"dense": units}
    for kinds, share in itertools.product(_cuts(list(units)), SHARES):
        name = f"{' + '.join(kinds)}, {share:.0%}"
        models[name], numbers = _with(dense, kinds, share, config)
        left[name] = {kind: numbers[kind] for kind in units}
    inputs = model_inputs(dense, leap.latency_batch, leap.latency_length)
    clock = time.process_time if threads == 1 else time.perf_counter
    with torch_threads(threads):
        times = medians({name: torch_runner(each, last=True) for name, each in models.items()}, inputs, BUDGET, clock)
    rows = [Row(units=left[name], ms=ms) for name, ms in times.items()]
    fixed, slopes, residual = fit(rows, list(units))
    table = Table(
        machine=here(),
        model=digest_of(dense, config.family),
        batch=leap.latency_batch,
        length=leap.latency_length,
        threads=threads,
        units=units,
        rows=rows,
        fixed=fixed,
        each=slopes,
        residual=residual,
    )
    write_table(table, Path(leap.latency_table))
    fitted = [fixed + sum(slopes[kind] * number for kind, number in row.units.items()) for row in rows]
    shown = [
        {"left": name, "ms": row.ms, "fit": ms, "off": ms / row.ms - 1}
        for name, row, ms in zip(models, rows, fitted, strict=True)
    ]
    each_said = ", ".join(f"{1e3 * ms:.3g} us a {kind}" for kind, ms in slopes.items())
    notes = [f"{leap.latency_table}: {fixed:.3g} ms that no unit takes, {each_said}; the fit is off by {residual:.1%}"]
    return {"machine": where, "threads": threads, "notes": notes, "counts": shown}


def _check_place(path: Path) -> None:
    """UserError if no table can be written there, before anything is measured."""
    place = nearest(path.absolute().parent)
    if path.is_dir() or not takes_files(place):
        wrong = "it is a folder" if path.is_dir() else f"{place} is not a folder that can be written to"
        raise UserError(f"leap.latency_table: got {path}; {wrong}; name a file in a folder that can be")


def _cuts(kinds: Sequence[str]) -> list[tuple[str, ...]]:
    """What is cut together: each kind alone, and all of them."""
    return [(kind,) for kind in kinds] + ([tuple(kinds)] if len(kinds) > 1 else [])


def _with(dense: Any, kinds: Sequence[str], share: float, config: JobConfig) -> tuple[Any, dict[str, int]]:
    """The model with a share of the units of some kinds, and how many of every kind are left in all."""
    model, kept, left = copy.deepcopy(dense), dict[str, Sequence[int]](), dict[str, int]()
    parts = find_parts(model, config.family)
    for structure in (block.structure for block in parts.blocks):
        kind = kind_of(structure.kind, structure.num_units)
        number = max(1, round(share * structure.num_units)) if kind in kinds else structure.num_units
        kept[structure.name] = range(number)
        left[kind] = left.get(kind, 0) + number
    remove_(model, parts, kept)
    return model, left
