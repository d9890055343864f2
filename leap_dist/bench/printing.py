"""A benchmark's result as the user sees it: where and with what, notes, and a table for each list of rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from leap_dist.console import console, summary_table

TITLES = {
    "variants": "seconds of a step, medians; ratios to dense",
    "sizes": "milliseconds of a selection, medians",
    "jumps": "a selection when the level jumps, 126 gates: warm milliseconds, ratios to them, memory",
    "counted": "a step on real ranks of a tiny model, LEAP's bytes beside the model of them",
    "ranks": "BERT-base in bf16 with element gates, bytes of one rank in a step, modelled",
    "models": "what LEAP adds on two ranks, modelled",
    "counts": "milliseconds of a forward pass with so many units left, medians, and the sum that fits them",
    "times": "medians; ratios to dense in the same engine",
}
"""Keys of a result that hold rows."""


def print_result(result: Mapping[str, Any]) -> None:
    """Print what was measured, and on which machine."""
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    cores = f"{machine['cores']} cores, load {machine['load']:.2g} before"
    settings = [f"{key} {value}" for key, value in result.items() if isinstance(value, str | int | float)]
    lines = [f"{machine['processor']}, {cores}, {machine['system']}", versions, ", ".join(settings), *result["notes"]]
    for line in filter(None, lines):
        console().print(line, markup=False, soft_wrap=True)
    console().print(f"commit {machine['commit'] or 'unknown'}", markup=False)
    for key, title in TITLES.items():
        rows = result.get(key)
        if isinstance(rows, list | dict):
            named = [{"variant": name, **row} for name, row in rows.items()] if isinstance(rows, dict) else rows
            summary_table(named, title=title)
