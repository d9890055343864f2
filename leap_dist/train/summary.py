"""What a run says of itself at its end, and what runs are found and compared by in MLflow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from leap_dist.console import console, summary_table
from leap_dist.core.measure import said_of
from leap_dist.core.stopwatch import TIMINGS
from leap_dist.export import certificate as cert
from leap_dist.machine import machine
from leap_dist.train.job import Job


def tags_of(job: Job, output: Path) -> dict[str, str]:
    """What distinguishes runs in MLflow, beside their parameters. The first rank's."""
    here, device = machine(), job.ranks.device
    found = {
        "commit": here["commit"] or "unknown",
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else here["processor"],
        "folder": str(output.resolve()),
        "ranks": job.ranks.world_size,
        "zero_stage": job.engine.zero_optimization_stage(),
        "rule": job.config.leap.masks_by,
        "gates": " + ".join(gate.granularity for gate in job.config.leap.gates),
        "metric": job.task.primary,
    }
    found |= {f"version.{name}": version or "not installed" for name, version in cert.versions().items()}
    return {f"leap.{name}": str(value) for name, value in found.items()}


def leap_ms(job: Job) -> float | None:
    """What LEAP took of a pruning step, the mean over those that were logged; None where none was."""
    costs = job.state.costs
    return sum(cost[name] for cost in costs for name in TIMINGS) / len(costs) if costs else None


def print_summary(job: Job, certificate: Mapping[str, Any], output: Path) -> None:
    """The table at the end."""
    rows: list[dict[str, str | float]] = []
    for name, metrics in job.state.measured.items():
        pruned = name in ("pruned", "start")
        density = certificate["density"] if pruned else 1.0
        kept = certificate["kept"] if pruned else certificate["prunable"]
        rows.append({"model": name, "density": density, "weights": kept, **shown(job.task.primary, metrics)})
    summary_table(rows, title=f"{job.task.name}, target {said_of(certificate)} {certificate['target']}")
    if "note" in certificate:
        console().print(certificate["note"], markup=False, soft_wrap=True)
    if job.state.costs:
        console().print(_cost_line(job.state.costs), markup=False, soft_wrap=True)
    console().print(f"certificate and model: {output}", markup=False)


def shown(primary: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """What the table has of a model's metrics: the main one, and beside a perplexity what tokenizers do not change."""
    return {name: metrics[name] for name in (primary, "bits_per_byte") if name in metrics}


def _cost_line(costs: list[dict[str, float]]) -> str:
    """What LEAP cost in a step of the prune phase, a mean over those that were logged."""
    mean = {key: sum(cost[key] for cost in costs) / len(costs) for key in costs[0]}
    parts = ", ".join(f"{name.removeprefix('leap_ms_')} {mean[name]:.3g}" for name in TIMINGS)
    sent = f"{mean['leap_collectives']:.3g} collectives of {mean['leap_bytes_communicated'] / 1e3:.3g} kB"
    return f"LEAP's step: ms {parts}; {sent}; {mean['leap_extra_bytes'] / 1e6:.3g} MB of state of its own on a rank"
