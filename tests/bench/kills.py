"""kill -9 of a random rank at random moments of the embedded job, and every time the same command again.

    python -m tests.bench.kills [--kills 8] [--steps 300] [--seed 1] [--ranks 1 2] [--stages 2 3]

For each number of ranks and ZeRO stage a run is broken so often, every third time while a checkpoint is being written.
Its weights and masks have to be those of a run that nothing disturbed, by the hashes in the certificates. Runs replace
their rows of results/kills.json as they finish.
"""

import argparse
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from leap_dist.config.job_file import CONFIG_FOLDER

ROOT = Path(__file__).resolve().parents[2]
HASHES = ("weights_sha256", "masks_sha256")


def main() -> None:
    """Break a run of each kind, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=8, help="of each run")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3])
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    target = Path(__file__).parent / "results" / "kills.json"
    rows = json.loads(target.read_text()) if target.exists() else {}
    for world, stage in itertools.product(arguments.ranks, arguments.stages):
        with tempfile.TemporaryDirectory() as folder:
            row = one_setting(Path(folder), world, stage, arguments.kills, arguments.steps, chance)
        print(json.dumps(row), flush=True)
        rows[f"ranks {world} stage {stage}"] = row
        target.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")
        assert row["equal"]


def one_setting(folder: Path, world: int, stage: int, kills: int, steps: int, chance: random.Random) -> dict[str, Any]:
    """An undisturbed and a broken run; what happened, and whether both ended with the same bits."""
    job = json.loads((CONFIG_FOLDER / "ds_leap.json").read_text())
    job |= {"zero_optimization": {"stage": stage}, "tracking": {"mlflow_uri": None}}
    job["train"] |= {"max_steps": steps, "checkpoint_every": 10, "log_every": 1}
    (folder / "job.json").write_text(json.dumps(job))
    finish(start(folder, "whole", world))
    told = []
    for number in range(kills):
        process = start(folder, "broken", world)
        reach = last_step(folder / "broken") + chance.randint(2, max(3, steps // (kills + 1)))
        told.append(kill(process, folder / "broken", world, min(reach, steps - 5), number % 3 == 0, chance))
        print(f"{world} ranks, stage {stage}: {told[-1]}", flush=True)
    finish(start(folder, "broken", world))
    whole, broken = (json.loads((folder / name / "certificate.json").read_text()) for name in ("whole", "broken"))
    equal = all(whole[key] == broken[key] for key in HASHES) and whole["metrics"] == broken["metrics"]
    return {"steps": steps, "equal": equal, **{key: broken[key] for key in HASHES}, "kills": told}


def start(folder: Path, name: str, world: int) -> subprocess.Popen[bytes]:
    """The job, by DeepSpeed's launcher where there is more than one rank."""
    arguments = [
        str(ROOT / "launch" / "prune.py"),
        "--config",
        str(folder / "job.json"),
        "--output",
        str(folder / name),
    ]
    command = [sys.executable, *arguments]
    if world > 1:
        launcher = str(Path(sys.executable).with_name("deepspeed"))
        command = [launcher, "--num_gpus", str(world), "--master_port", str(free_port()), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)


def kill(
    process: subprocess.Popen[bytes], output: Path, world: int, step: int, saving: bool, chance: random.Random
) -> dict[str, Any]:
    """kill -9 after `step`, or the next time that a checkpoint is being written after it."""
    while last_step(output) < step or (saving and not any((output / "checkpoints").glob(".step-*.partial"))):
        assert process.poll() is None, (process.stdout.read() if process.stdout else b"").decode()
        time.sleep(0.001)
    time.sleep(chance.random() * (0.02 if saving else 0.2))
    ranks = [process.pid] if world == 1 else [rank for node in children(process.pid) for rank in children(node)]
    victim = chance.randrange(len(ranks))
    os.kill(ranks[victim], signal.SIGKILL)
    partial = sorted(path.name for path in (output / "checkpoints").glob(".step-*"))
    process.communicate(timeout=300)
    while any(Path(f"/proc/{rank}").exists() for rank in ranks):
        time.sleep(0.01)
    complete = sorted(path.name for path in (output / "checkpoints").glob("step-*"))
    return {"rank": victim, "after": last_step(output), "unfinished": partial, "goes on from": complete[-1:]}


def last_step(output: Path) -> int:
    """The last step that a run has logged in whole."""
    metrics = output / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    return int(json.loads(whole[-1])["step"]) if whole else 0


def children(process: int) -> list[int]:
    """The processes that a process has started, in their order."""
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def finish(process: subprocess.Popen[bytes]) -> None:
    """Wait for a run that nothing disturbs."""
    printed, _ = process.communicate()
    assert process.returncode == 0, printed.decode()


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    main()
