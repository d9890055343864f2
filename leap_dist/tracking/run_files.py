"""What is shown of a run, from the files in its folder; torch and MLflow are not needed to read them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from leap_dist.errors import UserError

RESOLVED, CERTIFICATE, METRICS, SCORES = "config.json", "certificate.json", "metrics.jsonl", "scores.json"
CARDS = "export/*/card.json"
COST = "leap_ms_"  # what the measures of LEAP's own time begin with


@dataclass(frozen=True)
class Export:
    """An export by its card: parameters and latency (ms of a forward pass, the first one measured), if it has any."""

    kind: str
    bytes: float
    parameters: float | None
    latency: float | None


@dataclass(frozen=True)
class RunFiles:
    """A finished run. steps: the lines of metrics.jsonl; scores: scores.json; both empty without the file."""

    folder: Path
    certificate: Mapping[str, Any]
    job: Mapping[str, Any] = field(default_factory=dict)
    steps: Sequence[Mapping[str, Any]] = ()
    scores: Mapping[str, Any] = field(default_factory=dict)

    @property
    def metric(self) -> str:
        """The task's main metric; "" where none was measured."""
        return next(iter(self.certificate.get("metrics", {}).get("pruned", {})), "")

    @property
    def leap_ms(self) -> float | None:
        """Milliseconds of LEAP in a step of the prune phase, the mean over those that were logged."""
        pruning = [line for line in self.steps if line["phase"] == "prune"]
        costs = [sum(value for key, value in line.items() if key.startswith(COST)) for line in pruning]
        return sum(costs) / len(costs) if costs else None


def read_files(folder: Path) -> RunFiles:
    """Raises UserError for a folder that holds no finished run, and for a file that is damaged."""
    if not (folder / CERTIFICATE).is_file():
        raise UserError(f"{folder} holds no finished run: it has no {CERTIFICATE}")
    job = _json(folder / RESOLVED) if (folder / RESOLVED).is_file() else {}
    scores = _json(folder / SCORES) if (folder / SCORES).is_file() else {}
    return RunFiles(folder, _json(folder / CERTIFICATE), job, _steps(folder / METRICS), scores)


def exports(folder: Path | None) -> list[Export]:
    """The exports below a run folder, the fastest first, those that cannot be run last; none if it is not there."""
    found = []
    for path in sorted(folder.glob(CARDS)) if folder else ():
        card = _json(path)
        latency = card["latency"][0]["after"] if card["latency"] else None
        parameters = card["parameters"]["after"] if card["parameters"] else None
        found.append(Export(card["kind"], card["bytes"]["after"], parameters, latency))
    return sorted(found, key=lambda export: (export.latency is None, export.latency or 0.0))


def _steps(path: Path) -> list[dict[str, Any]]:
    """All whole lines; the last one of a run that was killed may be torn."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [_parsed(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]


def _json(path: Path) -> dict[str, Any]:
    return _parsed(path.read_text(encoding="utf-8"), str(path))


def _parsed(text: str, place: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise UserError(f"{place}: damaged: {error}; restore the file, or run the job again") from error
    if not isinstance(found, dict):
        raise UserError(f"{place}: damaged: no JSON object; restore the file, or run the job again")
    return found
