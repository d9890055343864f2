"""A long run: memory and open files stay what they were, through saves, resumes and evaluations.

    OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu python -m tests.bench.soak [--steps 20000]

A tiny job in one process: a checkpoint every 50 steps, an evaluation every 1000, and four times it is asked to stop and
goes on with a new engine. Memory is what the process holds (RSS), a median over the samples of each tenth of the run.
Writes results/soak.json.
"""

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from leap_dist.checkpoint.checkpoints import Checkpoints
from leap_dist.config.job_file import parse_job
from leap_dist.run_folder import CHECKPOINTS
from leap_dist.tracking.mlflow import Tracker
from leap_dist.train.evaluate import evaluate
from leap_dist.train.job import Job, build_job
from leap_dist.train.signals import Interrupted
from leap_dist.train.steps import train
from leap_dist.train.watch import Watch
from leap_dist.zero.ranks import Ranks, leave, start_ranks
from tests.sweep.jobs import JOB

PARTS = 5  # of the run, each by an engine of its own
EVALUATE = 1000
SAMPLE = 100
PAGE = os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Run, sample, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    steps = parser.parse_args().steps
    ranks, began = start_ranks(), time.monotonic()
    samples: list[tuple[float, int]] = []
    with tempfile.TemporaryDirectory() as folder:
        for part in range(1, PARTS + 1):
            run_part(Path(folder), ranks, steps, steps * part // PARTS, samples)
            gc.collect()
    tenths = [samples[len(samples) * part // 10 : len(samples) * (part + 1) // 10] for part in range(10)]
    found = {
        "steps": steps,
        "seconds": round(time.monotonic() - began),
        "memory_mb": [round(statistics.median(memory for memory, _ in part), 1) for part in tenths],
        "open_files": [max(files for _, files in part) for part in tenths],
    }
    print(json.dumps(found, indent=1))
    (Path(__file__).parent / "results" / "soak.json").write_text(json.dumps(found, indent=1) + "\n")
    leave(0)


def run_part(folder: Path, ranks: Ranks, steps: int, last: int, samples: list[tuple[float, int]]) -> None:
    """Go on to the step `last`, by an engine that takes its state from the newest checkpoint."""
    settings = {"max_steps": steps, "checkpoint_every": 50, "log_every": SAMPLE, "eval_batch_size": 512}
    config = parse_job(JOB | {"zero_optimization": {"stage": 2}, "train": settings})
    job = build_job(config, ranks)
    checkpoints = Checkpoints(folder / CHECKPOINTS, ranks)
    progress = checkpoints.load(job.engine)
    if progress is not None:
        job.state.start, job.state.measured = progress["step"], progress["measured"]
    reached = [job.state.start]
    job = replace(job, watch=watch(job, last, reached, samples))
    try:
        train(job, Tracker(config.tracking, {}, enabled=False), folder, checkpoints)
    except Interrupted as stopped:
        print(stopped, flush=True)
    assert reached[0] >= last
    job.engine.destroy()


def watch(job: Job, last: int, reached: list[int], samples: list[tuple[float, int]]) -> Watch:
    """Samples and evaluates now and then, and asks to stop at the end of the part."""

    def told(step: int, total: int, measures: Mapping[str, Any]) -> None:
        reached[0] = step
        samples.append((memory_mb(), len(os.listdir("/proc/self/fd"))))
        if step % EVALUATE == 0:
            evaluate(job.engine, job.task, job.config.train.eval_batch_size, job.ranks)

    return Watch(notify=told, asked=lambda: "the plan" if last <= reached[0] < job.total_steps else None)


def memory_mb() -> float:
    """What the process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 1e6


if __name__ == "__main__":
    main()
