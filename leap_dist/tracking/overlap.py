"""How much of what two runs keep is the same: intersection over union of their masks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from leap_dist.errors import UserError
from leap_dist.export.masks import masks_of
from leap_dist.run_folder import read_run
from leap_dist.tracking.runs import FOLDER, StoredRun

MOST_RUNS = 20  # more make a table that is too large to read

Packed = dict[str, np.ndarray]
"""Masks by tensor name, one bit a weight."""


def overlaps(runs: Sequence[StoredRun]) -> list[dict[str, str | float]]:
    """A line for each run, with its IoU to each; the masks are read from the run folders, which have to be there.

    Raises UserError for a folder that is gone or changed, for runs of different models or with columns in different
    orders, and for too many runs.
    """
    if not 2 <= len(runs) <= MOST_RUNS:
        raise UserError(
            f"--masks: got {len(runs)} runs; allowed: 2 to {MOST_RUNS}; choose them with --runs or --pareto"
        )
    found = [_packed(run) for run in runs]
    masks, orders = [packed for packed, _ in found], [order for _, order in found]
    for run, order in zip(runs, orders, strict=True):
        if order != orders[0]:
            raise UserError(
                f"--masks: {run.label} and {runs[0].label} have their columns in different orders (leap.permute); "
                "choose runs with the same one"
            )
    shapes = [{name: mask.size for name, mask in packed.items()} for packed in masks]
    for run, sizes in zip(runs, shapes, strict=True):
        if sizes != shapes[0]:
            raise UserError(
                f"--masks: {run.label} and {runs[0].label} have not pruned the same tensors; choose runs of one model"
            )
    return [
        {"run": run.label} | {other.id[:8]: iou(mask, against) for other, against in zip(runs, masks, strict=True)}
        for run, mask in zip(runs, masks, strict=True)
    ]


def iou(one: Packed, other: Packed) -> float:
    """Weights that both keep / weights that either keeps; 1 where neither keeps any."""
    both = sum(int(np.bitwise_count(mask & other[name]).sum(dtype=np.int64)) for name, mask in one.items())
    either = sum(int(np.bitwise_count(mask | other[name]).sum(dtype=np.int64)) for name, mask in one.items())
    return both / either if either else 1.0


def _packed(stored: StoredRun) -> tuple[Packed, bool | str]:
    """The masks of the prunable weights, and the order of their columns; biases that follow their rows are left out."""
    folder = stored.tags.get(FOLDER)
    if folder is None or not Path(folder).is_dir():
        where = f"{folder} is not on this machine" if folder else f"the run has no tag {FOLDER}"
        raise UserError(f"--masks: the files of {stored.label} are needed, and {where}")
    run = read_run(Path(folder))
    counted = {name for gate in run.certificate.gates for name in gate.tensors}
    packed = {name: np.packbits(mask.numpy().reshape(-1)) for name, mask in masks_of(run) if name in counted}
    return packed, run.certificate.permuted
